"""Several processes, as `accelerate launch` starts them: one writes and speaks, all stop after the same step.

Rank and number are read from the environment, so that nothing heavy is imported where there is one process alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from cai_experiment.errors import BadInputError


def count() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    """True in the one that writes files and speaks to the user."""
    return rank() == 0


def start() -> None:
    """Join the others, on this process's own GPU (nccl) or on the CPU (gloo); only the first speaks from now on."""
    if count() == 1:
        return
    import torch
    from accelerate import PartialState

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:  # accelerate would say cpu:0, which torch.load does not know
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState(cpu=not torch.cuda.is_available())
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends


def only_one(what: str) -> BadInputError:
    """The error for something that several processes cannot do."""
    return BadInputError(f"{what} trains in one process", "use --backend fast, or trl, with several")


def wait() -> None:
    """Return once every process has come here."""
    if count() > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()


@contextmanager
def first_goes_ahead() -> Iterator[None]:
    """Within it the first process is alone; the others enter when it has left, and find what it has written."""
    if not is_first():
        wait()
    try:
        yield
    finally:
        if is_first():
            wait()


def of_all(mine: Any) -> list[Any]:
    """What every process passes here, by rank. All must call it."""
    if count() == 1:
        return [mine]
    from accelerate.utils import gather_object

    found: list[Any] = gather_object([mine])
    return found


def is_sharded() -> bool:
    """True if accelerate shards the weights (FSDP) instead of copying them (DDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
