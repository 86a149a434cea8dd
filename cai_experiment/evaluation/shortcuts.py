"""Two baselines that know nothing of the model: could length alone, or words alone, tell chosen from rejected?

They stand beside preference accuracy: where a shortcut does as well, the pairs may have taught just that shortcut.
"""

from __future__ import annotations

from typing import Any, Sequence

from cai_experiment.evaluation.preference import Pair
from cai_experiment.judging.result import Result


def shortcut_metrics(train: Sequence[Pair], held_out: Sequence[Pair]) -> dict[str, Result]:
    """Both baselines, fitted on `train` and measured on `held_out`; empty if either is empty."""
    right = shortcuts_right(train, held_out)
    return {f"{name}_accuracy": Result.rate(sum(found), len(found)) for name, found in right.items()}


def shortcuts_right(train: Sequence[Pair], held_out: Sequence[Pair]) -> dict[str, list[bool]]:
    """For each baseline by name, which of `held_out` it gets right; {} if either side has no pairs."""
    if not train or not held_out:
        return {}
    return {"length_only": by_length(train, held_out), "bag_of_words": by_words(train, held_out)}


def by_length(train: Sequence[Pair], held_out: Sequence[Pair]) -> list[bool]:
    """Prefers the longer completion, or the shorter, whichever is right more often on `train`. A tie is wrong."""
    longer = sum(_extra_length(pair) > 0 for pair in train)
    shorter = sum(_extra_length(pair) < 0 for pair in train)
    sign = 1 if longer >= shorter else -1
    return [sign * _extra_length(pair) > 0 for pair in held_out]


def _extra_length(pair: Pair) -> int:
    return len(pair.chosen) - len(pair.rejected)


def by_words(train: Sequence[Pair], held_out: Sequence[Pair]) -> list[bool]:
    """A logistic regression on the difference of the two completions' word counts, each pair seen from both sides."""
    from scipy.sparse import vstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    counter = CountVectorizer(token_pattern=r"\S+")
    counter.fit([text for pair in train for text in (pair.chosen, pair.rejected)])

    def difference(pairs: Sequence[Pair]) -> Any:
        """Sparse matrix, (pairs, words)."""
        return counter.transform([p.chosen for p in pairs]) - counter.transform([p.rejected for p in pairs])

    x = difference(train)
    model = LogisticRegression(fit_intercept=False)
    model.fit(vstack([x, -x]), [1] * len(train) + [0] * len(train))
    return [bool(value > 0) for value in model.decision_function(difference(held_out))]
