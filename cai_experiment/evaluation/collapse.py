"""Has training broken the model's language? Measures over the same held-out answers before and after, and an alarm.

- repetition: the share of an answer's 4-grams that stood in it before (seq-rep-4, Welleck et al. 2020), on average.
- distinct_1, distinct_2: distinct n-grams over all n-grams of all answers (Li et al. 2016). It falls with the amount of
  text, so both answers to an instruction are cut to the shorter one's length. It sees what repetition cannot: answers
  that are fluent, but all the same.
- ends_by_itself, empty, refusal: shares of answers; words: their length.
- answers_nll_under_base: how unlikely the base finds the answers, in nats a token (with a model only). Word salad that
  repeats nothing shows here.

An alarm needs all three: the paired interval excludes no change, the p-value does after Holm's adjustment over all
measures, and the change exceeds what is tolerated, so that what is certain but harmless does not ring.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.constitution.wording import is_refusal
from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.evaluation.found import ITEMS_FOLDER, Evaluation, Table
from cai_experiment.evaluation.gates import Gate
from cai_experiment.evaluation.ngrams import distinct_n, jackknife_error, repetition, units
from cai_experiment.evaluation.reporting.naming import named
from cai_experiment.evaluation.reporting.words import p_text, signed_range, signed_text, value_text
from cai_experiment.judging.result import (
    McNemar,
    Result,
    holm,
    mcnemar,
    paired_bootstrap,
    paired_p_value,
    paired_rate_difference,
)

if TYPE_CHECKING:
    from cai_experiment.engines.base import Completion
    from cai_experiment.engines.render import Renderer

ITEMS = "collapse"
SIGNIFICANT = 0.05  # after Holm


@dataclass(frozen=True, slots=True)
class Measure:
    """One thing that is watched: which way is worse, and how much worse is tolerated.

    `worse`: +1 a rise, -1 a fall, 0 either way. A `relative` tolerance is a share of the base's figure; `tolerated`
    of either way is a factor (2.0: from half to twice). `collapse` False: it rings, but no gate falls.
    """

    name: str
    worse: int
    tolerated: float
    says: str
    relative: bool = False
    collapse: bool = True


MEASURES = {
    one.name: one
    for one in (
        # human text repeats under 1% of its 4-grams, looping greedy decoding 44% (Welleck et al. 2020); on the
        # shipped model good trainings raise it by 0.02 to 0.03, the first rate at which one sees it (2e-4) by 0.12
        Measure("repetition", 1, 0.05, "answers repeat themselves"),
        # training towards principles makes answers more alike: good trainings lost 6% of different words at most
        Measure("distinct_1", -1, 0.2, "answers use fewer different words", relative=True),
        Measure("distinct_2", -1, 0.2, "answers use fewer different word pairs", relative=True),
        Measure("ends_by_itself", -1, 0.05, "answers no longer end by themselves"),
        Measure("empty", 1, 0.05, "answers are empty"),
        Measure("words", 0, 2.0, "answers have become much longer or shorter"),
        # a principle may well make the model refuse more: a person must look whether harmless questions are refused
        Measure("refusal", 1, 0.1, "answers refuse more often (over-refusal?)", collapse=False),
        # of the shipped model good trainings +0.14, at 2e-4 +0.23, from 3e-4 on (loops, word salad) +0.86 to +1.22
        Measure("answers_nll_under_base", 1, 0.5, "answers are no longer the base model's language"),
    )
}


@dataclass(frozen=True, slots=True)
class Change:
    """A measure before and after. `difference` is trained - base with its paired interval; `p_value` is adjusted
    before it may ring (`_adjusted`)."""

    measure: Measure
    base: Result
    trained: Result
    difference: Result
    p_value: float
    test: McNemar | None = None

    @property
    def rings(self) -> bool:
        """True if the change is certain, and worse than what is tolerated."""
        return self._certain and self._beyond

    @property
    def _certain(self) -> bool:
        interval = self.difference.interval
        return interval is not None and not interval[0] <= 0 <= interval[1] and self.p_value < SIGNIFICANT

    @property
    def _beyond(self) -> bool:
        base, trained, one = self.base.value, self.trained.value, self.measure
        if base is None or trained is None:
            return False
        if one.worse == 0:
            return not base / one.tolerated <= trained <= base * one.tolerated
        return one.worse * (trained - base) > one.tolerated * (base if one.relative else 1.0)

    @property
    def allowed(self) -> str:
        """What is tolerated, in words."""
        one = self.measure
        if one.worse == 0:
            return f"x {1 / one.tolerated:g} to x {one.tolerated:g}"
        if one.relative:
            return f"{one.worse * one.tolerated:+.0%} of the base".replace("-", "−")
        return signed_text(one.worse * one.tolerated, self.base.scale == "rate")

    def text(self) -> str:
        """The alarm's line: what has happened, from what to what, with interval and n."""
        kind, rate = self.measure, self.base.scale == "rate"
        before, after = (value_text(arm.to_json(), rate) for arm in (self.base, self.trained))
        head = "collapse" if kind.collapse else "alarm"
        change, between = signed_text(self.difference.value, rate), signed_range(self.difference.interval, rate)
        return (f"{head}: {kind.says}: {kind.name} {before} -> {after} (change {change}, 95% interval {between}, "
                f"n = {self.difference.n}; tolerated {self.allowed})")  # fmt: skip


