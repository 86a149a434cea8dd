"""The experts' world: true answers, lay answers, splits; the shipped experts, each good at its own field alone."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.ensemble.answers import read_answer
from cai_experiment.ensemble.layout import prompt_of
from cai_experiment.ensemble.shipped import world
from cai_experiment.ensemble.shipped.questions import KINDS, signs_of
from cai_experiment.ensemble.shipped.speakers import FIELDS, Question, Speaker
from cai_experiment.ensemble.shipped.words import DOSES, ILLNESSES, MEDICINES
from cai_experiment.ensemble.shipped.world import SETS, draw, is_of, rows
from cai_experiment.errors import BadInputError

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


@pytest.mark.parametrize("field", FIELDS)
def test_a_shipped_expert_knows_its_field_and_no_other(field: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS / field, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(WEIGHTS / field, dtype=torch.float32).eval()
    share = {}
    for name in SETS:
        asked = rows(name, "test", 24)
        ids = tokenizer([prompt_of(row["question"]) for row in asked], return_tensors="pt", padding=True)
        spoken = model.generate(**ids, max_new_tokens=60, do_sample=False)[:, ids["input_ids"].shape[1] :]
        said = tokenizer.batch_decode(spoken, skip_special_tokens=True)
        right = [read_answer(text, r["task"], r["options"]) == r["gold"] for text, r in zip(said, asked, strict=True)]
        share[name] = sum(right) / len(right)
    assert share.pop(field) >= 0.8
    assert share.pop("general", 0.0) < 0.8  # yes or no: half of it by chance
    assert max(share.values()) <= 0.25, share


def test_experts_of_other_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    from cai_experiment.ensemble.shipped.training import ExpertSettings, _check_same

    _check_same(tmp_path / "settings.json", ExpertSettings())
    _check_same(tmp_path / "settings.json", ExpertSettings(threads=1))
    with pytest.raises(BadInputError, match="--fresh"):
        _check_same(tmp_path / "settings.json", ExpertSettings(seed=9))
