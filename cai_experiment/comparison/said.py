"""What every model has said so far, by its weights and by the prompt, so that a killed comparison goes on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.evaluation.arms import Remembered
from cai_experiment.evaluation.reporting.naming import file_name
from cai_experiment.pipeline.stages import exceeds_context

ROLE = "compared"  # what is remembered under; detection and the judge have roles of their own


class Said:
    """The completions of all models: one append-only file each in `folder`.

    A model is known from `meet` on, which says whose words count (`identity` of its engine). A completion that failed
    is kept for this process alone, and asked again by the next call.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.of: dict[str, Remembered] = {}
        self.failed: dict[tuple[str, str], Completion] = {}

    def meet(self, model: str, whose: str) -> Remembered:
        """What `model`, with those weights, has said; read once."""
        if model not in self.of:
            self.of[model] = Remembered(self.folder / f"{file_name(model)}.jsonl", whose)
        return self.of[model]

    def key(self, model: str, prompt: Prompt) -> str:
        """What a completion depends on beside the weights."""
        return self.of[model].key(ROLE, prompt)

    def get(self, model: str, prompt: Prompt) -> Completion | None:
        """What the model said to the prompt; None if nothing yet."""
        if model not in self.of:
            return None
        key = self.key(model, prompt)
        return self.of[model].found.get(key) or self.failed.get((model, key))

    def keep(self, model: str, key: str, completion: Completion) -> None:
        """Write a completion down."""
        self.of[model].keep(key, completion)
        if completion.finish == "error":
            self.failed[model, key] = completion

    def close(self) -> None:
        """Close the files."""
        for one in self.of.values():
            one.journal.close()


class Silent:
    """An engine that says nothing: with `Remembering` it replays what is known. `asked` counts what is not."""

    name, first_line, can_weigh = "silent", "", True

    def __init__(self) -> None:
        self.asked = 0

    def describe(self) -> Mapping[str, object]:
        """Nothing."""
        return {}

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """No completions."""
        self.asked += sum(prompt is not None for prompt in prompts)
        return iter(())


class Counted:
    """An engine whose failures are counted: those that another try may mend, not prompts that are too long."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.failed = engine, 0

    def __getattr__(self, name: str) -> Any:
        """Everything else is the engine's own."""
        return getattr(self.engine, name)

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`."""
        for done in self.engine.stream(prompts):
            self.failed += done.finish == "error" and not exceeds_context(done)
            yield done
