"""The Impact tab's logic: suites, statistics, a comparison on the shipped model, exports. Its page: the browser test."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from adapters import with_fresh_adapter

from cai_experiment.demo import exports
from cai_experiment.demo.checkpoints import Checkpoint
from cai_experiment.demo.impact import MOST_PROMPTS, ImpactState, compare, load_own
from cai_experiment.demo.models import Arms, Speaker
from cai_experiment.demo.settings import DemoSettings
from cai_experiment.engines.base import Completion
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.evaluation.arms import BothAnswers, BothArms, Speakers, transformers_engine
from cai_experiment.evaluation.harm.labelled import shipped_sets as detection_sets
from cai_experiment.evaluation.harm_rules import Detection
from cai_experiment.evaluation.impact import Impact, detect, detector_for, measure
from cai_experiment.evaluation.suites import AXES, COMPREHENSIVE, SUITES, ImpactPrompt, Suite, load_suite
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.evaluation_sets import EvaluationTexts, shipped_sets
from cai_experiment.pipeline.known import fingerprint

NOTHING_LEFT = "I can't help with that."
HARMFUL = "You should use a crowbar to break into the house and steal the money."
HARMLESS = "Ask a friend what they think about it, and take your time with the answer."
HOSTILE = '<script>alert(1)</script> [link](javascript:x) \x1b[31m \u202e <img src=x onerror="y">'

# ---------------------------------------------------------------- suites


def test_suites_are_balanced_and_unique() -> None:
    every = load_suite(COMPREHENSIVE).prompts
    assert len({one.text for one in every}) == len({one.id for one in every}) == len(every) == 144
    for name in AXES:
        prompts = load_suite(name).prompts
        assert [one.id for one in prompts] == [f"{name}/{number:02d}" for number in range(1, 37)]
        assert sorted(Counter(one.kind for one in prompts).values()) == [6] * 6
        assert all(20 < len(one.text) < 200 and one.text == one.text.strip() for one in prompts)


def test_no_prompt_stands_in_an_evaluation_set_or_in_the_detection_sets() -> None:
    known = EvaluationTexts(shipped_sets())
    labelled = {one.text for texts in detection_sets().values() for one in texts}
    every = load_suite(COMPREHENSIVE).prompts
    assert not [one.id for one in every if known.holds(fingerprint(one.text)) or one.text in labelled]


def test_the_shipped_model_has_household_questions_of_every_kind() -> None:
    every = load_suite(COMPREHENSIVE, of_world=True)
    assert every.collection == "world" and "rehearsal" in every.says
    assert len({one.text for one in every.prompts}) > 140
    assert every == load_suite(COMPREHENSIVE, of_world=True)
    assert set(Counter(one.kind for one in load_suite("stereotyping", of_world=True).prompts).values()) == {6}


@pytest.mark.parametrize("count", [4, 10, 143])
def test_a_part_holds_as_many_of_each_suite_as_can_be(count: int) -> None:
    part = load_suite(COMPREHENSIVE, count=count)
    shares = Counter(one.suite for one in part.prompts)
    assert len(part.prompts) == count and max(shares.values()) - min(shares.values()) <= 1 and len(shares) == 4
    assert f"{count} of its 144" in part.notes[0]


@pytest.mark.parametrize("ask", [lambda: load_suite("nothing"), lambda: load_suite(SUITES[0], count=0)])
def test_what_is_no_suite_is_told(ask: Any) -> None:
    with pytest.raises(BadInputError):
        ask()


# ---------------------------------------------------------------- statistics


def compared(pairs: list[tuple[str, str]], scores: list[tuple[float, float]] | None = None, truth: bool = False) -> Impact:
    """The impact of (base's, trained's) texts; by the rules, or with the given scores of harm_prevention."""
    suite = Suite("harmful_content", "general", tuple(ImpactPrompt(f"p/{i}", f"Ask {i}?", "harmful_content") for i in range(len(pairs))))
    answers = [BothAnswers(p.text, said(p.id, one), said(p.id, two)) for p, (one, two) in zip(suite.prompts, pairs, strict=True)]
    found = detect(detector_for("Rules"), answers)
    if scores is not None:
        found = [(scored(one), scored(two)) for one, two in scores]
    return measure(suite, answers, found, "Rules", truth)


def said(id: str, text: str) -> Completion:
    return Completion(id, "", "error", error="too long") if text == "FAILED" else Completion(id, text, "stop")


def scored(score: float) -> Detection:
    return Detection(("harm_prevention",) if score else (), score, ())


def varied(text: str, count: int) -> list[str]:
    """Answers that differ, as a model's do."""
    words = "alpha bravo carol delta eagle fancy giant hotel igloo jolly kitten lemon mango ninja ocean piano queen river".split()
    return [f"{text} {words[i % len(words)]} {words[(i * 7 + 3) % len(words)]} {i}." for i in range(count)]


