"""What a training changed in the answers to a suite of prompts: base against trained, and what chance would do as well.

    suite = load_suite("stereotyping")
    answers = [...]                                    # BothAnswers, one for each of suite.prompts
    found = detect(detector_for("Rules"), answers)
    print(measure(suite, answers, found, "Rules").verdicts[0].line)

Silence cannot win: a prompt on which an answer failed or is empty counts for neither arm and is counted, and a gain is
confirmed only if it still stands when every answer that the trained model left empty counts as its base's did. A model
whose language has collapsed (see collapse.py) has no gain confirmed either. Refusals are answers, and are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from cai_experiment.constitution.principles import AXIS_WEIGHTS, load_constitution
from cai_experiment.constitution.wording import is_refusal
from cai_experiment.engines.base import Completion
from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.evaluation.collapse import MEASURES, collapse_watch
from cai_experiment.evaluation.harm_model import BothDetector, Detector, ModelDetector, RulesDetector
from cai_experiment.evaluation.harm_rules import Detection
from cai_experiment.evaluation.impact_found import Figure, Impact, ImpactRow, Said, arms_of
from cai_experiment.evaluation.impact_words import BOTH, FLAWED, METHODS, RULES, counts_of, notes, verdict
from cai_experiment.evaluation.reporting.naming import Named
from cai_experiment.evaluation.suites import AXES, SUITES, ImpactPrompt, Suite, load_suite
from cai_experiment.judging.judge import Judge
from cai_experiment.judging.result import (
    Result,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_difference,
    paired_p_value,
)
from cai_experiment.nano.truth import find_flaws, on_topic

__all__ = ["METHODS", "SUITES", "Impact", "detect", "detector_for", "load_suite", "measure", "row_of"]

SCORE, FLAGGED = "harm_score", "harm_flagged"
NOTHING = Detection((), 0.0, (), method="not judged")  # of an answer that failed or is empty
GUARDS = ("empty", "refusal", "words", "ends_by_itself", "repetition")  # of the collapse watch
TOPIC = Named("answers on topic (world's truth)", "helpful", "up", rate=True)


def detector_for(method: str, judge: Judge | None = None) -> Detector:
    """The detector of one of METHODS; all but the rules need a `judge`."""
    if method == RULES or judge is None:
        return RulesDetector()
    model = ModelDetector(judge)
    return BothDetector(model) if method == BOTH else model


def detect(detector: Detector, answers: Sequence[BothAnswers]) -> list[tuple[Detection, Detection]]:
    """What is found in (base's, trained's) answer of each; an answer that failed or is empty is not judged."""
    asked = [said for one in answers for said in (one.base, one.trained)]
    spoken = [place for place, said in enumerate(asked) if _speaks(said)]
    found = detector.detect_all([asked[place].text for place in spoken])
    by_place = dict(zip(spoken, found, strict=True))
    said = [by_place.get(place, NOTHING) for place in range(len(asked))]
    return list(zip(said[::2], said[1::2], strict=True))


def measure(
    suite: Suite, answers: Sequence[BothAnswers], found: Sequence[tuple[Detection, Detection]], method: str,
    truth: bool = False, facts: Mapping[str, Any] | None = None,
) -> Impact:  # fmt: skip
    """Everything about the answers to a suite's prompts, in its order; `found` is what `detect` gave of them.

    `truth`: they speak of the shipped model's world, so its flaws are known. `facts` (run, seed ...): for the export.
    """
    rows = [row_of(*one, truth) for one in zip(suite.prompts, answers, found, strict=True)]
    came = [row for row in rows if row.came]
    compared = [row for row in came if not (row.base.empty or row.trained.empty)]
    figures = _figures(suite, compared, len(rows) - len(compared), truth)
    watch = collapse_watch(answers)
    collapsed = not all(gate.passed for gate in watch.gates)
    led = [SCORE, *([FLAWED] if truth else [])]
    verdicts = [verdict(one, came, collapsed) for one in figures if one.name in led]
    return Impact(
        suite.name, suite.collection, method, tuple(figures), tuple(_guards(watch, compared, truth)), tuple(rows),
        tuple(verdicts), _by_suite(compared), counts_of(rows),
        (suite.says, *suite.notes, *notes(rows, method), *watch.alarms), dict(facts or {}),
    )  # fmt: skip


# ---------------------------------------------------------------- one answer


def row_of(prompt: ImpactPrompt, both: BothAnswers, found: tuple[Detection, Detection], truth: bool) -> ImpactRow:
    """One prompt with both answers and what was found in them."""
    base, trained = (_said(one, of, truth) for one, of in zip((both.base, both.trained), found, strict=True))
    return ImpactRow(prompt.id, prompt.suite, prompt.kind, prompt.text, base, trained)


def _speaks(said: Completion) -> bool:
    return said.finish != "error" and bool(said.text.strip())


def _said(said: Completion, found: Detection, truth: bool) -> Said:
    flaws = tuple(flaw.principle_id for flaw in find_flaws(said.text)) if truth else ()
    return Said(said.text, said.finish, not said.text.strip(), is_refusal(said.text), found, flaws, said.error)


@cache
def _axis_of() -> dict[str, str]:
    """The axis of each principle that the world's flaws name."""
    return {principle.id: principle.axis for principle in load_constitution().principles}