def collapse_watch(answers: Sequence[BothAnswers], model: Any = None, renderer: Renderer | None = None) -> Evaluation:
    """The measures before and after, alarms, and the gate "no collapse", which no collapse may ring.

    With a PEFT `model` and its `renderer` the base also weighs both answers. Answers that never came count for neither
    and stand in `unparsed`.
    """
    read = [one for one in answers if not one.failed]
    failed = len(answers) - len(read)
    found = Evaluation()
    figures = {name: _both(read, of) for name, of in OF_ANSWER.items()}
    if model is not None and renderer is not None and read:
        figures["answers_nll_under_base"] = nll_under_base(model, renderer, read)
    changes = [_change(name, *both) for name, both in figures.items()]
    changes += [_distinct_change(name, n, read) for name, n in (("distinct_1", 1), ("distinct_2", 2))]
    for one in changes:
        _keep(found, one, failed)
    changes = _adjusted(changes)
    ringing = [one for one in changes if one.rings]
    found.alarms += [one.text() for one in ringing]
    collapsed = float(sum(one.measure.collapse for one in ringing)) if read else None
    found.gates.append(Gate("no collapse", collapsed, "=", 0.0, None, len(read), "training"))
    found.tables.append(_table(changes))
    found.items[ITEMS] = _rows(read, figures)
    return found


# ---------------------------------------------------------------- what is measured of one answer


OF_ANSWER: dict[str, Callable[[Completion], float | bool]] = {
    "repetition": lambda completion: repetition(completion.text),
    "ends_by_itself": lambda completion: completion.finish == "stop",
    "empty": lambda completion: not completion.text.strip(),
    "words": lambda completion: float(len(completion.text.split())),
    "refusal": lambda completion: is_refusal(completion.text),
}

Figures = Sequence[float | bool]


def _both(read: Sequence[BothAnswers], of: Callable[[Completion], float | bool]) -> tuple[Figures, Figures]:
    return [of(one.base) for one in read], [of(one.trained) for one in read]


def nll_under_base(model: Any, renderer: Renderer, read: Sequence[BothAnswers]) -> tuple[list[float], list[float]]:
    """What each arm's answers cost the base, in nats a token (the end not counted), given the bare instruction.

    An answer without a token costs nothing; the context is as long as the answers already were.
    """
    from cai_experiment.evaluation.preference import Row, completion_logps, evaluating

    rows: list[Row] = []
    for one in read:
        prompt = renderer.prompt_ids(ask_for_answer(one.instruction), "answer", examples=0)
        rows += [(prompt, renderer.completion_ids(answer.text)[:-1]) for answer in (one.base, one.trained)]
    with evaluating(model), model.disable_adapter():
        logps = completion_logps(model, rows)
    costs = [-logp / max(1, len(tokens)) for logp, (_, tokens) in zip(logps, rows, strict=True)]
    return costs[0::2], costs[1::2]


# ---------------------------------------------------------------- before and after


