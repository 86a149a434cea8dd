"""What DPO and SFT do to the shipped model, against a control: 100 pairs, 200 held-out answers before and after.

Run: python cai_experiment/scripts/dpo_effect.py                      (eight minutes on two cores)
     python cai_experiment/scripts/dpo_effect.py --json effect.json

Makes the pairs as generate_mvp.py does, trains and evaluates as train_dpo.py --milestone mvp does; the world's truth
says which answers have a flaw. The arms, on the same pairs and the same questions: DPO; SFT on the revisions of all
training pairs (--sft-first --sft-share 1); SFT, then DPO (--sft-first); and the control, DPO with chosen and rejected
swapped in half of the pairs, drawn by a seeded coin. Writes DATA_DIR/RUN and DATA_DIR/RUN-ARM; the same command again
resumes. Exit code 0: every target is met; 3: one is missed.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_NO_GO, EXIT_OK
from cai_experiment.milestones import CHECKPOINT_DIR, DATA_DIR, MILESTONES
from cai_experiment.records.files import read_examples, read_json, write_json, write_jsonl
from cai_experiment.records.schema import Example, PreferencePair, to_row
from cai_experiment.scripts import generate_mvp, train_dpo
from cai_experiment.scripts._common import positive_int, run_main

FEWEST_FLAWED = {"dpo": 0.05, "sft_dpo": 0.03}
ARMS: dict[str, tuple[str, ...]] = {  # flags of train_dpo.py
    "dpo": (),
    "sft": ("--sft-first", "--sft-share", "1"),
    "sft_dpo": ("--sft-first",),
    "control": (),
}
RATE = 0.95  # on topic; ends by itself
MAY_FORGET, MAY_DRIFT, SIGNIFICANT = 0.05, 0.1, 0.05
PAIRS, STEPS = MILESTONES["mvp"].pairs, MILESTONES["mvp"].dpo_steps


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--run", metavar="NAME", default="dpo_effect", help="its folders (default: %(default)s)")
    flags.add_argument("--data-dir", type=Path, default=DATA_DIR)
    flags.add_argument("--checkpoint-dir", type=Path, default=CHECKPOINT_DIR)
    flags.add_argument("--count", type=positive_int, default=PAIRS, metavar="N", help="pairs (default: %(default)s)")
    flags.add_argument("--steps", type=positive_int, default=STEPS, metavar="N", help="(default: %(default)s)")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--fresh", action="store_true", help="start anew; the old folders are moved, never deleted")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    flags.add_argument("--debug", action="store_true", help="show tracebacks")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pairs, train every arm on them, print one table; gives the exit code."""
    args = parser().parse_args(argv)
    call(args, generate_mvp.main, args.run, "--count", str(args.count))
    examples = read_examples(args.data_dir / args.run / "pairs.jsonl")
    reports = {}
    for arm, flags in ARMS.items():
        run = args.run if arm == "dpo" else f"{args.run}-{arm}"
        if arm != "dpo":
            give_pairs(args.data_dir / run, shuffled(examples, args.seed) if arm == "control" else examples)
        steps = () if arm == "sft" else ("--steps", str(args.steps))  # which are DPO's
        call(args, train_dpo.main, run, "--milestone", "mvp", *steps, *flags)
        reports[arm] = read_json(args.data_dir / run / "report.json")
    rows = effect(reports)
    show(rows)
    if args.json is not None:
        write_json(args.json, rows)
    return EXIT_OK if all(row["met"] for row in rows.values()) else EXIT_NO_GO


def give_pairs(folder: Path, examples: Sequence[Example]) -> None:
    """Write the pairs of an arm into its run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "pairs.jsonl", map(to_row, examples))


def call(args: argparse.Namespace, script: Callable[[Sequence[str]], int], run: str, *flags: str) -> None:
    """Run one of the lab's scripts on the shipped model; whether its own gates pass is not asked here."""
    places = ("--data-dir", str(args.data_dir), "--checkpoint-dir", str(args.checkpoint_dir), "--seed", str(args.seed))
    script(["--model", "nano", "--run", run, *places, *flags, *(["--fresh"] if args.fresh else [])])


