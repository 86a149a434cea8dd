"""Suite records: how fast the journal takes lines, and how long a resume of 100,000 lines takes to read them."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cai_experiment.engines.base import Completion
from cai_experiment.pipeline.replay import Replies
from cai_experiment.records.files import encode_line
from cai_experiment.records.store import Journal
from cai_experiment.scripts._bench_figures import Figure, Say, interleaved, timed

ROWS, WARM_ROWS = 100_000, 100
WORDS = 3 * "Turn the water off, open the tap and change the washer. If it still drips, ask someone who knows pipes. "


def records(args: argparse.Namespace, say: Say) -> list[Figure]:
    """Both figures, over `--rows` lines."""
    rows = args.rows or ROWS
    with tempfile.TemporaryDirectory() as folder:
        path, bare = Path(folder) / "journal.jsonl", Path(folder) / "bare.jsonl"
        _append(path, WARM_ROWS)  # untimed
        _write(bare, WARM_ROWS)
        speeds = interleaved(
            {"journal": lambda: timed(lambda: _append(path, rows)),
             "bare_write": lambda: timed(lambda: _write(bare, rows))},
            args.repeats, say)  # fmt: skip
        scale = ROWS / rows  # seconds of 100,000 lines
        scans = interleaved({"resume": lambda: scale * _scan(path, rows), "bare_json": lambda: scale * _parse(path)},
                            args.repeats, say)  # fmt: skip
    return [
        Figure("rows_per_second", speeds["journal"], None, speeds["bare_write"], speeds),
        Figure("resume_scan_seconds_100k", scans["resume"], 2.0, scans["bare_json"], scans, at_most=True),
    ]


def completions(rows: int) -> Iterator[Completion]:
    """Completions as a run makes them; every line holds a text, though most of a run's are shorter verdicts."""
    for number in range(rows):
        yield Completion(f"{number:06d}/answer/0", WORDS, "stop", 300, 20, 80)


def _append(path: Path, rows: int) -> int:
    path.unlink(missing_ok=True)
    journal = Journal(path)
    for completion in completions(rows):
        journal.append(asdict(completion))
    journal.close()
    return rows


def _write(path: Path, rows: int) -> int:
    """The same bytes without the journal's care, encoded one by one and written at once."""
    with open(path, "wb") as file:
        file.writelines(encode_line(asdict(completion)) for completion in completions(rows))
        file.flush()
        os.fsync(file.fileno())
    return rows


def _scan(path: Path, rows: int) -> float:
    """Seconds until a resumed run knows what is finished, one completion looked up."""
    started = time.perf_counter()
    replies = Replies(Journal(path))
    last = replies.get(f"{rows - 1:06d}/answer/0")
    seconds = time.perf_counter() - started
    assert len(replies) == rows and last is not None
    return seconds


def _parse(path: Path) -> float:
    started = time.perf_counter()
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)
    return time.perf_counter() - started
