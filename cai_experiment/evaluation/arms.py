"""The base model and the trained one, asked the same prompts with the same random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Sequence

from cai_experiment.constitution.prompts import Turn, ask_for_answer
from cai_experiment.engines.base import Completion, Engine, Prompt, Sampling
from cai_experiment.engines.render import Renderer
from cai_experiment.milestones import MAX_TOKENS_ANSWER, TEMPERATURE_ANSWER
from cai_experiment.observe.progress import Progress


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


class BothArms:
    """Speaks with the base model and with the trained one."""

    def __init__(self, engine: Engine, model: Any, seed: int, progress: Progress) -> None:
        """`engine` speaks through the PEFT `model`, whose adapter is switched off for the base."""
        self.engine, self.model, self.seed, self.progress = engine, model, seed, progress

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
            return self._speak(prompts)

    def trained(self, prompts: Sequence[Prompt]) -> list[Completion]:
        """The trained model's completions, likewise."""
        return self._speak(prompts)

    def _speak(self, prompts: Sequence[Prompt]) -> list[Completion]:
        found: dict[str, Completion] = {}
        for completion in self.engine.stream(prompts):
            found[completion.id] = completion
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
        """An engine with worked examples, as the judge needs them."""
        return self.engine_over(self.model, self.tokenizer, self.renderer)


def transformers_engine(model: Any, tokenizer: Any, renderer: Renderer) -> Engine:
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
