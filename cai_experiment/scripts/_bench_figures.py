"""What every suite of bench.py shares: a figure with its target and limit, interleaved timing, and counting."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

Say = Callable[[str], None]
Rounds = dict[str, list[float]]  # an arm's figure in each round, in their order


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table. `value` None means that it could not be measured, and `reason` says why: never a pass.

    `limit` is the best that this machine or the arithmetic allows, None where none is known; `arms` holds what the
    value was computed from, and `rounds` each round's figure of the arms that were timed.
    """

    name: str
    value: float | None
    target: float | None
    limit: float | None
    arms: Mapping[str, float | None] = field(default_factory=dict)
    at_most: bool = False  # the target is an upper bound
    reason: str = ""
    rounds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    note: str = ""  # what a reader of the figure must know

    @property
    def met(self) -> bool:
        """True if there is no target, or the value reaches it."""
        if self.target is None:
            return True
        if self.value is None:
            return False
        return self.value <= self.target if self.at_most else self.value >= self.target

    def as_json(self) -> dict[str, object]:
        """{"value", "target", "limit", "arms", "rounds"}, and "reason" where there is no value; NaN is null."""
        row: dict[str, object] = {"value": self.value, "target": self.target, "limit": self.limit}
        row["arms"] = dict(self.arms)
        row["rounds"] = {arm: [None if math.isnan(one) else one for one in each] for arm, each in self.rounds.items()}
        said = {"reason": self.reason, "note": self.note}
        return row | {name: words for name, words in said.items() if words}


@dataclass(frozen=True, slots=True)
class Report:
    """What a suite found, and what it measured (see `_bench_setting.setting_of`)."""

    figures: list[Figure]
    setting: Mapping[str, object]

    def as_json(self) -> dict[str, object]:
        """{NAME: figure, ..., "setting": {...}}."""
        return {**{figure.name: figure.as_json() for figure in self.figures}, "setting": dict(self.setting)}


def interleaved(arms: Mapping[str, Callable[[], float]], repeats: int, say: Say) -> Rounds:
    """The figures of each arm in `repeats` rounds; each round begins with another arm.

    Whatever else the machine does meanwhile thus falls on all arms alike.
    """
    names = list(arms)
    found: Rounds = {name: [] for name in arms}
    for number in range(repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            found[name].append(arms[name]())
            say(f"round {number + 1} of {repeats}: {name} {found[name][-1]:,.1f}")
    return found


def medians(rounds: Rounds) -> dict[str, float]:
    """Each arm's median over the rounds."""
    return {name: median(values) for name, values in rounds.items()}


def timed(work: Callable[[], float]) -> float:
    """What `work` made (tokens, rows), per second."""
    started = time.perf_counter()
    made = work()
    return made / (time.perf_counter() - started)


# ---------------------------------------------------------------- counting, without a clock


def prefix_tree_size(rows: Sequence[Sequence[int]]) -> int:
    """Distinct prefixes of all `rows` of token ids: the nodes of their trie (its root not counted).

    Sorted, each row adds what it does not share with the row before it.
    """
    encoded = sorted(np.asarray(row, dtype=">u4").tobytes() for row in rows)  # big-endian bytes sort as the ids do
    size, before = 0, np.empty(0, dtype=">u4")
    for row in (np.frombuffer(one, dtype=">u4") for one in encoded):
        shortest = min(len(row), len(before))
        differ = row[:shortest] != before[:shortest]
        size += len(row) - (int(differ.argmax()) if differ.any() else shortest)
        before = row
    return size


@dataclass(slots=True)
class Occupancy:
    """How full the slots were while rows waited.

    A slot is at work in a pass that speaks for it or weighs what it holds; it counts once if both happen.
    """

    passes: int = 0  # all
    crowded: int = 0  # passes for which there were at least as many rows as slots, or a row that was put off
    worked: int = 0  # slots at work in the crowded passes
    offered: int = 0  # slots that rows were there for in the crowded passes

    def add(self, at_hand: int, put_off: int, worked: int, slots: int) -> None:
        """One pass: rows in slots or waiting before it, rows still waiting after it, slots at work in it."""
        self.passes += 1
        if at_hand >= slots or put_off:
            self.crowded, self.worked = self.crowded + 1, self.worked + worked
            self.offered += min(slots, at_hand)

    @property
    def share(self) -> float | None:
        """Slots at work over slots, None if no pass was crowded."""
        return self.worked / self.offered if self.offered else None

    @property
    def reason(self) -> str:
        """Why there is no share; "" if there is one."""
        return "" if self.crowded else "no pass had as many rows as slots: give more --rows"

    def arms(self) -> dict[str, float]:
        """What the share was computed from."""
        return {"slots_at_work": self.worked, "slots_offered": self.offered, "passes": self.passes,
                "passes_while_rows_wait": self.crowded}  # fmt: skip


# ---------------------------------------------------------------- showing


def print_table(figures: Sequence[Figure]) -> None:
    """One row a figure: value, target, limit; below them the arms, and why a value is missing."""
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", "target", "limit", "")
    for figure in figures:
        sign = "at most" if figure.at_most else "at least"
        target = "" if figure.target is None else f"{sign} {figure.target:g}"
        verdict = "" if figure.target is None else "met" if figure.met else "missed"
        table.add_row(figure.name, _short(figure.value), target, _short(figure.limit), verdict)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for figure in figures:
        arms = ", ".join(f"{name} {_short(value)}" for name, value in figure.arms.items())
        note = f" ({figure.note})" if figure.note else ""
        console.print(f"{figure.name}: {figure.reason and 'not measured, ' + figure.reason + '; '}{arms}{note}")


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
