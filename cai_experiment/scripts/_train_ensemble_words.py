"""What train_ensemble.py says at its end: a table of the held-out rows, and what to do next."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from cai_experiment.ensemble.patterns import letter


def size(count: float) -> str:
    """Bytes in words: "3.4 MB", "10.2 GB"."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def print_summary(summary: Mapping[str, Any]) -> None:
    """Nats a token on the held-out rows, by data set: the heads beside what they are to beat."""
    from cai_experiment.models.tables import plain_table, show

    experts = [letter(place) for place in range(len(summary["experts"]))]
    names = ("held out", "tokens", "mixture", "select", "uniform", *experts, "best", "chosen")
    title = (
        f"nats a token at epoch {summary['best_epoch']}, lower is better: the heads' mixture and their arg-max expert, "
        f"the uniform mixture, each expert alone, the best expert of each token (a bound); chosen: share of tokens"
    )
    table = plain_table(title, names, names[1:-1])
    for name, row in summary["held_out"].items():
        values = (row["mixture"], row["select"], row["uniform"], *row["experts"], row["best_expert"])
        shares = " ".join(f"{mark} {share:.0%}" for mark, share in zip(experts, row["shares"], strict=True))
        table.add_row(name, f"{row['tokens']:,}", *(f"{value:.4f}" for value in values), shares)
    show(table)


def closing(summary: Mapping[str, Any], args: argparse.Namespace) -> list[str]:
    """Warnings, times, where the heads are, the next command."""
    found = [*_warnings(summary), *_times(summary["history"])]
    heads = summary["heads"]
    found.append(f"heads: {heads} (epoch {summary['best_epoch']} of {summary['said']['num_epochs']})")
    found.append(f"next: python cai_experiment/scripts/eval_ensemble.py --model_weights {heads}")
    return found


def _warnings(summary: Mapping[str, Any]) -> list[str]:
    """A line where training did not do what it is for."""
    row = next(reversed(list(summary["held_out"].values())))  # all rows
    best = min(row["experts"])
    found = []
    if row["mixture"] >= best:
        mark = letter(row["experts"].index(best))
        found.append(f"warning: on held-out rows the heads ({row['mixture']:.4f}) are not better than expert {mark} "
                     f"alone ({best:.4f}): more rows or epochs, or a higher --learning_rate")  # fmt: skip
    if row["mixture"] >= row["uniform"]:
        found.append("warning: the heads are not better than the uniform mixture: they have learned nothing")
    if summary["best_epoch"] == summary["said"]["num_epochs"] and _still_falling(summary["history"]):
        found.append("the held-out loss was still falling in the last epoch: --num_epochs or --learning_rate may go up")
    return found


def _still_falling(history: list[Mapping[str, Any]]) -> bool:
    """True if the last epoch lowered the held-out loss by 1% or more."""
    if len(history) < 3:
        return False
    before, last = (next(reversed(list(row["held_out"].values())))["loss"] for row in history[-2:])
    return bool(last < before - 0.01 * abs(before))


def _times(history: list[Mapping[str, Any]]) -> list[str]:
    """What the first epoch took and what the others did, if this run saw both whole."""
    if len(history) < 3 or not history[1]["states_seconds"]:
        return []
    first = history[1]["seconds"] + history[1]["states_seconds"]
    later = sum(row["seconds"] for row in history[2:]) / len(history[2:])
    return [f"time: epoch 1 {first:.1f} s with the experts' states, each further one {later:.1f} s: "
            f"{first / max(later, 1e-9):.0f} times faster"]  # fmt: skip
