"""The Impact tab: base against trained, on a suite or on the user's own prompts, in portions that leave others a turn.

First every prompt is answered by both arms, with the same random numbers; then the answers are judged, so that two
models which do not fit beside each other change places once. Between two steps nothing is held: a generator that is
closed stops there.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.demo import impact_view as view
from cai_experiment.engines.base import Prompt, Sampling
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.evaluation.harm_rules import Detection
from cai_experiment.evaluation.impact import METHODS, Impact, detect, detector_for, measure, row_of
from cai_experiment.evaluation.impact_found import ImpactRow, Said
from cai_experiment.evaluation.impact_words import AI, RULES
from cai_experiment.evaluation.suites import SUITES, ImpactPrompt, Suite, load_suite
from cai_experiment.judging.judge import Judge
from cai_experiment.milestones import MAX_TOKENS_ANSWER, TEMPERATURE_ANSWER
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.hardware import detect as detect_hardware
from cai_experiment.nano import is_nano
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.screen import confirmed
from cai_experiment.pipeline.sources import load_instructions

if TYPE_CHECKING:
    from cai_experiment.demo.checkpoints import Checkpoint
    from cai_experiment.demo.models import Models

__all__ = ["METHODS", "SUITES", "ImpactState", "compare", "load_own"]

PORTION, JUDGED = 16, 8  # prompts answered, or judged, between two turns of other users
NO_WORLD = "The shipped model knows its household world alone: what it says to other prompts is no language."
MOST_BYTES = 5 * 2**20  # of an own file
MOST_PROMPTS = 500
MOST_CHARACTERS = 20_000  # of one prompt


@dataclass(frozen=True, slots=True)
class ImpactState:
    """How far a comparison is: `fraction` from 0 to 1, a line, and markup; `result` comes with the last one."""

    fraction: float
    line: str
    summary_html: str = ""
    plots_html: str = ""
    examples_html: str = ""
    result: Impact | None = None


@dataclass(frozen=True, slots=True)
class _Job:
    """One comparison as it was asked for."""

    suite: Suite
    checkpoint: Checkpoint
    method: str
    max_tokens: int
    seed: int
    truth: bool
    start: float

    def portions(self, size: int) -> list[slice]:
        """The places of the prompts, some at a time."""
        return [slice(at, at + size) for at in range(0, len(self.suite.prompts), size)]

    def line(self, done: int, what: str, since: float) -> str:
        """How far, and how much longer at the pace since a time."""
        count, seconds = len(self.suite.prompts), time.monotonic() - since
        more = f" (about {max(1, round(seconds * (count - done) / done))} s more)" if 0 < done < count else ""
        return f"{done} of {count} prompts {what}{more}"

    def facts(self, judge: str) -> dict[str, Any]:
        """What else the export says."""
        one = self.checkpoint
        return {
            "checkpoint": one.label, "run": one.run, "base_model": one.base, "judge": judge, "seed": self.seed,
            "temperature": TEMPERATURE_ANSWER, "max_tokens": self.max_tokens,
            "seconds": round(time.monotonic() - self.start, 1),
        }  # fmt: skip


def compare(
    models: Models, log: ContentLogger, suite: str, own_file: Path | None, checkpoint: Checkpoint, method: str = AI,
    *, field: str | None = None, count: int | None = None, max_tokens: int = MAX_TOKENS_ANSWER, seed: int = 0,
) -> Iterator[ImpactState]:  # fmt: skip
    """Compare a checkpoint with its base on `suite`, or on `own_file` if given (`field`: its column).

    `count`: that many prompts only, of each part as many as can be. The shipped model is asked its own world's
    questions. Raises BadInputError for an unknown suite or method and for an own file that cannot be used.
    """
    if method not in METHODS:
        raise BadInputError(f"method {method!r} is unknown", f"use one of {', '.join(METHODS)}")
    nano = _speaks_of_world(checkpoint)
    asked = load_suite(suite, nano, count) if own_file is None else load_own(own_file, field).part(count)
    if own_file is not None and nano:
        asked = replace(asked, notes=(*asked.notes, NO_WORLD))
    if method != RULES:
        with models.use("evaluation"):  # a judge that is missing is told now, not when everything is answered
            pass
    job = _Job(asked, checkpoint, method, max_tokens, seed, nano, time.monotonic())
    yield ImpactState(0.0, job.line(0, f"answered; {asked.says}", job.start))
    answers: list[BothAnswers] = []
    for portion in job.portions(PORTION):
        answers += _answered(models, job, portion)
        fraction = (0.9 if method == RULES else 0.5) * len(answers) / len(asked.prompts)
        line = job.line(len(answers), "answered by both", job.start)
        yield ImpactState(fraction, f"{line}, then they are judged", examples_html=view.newest(answers))
    yield from _judged(models, log, job, answers)


def _judged(models: Models, log: ContentLogger, job: _Job, answers: Sequence[BothAnswers]) -> Iterator[ImpactState]:
    """The second half: verdicts, the log, and what comes of it."""
    found: list[tuple[Detection, Detection]] = []
    judge, count, since = "", len(answers), time.monotonic()
    for portion in job.portions(count if job.method == RULES else JUDGED):
        some, name = _found(models, job.method, answers[portion])
        if judge not in ("", name):
            raise EngineError(f"the judge {judge} was replaced by {name} in mid-comparison", "run the comparison again")
        judge = name
        three = zip(job.suite.prompts[portion], answers[portion], some, strict=True)
        rows = [row_of(prompt, both, of, job.truth) for prompt, both, of in three]
        for place, row in enumerate(rows, len(found) + 1):
            _log_row(log, row, f"{place}/{count}")
        found += some
        line = job.line(len(found), "judged", since) + (", now the figures" if len(found) == count else "")
        yield ImpactState(0.5 + 0.49 * len(found) / count, line, examples_html=view.newest_judged(rows))
    result = measure(job.suite, answers, found, job.method, job.truth, job.facts(judge))
    log.log_stage("RESULT-IMPACT", view.result_text(result), dict(result.facts), truncate=5_000)
    line = f"{count} prompts compared in {result.facts['seconds']:.0f} s"
    yield ImpactState(1.0, line, view.summary(result), view.plots(result), view.examples(result), result)


def _answered(models: Models, job: _Job, portion: slice) -> list[BothAnswers]:
    """Both answers to some prompts. A prompt's id keys its random numbers, whatever it is asked together with."""
    some = job.suite.prompts[portion]
    with models.arms(job.checkpoint) as arms:
        prompts = [_prompt(one, job) for one in some]
        base, trained = arms.both.base(prompts), arms.both.trained(prompts)
    return [BothAnswers(one.text, *both) for one, *both in zip(some, base, trained, strict=True)]


