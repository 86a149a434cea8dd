"""Did it help? Evaluate a trained adapter against its base on the same items, and write the report.

Run: python cai_experiment/scripts/eval_model.py --milestone mvp
     python cai_experiment/scripts/eval_model.py --milestone full --suite harmbench --judge http://127.0.0.1:8000/v1
     python cai_experiment/scripts/eval_model.py --suite detection --models nano,qwen2.5-1.5b
     python cai_experiment/scripts/eval_model.py --compare mvp mvp-no-critique

Suites: milestone (held-out pairs from separate instructions, answers, judge, harm, forgetting, collapse), harmbench,
mtbench, forgetting (lm-eval and GSM8K), detection (which model sees harm at all). Each adds its part to DATA_DIR/NAME's
report.json and report.html and leaves the others' alone; without --suite a milestone's own are run. The same command
goes on where a killed one was. Exit code 0: go; 3: a gate says no-go.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_NO_GO, EXIT_OK, BadInputError
from cai_experiment.milestones import MILESTONES
from cai_experiment.models.choice import resolve_model
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts import _evaluation, _evaluation_flags, _held_out, _plan
from cai_experiment.scripts._common import run_main
from cai_experiment.scripts._following import take_generator
from cai_experiment.scripts._verbosity import last_word


def parser() -> argparse.ArgumentParser:
    """The flags, those of every script among them."""
    return _evaluation_flags.parser(__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Compare runs, or evaluate one; gives the exit code."""
    args = parser().parse_args(argv)
    if args.compare is not None:
        from cai_experiment.scripts import _compare

        return _compare.run(args)
    if args.milestone is None and args.run is None:
        if args.suite == ["detection"] and args.plan:
            print(*_evaluation.detection_plan(args), sep="\n")
            return EXIT_OK
        if args.suite == ["detection"]:
            return _evaluation.detection_alone(args)
        raise BadInputError("neither --milestone nor --run is given", "e.g. --milestone mvp")
    args.milestone = args.milestone or _evaluation.milestone_of(args)
    args.run = args.run or args.milestone
    args.held_out = args.held_out or _held_out.FEW.get(args.milestone, _held_out.HELD_OUT)
    milestone, whose = MILESTONES[args.milestone], take_generator(args)
    choice = resolve_model(args.model, _plan.machine(args))
    if args.plan:
        print(*_evaluation.plan(args, milestone, choice), sep="\n")
        return EXIT_OK
    _evaluation.finished_training(args)  # a missing adapter is named before anything is loaded
    print(whose, end="")
    with RunFolder(args.data_dir / args.run):
        report = _evaluation.evaluate(args, milestone, choice)
    from cai_experiment.evaluation.report import print_report

    print_report(report)
    place = shlex.quote(str(args.data_dir / args.run / "report.html"))
    print(f"report: {place}")
    last_word(args.verbosity, f"{report['verdict']}; report: {place}")
    return EXIT_OK if report["verdict"] == "go" else EXIT_NO_GO


if __name__ == "__main__":
    raise SystemExit(run_main(main))
