"""Harm by model: a verdict on each of the four axes, with a short reason; the rules speak where it cannot be read.

    found = ModelDetector(Judge(engine, "qwen2.5-7b"), load_rules()).detect_all(texts)
    found[0].axes      # ("truthfulness",)
    found[0].score     # 1.5, of at most 5.5
    found[0].reasons   # {"truthfulness": "The text says ..."}
    found[0].method    # "AI (qwen2.5-7b)", or "rules (AI output unreadable)"

A verdict weighs two lettered options in both orders (judging.judge). Orders that disagree are "undecided": the axis is
not flagged, and counted. `BothDetector` flags what the model or the rules flag.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from cai_experiment.constitution.principles import AXIS_WEIGHTS
from cai_experiment.constitution.prompts import Turn, ask_harm, ask_harm_reason
from cai_experiment.engines.base import Prompt, Sampling
from cai_experiment.evaluation.harm_rules import METHOD as RULES
from cai_experiment.evaluation.harm_rules import Detection, Rules, load_rules
from cai_experiment.judging.judge import LETTERS, NO_FIRST, YES_FIRST, Judge, PromptPair, Verdict
from cai_experiment.observe.progress import Progress

UNREADABLE = "rules (AI output unreadable)"
MAX_TOKENS_REASON = 60
QUESTIONS_A_TEXT, REASONS_A_TEXT = 2 * len(AXIS_WEIGHTS), len(AXIS_WEIGHTS)  # two orders; at most, if all are flagged
TEXTS_AT_A_TIME = 64  # 512 verdict prompts: more than any engine's slots, and the progress still moves


@dataclass(frozen=True, slots=True)
class ModelDetection(Detection):
    """What a model found. `verdicts` has every axis ("yes", "no", "undecided", "unparsed"), `reasons` the flagged ones.

    If a verdict is unparsed, axes, score and spans are those of the rules, and `method` and `why` say so.
    """

    verdicts: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    why: str = ""  # what came instead of a verdict

    @property
    def unreadable(self) -> bool:
        """True if the model's output could not be read on some axis."""
        return "unparsed" in self.verdicts.values()

    @property
    def undecided(self) -> tuple[str, ...]:
        """The axes on which the two orders disagree."""
        return tuple(axis for axis, answer in self.verdicts.items() if answer == "undecided")

    def to_json(self) -> dict[str, Any]:
        """The detection as a row of a file."""
        found = Detection.to_json(self)
        said = {"verdicts": dict(self.verdicts), "reasons": dict(self.reasons)}
        return found | said | ({"why": self.why} if self.why else {})


class Detector(Protocol):
    """Anything that detects harm. `method` is what its detections say of themselves."""

    @property
    def name(self) -> str: ...
    @property
    def method(self) -> str: ...

    def detect_all(self, texts: Sequence[str], progress: Progress | None = None) -> Sequence[Detection]:
        """One detection for each text, in their order; `progress` counts texts."""
        ...


class RulesDetector:
    """The rules alone."""

    name = method = RULES

    def __init__(self, rules: Rules | None = None) -> None:
        """`rules` None: the shipped ones."""
        self.rules = rules or load_rules()

    def detect_all(self, texts: Sequence[str], progress: Progress | None = None) -> list[Detection]:
        """See `Detector.detect_all`."""
        return [self.rules.detect(text) for text in texts]


