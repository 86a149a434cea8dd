"""The chain as a plain script does it: one stage of every row, then the next. The prompts are the pipeline's own.

Imports no torch, so that distilabel's own environment can read it too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.milestones import MILESTONES
from cai_experiment.pipeline.instruct import Instruction, example_id
from cai_experiment.pipeline.stages import ExampleStages, StageSettings

Complete = Callable[[list[Prompt]], list[Completion]]


def instructions_for(rows: int, seed: int) -> tuple[Instruction, ...]:
    """`rows` questions of the shipped model's world, the same for every arm."""
    from cai_experiment.nano.world import held_out_questions

    texts = held_out_questions(rows, seed)
    return tuple(Instruction(example_id(i), text, "bench") for i, text in enumerate(texts))


def stage_settings(seed: int, principles: str = "targeted") -> StageSettings:
    """What milestone mvp puts every example through."""
    assert principles in ("targeted", "random")
    return StageSettings(MILESTONES["mvp"].rounds, principles, seed)  # type: ignore[arg-type]


def lockstep(
    instructions: Sequence[Instruction], settings: StageSettings, complete: Complete, stages: int | None = None
) -> int:
    """Take all rows through the chain (or its first `stages`), a stage of all at a time; gives the completion tokens.

    `complete` gets the prompts that all rows need next, in the rows' order, and gives their completions in any order.
    """
    principles = load_constitution().principles
    machines = [ExampleStages(row, principles, settings).steps() for row in instructions]
    asking = [(machine, next(machine)) for machine in machines]
    tokens = done = 0
    while asking and done != stages:
        completions = complete([prompt for _, prompts in asking for prompt in prompts])
        tokens += sum(completion.completion_tokens for completion in completions)
        found = {completion.id: completion for completion in completions}
        going_on = []
        for machine, prompts in asking:
            with suppress(StopIteration):
                going_on.append((machine, machine.send({prompt.id: found[prompt.id] for prompt in prompts})))
        asking, done = going_on, done + 1
    return tokens


def batches(prompts: Iterable[Prompt], size: int) -> Iterator[list[Prompt]]:
    """Prompts in the rows' order, `size` at a time, apart by what one call can do: same sampling, options or none."""
    groups: dict[tuple[bool, float, int], list[Prompt]] = {}
    for prompt in prompts:
        kind = (bool(prompt.options), prompt.sampling.temperature, prompt.sampling.max_tokens)
        groups.setdefault(kind, []).append(prompt)
    for group in groups.values():
        yield from (group[i : i + size] for i in range(0, len(group), size))
