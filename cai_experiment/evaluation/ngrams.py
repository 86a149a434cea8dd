"""Repetition and variety of text, by n-grams of words; and the spread of a figure over all texts together."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import islice

_UNIT = re.compile(r"[^\W\d_]+|\d|[^\w\s]|_")  # words; digits and marks one by one, since "!!!!!!" is a repetition too


def units(text: str) -> list[str]:
    """The lower-cased words of a text; digits and punctuation marks stand one by one."""
    return _UNIT.findall(text.lower())


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All runs of `n` words, in order."""
    return list(zip(*(islice(words, start, None) for start in range(n)), strict=False))


def repetition(text: str) -> float:
    """seq-rep-4: 1 - distinct 4-grams / 4-grams (Welleck et al. 2020, equation 9); 0 where there is none."""
    found = ngrams(units(text), 4)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct_n(texts: Sequence[Sequence[str]], n: int) -> tuple[float | None, list[float]]:
    """Distinct n-grams over all n-grams of `texts` (Li et al. 2016), and the same without each text in turn.

    (None, []) where there is no n-gram.
    """
    owners: dict[tuple[str, ...], int] = {}  # of an n-gram that one text alone has; -1 of all others
    counts = [0] * len(texts)
    for index, words in enumerate(texts):
        for gram in ngrams(words, n):
            counts[index] += 1
            owners[gram] = index if owners.setdefault(gram, index) == index else -1
    own = [0] * len(texts)
    for owner in owners.values():
        if owner >= 0:
            own[owner] += 1
    total = sum(counts)
    if not total:
        return None, []
    whole = len(owners) / total
    without = [
        (len(owners) - mine) / (total - count) if total > count else whole
        for mine, count in zip(own, counts, strict=True)
    ]
    return whole, without


def jackknife_error(without: Sequence[float]) -> float:
    """The standard error of a figure, from its values without each item in turn (Tukey 1958)."""
    n = len(without)
    if n < 2:
        return 0.0
    mean = math.fsum(without) / n
    return math.sqrt((n - 1) / n * math.fsum((value - mean) ** 2 for value in without))
