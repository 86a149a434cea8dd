"""Make the shipped model again, from nothing.

Run: python cai_experiment/scripts/train_nano.py            (two free cores: some 40 minutes, by its pace so far)

It stops by steps, not by the clock, and the same command resumes. Measure the result with check_nano.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.constitution.principles import DEFAULT_CONSTITUTION, load_constitution
from cai_experiment.nano import NANO_DIR


def main(argv: list[str] | None = None) -> int:
    """Parse the flags, train, say what to do next."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=NANO_DIR, help="where the model is written (default: the shipped one's folder)"
    )
    parser.add_argument("--work", type=Path, default=Path("build/nano"), help="where the state for resuming is kept")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps (default: the shipped model's)")
    parser.add_argument("--seed", type=int, default=None, help="another seed makes another model of the same kind")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args(argv)

    from cai_experiment.nano.train import TrainSettings, train

    changes = {"steps": args.steps, "seed": args.seed, "threads": args.threads}
    settings = TrainSettings(**{k: v for k, v in changes.items() if v is not None})
    train(
        settings,
        load_constitution(DEFAULT_CONSTITUTION).principles,
        args.out,
        args.work,
        lambda line: print(line, flush=True),
    )
    print("next: python cai_experiment/scripts/check_nano.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
