"""How many threads a small computation on the CPU gets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(on: bool) -> Iterator[None]:
    """With `on`, torch's CPU operations in here use one thread: shared out, tiny ones mostly wait for one another."""
    before = torch.get_num_threads()
    if on:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if on:
            torch.set_num_threads(before)
