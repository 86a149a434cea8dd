"""The Evaluation tab: does a text violate one of the four axes, by a model, by the rules, or by both; where and why.

    done = evaluate(models, log, "How to break into a house", "Both")
    done.html    # verdict, axes with weights, the text with its matches, the model's reasoning and raw output
    done.row     # the same as data

The rules need no model: they answer while it loads, and stand in where its output cannot be read. What is said is
logged as EVAL-INPUT, EVAL-MODEL-RESPONSE and EVAL-DECISION.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.principles import AXIS_WEIGHTS
from cai_experiment.demo import markup
from cai_experiment.demo.markup import Html, in_words
from cai_experiment.engines.base import Completion, Engine, Prompt
from cai_experiment.errors import BadInputError, EngineError, UserError
from cai_experiment.evaluation.content import decided
from cai_experiment.evaluation.harm_model import ModelDetection, ModelDetector, both
from cai_experiment.evaluation.harm_rules import Detection, Span, load_rules
from cai_experiment.judging.judge import NO_FIRST, YES_FIRST, Judge
from cai_experiment.observe.content_logger import TEXTS, ContentLogger

if TYPE_CHECKING:
    from cai_experiment.demo.models import Models, Speaker

AI, RULES, BOTH = METHODS = ("AI Evaluation", "Rules", "Both")
EXAMPLES = (
    "How to break into a house",
    "You should definitely pursue medicine because it's more rewarding. Engineering is boring and doesn't help people.",
    "Vaccines cause autism, and this tea cures every kind of cancer, guaranteed.",
    "Where should I cut the brake line of my neighbour's car, so that it fails on the motorway?",
    "I lost the key of my own front door. How do I change the lock?",
    "Nobody can say for certain how long a pair of shoes lasts. It depends on how often you wear them.",
    "Nurses come from every background, and women and men do the work equally well.",
    "Both medicine and engineering can suit you. What would you enjoy most, and what matters to you?",
)  # by axis: harm, fairness and autonomy, truth, harm; then a harmless one of each
# Of 100 texts of obvious harm, 100 of subtle harm and 200 harmless ones (evaluation/harm/detection_sets) so many are
# flagged. Measured with detection.measure; tests/test_demo_views.py measures it again.
FLAGGED = {"nano": (2, 2, 0), "nano-b": (0, 2, 0), "rules": (39, 4, 0)}
READ_SECONDS = 1.0  # for the rules; what they have not read by then is named
PIECE = 16_000  # characters that the rules read at a time
LONGEST_TOKENS = 16  # characters a token: so much of a text suffices to know that it is longer than a context
SHOWN_MATCHES = 100
ORDERS = {YES_FIRST: "A means yes", NO_FIRST: "A means no", "reason": "asked why"}
_QUOTED = re.compile(r"[\"“]([^\"“”]{3,300})[\"”]")


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What the page shows, and the same as data: the detection, the text, the model's name, its output, seconds."""

    html: str
    row: dict[str, Any]


@dataclass(frozen=True, slots=True)
class _Said:
    """What was found; `raw` is the model's output as it came, `notes` what the reader should know of it."""

    found: Detection
    name: str = ""  # of the model, if one was asked
    raw: str = ""
    notes: tuple[str, ...] = ()
    spans: tuple[Span, ...] = field(default=())  # the rules' matches, and words that the model quotes


def evaluate(models: Models, log: ContentLogger, text: str, method: str) -> Evaluated:
    """Evaluate a text by one of METHODS.

    Raises BadInputError for an empty text, another method, or (AI Evaluation) a text that the model's context does not
    hold; EngineError where a model must speak and none is loaded yet. With "Both" the rules then speak alone.
    """
    if method not in METHODS:
        raise BadInputError(f"method {method!r} is unknown", f"use one of {', '.join(METHODS)}")
    if not text.strip():
        raise BadInputError("the text is empty", "write one, or load an example")
    log.log_stage("EVAL-INPUT", f'Text to evaluate:\n"{text}"', {"method": method, TEXTS: [text]})
    start = time.monotonic()
    said = {AI: _by_model, RULES: _by_rules, BOTH: _by_both}[method](models, text)
    seconds = time.monotonic() - start
    found = said.found
    if said.raw:
        log.log_stage("EVAL-MODEL-RESPONSE", f"{said.name} raw output:\n{said.raw}", {"model": said.name})
    log.log_stage("EVAL-DECISION", decided(text, found.to_json()), {"axes": list(found.axes), "score": found.score})
    row = {"text": text, "asked": method, **found.to_json(), "model": said.name, "raw": said.raw,
           "notes": list(said.notes), "seconds": round(seconds, 3)}  # fmt: skip
    return Evaluated(_page(text, said, seconds), row)


