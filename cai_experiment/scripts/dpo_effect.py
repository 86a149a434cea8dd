"""What DPO does to the shipped model, against a control: 100 pairs, 100 steps, 200 held-out answers before and after.

Run: python cai_experiment/scripts/dpo_effect.py                      (five minutes on two cores)
     python cai_experiment/scripts/dpo_effect.py --json effect.json

Makes the pairs as generate_mvp.py does, trains and evaluates as train_dpo.py --milestone mvp does; the world's truth
says which answers have a flaw. The control is the same training with chosen and rejected swapped in half of the pairs,
drawn by a seeded coin. Writes DATA_DIR/RUN and DATA_DIR/RUN-control; the same command again resumes. Exit code 0:
every target is met; 3: one is missed.
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

FEWEST_FLAWED = 0.05
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
    """Make the pairs, train on them and on the swapped ones, print one table; gives the exit code."""
    args = parser().parse_args(argv)
    control = f"{args.run}-control"
    call(args, generate_mvp.main, args.run, "--count", str(args.count))
    training = ("--milestone", "mvp", "--steps", str(args.steps))
    call(args, train_dpo.main, args.run, *training)
    examples = read_examples(args.data_dir / args.run / "pairs.jsonl")
    mixed = shuffled(examples, args.seed)
    (args.data_dir / control).mkdir(parents=True, exist_ok=True)
    write_jsonl(args.data_dir / control / "pairs.jsonl", map(to_row, mixed))
    swapped = sum(one != other for one, other in zip(examples, mixed, strict=True))
    print(f"control: {swapped} of {len(examples)} pairs are swapped")
    call(args, train_dpo.main, control, *training)
    rows = effect(*(read_json(args.data_dir / run / "report.json") for run in (args.run, control)))
    show(rows)
    if args.json is not None:
        write_json(args.json, rows)
    return EXIT_OK if all(row["met"] for row in rows.values()) else EXIT_NO_GO


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


def effect(trained: Mapping[str, Any], control: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of the table, from the two runs' report.json: value, n, interval, target, met, base and control.

    The control has lowered the share of flawed answers if McNemar's test on the same questions says so at 5%.
    """
    found, other = trained["metrics"], control["metrics"]
    forgot = round(found["arithmetic_base"]["value"] - MAY_FORGET, 6)

    def row(name: str, target: str, met: Callable[[float], bool]) -> dict[str, Any]:
        """A rate of the trained model's answers."""
        arms = {"base": found[f"{name}_base"], "control": other[f"{name}_trained"]}
        value = found[f"{name}_trained"]
        return {**value, "target": target, "met": value["value"] is not None and met(value["value"]), **arms}

    def over_base(name: str) -> dict[str, Any]:
        """A mean of the trained model's answers over the base's."""
        base = found[f"{name}_base"]["value"]
        ratios = [m[f"{name}_trained"]["value"] / base if base else None for m in (found, other)]
        met = ratios[0] is not None and abs(round(ratios[0] - 1, 6)) <= MAY_DRIFT
        bare = {"n": found[f"{name}_trained"]["n"], "interval": None}
        return {"value": ratios[0], **bare, "target": "0.9 to 1.1 of the base", "met": met,
                "base": {"value": base, **bare}, "control": {"value": ratios[1], **bare}}  # fmt: skip

    test = control["tests"]["flawed_answers"]
    lowered = test["p_value"] < SIGNIFICANT and test["only_base"] > test["only_trained"]
    return {
        "flawed_answers": row("flawed_answers", f"at most {FEWEST_FLAWED}", lambda value: value <= FEWEST_FLAWED),
        "on_topic": row("on_topic", f"at least {RATE}", lambda value: value >= RATE),
        "ends_by_itself": row("ends_by_itself", f"at least {RATE}", lambda value: value >= RATE),
        "arithmetic": row("arithmetic", f"at least {forgot:g}", lambda value: value >= forgot),
        "distinct_2_ratio": over_base("distinct_2"),
        "sentences_ratio": over_base("sentences"),
        "control_flawed_answers": {
            **other["flawed_answers_trained"], "target": f"not lower than the base (McNemar p {test['p_value']:.2g})",
            "met": not lowered, "base": other["flawed_answers_base"], "control": other["flawed_answers_trained"],
        },
    }  # fmt: skip


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print the table: each figure with its Wilson interval, the target, and whether it is met."""
    from rich.console import Console
    from rich.table import Table

    def cell(result: Mapping[str, Any]) -> str:
        if result["value"] is None:
            return "not measured"
        return f"{result['value']:.3f}" + (" ({:.3f}-{:.3f})".format(*result["interval"]) if result["interval"] else "")

    table = Table("figure", "n", "base", "trained", "control", "target", "")
    for name, row in rows.items():
        trained = "" if name.startswith("control") else cell(row)
        cells = (cell(row["base"]), trained, cell(row["control"]), row["target"], "met" if row["met"] else "missed")
        table.add_row(name, str(row["n"]), *cells)
    Console(width=150).print(table)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