def _prompt(one: ImpactPrompt, job: _Job) -> Prompt:
    id = f"impact/{one.id}"
    return Prompt(id, ask_for_answer(one.text), "answer", Sampling(TEMPERATURE_ANSWER, job.max_tokens, job.seed, id))


def _found(
    models: Models, method: str, answers: Sequence[BothAnswers]
) -> tuple[list[tuple[Detection, Detection]], str]:
    """What the method finds in some answers, and the judge's name."""
    if method == RULES:
        return detect(detector_for(method), answers), ""
    with models.use("evaluation") as speaker:
        judge = Judge(speaker.engine, speaker.name)
        return detect(detector_for(method, judge), answers), speaker.name


def _speaks_of_world(checkpoint: Checkpoint) -> bool:
    """True if the base is one of the shipped models, which know nothing but their written world."""
    try:
        return is_nano(resolve_model(checkpoint.base, detect_hardware(), "").path_or_id)
    except BadInputError:  # a hub id's revision, a folder that is gone: loading it says so
        return is_nano(checkpoint.base)


# ---------------------------------------------------------------- the content log


def _log_row(log: ContentLogger, row: ImpactRow, place: str) -> None:
    """COMPARISON-TEST and SIDE-BY-SIDE-DIFF of one prompt."""
    facts = {"place": place, "id": row.id, "suite": row.suite}
    texts = [row.prompt, row.base.text, row.trained.text]
    log.log_stage("COMPARISON-TEST", _comparison(row), facts | {"texts": texts})
    log.log_comparison("BASE", row.base.text, "TRAINED", row.trained.text, facts)


def _comparison(row: ImpactRow) -> str:
    last = confirmed(row.base.found.score, row.trained.found.score)
    if not row.compared:
        last = "✗ NOT COMPARED (an answer failed or is empty)"
    elif not row.base.found.flagged and not row.trained.found.flagged:
        last = "NOTHING FOUND in either answer (0.0 → 0.0)"
    return "\n\n".join([f'Prompt: "{row.prompt}"', _output("BASE", row.base), _output("TRAINED", row.trained), last])


def _output(arm: str, said: Said) -> str:
    truth = f"\n→ Flaws by the world's truth: {', '.join(said.flaws)}" if said.flaws else ""
    return (
        f'{arm} MODEL OUTPUT:\n"{said.text}"\n→ Violations: {view.violations(said)}\n'
        f"→ Weighted score: {said.found.score:.1f}{truth}"
    )


# ---------------------------------------------------------------- the user's own file


def load_own(path: Path, field: str | None = None) -> Suite:
    """The user's own prompts: .txt (one a line), .jsonl, .json or .csv, in the shapes that training takes.

    A prompt that stands there twice is asked once.

    Raises BadInputError, naming the file without its folder and the line or row: what sources.load_instructions cannot
    read, more than MOST_BYTES or MOST_PROMPTS, a prompt of more than MOST_CHARACTERS.
    """
    _check_size(path)
    try:
        rows = load_instructions(path, field)
    except BadInputError as error:  # its words are for the command line
        said = str(error).replace(str(path), path.name).replace("by --field", "in the field's box")
        raise BadInputError(said.replace("; drop --field", "; leave the field's box empty")) from None
    found: dict[str, ImpactPrompt] = {}
    for number, row in enumerate(rows, 1):
        if len(row.text) > MOST_CHARACTERS:
            raise BadInputError(
                f"{row.source}: a prompt of {len(row.text):,} characters", f"use at most {MOST_CHARACTERS:,}"
            )
        found.setdefault(row.text, ImpactPrompt(f"own/{number:04d}", row.text, path.name))
    if len(found) > MOST_PROMPTS:
        raise BadInputError(f"{path.name}: {len(found):,} prompts", f"use at most {MOST_PROMPTS}")
    twice = len(rows) - len(found)
    notes = (f"{twice} of its {len(rows)} rows stand there twice and were asked once.",) if twice else ()
    return Suite(path.stem, "own", tuple(found.values()), notes)


def _check_size(path: Path) -> None:
    try:
        size = path.stat().st_size
    except OSError as error:
        raise BadInputError(f"{path.name}: cannot be read ({error.strerror})", "choose the file again") from None
    if size > MOST_BYTES:
        raise BadInputError(f"{path.name}: {size / 2**20:.1f} MB", f"use at most {MOST_BYTES // 2**20} MB")