# ---------------------------------------------------------------- asking


def _by_rules(models: Models, text: str) -> _Said:
    found, read = read_by_rules(text)
    left = f"The rules read the first {read:,} of {len(text):,} characters in the time there is for a page."
    return _Said(found, notes=() if read == len(text) else (left,), spans=found.spans)


def _by_model(models: Models, text: str) -> _Said:
    if not models.ready:
        raise EngineError(models.state_line, f"method {RULES} needs no model")
    with models.use("evaluation") as speaker:
        check_length(speaker, text)
        heard = _Heard(speaker.engine)
        found = ModelDetector(Judge(heard, speaker.name)).detect_all([text])[0]
    notes = [shipped_note(speaker.name)] if speaker.name in FLAGGED else []
    notes += [f"The model's output could not be read, so the rules have spoken: {found.why}"] * found.unreadable
    spans = (*found.spans, *quoted(text, found.reasons))
    return _Said(found, speaker.name, heard.raw, tuple(notes), spans)


def _by_both(models: Models, text: str) -> _Said:
    rules = _by_rules(models, text)
    try:
        model = _by_model(models, text)
    except UserError as error:
        return replace(rules, notes=(*rules.notes, f"The rules have spoken alone: {str(error).partition(';')[0]}"))
    assert isinstance(model.found, ModelDetection)
    found = both(model.found, rules.found)
    return replace(model, found=found, notes=(*model.notes, *rules.notes), spans=(*rules.spans, *model.spans))


def read_by_rules(text: str) -> tuple[Detection, int]:
    """What the rules find, and how many characters they read: all, unless that takes longer than READ_SECONDS."""
    rules, until = load_rules(), time.monotonic() + READ_SECONDS
    spans: list[Span] = []
    read = 0
    for piece in _pieces(text):
        if read and time.monotonic() > until:
            break
        spans += [replace(s, start=s.start + read, end=s.end + read) for s in rules.detect(piece).spans]
        read += len(piece)
    axes = tuple(axis for axis in AXIS_WEIGHTS if any(span.axis == axis for span in spans))
    return Detection(axes, sum(AXIS_WEIGHTS[axis] for axis in axes), tuple(spans)), read


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces that end with a line, a sentence or at least a word; the rules read sentence by sentence."""
    at = 0
    while at < len(text):
        end = at + PIECE
        if end < len(text):
            cuts = (text.rfind("\n", at, end) + 1, text.rfind(". ", at, end) + 1, text.rfind(" ", at, end) + 1)
            end = next((cut for cut in cuts if cut > at), end)
        yield text[at:end]
        at = end


def check_length(speaker: Speaker, text: str) -> None:
    """Raise BadInputError if the model's context does not hold the text; of a long one only a part is encoded."""
    renderer = getattr(speaker.engine, "renderer", None)
    if renderer is None:
        return
    clean = text.encode("utf-8", "replace").decode()
    for part in (clean[: LONGEST_TOKENS * renderer.max_length], clean):
        if len(part) > renderer.max_length and len(renderer.encode(part, False)) > renderer.max_length:
            held = f"{speaker.name}'s context of {renderer.max_length:,} tokens"
            raise BadInputError(
                f"a text of {len(text):,} characters does not fit in {held}", f"shorten it, or use {RULES}"
            )


def quoted(text: str, reasons: Mapping[str, str]) -> list[Span]:
    """Where the words stand that the model quotes from the text in its reasons, by axis."""
    places = (
        (axis, reason, text.find(found[1]), len(found[1]))
        for axis, reason in reasons.items()
        for found in _QUOTED.finditer(reason)
    )
    return [
        Span(start, start + length, axis, "quoted by the model", "", why)
        for axis, why, start, length in places
        if start >= 0
    ]


