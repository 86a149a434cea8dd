"""Where a base model's turn ends in an investigation: at a full heading of ours, not at any "###" of its Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from cai_experiment.constitution.prompts import INVESTIGATION_STOPS


@contextmanager
def whole_replies(engine: Any) -> Iterator[None]:
    """Within it the engine's base layout ends a turn at INVESTIGATION_STOPS; the chat layout is as it was."""
    own = getattr(engine, "renderer", None)
    if own is None or own.layout != "base":
        yield
        return
    from cai_experiment.engines.stops import StopRule

    engine.renderer = copy(own)
    engine.renderer.stop_strings = INVESTIGATION_STOPS
    engine.renderer.stops = StopRule(own.tokenizer, own.stop_token_ids, INVESTIGATION_STOPS)
    try:
        yield
    finally:
        engine.renderer = own
