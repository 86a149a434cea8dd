"""Soak: kill -9 a run at random moments, resume it each time, and compare its files with an unbroken run's.

Run: python cai_experiment/scripts/kill_test.py                 (20 kills of a 40-pair run; some minutes on a CPU)
     python cai_experiment/scripts/kill_test.py --kills 50 --count 10 --keep /tmp/soak

Every run is a fork of one parent that has imported the libraries but computed nothing, and dies of a real SIGKILL.
Exit code 0: every byte is equal and no completion was made twice; 1: not so.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_FAILURE, EXIT_OK
from cai_experiment.milestones import MILESTONES
from cai_experiment.records.store import Journal, RunFolder
from cai_experiment.scripts._common import positive_int, run_main
from cai_experiment.scripts._generation import generate, generation_parser, load_engines, run_settings

FILES = ("instructions.jsonl", "pairs.jsonl", "rejected.jsonl")
Job = Callable[[Path], None]


def fork(job: Job, folder: Path) -> int:
    """Run `job(folder)` in a child with its output in `folder`.log; gives the child's process id."""
    child = os.fork()
    if child:
        return child
    code = EXIT_FAILURE
    try:
        log = os.open(folder.with_name(folder.name + ".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        job(folder)
        code = EXIT_OK
    finally:
        os._exit(code)


def unbroken(job: Job, folder: Path) -> None:
    """One run without a kill; raises RuntimeError if it fails."""
    if os.waitpid(fork(job, folder), 0)[1] != 0:
        raise RuntimeError(f"a run that nobody killed failed; see {folder}.log")


def run_and_kill(job: Job, folder: Path, lines: int, chance: random.Random) -> bool:
    """Kill a run some time after it has written `lines` further journal lines; False if it ended before."""
    journal, child = folder / "journal.jsonl", fork(job, folder)
    goal = _lines(journal) + lines
    while _lines(journal) < goal:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.02)
    time.sleep(chance.random() * 0.2)  # the moment within a step is random too
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def faults(folder: Path, reference: Path) -> list[str]:
    """What differs between a resumed run and the unbroken one, and completions that were made twice."""
    found = [name for name in FILES if (folder / name).read_bytes() != (reference / name).read_bytes()]
    ids = [row["id"] for row in Journal(folder / "journal.jsonl").rows()]
    return found + [f"{len(ids) - len(set(ids))} completions made twice"] * (len(ids) > len(set(ids)))


def soak(job: Job, work: Path, kills: int, seed: int, say: Callable[[str], None]) -> list[str]:
    """`kills` kills, over as many runs as that takes; gives what differed from an unbroken run."""
    chance, done, number = random.Random(seed), 0, 0
    reference = work / "unbroken"
    unbroken(job, reference)
    total = _lines(reference / "journal.jsonl")
    say(f"unbroken run: {total} completions")
    found: list[str] = []
    while done < kills:
        number += 1
        folder = work / f"run-{number}"
        while done < kills and run_and_kill(job, folder, chance.randint(0, max(1, 2 * total // kills)), chance):
            done += 1
            say(f"kill {done} of {kills}: run {number} at {_lines(folder / 'journal.jsonl')} completions")
        unbroken(job, folder)
        found += [f"run {number}: {fault}" for fault in faults(folder, reference)]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Import what a run needs, fork and kill; gives the exit code."""
    parser = generation_parser(__doc__, "batch")
    parser.add_argument("--kills", type=positive_int, default=20, metavar="N")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs here (default: a temporary folder)")
    parser.set_defaults(count=40, verbosity=0)
    args = parser.parse_args(argv)
    import datasketch  # noqa: F401 - imported once, for all children
    import torch  # noqa: F401
    import transformers  # noqa: F401

    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        found = soak(lambda folder: _job(args, folder), work, args.kills, args.seed, print)
        print(*found, f"{args.kills} kills, {time.monotonic() - started:.0f} s: {'FAILED' if found else 'bytes equal'}",
              sep="\n")  # fmt: skip
    return EXIT_FAILURE if found else EXIT_OK


def _job(args: argparse.Namespace, path: Path) -> None:
    """One run, from loading the model on."""
    settings = run_settings(args, MILESTONES["batch"])
    with RunFolder(path) as folder:
        generate(args, settings, folder, *load_engines(args))


if __name__ == "__main__":
    raise SystemExit(run_main(main))
