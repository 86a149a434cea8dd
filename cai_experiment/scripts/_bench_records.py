"""Suite records: how fast the journal takes lines, and how long a resume of 100,000 lines takes.

A resume has two parts: the scan, after which it is known what is finished, and the replay, in which every example goes
through its stages again with the completions that stand there. The replay's journal is a whole run's, made by the
scripted engine with the stages of milestone mvp; its figure holds both parts.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.engines.base import Completion
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.instruct import Instruction, example_id
from cai_experiment.pipeline.replay import Replies
from cai_experiment.pipeline.runner import run_pipeline
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.records.files import encode_line
from cai_experiment.records.store import Journal, RunFolder
from cai_experiment.scripts._bench_chain import stage_settings
from cai_experiment.scripts._bench_figures import Figure, Report, Say, interleaved, medians, timed
from cai_experiment.scripts._bench_setting import setting_of
from cai_experiment.scripts._scripted_engine import ScriptedEngine

ROWS, WARM_ROWS = 100_000, 100
LINES_AN_EXAMPLE = {"targeted": 45, "random": 12}  # nearly: the figure is reckoned by the lines that were written
WORDS = 3 * "Turn the water off, open the tap and change the washer. If it still drips, ask someone who knows pipes. "


def records(args: argparse.Namespace, say: Say) -> Report:
    """All figures, over `--rows` lines."""
    rows = args.rows or ROWS
    with tempfile.TemporaryDirectory() as folder:
        path, bare = Path(folder) / "journal.jsonl", Path(folder) / "bare.jsonl"
        _append(path, WARM_ROWS)  # untimed
        _write(bare, WARM_ROWS)
        writes = interleaved(
            {"journal": lambda: timed(lambda: _append(path, rows)),
             "bare_write": lambda: timed(lambda: _write(bare, rows))},
            args.repeats, say)  # fmt: skip
        scale = ROWS / rows  # seconds of 100,000 lines
        scans = interleaved({"resume": lambda: scale * _scan(path, rows), "bare_json": lambda: scale * _parse(path)},
                            args.repeats, say)  # fmt: skip
        run, settings = Path(folder) / "run", _run_of(rows, args)
        _through(run, settings)
        lines = (run / "journal.jsonl").read_bytes().count(b"\n")
        say(f"a run of {settings.max_draws:,} examples, {lines:,} lines")
        whole = ROWS / lines
        replays = interleaved(
            {"replay": lambda: whole * _through(run, settings),
             "bare_json": lambda: whole * _parse(run / "journal.jsonl")},
            args.repeats, say)  # fmt: skip
    speeds, scan, replay = medians(writes), medians(scans), medians(replays)
    return Report([
        Figure("rows_per_second", speeds["journal"], None, speeds["bare_write"], speeds, rounds=writes),
        Figure("resume_scan_seconds_100k", scan["resume"], 2.0, scan["bare_json"], scan, True, rounds=scans),
        Figure("resume_replay_seconds_100k", replay["replay"], None, replay["bare_json"], replay, True, rounds=replays),
    ], setting_of(args, rows))  # fmt: skip


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


def _run_of(lines: int, args: argparse.Namespace) -> RunSettings:
    """A run whose journal has about so many lines."""
    count = max(1, lines // LINES_AN_EXAMPLE[args.principles])
    texts = [Instruction(example_id(i), f"How do I mend thing number {i}?", "bench") for i in range(count)]
    return RunSettings(count, count, stage_settings(args.seed, args.principles), instructions=tuple(texts))


def _through(path: Path, settings: RunSettings) -> float:
    """Seconds of the run, or of its resume: then nothing is asked."""
    engine, resumed = ScriptedEngine(), path.exists()
    started = time.perf_counter()
    with (
        RunFolder(path) as folder,
        ContentLogger(0, path / "content_log.jsonl") as logger,
        Progress(settings.max_draws, "rows", 0) as progress,
    ):
        result = run_pipeline(settings, folder, engine, engine, load_constitution(), logger, progress)
    assert result.complete and bool(engine.asked) != resumed
    return time.perf_counter() - started


def _parse(path: Path) -> float:
    started = time.perf_counter()
    with open(path, "rb") as file:
        for line in file:
            json.loads(line)
    return time.perf_counter() - started
