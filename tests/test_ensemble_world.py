"""The experts' world: true answers, lay answers, splits, and that the shipped experts are what their card says."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from cai_experiment.ensemble.shipped import world
from cai_experiment.ensemble.shipped.questions import KINDS, signs_of
from cai_experiment.ensemble.shipped.speakers import FIELDS, Question, Speaker
from cai_experiment.ensemble.shipped.words import DOSES, ILLNESSES, MEDICINES
from cai_experiment.ensemble.shipped.world import SETS, draw, is_of, rows

WEIGHTS = Path(world.__file__).parent / "weights"


def questions(kind: str, count: int = 60) -> list[Question]:
    rng = random.Random(kind)
    return [draw(kind, "test", rng) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_sums_of_a_true_answer_are_right_and_its_letter_names_what_it_says(kind: str) -> None:
    for question in questions(kind):
        said = question.true_answer()
        assert said.startswith(" ") and set(question.needs) <= set(FIELDS)
        for left, sign, right, result in re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)\.", said):
            assert eval(f"{left} {sign} {right}") == int(result)
        if question.task == "choice":
            assert len(set(question.options)) == 4
            assert said.endswith(f" {question.options['ABCD'.index(question.gold)]}.")
        if question.task == "number":
            assert said.endswith(f"#### {question.gold}")


def test_a_sign_belongs_to_one_illness() -> None:
    signs = [sign for illness in range(len(ILLNESSES)) for sign in signs_of(illness)]
    assert len(signs) == len(set(signs)) == 3 * len(ILLNESSES)
    assert len(MEDICINES) == len(DOSES) == len(ILLNESSES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_layperson_is_often_wrong_and_an_expert_never_in_its_field(kind: str) -> None:
    rng = random.Random(0)
    asked = questions(kind, 200)
    lay = [question.answer(Speaker(frozenset(), rng)) == question.true_answer() for question in asked]
    assert sum(lay) < 0.5 * len(lay)
    for question in asked[:20]:
        assert question.answer(Speaker(frozenset(question.needs), rng)) == question.true_answer()


def test_no_expert_alone_answers_what_needs_two() -> None:
    rng = random.Random(0)
    for kind in SETS["two"]:
        asked = questions(kind, 200)
        for field in FIELDS:
            alone = [question.answer(Speaker(frozenset([field]), rng)) == question.true_answer() for question in asked]
            assert sum(alone) < 0.5 * len(alone), (kind, field)


def test_splits_share_no_question_and_rows_are_the_same_every_time() -> None:
    for name in SETS:
        test, train = rows(name, "test", 60), rows(name, "train", 60)
        assert not {row["question"] for row in test} & {row["question"] for row in train}
        assert rows(name, "test", 60) == test and rows(name, "test", 30) == test[:30]
    rng = random.Random(3)
    for kind in KINDS:
        question = draw(kind, "experts", rng)
        assert [split for split in world.SPLITS if is_of(question, split)] == ["experts"]


@pytest.mark.parametrize("field", FIELDS)
def test_shipped_experts_are_small(field: str) -> None:
    assert sum(path.stat().st_size for path in (WEIGHTS / field).iterdir()) <= 4_000_000
