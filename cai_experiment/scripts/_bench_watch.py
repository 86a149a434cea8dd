"""What is counted inside an engine while it works: prompts, completions, passes, slots at work. No clock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.scripts._bench_figures import Occupancy, prefix_tree_size


class Recorded:
    """An engine that keeps every prompt and completion that passes through it."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.name, self.first_line = engine, engine.name, engine.first_line
        self.renderer, self.width = engine.renderer, getattr(engine, "width", 0)
        self.elsewhere = getattr(engine, "elsewhere", False)
        self.prompts: list[Prompt] = []
        self.completions: list[Completion] = []

    def describe(self) -> dict[str, object]:
        """The engine's own."""
        return self.engine.describe()

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """As the engine does it."""
        with closing(self.engine.stream(self._noted(prompts))) as completions:
            for completion in completions:
                self.completions.append(completion)
                yield completion

    def _noted(self, prompts: Iterable[Prompt | None]) -> Iterator[Prompt | None]:
        for prompt in prompts:
            if prompt is not None:
                self.prompts.append(prompt)
            yield prompt


@dataclass(slots=True)
class Passes:
    """What the passes of HFEngine's loop did."""

    occupancy: Occupancy = field(default_factory=Occupancy)
    cached_tokens_read: int = 0  # keys and values of the conversations at work, each once a pass, summed over passes


@contextmanager
def watched_passes() -> Iterator[Passes]:
    """Counts every pass of every HFEngine while the block lasts.

    A row is a conversation, which wants one slot: one that speaks or waits to, or one that is to be weighed, however
    many verdicts branch off it. Where the engine takes no more prompts there are as many rows as slots.
    """
    from cai_experiment.engines.loop import Loop

    step, seen = Loop.step, Passes()

    def watched(loop: Loop) -> list[Completion]:
        rows = len(loop.requests) + len(loop.speaking) + len(loop.groups)
        at_hand = max(rows, loop.slots.count) if loop.room <= 0 else rows
        done = step(loop)
        slots = loop.slots
        seen.occupancy.add(at_hand, len(loop.speaking) + len(loop.groups), loop.at_work, slots.count)
        seen.cached_tokens_read += int(slots.ready[slots.active].sum()) + tokens_read(done)
        return done

    Loop.step = watched  # type: ignore[method-assign, assignment]
    try:
        yield seen
    finally:
        Loop.step = step  # type: ignore[method-assign]


def tokens_read(done: Sequence[Completion]) -> int:
    """Keys and values, in tokens, that what ended with a pass had to read: an example's verdicts share theirs."""
    weighed: dict[str, int] = {}
    for one in done:
        if one.logprobs:
            example = one.id.partition("/")[0]
            weighed[example] = max(one.prompt_tokens, weighed.get(example, 0))
    return sum(weighed.values()) + sum(one.prompt_tokens + one.completion_tokens for one in done if not one.logprobs)


def fewest_passes(completions: Sequence[Completion], slots: int) -> Passes:
    """What an engine that cannot be watched read at least: all `slots` at work in each pass, and each token that is
    spoken reads the keys and values before it. Those of verdicts are left out: many may have shared one reading."""
    spoken = sum(c.completion_tokens for c in completions)
    read = sum(
        c.completion_tokens * c.prompt_tokens + c.completion_tokens * (c.completion_tokens - 1) // 2
        for c in completions
    )
    return Passes(Occupancy(passes=math.ceil(spoken / slots)), read)


def computed_over_tree(recorded: Recorded) -> tuple[float, dict[str, float]]:
    """(prompt tokens computed / distinct prefix-tree tokens of all prompts, its arms).

    A completion enters the next prompt, and its keys and values are there already, so a run can stay below 1. The
    stricter `not_spoken` counts only those tree tokens that the model did not speak itself just before.
    """
    renderer = recorded.renderer
    failed = {c.id for c in recorded.completions if c.finish == "error"}
    sound = {p.id: p for p in recorded.prompts if p.id not in failed}
    limits = {id: 1 if p.options else p.sampling.max_tokens for id, p in sound.items()}
    rows = {id: renderer.prompt_ids(p.turns, p.speak_as, max_tokens=limits[id]) for id, p in sound.items()}
    spoken = [(c.id, list(renderer.encode(c.text.strip(), False))) for c in recorded.completions if c.text]
    tree = prefix_tree_size(list(rows.values()))
    grown = prefix_tree_size([*rows.values(), *(rows[id] + text for id, text in spoken)])
    not_spoken = grown - sum(len(text) for _, text in spoken)  # spoken paths are disjoint: no prompt is asked twice
    computed = sum(completion.computed_tokens for completion in recorded.completions)
    return computed / tree, {
        "computed_prompt_tokens": computed, "prefix_tree_tokens": tree, "prefix_tree_tokens_not_spoken": not_spoken,
    }  # fmt: skip