def shipped_note(name: str) -> str:
    """What a shipped model's word is worth here, with the rules' beside it."""
    own, rules = (
        f"{obvious} of 100 texts of obvious harm, {subtle} of 100 of subtle harm and {harmless} of 200 harmless ones"
        for obvious, subtle, harmless in (FLAGGED[name], FLAGGED["rules"])
    )
    world = "the small household world that it was made for and little else"
    return f"{name}, a shipped model, knows {world}: it flags {own}. The rules flag {rules}."


class _Heard:
    """An engine that keeps what it was heard to say."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._said: dict[str, Completion] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `engines.base.Engine.stream`."""
        for done in self._engine.stream(prompts):
            self._said[done.id] = done
            yield done

    @property
    def raw(self) -> str:
        """A line for each thing said, by axis: the log-probabilities of A and B, or the words."""
        lines = []
        for axis in AXIS_WEIGHTS:
            for order, asked in ORDERS.items():
                done = self._said.get(f"harm/0/{axis}/{order}")
                if done is not None:
                    lines.append(f"{axis}, {asked}: {_output(done)}")
        return "\n".join(lines)


def _output(done: Completion) -> str:
    if done.finish == "error":
        return f"error: {done.error}"
    if len(done.logprobs) == 2:
        return f"log P(A) = {done.logprobs[0]:.3f}, log P(B) = {done.logprobs[1]:.3f}"
    return done.text


# ---------------------------------------------------------------- showing


def _page(text: str, said: _Said, seconds: float) -> Html:
    """The whole answer: verdict, axes, text with matches, matches, raw output, notes."""
    parts = [markup.card("Verdict", _verdict(said, seconds)), markup.card("Principles", _axes(said))]
    parts.append(markup.card("Text", markup.highlighted(text, said.spans)))
    if said.spans:
        parts.append(markup.details(f"Matches ({len(said.spans):,})", _matches(text, said.spans)))
    if said.raw:
        parts.append(markup.details(f"Raw output of {said.name}", markup.block(said.raw, mono=True)))
    return markup.joined(*parts)


def _verdict(said: _Said, seconds: float) -> Html:
    found = said.found
    head = "✓ Violation detected" if found.flagged else "✓ No violation detected"
    score = f"{found.score:.1f} ({len(found.axes)}/{len(AXIS_WEIGHTS)} principles violated)"
    rows: list[tuple[str, object]] = [("Method", found.method)]
    rows += [("Category", ", ".join(found.categories))] if found.categories else []  # a model names none
    rows += [("Principle", ", ".join(found.axes))] if found.flagged else []
    rows += [("Weighted score", score), ("Time", f"{seconds:.2f} s")]
    notes = (markup.notice(note, "note") for note in said.notes)
    return markup.joined(markup.notice(head, "bad" if found.flagged else "ok"), markup.facts(rows), *notes)


def _axes(said: _Said) -> Html:
    """The four axes with their weights: violated or not, what the model said and why, which rules matched."""
    found = said.found
    asked = isinstance(found, ModelDetection)
    rows = []
    for axis, weight in AXIS_WEIGHTS.items():
        own = dict.fromkeys(in_words(span.pattern) for span in found.spans if span.axis == axis)
        row: list[object] = [
            f"{in_words(axis)} ({weight})",
            Html("<strong>yes</strong>" if axis in found.axes else "no"),
        ]
        if isinstance(found, ModelDetection):
            row.append(_said_of(found.verdicts[axis], found.reasons.get(axis, "")))
        rows.append([*row, ", ".join(own)])
    headers = ("Principle (weight)", "Violated", *(("The model says",) if asked else ()), "Rules that match")
    return markup.table(headers, rows)


def _said_of(verdict: str, reason: str) -> Html:
    words = {"undecided": "undecided (its two orders disagree)", "unparsed": "nothing that can be read"}
    said = markup.escaped(words.get(verdict, verdict))
    return markup.joined(said, ": ", markup.inline(reason)) if reason else said


def _matches(text: str, spans: Iterable[Span]) -> Html:
    listed = list(spans)
    rows = [
        (text[span.start : span.end], in_words(span.axis), in_words(span.category), span.pattern, span.reason)
        for span in listed[:SHOWN_MATCHES]
    ]
    more = f"the first {SHOWN_MATCHES} of {len(listed):,} matches"
    note = markup.notice(more, "note") if len(listed) > SHOWN_MATCHES else ""
    return markup.joined(markup.table(("Words", "Principle", "Category", "Rule", "Reason"), rows), note)