# ---------------------------------------------------------------- figures

Of = Callable[[Said], float | bool]


def _measures(suite: Suite, truth: bool) -> dict[str, tuple[Named, Of]]:
    """What is compared, in the order of the page; less of each is better."""
    found: dict[str, tuple[Named, Of]] = {
        SCORE: (Named("weighted harm score (0 to 5.5)", "safer", "down"), lambda said: said.found.score),
        FLAGGED: (_rate("answers flagged"), lambda said: said.found.flagged),
    }
    for axis in AXIS_WEIGHTS:
        label = f"flagged: {axis.replace('_', ' ')}"
        found[f"flagged_{axis}"] = (_rate(label), lambda said, axis=axis: axis in said.found.axes)  # type: ignore[misc]
    if truth:
        found[FLAWED] = (_rate("answers with a flaw (world's truth)"), lambda said: bool(said.flaws))
        if suite.name in AXES:
            own = AXES[suite.name]
            label = f"with a flaw of {own.replace('_', ' ')} (world's truth)"
            found[f"flawed_{own}"] = (
                _rate(label), lambda said: any(_axis_of().get(flaw) == own for flaw in said.flaws)
            )  # fmt: skip
    return found


def _rate(label: str) -> Named:
    return Named(label, "safer", "down", rate=True)


def _figures(suite: Suite, rows: Sequence[ImpactRow], left_out: int, truth: bool) -> list[Figure]:
    """Every measure over `rows`; their p-values are one family for Holm."""
    figures = [
        _figure(name, known, [of(row.base) for row in rows], [of(row.trained) for row in rows], left_out)
        for name, (known, of) in _measures(suite, truth).items()
    ]
    adjusted = holm([one.p_value for one in figures if one.p_value is not None])
    return [replace(one, p_holm=p_value) for one, p_value in zip(figures, adjusted, strict=True)]


def _figure(
    name: str, known: Named, before: Sequence[float | bool], after: Sequence[float | bool], left_out: int
) -> Figure:
    """Shares by Wilson, McNemar and Bonett-Price; means by bootstrap and by a permutation test."""
    if known.rate:
        old, new = [bool(one) for one in before], [bool(one) for one in after]
        test = mcnemar(old, new)
        base, trained = (Result.rate(sum(arm), len(arm), left_out) for arm in (old, new))
        return Figure(name, known, base, trained, paired_difference(old, new), test.p_value, None, test)
    first, second = [float(one) for one in before], [float(one) for one in after]
    base, trained = (Result.mean(arm, left_out) for arm in (first, second))
    return Figure(name, known, base, trained, paired_bootstrap(first, second), paired_p_value(first, second), None)


def _guards(watch: Any, rows: Sequence[ImpactRow], truth: bool) -> list[Figure]:
    """What must not be lost for the gain: shown with its interval, and no part of the tests' family."""
    found = [
        Figure(name, _guard_name(name), watch.metrics[f"{name}_base"], watch.metrics[f"{name}_trained"],
               watch.differences[name], None, None)
        for name in GUARDS
    ]  # fmt: skip
    if truth:
        pairs = [(on_topic(row.prompt, row.base.text), on_topic(row.prompt, row.trained.text)) for row in rows]
        one = _figure("on_topic", TOPIC, [before for before, _ in pairs], [after for _, after in pairs], 0)
        found.append(replace(one, p_value=None))
    return found


def _guard_name(name: str) -> Named:
    labels = {
        "empty": "answers that are empty", "refusal": "answers that refuse", "words": "words an answer",
        "ends_by_itself": "answers that end by themselves", "repetition": "repetition (seq-rep-4)",
    }  # fmt: skip
    return Named(labels[name], "lost", {1: "down", -1: "up"}.get(MEASURES[name].worse, ""),  # type: ignore[arg-type]
                 rate=name in ("empty", "refusal", "ends_by_itself"))  # fmt: skip


def _by_suite(rows: Sequence[ImpactRow]) -> dict[str, dict[str, Result]]:
    """Share flagged and mean score of each part of a suite, both arms: described, not tested. {} for a single part."""
    parts = list(dict.fromkeys(row.suite for row in rows))
    found = {}
    for part in parts if len(parts) > 1 else ():
        some = [row for row in rows if row.suite == part]
        found[part] = {
            f"{name}_{arm}": Result.rate(sum(s.found.flagged for s in said), len(said))
            if name == FLAGGED else Result.mean([s.found.score for s in said])
            for name in (FLAGGED, SCORE) for arm, said in arms_of(some)
        }  # fmt: skip
    return found
