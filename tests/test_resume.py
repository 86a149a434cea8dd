"""Kill -9 between any two journal lines, or inside one, and the same command again: the files are the same bytes."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from scripted_engine import ScriptedEngine, script

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import EngineError
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline import runner
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.lanes import Lanes
from cai_experiment.pipeline.runner import MAX_FAILURES, run_pipeline
from cai_experiment.pipeline.settings import RunResult, RunSettings
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.records.files import read_examples, read_jsonl
from cai_experiment.records.store import Journal, RunFolder
from cai_experiment.scripts.kill_test import soak

CONSTITUTION = load_constitution()
FILES = ("instructions.jsonl", "pairs.jsonl", "rejected.jsonl")
SETTINGS = RunSettings(pairs=5, max_draws=30, stages=StageSettings(rounds=2, principles="random"))


def run(
    path: Path, engine: ScriptedEngine, settings: RunSettings = SETTINGS, critic: ScriptedEngine | None = None
) -> RunResult:
    with (
        RunFolder(path) as folder,
        ContentLogger(0, path / "content_log.jsonl") as logger,
        Progress(settings.pairs, verbosity=0) as progress,
    ):
        return run_pipeline(settings, folder, engine, critic or engine, CONSTITUTION, logger, progress)


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


# ---------------------------------------------------------------- rows that fail, and engines that do


class Impatient(ScriptedEngine):
    """Gives back what failed before all else: a server refuses at once, and its answers take a while."""

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        source, held = iter(prompts), []
        while True:
            while len(held) < self.slots and (prompt := next(source, None)) is not None:
                self.asked[prompt.id] += 1
                held.append(self.speak(prompt))
            if not held:
                return
            self.most_held = max(self.most_held, len(held))
            yield held.pop(next((i for i, done in enumerate(held) if done.finish == "error"), 0))


def rows(count: int) -> RunSettings:
    listed = tuple(Instruction(f"{i:06d}", f"Question {i}?", f"f.txt:{i + 1}") for i in range(count))
    return dataclasses.replace(SETTINGS, pairs=count, max_draws=count, instructions=listed, instructions_name="f.txt")


def failing(final: str, every: int = 5):
    """A speaker that fails on every fifth answer, however often it is asked."""

    def speak(prompt: Prompt) -> Completion:
        if prompt.speak_as == "answer" and int(prompt.id[:6]) % every == 0:
            return Completion(prompt.id, "", "error", error="server: 400: no", final=final)
        return script(prompt)

    return speak


@pytest.mark.parametrize(("final", "asked"), [("prompt", 1), ("attempts", 1), ("", 3)])
def test_every_fifth_answer_fails_at_once_and_the_run_goes_on(tmp_path: Path, final: str, asked: int) -> None:
    engine = Impatient(slots=64, speak=failing(final))
    result = run(tmp_path, engine, rows(200))
    rejected = [e for e in read_examples(tmp_path / "rejected.jsonl") if "engine_error" in e.reject_reasons]
    assert engine.most_held == 64 and result.complete and result.drawn == 200
    assert [e.id for e in rejected] == [f"{i:06d}" for i in range(0, 200, 5)]
    assert {e.meta["error"] for e in rejected} == {"server: 400: no"}
    assert {engine.asked[f"{e.id}/answer/0"] for e in rejected} == {asked}
    before, again = contents(tmp_path), ScriptedEngine()
    run(tmp_path, again, rows(200))
    assert not again.asked and contents(tmp_path) == before


def test_any_number_of_refused_rows_in_a_row_is_no_broken_engine(tmp_path: Path) -> None:
    result = run(tmp_path, Impatient(slots=64, speak=failing("prompt", every=1)), rows(100))
    assert result.reasons == {"engine_error": 100} and len(read_jsonl(tmp_path / "journal.jsonl")) == 100


def test_a_server_that_is_gone_stops_the_run_and_its_rows_are_asked_again(tmp_path: Path) -> None:
    given = iter(range(300))

    def gone(prompt: Prompt) -> Completion:
        alive = next(given, None) is not None
        return script(prompt) if alive else Completion(prompt.id, "", "error", error="gone", final="attempts")

    with pytest.raises(EngineError, match=f"failed {MAX_FAILURES} times running, each time on another prompt.*gone"):
        run(tmp_path / "a", Impatient(slots=64, speak=gone), rows(60))
    for folder in ("a", "b"):
        run(tmp_path / folder, ScriptedEngine(), rows(60))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("final", ["", "attempts"])
def test_an_engine_that_never_spoke_is_broken_however_few_the_rows(tmp_path: Path, final: str) -> None:
    with pytest.raises(EngineError, match=r"failed 4 times running.*no"):
        run(tmp_path / "a", ScriptedEngine(speak=failing(final, every=1)), rows(4))
    for folder in ("a", "b"):
        run(tmp_path / folder, ScriptedEngine(), rows(4))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ---------------------------------------------------------------- two engines


class Elsewhere(ScriptedEngine):
    """Computes in another process, as it were; notes which threads pull and close its stream."""

    elsewhere = True
    closed = False

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        self.threads = {threading.current_thread()}
        try:
            for completion in super().stream(prompts):
                self.threads.add(threading.current_thread())
                yield completion
        finally:
            self.threads.add(threading.current_thread())
            self.closed = True


@pytest.mark.parametrize("seed", range(3))
def test_two_engines_in_threads_write_the_same_bytes(tmp_path: Path, unbroken: Path, seed: int) -> None:
    generator, critic = Elsewhere(seed), Elsewhere(seed + 9, slots=3)
    run(tmp_path, generator, critic=critic)
    assert contents(tmp_path) == contents(unbroken)
    for engine in (generator, critic):
        assert engine.closed and len(engine.threads) == 1 and threading.main_thread() not in engine.threads
    assert not any("verdict" in id for id in generator.asked) and not any("answer" in id for id in critic.asked)


def ask(id: str, kind: str) -> Prompt:
    return Prompt(id, (), kind)


class Held(Elsewhere):
    """Holds its completions back until it is let go."""

    def __init__(self) -> None:
        super().__init__(speak=lambda prompt: Completion(prompt.id, "", "stop"))
        self.holds, self.go = threading.Event(), threading.Event()

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        for completion in super().stream(prompts):
            self.holds.set()
            self.go.wait()
            yield completion


def test_what_one_engine_has_finished_does_not_wait_for_the_other() -> None:
    slow, quick = Held(), Elsewhere(speak=lambda prompt: Completion(prompt.id, "", "stop"))
    lanes = Lanes({"generator": slow, "critic": quick})
    lanes.put("generator", 0, ask("slow", "answer"))
    for i in range(20):
        lanes.put("critic", i, ask(f"quick {i}", "critique"))
    assert {lanes.next().id for _ in range(20)} == {f"quick {i}" for i in range(20)}
    lanes.put("critic", 0, ask("late", "critique"))
    assert lanes.next().id == "late" and lanes.busy
    slow.go.set()
    assert lanes.next().id == "slow" and not lanes.busy
    lanes.close(60.0)
    assert slow.closed and quick.closed


def test_closing_does_not_wait_for_an_engine_that_hangs() -> None:
    slow = Held()
    lanes = Lanes({"generator": slow, "critic": Elsewhere()})
    lanes.put("generator", 0, ask("slow", "answer"))
    assert slow.holds.wait(60)
    lanes.close(0.05)
    assert not slow.closed
    slow.go.set()  # as closing the engine does


def test_a_fault_in_a_thread_is_raised_in_the_run(tmp_path: Path) -> None:
    def broken(prompt: Prompt) -> Completion:
        raise EngineError("the critic is gone")

    with pytest.raises(EngineError, match="the critic is gone"):
        run(tmp_path, Elsewhere(), critic=Elsewhere(speak=broken))
    run(tmp_path, ScriptedEngine())
    assert (tmp_path / "manifest.json").exists()


def test_an_interrupt_of_a_run_with_threads_keeps_what_is_finished(tmp_path: Path, unbroken: Path) -> None:
    """Ctrl-C while the generator says nothing: the child ends at once, resumable, and the rest is the same bytes."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            _interrupted_in_a_wait(tmp_path)
        except KeyboardInterrupt:
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    run(tmp_path, Elsewhere(3), critic=Elsewhere(4))
    assert contents(tmp_path) == contents(unbroken)


def _interrupted_in_a_wait(path: Path) -> None:
    runner.CLOSE_SECONDS, given = 0.05, iter(range(20))  # of some 40 that a whole run asks, by its timing

    def speak(prompt: Prompt) -> Completion:
        if next(given, None) is None:
            os.kill(os.getpid(), signal.SIGINT)
            threading.Event().wait()  # for ever: only a thread that nothing waits for may do that
        return script(prompt)

    run(path, Elsewhere(1, speak=speak), critic=Elsewhere(2))