class ModelDetector:
    """A model that is asked; the rules stand in where its output cannot be read."""

    def __init__(self, judge: Judge, rules: Rules | None = None, reasons: bool = True) -> None:
        """`rules` None: the shipped ones. `reasons` False saves a generation for each flagged axis."""
        self.judge, self.rules, self.reasons = judge, rules or load_rules(), reasons
        self.name, self.method = judge.name, f"AI ({judge.name})"

    def detect_all(self, texts: Sequence[str], progress: Progress | None = None) -> list[ModelDetection]:
        """See `Detector.detect_all`. Raises EngineError for what no question gets past, such as a refused key."""
        found: list[ModelDetection] = []
        for start in range(0, len(texts), TEXTS_AT_A_TIME):
            found += self._detect(dict(enumerate(texts[start : start + TEXTS_AT_A_TIME], start)))
            if progress is not None:
                progress.update(len(found))
        return found

    def _detect(self, texts: Mapping[int, str]) -> Iterator[ModelDetection]:
        """The detections of texts with their places, which name the prompts."""
        places = [(place, axis) for place in texts for axis in AXIS_WEIGHTS]
        asked = [_ask(f"harm/{place}/{axis}", texts[place], axis) for place, axis in places]
        verdicts = dict(zip(places, self.judge.verdicts(asked), strict=True))
        read = {p for p in texts if all(verdicts[p, axis].answer != "unparsed" for axis in AXIS_WEIGHTS)}
        flagged = [key for key, verdict in verdicts.items() if verdict.answer == "yes" and key[0] in read]
        reasons = self._reasons(texts, flagged) if self.reasons else {}
        for place, text in texts.items():
            said = {axis: verdicts[place, axis] for axis in AXIS_WEIGHTS}
            why = {axis: reasons[place, axis] for axis in AXIS_WEIGHTS if (place, axis) in reasons}
            yield self._found(text, said, why)

    def _found(self, text: str, verdicts: Mapping[str, Verdict], reasons: Mapping[str, str]) -> ModelDetection:
        said: dict[str, str] = {axis: verdict.answer for axis, verdict in verdicts.items()}
        unread = [verdict.why for verdict in verdicts.values() if verdict.answer == "unparsed"]
        if unread:
            instead = self.rules.detect(text)
            return ModelDetection(instead.axes, instead.score, instead.spans, UNREADABLE, said, why=unread[0])
        axes = tuple(axis for axis, answer in said.items() if answer == "yes")
        return ModelDetection(axes, score_of(axes), (), self.method, said, reasons)

    def _reasons(self, texts: Mapping[int, str], flagged: Sequence[tuple[int, str]]) -> dict[tuple[int, str], str]:
        """A reason for each flagged (place, axis); one that did not come is left out."""
        prompts = {f"harm/{place}/{axis}/reason": (place, axis) for place, axis in flagged}
        asked = [_ask_reason(id, texts[place], axis) for id, (place, axis) in prompts.items()]
        said: dict[tuple[int, str], str] = {}
        for done in self.judge.engine.stream(asked):
            first_line = done.text.strip().partition("\n")[0].strip()
            if done.finish != "error" and first_line:
                said[prompts[done.id]] = first_line
        return said


class BothDetector:
    """The model with the rules: an axis is flagged if either flags it."""

    def __init__(self, model: ModelDetector) -> None:
        """The rules are the model's own."""
        self.model = model
        self.name, self.method = both_name(model.name), f"{model.method} and rules"

    def detect_all(self, texts: Sequence[str], progress: Progress | None = None) -> list[ModelDetection]:
        """See `Detector.detect_all`."""
        found = self.model.detect_all(texts, progress)
        return [both(one, self.model.rules.detect(text)) for one, text in zip(found, texts, strict=True)]


def both(model: ModelDetection, rules: Detection) -> ModelDetection:
    """What either flags, with the rules' spans; if the model could not be read, the rules alone have spoken already."""
    if model.unreadable:
        return model
    axes = tuple(axis for axis in AXIS_WEIGHTS if axis in model.axes or axis in rules.axes)
    return replace(model, axes=axes, score=score_of(axes), spans=rules.spans, method=f"{model.method} and rules")


def both_name(name: str) -> str:
    """What a model with the rules is called in a table."""
    return f"{name} with rules"


def score_of(axes: Sequence[str]) -> float:
    """The weighted score: the sum of the axes' weights, at most 5.5."""
    return sum(AXIS_WEIGHTS[axis] for axis in axes)


def _ask(id: str, text: str, axis: str) -> PromptPair:
    turns = ask_harm(text, axis, yes_first=True), ask_harm(text, axis, yes_first=False)
    ids, one_letter = (f"{id}/{YES_FIRST}", f"{id}/{NO_FIRST}"), Sampling(temperature=0.0, max_tokens=1)
    first, second = (Prompt(i, t, "verdict", one_letter, LETTERS) for i, t in zip(ids, turns, strict=True))
    return first, second


def _ask_reason(id: str, text: str, axis: str) -> Prompt:
    turns = (*ask_harm(text, axis), Turn("verdict", "A"), ask_harm_reason())
    return Prompt(id, turns, "critique", Sampling(temperature=0.0, max_tokens=MAX_TOKENS_REASON))
