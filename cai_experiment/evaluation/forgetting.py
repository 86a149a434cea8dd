"""What has training cost? Skills it never touched, base against trained on the same items.

Three kinds of evidence: tasks of lm-eval (lm_eval_tasks.py) and GSM8K asked directly (gsm8k.py) for any model; short
sums with known answers for the shipped one; and how well clean text is still predicted (perplexity.py), for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.evaluation.found import ITEMS_FOLDER, Evaluation
from cai_experiment.evaluation.gates import MAY_FORGET, Gate
from cai_experiment.judging.result import Result, mcnemar, paired_difference
from cai_experiment.nano.truth import arithmetic_right

ENOUGH = 400  # items: a paired difference is then known to within 3 points if a tenth of them change


def kept_gate(name: str, difference: Result, failed: int = 0) -> Gate:
    """The gate "no forgetting: NAME" on a paired difference of rates (trained - base).

    From ENOUGH items on (those that `failed` are among them) the lower end of its interval must stay above
    -MAY_FORGET. With fewer that end says more of n than of the model (200 items with 20% discordant: +-6 points), so
    the point estimate decides; see `width_note`.
    """
    if difference.interval is not None and difference.n + failed >= ENOUGH:
        low = difference.interval[0]
        return Gate(f"no forgetting: {name}, lower end", low, ">", -MAY_FORGET, difference.interval, difference.n,
                    "training")  # fmt: skip
    value = None if difference.value is None else round(difference.value, 6)
    return Gate(f"no forgetting: {name}", value, ">=", -MAY_FORGET, difference.interval, difference.n, "training")


def width_note(name: str, difference: Result) -> list[str]:
    """A warning where few items leave a loss of more than MAY_FORGET possible."""
    if difference.interval is None or difference.n >= ENOUGH or difference.interval[0] > -MAY_FORGET:
        return []
    low, high = difference.interval
    return [f"{name}: with n = {difference.n} a change of {low:+.3f} to {high:+.3f} is possible; {ENOUGH} items or "
            "more would decide (--task-limit)"]  # fmt: skip


def paired(
    name: str, base: Sequence[float | bool], trained: Sequence[float | bool], rows: Sequence[Mapping[str, Any]],
    failed: int = 0,
) -> Evaluation:  # fmt: skip
    """One skill before and after: NAME_base and NAME_trained, their difference, the gate, and McNemar's test of rates.

    `base` and `trained` are the items' figures in one order, booleans for a rate; `failed` items count for neither.
    """
    items = f"{ITEMS_FOLDER}/{name}.jsonl"
    is_rate = all(isinstance(value, bool) for value in (*base, *trained))
    difference = paired_difference([float(v) for v in base], [float(v) for v in trained])
    gate = kept_gate(name, difference, failed)
    found = Evaluation(differences={name: difference}, items={name: list(rows)}, gates=[gate])
    found.notes += width_note(name, difference)
    for arm, values in (("base", base), ("trained", trained)):
        one = Result.rate(int(sum(values)), len(values)) if is_rate else Result.mean([float(v) for v in values])
        found.metrics[f"{name}_{arm}"] = replace(one, unparsed=failed, items=items)
    if is_rate:
        found.tests[name] = mcnemar([bool(v) for v in base], [bool(v) for v in trained])
    return found


def score_sums(answers: Sequence[BothAnswers], numbers: Sequence[str]) -> Evaluation:
    """A skill that training never touched: `answers` to short sums, right if their last number is `numbers`' own."""
    read = [(a, number) for a, number in zip(answers, numbers, strict=True) if not a.failed]
    rows = [
        {
            "id": both.base.id,
            "instruction": both.instruction,
            "base": arithmetic_right(both.base.text, number),
            "trained": arithmetic_right(both.trained.text, number),
            "right": number,
            "base_text": both.base.text,
            "trained_text": both.trained.text,
        }
        for both, number in read
    ]
    base, trained = [bool(r["base"]) for r in rows], [bool(r["trained"]) for r in rows]
    return paired("arithmetic", base, trained, rows, len(answers) - len(read))
