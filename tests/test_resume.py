"""Kill -9 between any two journal lines, or inside one, and the same command again: the files are the same bytes."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine, script

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.runner import run_pipeline
from cai_experiment.pipeline.settings import RunResult, RunSettings
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.records.files import read_jsonl
from cai_experiment.records.store import Journal, RunFolder
from cai_experiment.scripts.kill_test import soak

CONSTITUTION = load_constitution()
FILES = ("instructions.jsonl", "pairs.jsonl", "rejected.jsonl")
SETTINGS = RunSettings(pairs=5, max_draws=30, stages=StageSettings(rounds=2, principles="random"))


def run(path: Path, engine: ScriptedEngine, settings: RunSettings = SETTINGS) -> RunResult:
    with (
        RunFolder(path) as folder,
        ContentLogger(0, path / "content_log.jsonl") as logger,
        Progress(settings.pairs, verbosity=0) as progress,
    ):
        return run_pipeline(settings, folder, engine, engine, CONSTITUTION, logger, progress)


def contents(path: Path) -> list[bytes]:
    return [(path / name).read_bytes() for name in FILES]


def run_and_kill(path: Path, seed: int, lines: int, torn: bool) -> bool:
    """Run in a child that gets SIGKILL once it has appended `lines` lines; `torn`: in the middle of the next one.

    True if it was killed, False if it came to its end before.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _kill_after(lines, torn)
            run(path, ScriptedEngine(seed, 6))
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def _kill_after(lines: int, torn: bool) -> None:
    append, left = Journal.append, iter(range(lines))

    def appending(self: Journal, row: dict) -> None:
        if next(left, None) is None:
            if torn:
                with open(self.path, "ab", buffering=0) as file:
                    file.write(b'{"id": "torn/half \xc3')
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, row)

    Journal.append = appending  # type: ignore[method-assign]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(folder, ScriptedEngine())
    return folder


@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_between_any_two_lines_changes_no_byte(tmp_path: Path, unbroken: Path, torn: bool) -> None:
    total = len(read_jsonl(unbroken / "journal.jsonl"))
    for lines in range(0, total, 7 if torn else 4):
        folder = tmp_path / str(lines)
        if run_and_kill(folder, seed=lines, lines=lines, torn=torn):
            done = {row["id"] for row in Journal(folder / "journal.jsonl").rows()}
            again = ScriptedEngine(lines + 1)
            run(folder, again)
            assert not done & again.asked.keys()  # nothing finished is asked again
            assert len(done) == lines
        assert contents(folder) == contents(unbroken)


def test_many_kills_of_one_run(tmp_path: Path, unbroken: Path) -> None:
    kills = 0
    while run_and_kill(tmp_path / "run", seed=kills, lines=1 + kills % 7, torn=kills % 2 == 0):
        kills += 1
    assert kills > 15
    assert contents(tmp_path / "run") == contents(unbroken)
    ids = [row["id"] for row in read_jsonl(tmp_path / "run" / "journal.jsonl")]
    assert len(ids) == len(set(ids))


def test_a_journal_cut_at_any_byte_is_mended(tmp_path: Path, unbroken: Path) -> None:
    whole = (unbroken / "journal.jsonl").read_bytes()
    for size in range(0, len(whole), len(whole) // 12):
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "journal.jsonl").write_bytes(whole[:size])
        for name in FILES:  # what an interrupted, longer run left there
            (folder / name).write_bytes((unbroken / name).read_bytes()[: size // 9] + b"rest")
        run(folder, ScriptedEngine(size))
        assert contents(folder) == contents(unbroken)


def test_a_bad_line_in_the_middle_is_set_aside_and_redone(tmp_path: Path, unbroken: Path) -> None:
    lines = (unbroken / "journal.jsonl").read_bytes().splitlines(keepends=True)
    lines[7] = lines[7][:20] + b"\xff\n"
    tmp_path.joinpath("journal.jsonl").write_bytes(b"".join(lines))
    engine = ScriptedEngine()
    run(tmp_path, engine)
    assert contents(tmp_path) == contents(unbroken)
    assert sum(engine.asked.values()) == 1
    assert (tmp_path / "journal.jsonl.bad").read_bytes() == lines[7]


def test_an_interrupt_keeps_what_is_finished(tmp_path: Path, unbroken: Path) -> None:
    given = iter(range(25))

    def interrupted(prompt: Prompt) -> Completion:
        if next(given, None) is None:
            raise KeyboardInterrupt
        return script(prompt)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ScriptedEngine(2, speak=interrupted))
    assert len(read_jsonl(tmp_path / "journal.jsonl")) == 25
    assert (tmp_path / "manifest.json").exists()
    assert run(tmp_path, ScriptedEngine()).manifest.sessions == 2
    assert contents(tmp_path) == contents(unbroken)


def test_the_soak_script_kills_at_random_and_sees_a_difference(tmp_path: Path) -> None:
    settings = dataclasses.replace(SETTINGS, pairs=25, max_draws=150)
    (tmp_path / "good").mkdir()
    assert soak(lambda folder: _run_quietly(folder, settings), tmp_path / "good", 5, 1, lambda line: None) == []
    (tmp_path / "bad").mkdir()
    found = soak(lambda folder: _run_with_a_fault(folder, settings), tmp_path / "bad", 1, 1, lambda line: None)
    assert "run 1: pairs.jsonl" in found


def _run_quietly(folder: Path, settings: RunSettings) -> None:
    run(folder, ScriptedEngine(os.getpid()), settings)


def _run_with_a_fault(folder: Path, settings: RunSettings) -> None:
    """A model whose words depend on which process it runs in: what a run without keyed sampling would do."""
    me = os.getpid()

    def speak(prompt: Prompt) -> Completion:
        said = script(prompt)
        return said if prompt.options else dataclasses.replace(said, text=said.text.replace("part", f"part {me}"))

    run(folder, ScriptedEngine(speak=speak), settings)
