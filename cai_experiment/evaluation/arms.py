"""The base model and the trained one, asked the same prompts with the same random numbers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, Sequence

from cai_experiment.constitution.prompts import Turn, ask_for_answer
from cai_experiment.engines.base import Completion, Engine, Prompt, Sampling
from cai_experiment.engines.render import Renderer
from cai_experiment.milestones import MAX_TOKENS_ANSWER, TEMPERATURE_ANSWER
from cai_experiment.observe.progress import Progress
from cai_experiment.records.files import make_folder
from cai_experiment.records.store import Journal


@dataclass(frozen=True, slots=True)
class BothAnswers:
    """One held-out instruction with the base model's answer and the trained model's."""

    instruction: str
    base: Completion
    trained: Completion

    @property
    def failed(self) -> bool:
        """True if either answer never came: the item then counts for neither."""
        return "error" in (self.base.finish, self.trained.finish)


class Remembered:
    """Completions of earlier calls, so that a killed evaluation goes on where it was: one line each, append-only.

    `whose` names the weights of both arms (the base's identity, the adapter's hash): those of others are not used.
    """

    def __init__(self, path: Path, whose: str) -> None:
        """Read what `path` holds. Raises BadInputError or DiskError if it cannot be read or written."""
        make_folder(path.parent)
        self.journal, self.whose = Journal(path), whose
        rows = self.journal.rows() if path.exists() else []
        self.found = {row["key"]: _completion(row["completion"]) for row in rows if row["whose"] == whose}

    def key(self, arm: str, prompt: Prompt) -> str:
        """What a completion depends on beside the weights: arm, conversation, sampling."""
        said = repr((arm, prompt.turns, prompt.speak_as, prompt.sampling, prompt.options, prompt.id))
        return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def keep(self, key: str, completion: Completion) -> None:
        """Write a completion down; one that failed is asked again by the next call."""
        if completion.finish != "error":
            row = completion.as_dict() | {"logprobs": list(completion.logprobs)}
            self.journal.append({"key": key, "whose": self.whose, "completion": row})
            self.found[key] = completion


class Remembering:
    """An engine whose completions are written down as they come, and not asked for again by a later call."""

    def __init__(self, engine: Any, remembered: Remembered, role: str) -> None:
        """`role` is its arm among what is remembered ("judge")."""
        self.engine, self.remembered, self.role = engine, remembered, role

    def __getattr__(self, name: str) -> Any:
        """Everything else is the engine's own."""
        return getattr(self.engine, name)

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`; what is remembered comes first."""
        keys: dict[str, str] = {}
        asked: list[Prompt] = []
        for prompt in prompts:
            if prompt is None:
                continue
            keys[prompt.id] = self.remembered.key(self.role, prompt)
            if (known := self.remembered.found.get(keys[prompt.id])) is not None:
                yield known
            else:
                asked.append(prompt)
        for completion in self.engine.stream(asked):
            self.remembered.keep(keys[completion.id], completion)
            yield completion


def _completion(row: dict[str, Any]) -> Completion:
    return Completion(**row | {"logprobs": tuple(row["logprobs"])})


class BothArms:
    """Speaks with the base model and with the trained one."""

    def __init__(
        self, engine: Engine, model: Any, seed: int, progress: Progress, remembered: Remembered | None = None
    ) -> None:
        """`engine` speaks through the PEFT `model`, whose adapter is switched off for the base."""
        self.engine, self.model, self.seed, self.progress = engine, model, seed, progress
        self.remembered = remembered

    def answer(
        self, name: str, questions: Sequence[str], max_tokens: int = MAX_TOKENS_ANSWER,
        temperature: float = TEMPERATURE_ANSWER,
    ) -> list[BothAnswers]:  # fmt: skip
        """Each question answered by both. `name` and the question's place key the randomness, which both share."""
        ids = [f"evaluation/{name}/{index}" for index in range(len(questions))]
        prompts = [
            Prompt(id, ask_for_answer(question), "answer", Sampling(temperature, max_tokens, self.seed, id))
            for id, question in zip(ids, questions, strict=True)
        ]
        return [BothAnswers(*three) for three in zip(questions, self.base(prompts), self.trained(prompts), strict=True)]

    def base(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """The base model's completions, in the order of `prompts`; one that never came has finish "error"."""
        with self.model.disable_adapter():
            return self._speak("base", prompts)

    def trained(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """The trained model's completions, likewise."""
        return self._speak("trained", prompts)

    def _speak(self, arm: str, prompts: Sequence[Prompt]) -> list[Completion]:
        found: dict[str, Completion] = {}
        keys: dict[str, str] = {}
        if self.remembered is not None:
            keys = {p.id: self.remembered.key(arm, p) for p in prompts}
            found = {id: self.remembered.found[key] for id, key in keys.items() if key in self.remembered.found}
            self.progress.update(self.progress.done + len(found), self.progress.tokens)
        for completion in self.engine.stream([p for p in prompts if p.id not in found]):
            found[completion.id] = completion
            if self.remembered is not None:
                self.remembered.keep(keys[completion.id], completion)
            self.progress.update(self.progress.done + 1, self.progress.tokens + completion.completion_tokens)
        return [found.get(p.id, Completion(p.id, "", "error", error="no answer came back")) for p in prompts]


EngineOver = Callable[[Any, Any, Renderer], Engine]


@dataclass(frozen=True, slots=True)
class Speakers:
    """Makes engines over one model in memory."""

    model: Any
    tokenizer: Any
    renderer: Renderer
    engine_over: EngineOver

    def bare(self) -> Engine:
        """An engine without worked examples: the prompt that training used."""
        return self.engine_over(self.model, self.tokenizer, BareRenderer(self.renderer))

    def full(self) -> Engine:
        """An engine with worked examples."""
        return self.engine_over(self.model, self.tokenizer, self.renderer)

    def base(self) -> AdapterOff:
        """The base model as a judge: with worked examples, without the adapter."""
        return AdapterOff(self.full(), self.model)


class AdapterOff:
    """An engine over a PEFT model that speaks with the adapter switched off; the model stays its owner's."""

    def __init__(self, engine: Engine, model: Any) -> None:
        self.engine, self.model = engine, model
        self.name, self.first_line = engine.name, engine.first_line

    def describe(self) -> dict[str, object]:
        """What the engine says of itself."""
        return self.engine.describe()

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`. The adapter is on again between two completions."""
        completions = self.engine.stream(prompts)
        while True:
            with self.model.disable_adapter():
                completion = next(completions, None)
            if completion is None:
                return
            yield completion

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
        """See `base.Engine.choose`."""
        with self.model.disable_adapter():
            return self.engine.choose(prompts, options)

    def close(self) -> None:
        """Nothing: the weights serve both arms."""


def transformers_engine(model: Any, tokenizer: Any, renderer: Renderer) -> Engine:
    """The transformers engine over a model in memory."""
    from cai_experiment.engines.hf import HFEngine

    return HFEngine.from_model(model, tokenizer, renderer)


class BareRenderer(Renderer):
    """A renderer without worked examples, whatever is asked of it."""

    def __init__(self, renderer: Renderer) -> None:
        self.__dict__.update(renderer.__dict__)

    def prompt_ids(
        self, turns: Sequence[Turn], speak_as: str, examples: int | None = None, max_tokens: int = 0
    ) -> list[int]:
        """As the renderer's own, with no examples."""
        return super().prompt_ids(turns, speak_as, 0, max_tokens)