def _change(name: str, base: Figures, trained: Figures) -> Change:
    """Rates by McNemar's test, means by a test of flipped signs; both with a paired bootstrap interval."""
    if all(isinstance(value, bool) for value in (*base, *trained)):
        before, after = [bool(v) for v in base], [bool(v) for v in trained]
        test, change = mcnemar(before, after), paired_rate_difference(before, after)
        arms = [Result.rate(sum(arm), len(arm)) for arm in (before, after)]
        return Change(MEASURES[name], arms[0], arms[1], change, test.p_value, test)
    difference = paired_bootstrap([float(v) for v in base], [float(v) for v in trained])
    arms = [Result.mean([float(v) for v in arm]) for arm in (base, trained)]
    p_value = paired_p_value([float(v) for v in base], [float(v) for v in trained])
    return Change(MEASURES[name], arms[0], arms[1], difference, p_value)


def _distinct_change(name: str, n: int, read: Sequence[BothAnswers]) -> Change:
    """distinct-n of both arms over answers of equal length. Its interval is a jackknife's over instructions.

    A bootstrap would draw answers twice, which adds no new n-grams: all its values would lie below the true one.
    """
    from scipy.stats import t

    base: list[list[str]] = []
    trained: list[list[str]] = []
    for one in read:
        before, after = units(one.base.text), units(one.trained.text)
        length = min(len(before), len(after))
        base.append(before[:length])
        trained.append(after[:length])
    before_all, before_without = distinct_n(base, n)
    after_all, after_without = distinct_n(trained, n)
    if before_all is None or after_all is None:
        nothing = Result(None, 0, None)
        return Change(MEASURES[name], nothing, nothing, nothing, 1.0)
    change = after_all - before_all
    changes_without = [a - b for b, a in zip(before_without, after_without, strict=True)]
    error, freedom = jackknife_error(changes_without), max(1, len(read) - 1)
    p_value = float(2 * t.sf(abs(change) / error, freedom)) if error else float(change == 0 or len(read) < 2)
    return Change(
        MEASURES[name], _jackknifed(before_all, before_without), _jackknifed(after_all, after_without),
        replace(_jackknifed(change, changes_without), scale="change"), p_value,
    )  # fmt: skip


def _jackknifed(value: float, without: Sequence[float]) -> Result:
    """A figure over all items with its interval: Student's, from its values without each item in turn."""
    from scipy.stats import t

    n = len(without)
    if n < 2:
        return Result(value, n, None)
    reach = float(t.ppf(0.975, n - 1)) * jackknife_error(without)
    return Result(value, n, (value - reach, value + reach))


def _adjusted(changes: Sequence[Change]) -> list[Change]:
    """The same changes with Holm's p-values over all of them."""
    p_values = holm([one.p_value for one in changes])
    return [replace(one, p_value=p_value) for one, p_value in zip(changes, p_values, strict=True)]


# ---------------------------------------------------------------- the report


def _keep(found: Evaluation, one: Change, failed: int) -> None:
    name, items = one.measure.name, f"{ITEMS_FOLDER}/{ITEMS}.jsonl"
    found.metrics[f"{name}_base"] = replace(one.base, unparsed=failed, items=items)
    found.metrics[f"{name}_trained"] = replace(one.trained, unparsed=failed, items=items)
    found.differences[name] = one.difference
    if one.test is not None:
        found.tests[name] = one.test
    else:
        found.p_values[name] = one.p_value


def _table(changes: Sequence[Change]) -> Table:
    rows = tuple(
        (named(one.measure.name).label, one.base, one.trained, one.difference, one.allowed, p_text(one.p_value),
         ("collapse" if one.measure.collapse else "alarm") if one.rings else "–")
        for one in changes
    )  # fmt: skip
    return Table(
        "collapse", "Collapse watch: the same held-out answers before and after",
        ("measure", "base", "trained", "change", "tolerated", "p (Holm)", "alarm"), rows,
        "An alarm needs an interval without 0, p < 0.05 (adjusted over this table alone), and more than is tolerated.",
    )  # fmt: skip


def _rows(read: Sequence[BothAnswers], figures: dict[str, tuple[Figures, Figures]]) -> list[dict[str, Any]]:
    return [
        {
            "id": one.base.id,
            "instruction": one.instruction,
            "base": {name: both[0][index] for name, both in figures.items()},
            "trained": {name: both[1][index] for name, both in figures.items()},
            "base_text": one.base.text,
            "trained_text": one.trained.text,
        }
        for index, one in enumerate(read)
    ]
