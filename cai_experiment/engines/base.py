"""The seam between the pipeline and whatever speaks: `stream` prompts into completions, `choose` between options.

This file is the architecture of the engines; it imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterable, Iterator, Protocol, Sequence

from cai_experiment.constitution.prompts import Turn


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one completion is drawn. Randomness is keyed by (seed, key, token position), never by batch or arrival."""

    temperature: float = 0.7  # 0 is greedy
    max_tokens: int = 500
    seed: int = 0
    key: str = ""  # example id, stage and round, e.g. "000012/answer/0"; empty: the prompt's id


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request. `turns` is the conversation so far; the model speaks the next turn, of kind `speak_as`."""

    id: str
    turns: tuple[Turn, ...]
    speak_as: str
    sampling: Sampling = field(default_factory=Sampling)
    options: tuple[str, ...] = ()  # not empty: do not speak, weigh these as the next turn's first token


@dataclass(frozen=True, slots=True)
class Completion:
    """What came back. `finish`: "stop" (ended by itself), "length" (hit max_tokens), "error" (see `error`); while
    it grows "" (see `Engine`).

    `final` says of an error why asking again is of no use: "prompt" (the prompt's own fault, such as a refusal; it says
    nothing of the engine), "attempts" (the engine has tried as often as it should). Empty: another attempt may do.
    `prompt_tokens` counts the whole prompt, `computed_tokens` the prompt tokens that no cache held. For a prompt with
    options, `logprobs` holds one natural-log probability per option, in their order, and `text` is empty.
    """

    id: str
    text: str
    finish: str
    prompt_tokens: int = 0
    computed_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    logprobs: tuple[float, ...] = ()
    final: str = ""  # "prompt" | "attempts"

    def as_dict(self) -> dict[str, Any]:
        """Its line in the journal. (`dataclasses.asdict` copies deeply, and takes a twentieth of the runner's time.)"""
        return {name: getattr(self, name) for name in self.__slots__}


class Engine(Protocol):
    """Anything that speaks.

    An engine may also have `width`, how many prompts it wants at a time, `elsewhere`, True where it computes in
    another process, so that a thread may wait for it, and `grow`, which gives one completion token by token.
    """

    name: str
    first_line: str  # model, engine, quantisation and why, for the terminal

    def describe(self) -> dict[str, object]:
        """What the manifest records: model, revision or weights hash, engine, dtype, quantisation, probe result."""
        ...

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """Take prompts lazily, give completions back in any order, each with its prompt's id.

        The runner feeds an example's next stage after its last completion was consumed: the iterator yields None for
        "nothing right now, but more will come", and ends when all work is done. A prompt that fails comes back
        with finish="error"; it never stops the others.
        """
        ...

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
        """Natural-log probability of each option as the next turn's first token; one row per prompt, in order."""
        ...

    def close(self) -> None:
        """Give memory back."""
        ...