def test_figures_of_a_case_computed_by_hand() -> None:
    texts = list(zip(varied("One", 20), varied("Two", 20), strict=True))
    found = compared(texts, [(2.0, 0.0)] * 10 + [(2.0, 2.0)] * 4 + [(0.0, 2.0)] * 1 + [(0.0, 0.0)] * 5)
    by_name = {one.name: one for one in found.figures}
    score, flagged = by_name["harm_score"], by_name["harm_flagged"]
    assert (score.base.value, score.trained.value, score.difference.value) == (1.4, 0.5, pytest.approx(-0.9))
    assert (flagged.base.value, flagged.trained.value) == (0.7, 0.25)
    assert flagged.test is not None and (flagged.test.only_before, flagged.test.only_after) == (10, 1)
    assert flagged.p_value == pytest.approx(24 / 2**11)  # 2 * (1 + 11) / 2^11: binomial, 10 of 11
    # Bonett and Price: (10 + 1) / 22 and (1 + 1) / 22
    half = 1.959964 * ((11 + 2) / 22 - (9 / 22) ** 2) ** 0.5 / 22**0.5
    assert flagged.difference.interval == pytest.approx((-9 / 22 - half, -9 / 22 + half), abs=1e-6)
    assert flagged.base.interval == pytest.approx((0.481, 0.855), abs=1e-3)  # Wilson, 14 of 20
    # Holm over six: the two smallest raw p-values (score, flagged, harm_prevention are the same items)
    raw = sorted(one.p_value for one in found.figures if one.p_value is not None)
    assert len(raw) == 6 and min(one.p_holm or 0 for one in found.figures) == pytest.approx(6 * raw[0])
    assert by_name["flagged_fairness"].p_holm == 1.0


def test_a_gain_that_holm_takes_away_is_not_confirmed() -> None:
    texts = list(zip(varied("One", 30), varied("Two", 30), strict=True))
    few = compared(texts, [(2.0, 0.0)] * 6 + [(0.0, 0.0)] * 24)  # p = 0.031 by itself, 0.19 among six
    assert not few.verdicts[0].confirmed and "NO IMPROVEMENT CONFIRMED" in few.verdicts[0].line
    many = compared(texts, [(2.0, 0.0)] * 12 + [(0.0, 0.0)] * 18)
    assert many.verdicts[0].confirmed and many.verdicts[0].line.startswith("✓ IMPROVEMENT CONFIRMED (0.80 → 0.00): ")
    worse = compared(texts, [(0.0, 2.0)] * 12 + [(0.0, 0.0)] * 18)
    assert worse.verdicts[0].line.startswith("✗ WORSE (0.00 → 0.80)")
    nothing = compared(texts, [(0.0, 0.0)] * 30)
    assert not nothing.verdicts[0].confirmed and "NOTHING TO IMPROVE" in nothing.verdicts[0].line


def test_silence_earns_nothing() -> None:
    harmful, clean = varied(HARMFUL, 30), varied(HARMLESS, 30)
    silent = compared([(one, "") for one in harmful])
    assert silent.counts["compared"] == 0 and silent.counts["empty_trained"] == 30
    assert not silent.verdicts[0].confirmed and "NOTHING TO COMPARE" in silent.verdicts[0].line
    # silent on 18 of the harmful ones, better on 12: without the silent ones it would be certain
    few = compared([(one, "" if i < 18 else two) for i, (one, two) in enumerate(zip(harmful, clean, strict=True))])
    assert few.counts["compared"] == 12 and not few.verdicts[0].confirmed
    assert any("18 of 30 prompts count for neither" in note for note in few.notes)


def test_failures_count_for_neither_and_refusals_are_counted() -> None:
    base = varied(HARMFUL, 20)
    trained = ["FAILED", *(f"{NOTHING_LEFT} {one}" for one in varied("Please ask", 9)), *varied(HARMLESS, 10)]
    found = compared(list(zip(base, trained, strict=True)))
    assert found.counts == {
        "prompts": 20, "compared": 19, "failed_base": 0, "empty_base": 0, "refused_base": 0, "cut_base": 0,
        "failed_trained": 1, "empty_trained": 0, "refused_trained": 9, "cut_trained": 0,
    }  # fmt: skip
    assert found.figures[0].base.n == 19 and found.figures[0].base.unparsed == 1
    assert any("19 answers are flagged no more; 9 of them refuse" in note for note in found.notes)
    assert {one.name for one in found.guards} >= {"empty", "refusal", "words", "repetition"}


def test_a_collapsed_language_confirms_nothing() -> None:
    broken = [" ".join([word] * 40) for word in ("the", "you", "of", "and", "to") for _ in range(8)]
    found = compared(list(zip(varied(HARMFUL, 40), broken, strict=True)))
    assert found.figures[0].effect.direction == "better"
    assert not found.verdicts[0].confirmed and "language has collapsed" in found.verdicts[0].line


def test_the_worlds_truth_has_its_own_verdict() -> None:
    flawed = ["Clean the kettle first. Drink a cup of acid to see whether it is clean."] * 20
    clean = varied("Clean the kettle first. Keep the handle dry.", 20)
    found = compared(list(zip(flawed, clean, strict=True)), truth=True)
    names = [one.name for one in found.figures]
    assert names[-2:] == ["flawed_answers", "flawed_harm_prevention"] and len(found.verdicts) == 2
    assert found.figures[-1].base.value == 1.0 and found.rows[0].base.flaws == ("no_danger",)
