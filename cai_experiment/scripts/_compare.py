"""eval_model.py --compare RUN RUN [RUN ...]: the runs' settings and trained models beside each other."""

from __future__ import annotations

import argparse

from cai_experiment.errors import EXIT_OK
from cai_experiment.records.files import show


def run(args: argparse.Namespace) -> int:
    """Compare args.compare's runs in args.data_dir: the terminal, compare-RUN-RUN/compare.html, tables and figures.

    Raises BadInputError for fewer than two runs, one named twice, an unknown one, and one without a report.
    """
    from cai_experiment.evaluation.reporting.compare_report import compare_runs, print_comparison, write_comparison

    compared = compare_runs(args.data_dir, args.compare)
    page = write_comparison(args.data_dir, compared)
    print_comparison(compared)
    print(f"comparison: {show(page)}")
    return EXIT_OK