def shuffled(examples: Sequence[Example], seed: int) -> list[Example]:
    """The same examples, chosen and rejected swapped wherever a seeded coin falls so."""
    coin = random.Random(f"swap/{seed}")

    def swap(example: Example) -> Example:
        pair = example.preference_pair
        return replace(example, preference_pair=PreferencePair(pair.prompt, pair.rejected, pair.chosen))

    return [swap(example) if coin.random() < 0.5 else example for example in examples]


def effect(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of the table, from the report.json of every arm: value, n, interval, target, met, and every arm's value.

    A row's `value` is DPO's; its target holds for DPO and for SFT with DPO, but for the share of flawed answers, where
    each has its own. The control has lowered that share if McNemar's test on the same questions says so at 5%.
    """
    metrics = {arm: report["metrics"] for arm, report in reports.items()}
    forgot = round(metrics["dpo"]["arithmetic_base"]["value"] - MAY_FORGET, 6)
    flawed = _arms(metrics, "flawed_answers")
    rows = {
        "flawed_answers": _row(flawed, *_at_most(FEWEST_FLAWED["dpo"]), of=("dpo",)),
        "sft_dpo_flawed_answers": _row(flawed, *_at_most(FEWEST_FLAWED["sft_dpo"]), of=("sft_dpo",)),
        "on_topic": _row(_arms(metrics, "on_topic"), *_at_least(RATE)),
        "ends_by_itself": _row(_arms(metrics, "ends_by_itself"), *_at_least(RATE)),
        "arithmetic": _row(_arms(metrics, "arithmetic"), *_at_least(forgot)),
    }
    for name in ("distinct_2", "sentences"):
        steady = ("0.9 to 1.1 of the base", lambda value: abs(round(value - 1, 6)) <= MAY_DRIFT)
        rows[f"{name}_ratio"] = _row(_over_base(_arms(metrics, name)), *steady)
    test = reports["control"]["tests"]["flawed_answers"]
    lowered = test["p_value"] < SIGNIFICANT and test["only_base"] > test["only_trained"]
    target = f"not lower than the base (McNemar p {test['p_value']:.2g})"
    rows["control_flawed_answers"] = _row(flawed, target, lambda value: not lowered, of=("control",))
    return rows


Arm = Mapping[str, Any]


def _arms(metrics: Mapping[str, Mapping[str, Any]], name: str) -> dict[str, Arm]:
    """One figure of the base and of every arm's trained model."""
    return {"base": metrics["dpo"][f"{name}_base"], **{arm: found[f"{name}_trained"] for arm, found in metrics.items()}}


def _over_base(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """Every arm's mean over the base's; the base's own as it is."""
    base = arms["base"]["value"]

    def over(arm: str, value: float | None) -> float | None:
        return value if arm == "base" else value / base if base and value is not None else None

    return {arm: {"value": over(arm, f["value"]), "n": f["n"], "interval": None} for arm, f in arms.items()}


def _row(
    arms: Mapping[str, Arm], target: str, met: Callable[[float], bool], of: Sequence[str] = ("dpo", "sft_dpo")
) -> dict[str, Any]:
    """A row of the table: met if the target holds for all arms `of`."""
    values = [arms[arm]["value"] for arm in of]
    is_met = all(value is not None and met(value) for value in values)
    return {**arms[of[0]], "target": target, "met": is_met, **arms}


def _at_most(limit: float) -> tuple[str, Callable[[float], bool]]:
    return f"at most {limit:g}", lambda value: value <= limit


def _at_least(limit: float) -> tuple[str, Callable[[float], bool]]:
    return f"at least {limit:g}", lambda value: value >= limit


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table: each figure with its Wilson interval, the target, and whether it is met."""
    from rich.console import Console
    from rich.table import Table

    def cell(result: Mapping[str, Any]) -> str:
        if result["value"] is None:
            return "not measured"
        return f"{result['value']:.3f}" + (" ({:.3f}-{:.3f})".format(*result["interval"]) if result["interval"] else "")

    table = Table("figure", "n", "base", *ARMS, "target", "")
    for name, row in rows.items():
        cells = (cell(row[arm]) for arm in ("base", *ARMS))
        table.add_row(name, str(row["n"]), *cells, row["target"], "met" if row["met"] else "missed")
    Console(width=190).print(table)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
