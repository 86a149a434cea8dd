"""Soak: kill -9 a run at random moments, resume it each time, and compare its files with an unbroken run's.

Run: python cai_experiment/scripts/kill_test.py                           (20 kills of a 40-pair run on the model)
     python cai_experiment/scripts/kill_test.py --cycles 50
     python cai_experiment/scripts/kill_test.py --scripted --cycles 1000   (an engine of written words, no torch)
     python cai_experiment/scripts/kill_test.py --cycles 50 --count 10 --batch-size 128 --keep /tmp/soak

A cycle is a kill and a resume. Every run is a fork of one parent that has imported the libraries but computed nothing,
and dies of a real SIGKILL. Exit code 0: every byte is as in a run that nobody killed, no finished row was lost or made
twice, the content log tells each example once, and no more was asked again than was in flight; 1: not so. A kill costs
what the slots hold, so the model runs with 16 unless --batch-size says otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
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
from cai_experiment.scripts._kill_count import Logged, Session, Tally, lost_lines, read_session
from cai_experiment.scripts._kill_log import log_faults
from cai_experiment.scripts._kill_runs import Job, run_and_kill, size, unbroken

FILES = ("instructions.jsonl", "pairs.jsonl", "rejected.jsonl")
LOG = "content_log.jsonl"
KILLS_A_RUN = 25  # about; then the run may end, is compared, and the next one begins
PAIRS, SCRIPTED_PAIRS = 40, 10
SLOTS = 16


def asked_log(folder: Path) -> Path:
    """Where the jobs of `main` write what their engines are asked."""
    return folder.with_name(folder.name + ".asked")


def faults(folder: Path, reference: Path) -> list[str]:
    """What differs between a resumed run and the unbroken one, and completions that were made twice."""
    found = [name for name in FILES if (folder / name).read_bytes() != (reference / name).read_bytes()]
    ids = [row["id"] for row in Journal(folder / "journal.jsonl").rows() if row.get("finish") in ("stop", "length")]
    return found + [f"{len(ids) - len(set(ids))} completions made twice"] * (len(ids) > len(set(ids)))


def soak(job: Job, work: Path, cycles: int, seed: int, say: Callable[[str], None]) -> list[str]:
    """`cycles` kills and resumes, over as many runs as that takes; gives what is wrong."""
    chance, tally, done, number = random.Random(seed), Tally(), 0, 0
    reference = work / "unbroken"
    unbroken(job, reference)
    most = 2 * size(reference / "journal.jsonl") // min(cycles, KILLS_A_RUN)
    found: list[str] = []
    while done < cycles:
        number += 1
        folder, sessions = work / f"run-{number}", []
        while done < cycles:
            since = size(asked_log(folder))
            killed = run_and_kill(job, folder, chance.randint(0, most), 0.05 * chance.random())
            sessions.append(read_session(asked_log(folder), since, folder / "journal.jsonl", killed))
            if not killed:
                break
            done += 1
            if done % max(1, cycles // 20) == 0:
                say(f"kill {done} of {cycles}: run {number} had {sessions[-1].lines} lines")
        found += [f"run {number}: {fault}" for fault in _end(job, folder, reference, sessions, tally)]
    say(f"{number} runs; {tally}")
    return found


def _end(job: Job, folder: Path, reference: Path, sessions: list[Session], tally: Tally) -> list[str]:
    """Let the run come to its end, and look for everything that could be wrong with it."""
    since = size(asked_log(folder))
    unbroken(job, folder)
    journal = folder / "journal.jsonl"
    sessions.append(read_session(asked_log(folder), since, journal, killed=False))
    found = faults(folder, reference) + lost_lines(sessions, journal.read_bytes())
    found += log_faults(folder / LOG, reference / LOG, sum(session.killed for session in sessions))
    return found + tally.add(sessions, Journal(journal).rows())


def main(argv: Sequence[str] | None = None) -> int:
    """Import what a run needs, fork and kill; gives the exit code."""
    parser = generation_parser(__doc__, "batch", plans=False)
    parser.add_argument("--cycles", type=positive_int, default=20, metavar="N", help="kills, each with its resume")
    parser.add_argument("--scripted", action="store_true", help="an engine of written words, which imports no torch")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep the runs here (default: a temporary folder)")
    parser.set_defaults(verbosity=0)
    args = parser.parse_args(argv)
    args.count = args.count or (SCRIPTED_PAIRS if args.scripted else PAIRS)
    args.batch_size = args.batch_size or SLOTS
    import datasketch  # noqa: F401 - imported once, for all children

    if not args.scripted:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    with tempfile.TemporaryDirectory() as temporary:
        work = args.keep or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        found = soak(lambda folder: _job(args, folder), work, args.cycles, args.seed, print)
        print(*found, f"{args.cycles} cycles, {time.monotonic() - started:.0f} s: "
              f"{'FAILED' if found else 'bytes equal, nothing lost or made twice'}", sep="\n")  # fmt: skip
    return EXIT_FAILURE if found else EXIT_OK


def _job(args: argparse.Namespace, path: Path) -> None:
    """One run, from loading the model on."""
    settings = run_settings(args, MILESTONES["batch"])
    with RunFolder(path) as folder:
        if args.scripted:
            from cai_experiment.scripts._scripted_engine import ScriptedEngine

            engine = Logged(ScriptedEngine(os.getpid()), asked_log(path))  # another order in each process
        else:
            engine = Logged(load_engines(args)[0], asked_log(path))
        generate(args, settings, folder, engine, engine)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
