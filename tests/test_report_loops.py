"""Texts of a model that loops: the word diff of the page and the gate's similarity stay quick, and right."""

from __future__ import annotations

import random

import pytest

from cai_experiment.evaluation.reporting.differences import MOST_ALIKE as MOST_ALIKE_SHOWN
from cai_experiment.evaluation.reporting.differences import differences
from cai_experiment.pipeline.gate import MOST_ALIKE, similarity

LOOP = "the " * 2000
BROKEN = " ".join("the x" if i % 3 else "the" for i in range(1500))  # each gap is another match to be found


@pytest.mark.parametrize("before, after", [(LOOP, BROKEN), (BROKEN, LOOP), (LOOP, "First, rinse it. " + LOOP)])
def test_loops_are_compared_in_a_moment(before: str, after: str) -> None:
    share = similarity(before, after)  # word by word either would take minutes
    old, new = differences(before, after)
    assert 0 < share <= 1 and len(old) <= 3 and len(new) <= 3
    for text, pieces in ((before, old), (after, new)):
        assert "".join(piece.text for piece in pieces).rstrip() == text.rstrip()
    kept = [[word for piece in pieces if piece.kind == "same" for word in piece.text.split()] for pieces in (old, new)]
    assert kept[0] == kept[1]


def test_of_loops_the_common_ends_are_shown_as_such() -> None:
    old, new = differences(f"Well. {LOOP} Good luck.", f"Well. the x {LOOP} Good luck.")
    assert [piece.kind for piece in old] == ["same", "same"], "nothing of the first is gone"
    assert [piece.kind for piece in new] == ["same", "ins", "same"] and new[1].text.split() == ["x", "the"]


def test_of_loops_similarity_is_the_share_of_words_whatever_their_order() -> None:
    assert similarity(LOOP, LOOP + "the " * 2000) == pytest.approx(2 / 3), "as by the longest common stretches"
    assert similarity(LOOP, LOOP + "x") == pytest.approx(4000 / 4001)
    assert similarity(LOOP, "rinse it") == 0


def test_answers_of_1500_words_are_still_compared_word_by_word() -> None:
    rng = random.Random(0)
    words, weights = [f"w{i}" for i in range(3000)], [1 / (i + 10) for i in range(3000)]  # Zipf's law
    text = rng.choices(words, weights, k=1500)
    other = [word if rng.random() > 0.1 else "new" for word in text]
    assert sum(text.count(word) * other.count(word) for word in set(text)) < MOST_ALIKE == MOST_ALIKE_SHOWN
    old, _ = differences(" ".join(text), " ".join(other))
    assert len([piece for piece in old if piece.kind == "del"]) > 100
    assert similarity(" ".join(text), " ".join(reversed(other))) < 0.3, "the order counts"
