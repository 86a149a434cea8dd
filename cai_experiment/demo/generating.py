"""The Generation tab: base and trained answers to one prompt, token by token, with the same random numbers."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.demo.checkpoints import Checkpoint
from cai_experiment.demo.markup import block, notice
from cai_experiment.demo.models import Arms, Models, Speaker
from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.observe.content_logger import ContentLogger

MOST_CHARACTERS = 20_000  # of a prompt: more than any context here holds with room to answer
MOST_TOKENS = 2_000  # of an answer
MOST_HEAT = 2.0
TURN_SECONDS = 0.5  # of speaking while others wait
KEY = "evaluation/demo/0"  # of the random numbers: BothArms.answer("demo", [prompt]) says the same
NO_CHECKPOINT = "No trained checkpoint is chosen: the base alone answers."
ENDS = {"stop": "ended by itself", "length": "cut at the length asked for"}


@dataclass(frozen=True, slots=True)
class Generated:
    """Both answers as far as they are spoken. `line` says how far, and at the end how they ended."""

    base: str
    trained: str
    base_html: str
    trained_html: str
    line: str


def generate(
    models: Models, log: ContentLogger, prompt: str, checkpoint: Checkpoint | None, temperature: float,
    max_tokens: int, seed: int,
) -> Generator[Generated, None, None]:  # fmt: skip
    """Speak with the base and, with a checkpoint, with the trained model; one item a token. Closing it stops at once.

    Raises BadInputError (an empty or overlong prompt, a temperature or length that cannot be used) and EngineError.
    """
    began = time.monotonic()
    asked = Prompt(KEY, ask_for_answer(_checked(prompt)), "answer", _sampling(temperature, max_tokens, seed))
    answers = {"base": _Answer(asked)} | ({} if checkpoint is None else {"trained": _Answer(asked)})
    models.growing.update(answers.values())
    try:
        while not all(answer.ended for answer in answers.values()):
            _step(models, checkpoint, answers)
            yield _generated(answers, "")
    finally:
        models.let_go([answer for answer in answers.values() if answer.holds])
    _log(log, prompt, checkpoint, answers)
    yield _generated(answers, f" · seed {seed} · {time.monotonic() - began:.1f} s")


def _step(models: Models, checkpoint: Checkpoint | None, answers: dict[str, _Answer]) -> None:
    """A token of each arm; more for the turn where others wait, since theirs may take seconds.

    Here and not in the generator, whose frame would hold the weights while it is suspended.
    """
    began = time.monotonic()
    with _speaker(models, checkpoint) as speaker:
        while True:
            for arm, answer in answers.items():
                answer.step(speaker.engine if isinstance(speaker, Speaker) else getattr(speaker, arm), speaker.name)
            all_ended = all(answer.ended for answer in answers.values())
            if all_ended or not models.wanted or time.monotonic() - began > TURN_SECONDS:
                return


def _speaker(models: Models, checkpoint: Checkpoint | None) -> AbstractContextManager[Arms | Speaker]:
    return models.alone() if checkpoint is None else models.arms(checkpoint)


# ---------------------------------------------------------------- what was asked


def _checked(prompt: str) -> str:
    if not prompt.strip():
        raise BadInputError("the prompt is empty", "write a question or a request")
    if len(prompt) > MOST_CHARACTERS:
        raise BadInputError(f"the prompt has {len(prompt):,} characters, and at most {MOST_CHARACTERS:,} are taken",
                            "shorten it")  # fmt: skip
    return prompt


def _sampling(temperature: float, max_tokens: int, seed: int) -> Sampling:
    if not (math.isfinite(temperature) and 0 <= temperature <= MOST_HEAT):
        raise BadInputError(f"temperature {temperature} is not between 0 and {MOST_HEAT:g}", "0.7 is usual")
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise BadInputError(f"a length of {max_tokens} tokens is not between 1 and {MOST_TOKENS:,}", "200 is usual")
    return Sampling(float(temperature), int(max_tokens), int(seed), KEY)


# ---------------------------------------------------------------- one arm


class _Answer:
    """One arm's answer as it grows. Each step may find another engine over the same model: the words are the same."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.said = Completion(prompt.id, "", "")
        self._engine: Any = None
        self._model = ""
        self._growing: Iterator[Completion] = iter(())

    @property
    def ended(self) -> bool:
        return bool(self.said.finish)

    @property
    def holds(self) -> bool:
        """True while an engine keeps a row for it."""
        return self._engine is not None

    def step(self, engine: Any, model: str) -> None:
        """One token more. Raises EngineError where no answer comes, or another model is loaded in its place."""
        if self.ended:
            return
        if engine is not self._engine:
            if self._model not in ("", model):
                raise EngineError(f"{self._model} was unloaded while it answered", "ask again")
            self.close()
            self._engine, self._model = engine, model
            self._growing = engine.grow(self.prompt) if hasattr(engine, "grow") else engine.stream([self.prompt])
        before = self.said.completion_tokens
        for said in self._growing:  # begun anew, it first says again what was said: randomness is keyed
            self.said = said
            if said.finish or said.completion_tokens > before:
                break
        if self.ended:
            self.close()
        if self.said.finish == "error":
            step = "shorten the prompt or the answer" if "do not fit in a context" in self.said.error else ""
            raise EngineError(f"no answer came: {self.said.error}", step)

    def close(self) -> None:
        """Stop it; its engine forgets the row. A further step would begin anew."""
        close = getattr(self._growing, "close", None)
        self._growing, self._engine = iter(()), None
        if close is not None:
            close()

    @property
    def line(self) -> str:
        """ "12 tokens", then how it ended."""
        end = ENDS.get(self.said.finish, "")
        return f"{self.said.completion_tokens} tokens{', ' if end else ''}{end}"


# ---------------------------------------------------------------- what is shown


def _generated(answers: dict[str, _Answer], more: str) -> Generated:
    texts = {arm: answer.said.text for arm, answer in answers.items()}
    trained = block(texts["trained"]) if "trained" in texts else notice(NO_CHECKPOINT, "note")
    line = "; ".join(f"{arm}: {answer.line}" for arm, answer in answers.items())
    return Generated(texts["base"], texts.get("trained", ""), block(texts["base"]), trained, f"{line}{more}")


def _log(log: ContentLogger, prompt: str, checkpoint: Checkpoint | None, answers: dict[str, _Answer]) -> None:
    texts = [answer.said.text for answer in answers.values()]
    sampling = next(iter(answers.values())).prompt.sampling
    facts = {"texts": [prompt, *texts], "temperature": sampling.temperature, "seed": sampling.seed}
    outputs = "\n\n".join(f'{arm.upper()} MODEL OUTPUT:\n"{text}"' for arm, text in zip(answers, texts, strict=True))
    told = f'Prompt: "{prompt}"\n\n{outputs}'
    if checkpoint is None:
        log.log_stage("GENERATION", told, facts)
        return
    facts["checkpoint"] = checkpoint.name
    log.log_stage("COMPARISON-TEST", told, facts)
    log.log_comparison("BASE", texts[0], "TRAINED", texts[1], {"checkpoint": checkpoint.name})
