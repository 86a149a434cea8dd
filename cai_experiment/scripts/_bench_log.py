"""Suite log: what the content log costs a run of the shipped model, which speaks faster than any other.

Two figures for levels 2 and 3: the share of a run's wall time that is spent in telling (the texts made up, written into
the file, printed into a file), by the clock inside of it; and whole runs with the log over whole runs without.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.hardware import detect
from cai_experiment.observe.content_logger import CONTENT_LOG, ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.runner import run_pipeline
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.pipeline.story import Story
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._bench_chain import instructions_for, stage_settings
from cai_experiment.scripts._bench_figures import Figure, Report, Rounds, Say, interleaved, medians
from cai_experiment.scripts._bench_generation import Chain
from cai_experiment.scripts._bench_setting import setting_of

ROWS, WARM_ROWS = 100, 2
AT_MOST = 0.01  # of a run's wall time
LEVELS = (2, 3)


class NoLog(ContentLogger):
    """Says and writes nothing: the other arm."""

    def log_stage(self, stage: str, content: str, metadata: Mapping[str, Any] | None = None, truncate: int = 0) -> None:
        """Nothing."""


@dataclass
class Clock:
    """Seconds spent in telling."""

    seconds: float = 0.0


@contextmanager
def told(clock: Clock) -> Iterator[None]:
    """Within it `clock` counts the time in `Story.tell`, through which everything goes that a pipeline logs."""
    tell = Story.tell

    def timed(self: Story, *arguments: Any) -> None:
        began = time.perf_counter()
        try:
            tell(self, *arguments)
        finally:
            clock.seconds += time.perf_counter() - began

    Story.tell = timed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        Story.tell = tell  # type: ignore[method-assign]


def log(args: argparse.Namespace, say: Say) -> Report:
    """All figures, over `--rows` examples."""
    from cai_experiment.engines.load import LoadSettings, load_engine

    rows = args.rows or ROWS
    engine: Any = load_engine(LoadSettings(model=args.model, engine="hf", batch_size=args.batch_size, seed=args.seed))
    say(engine.first_line)
    stages, model = stage_settings(args.seed, args.principles), resolve_model(args.model, detect()).path_or_id
    _run(Chain(engine, instructions_for(WARM_ROWS, args.seed), stages, model), None)
    chain = Chain(engine, instructions_for(rows, args.seed), stages, model)
    shares: Rounds = {f"level_{level}": [] for level in LEVELS}

    def at(level: int | None) -> float:
        seconds, share = _run(chain, level)
        if level is not None:
            shares[f"level_{level}"].append(share)
        return seconds

    arms = {"without": partial(at, None)} | {f"level_{level}": partial(at, level) for level in LEVELS}
    rounds = interleaved(arms, args.repeats, say)
    wall, share = medians(rounds), medians(shares)
    figures = [
        Figure(f"log_share_level_{level}", share[f"level_{level}"], AT_MOST, None, share, True, rounds=shares)
        for level in LEVELS
    ]
    figures += [
        Figure(f"log_wall_level_{level}_over_none", wall[f"level_{level}"] / wall["without"], None, 1.0, wall, True,
               rounds=rounds)
        for level in LEVELS
    ]  # fmt: skip
    return Report(figures, setting_of(args, rows, engine.describe()))


def _run(chain: Chain, level: int | None) -> tuple[float, float]:
    """(wall seconds, share of them spent in telling) of a whole run; `level` None: without a log."""
    count, clock = len(chain.instructions), Clock()
    settings = RunSettings(count, count, chain.stages, instructions=chain.instructions, seed=chain.stages.seed)
    chain.engine.renderer.encode.cache_clear()
    with (
        tempfile.TemporaryDirectory() as path,
        open(Path(path) / "screen.txt", "w", encoding="utf-8") as screen,
        redirect_stdout(screen),
        told(clock),
        RunFolder(Path(path) / "run") as folder,
        NoLog(0) if level is None else ContentLogger(level, folder.path / CONTENT_LOG) as logger,
        Progress(count, "rows", 0) as progress,
    ):
        began = time.perf_counter()
        run_pipeline(settings, folder, chain.engine, chain.engine, load_constitution(), logger, progress)
        seconds = time.perf_counter() - began
    return seconds, clock.seconds / seconds
