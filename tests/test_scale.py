"""What milestone 3 adds: mixes, evaluation sets, length matching, --add, the guard's turn, and memory that stays."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, script

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.guard import GuardChoice, GuardVerdict
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.evaluation_sets import EvaluationSet
from cai_experiment.pipeline.guarding import spare_for
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.known import KnownTexts
from cai_experiment.pipeline.length_matching import BLOCK, KEEP, SURPLUS, surplus
from cai_experiment.pipeline.mix import Part, Turns, parse_mix
from cai_experiment.pipeline.outputs import DerivedFile, Outputs
from cai_experiment.pipeline.replay import Replies
from cai_experiment.pipeline.runner import _Run, run_pipeline
from cai_experiment.pipeline.settings import RunResult, RunSettings
from cai_experiment.pipeline.sources import load_instructions
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.pipeline.work_list import WorkList
from cai_experiment.records.files import ExampleFile, encode_line, read_examples, read_jsonl
from cai_experiment.records.index import RowIndex
from cai_experiment.records.manifest import Manifest
from cai_experiment.records.store import Journal, RunFolder
from cai_experiment.scripts import _guarding, _milestone, _turns, generate_full, generate_mvp
from cai_experiment.scripts._bench_process import peak_bytes
from cai_experiment.scripts._common import run_main

CONSTITUTION = load_constitution()
FILES = ("instructions.jsonl", "pairs.jsonl", "rejected.jsonl")
FILE_OF = {"accepted": "pairs.jsonl", "rejected": "rejected.jsonl"}
QUICK = StageSettings(rounds=1, principles="random")


def words(key: str, count: int) -> str:
    """Made-up words that depend on `key` alone, so that texts of different keys are never near each other."""
    chance = random.Random(key)
    return " ".join("".join(chance.choices("abcdefghiklmnoprstuvw", k=5)) for _ in range(count))


def varied(prompt: Prompt) -> Completion:
    """As `script`, with a new instruction for every candidate and answers of many lengths."""
    said = script(prompt)
    if prompt.speak_as == "written_instruction":
        return dataclasses.replace(said, text=f"How do I {words(prompt.id, 6)}?")
    if prompt.speak_as in ("answer", "revision") and said.text.strip():
        return dataclasses.replace(said, text=f"{said.text} {words(prompt.id, random.Random(prompt.id).randrange(12))}")
    return said


def run(path: Path, engine: ScriptedEngine | None = None, **settings: Any) -> RunResult:
    chosen = RunSettings(**{"pairs": 12, "max_draws": 90, "stages": QUICK} | settings)
    engine = engine or ScriptedEngine(speak=varied)
    with (
        RunFolder(path) as folder,
        ContentLogger(0, path / "content_log.jsonl") as logger,
        Progress(chosen.pairs, verbosity=0) as progress,
    ):
        return run_pipeline(chosen, folder, engine, engine, CONSTITUTION, logger, progress)


def contents(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in FILES}


# ---------------------------------------------------------------- mixes


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("self:0.5,a.csv:0.4", "sum to 0.9"),
        ("self:0.5,a.csv", "'a.csv' is not NAME:SHARE"),
        ("self:1,a.csv:0", "'a.csv:0' is not NAME:SHARE"),
        ("self:0.5,self:0.5", "twice"),
        (":1", "':1' is not NAME:SHARE"),
        ("", "'' is not NAME:SHARE"),
    ],
)
def test_a_mix_that_cannot_be_read_is_one_line(text: str, said: str) -> None:
    with pytest.raises(BadInputError, match="--mix") as raised:
        parse_mix(text)
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_mix_is_read_with_colons_in_its_names() -> None:
    assert parse_mix("self:0.5, a:b.csv:0.3,c.txt:0.2") == [("self", 0.5), ("a:b.csv", 0.3), ("c.txt", 0.2)]


@pytest.mark.parametrize("shares", [(0.5, 0.3, 0.2), (0.34, 0.33, 0.33), (0.9, 0.05, 0.05), (0.97, 0.02, 0.01)])
def test_shares_are_kept_within_one_at_every_draw(shares: tuple[float, ...]) -> None:
    turns = Turns([Part(name, share) for name, share in zip("abc", shares, strict=True)])
    counts = Counter[str]()
    for drawn in range(1, 1001):
        name = turns.next()
        assert name is not None
        turns.took(name)
        counts[name] += 1
        assert all(abs(counts[n] - s * drawn) <= 1 for n, s in zip("abc", shares, strict=True))


def rows(name: str, count: int) -> tuple[Instruction, ...]:
    return tuple(
        Instruction(f"{n:06d}", f"Tell me of {words(f'{name}{n}', 5)}.", f"{name}:{n + 1}") for n in range(count)
    )


MIX = (Part("self", 0.5), Part("red.csv", 0.3, rows("red.csv", 100)), Part("help.txt", 0.2, rows("help.txt", 6)))


def test_a_mixed_run_keeps_its_shares_and_does_not_depend_on_timing(tmp_path: Path) -> None:
    result = run(tmp_path / "a", pairs=40, max_draws=200, mix=MIX)
    listed = [row["source"].partition(":")[0] for row in read_jsonl(tmp_path / "a" / "instructions.jsonl")]
    whole = listed[: result.ran_out["help.txt"]]
    assert Counter(whole)["help.txt"] == 6
    for name, share in (("self", 0.5), ("red.csv", 0.3), ("help.txt", 0.2)):
        assert abs(Counter(whole)[name] - share * len(whole)) <= 1
    later = Counter(listed[len(whole) :])
    assert later.keys() == {"self", "red.csv"} and abs(later["self"] - later.total() * 5 / 8) <= 1
    taken = [
        row["source"] for row in read_jsonl(tmp_path / "a" / "instructions.jsonl") if row["source"].startswith("red")
    ]
    assert taken != sorted(taken, key=lambda source: int(source[8:])), "a file's rows come in the seed's order"
    for seed, slots in ((1, 3), (2, 64)):
        run(tmp_path / str(seed), ScriptedEngine(seed, slots, varied), pairs=40, max_draws=200, mix=MIX)
        assert contents(tmp_path / str(seed)) == contents(tmp_path / "a")


def test_files_alone_need_no_writer_and_end_when_they_have_no_more(tmp_path: Path) -> None:
    engine = ScriptedEngine(speak=varied)
    parts = (Part("a", 0.5, rows("a", 4)), Part("b", 0.5, rows("b", 9)))
    result = run(tmp_path, engine, pairs=50, max_draws=100, mix=parts)
    assert result.drawn == 13 and not result.complete and result.ran_out == {"a": 8, "b": 13}
    assert not any(key.startswith("instruction/") for key in engine.asked)


def test_a_file_s_near_copies_of_earlier_instructions_are_refused(tmp_path: Path) -> None:
    text = "How do I clean the old copper kettle in my kitchen on a Sunday?"
    parts = (
        Part("a", 0.5, (Instruction("000000", text, "a:1"),)),
        Part("b", 0.5, (Instruction("000000", f"{text[:-1]}, please?", "b:1"), *rows("b", 1))),
    )
    result = run(tmp_path, pairs=50, max_draws=100, mix=parts)
    assert result.refused == {"near_duplicate": 1} and result.drawn == 2


# ---------------------------------------------------------------- evaluation sets


def test_instructions_of_an_evaluation_set_are_refused_and_counted(tmp_path: Path) -> None:
    first = [f"How do I {words(f'instruction/{n}', 6)}?" for n in range(3)]
    near = "Please tell me, at once, how I can bake a cake of five kinds of flour for my sister's party on Sunday."
    held = (first[0].upper(), near)
    parts = (
        Part("self", 0.5),
        Part("a", 0.5, (Instruction("000000", near.replace("Sunday", "Monday"), "a:1"), *rows("a", 2))),
    )
    result = run(tmp_path, mix=parts, evaluation_sets=(EvaluationSet.of("held", held),))
    assert result.refused["in_evaluation_set"] == 2
    listed = {row["instruction"] for row in read_jsonl(tmp_path / "instructions.jsonl")}
    assert first[0] not in listed and first[1] in listed
    assert Manifest.read(tmp_path / "manifest.json").counts["refused/in_evaluation_set"] == 2


def test_rows_of_a_file_that_stand_in_an_evaluation_set_are_refused_the_rest_is_used_once(tmp_path: Path) -> None:
    given = rows("f.txt", 9)
    held = (EvaluationSet.of("held", [given[4].text]),)
    result = run(tmp_path, instructions=given, max_draws=9, evaluation_sets=held)
    assert result.complete and result.drawn == 8 and result.refused == {"in_evaluation_set": 1}
    assert [row["id"] for row in read_jsonl(tmp_path / "instructions.jsonl")] == [
        r.id for n, r in enumerate(given) if n != 4
    ]


def test_public_evaluation_sets_refuse_their_own_rows(shared_data: Path) -> None:
    behaviours = load_instructions(shared_data / "harmbench" / "harmbench_behaviors_text_all.csv")
    questions = load_instructions(shared_data / "mt_bench" / "question.jsonl")
    assert len(questions) == 80 and questions[0].text.startswith("Compose an engaging travel blog post")
    mine = rows("mine", 5)
    parts = (Part("x", 1.0, (*behaviours[::10], *questions[::10], *mine)),)
    held = tuple(row.text for row in (*behaviours, *questions))
    work = WorkList(RunSettings(pairs=1, max_draws=500, mix=parts, evaluation_sets=(EvaluationSet.of("held", held),)))
    found = [work.next() for _ in range(6)]
    assert {one.text for one in found if one} == {row.text for row in mine} and found[5] is None
    assert work.refused == {"in_evaluation_set": 48}


def test_sketches_find_every_near_copy_among_many_texts() -> None:
    known = KnownTexts(words(f"text{n}", 12) for n in range(600))
    for n in range(0, 600, 7):
        near = words(f"text{n}", 12).rsplit(" ", 1)[0] + " other"  # 9 of 11 triples: Jaccard 0.82
        assert known.add(near) == "near_duplicate"
    assert known.add(words("new", 12)) == "" and len(known) == 601


# ---------------------------------------------------------------- lengths matched by choice


def test_surplus_brings_the_sum_near_zero_and_takes_no_more_than_it_needs() -> None:
    chance = random.Random(3)
    ratios = [chance.gauss(0.1, 0.3) for _ in range(BLOCK)]
    gone = surplus(ratios, 0.0, BLOCK - KEEP)
    left = sum(r for n, r in enumerate(ratios) if n not in gone)
    assert abs(left) < abs(sum(ratios)) / 5 and len(gone) <= BLOCK - KEEP
    assert surplus([0.2, -0.2, 0.1, -0.1], 0.0, 2) == set()
    assert surplus([0.5, 0.1, -0.1], 0.0, 1) == {0}


def mean_log_ratio(pairs: Iterable[Any]) -> float:
    found = [math.log(len(p.revised_answer) / len(p.initial_answer)) for p in pairs]
    return sum(found) / len(found)


def test_matched_lengths_leave_pairs_out_with_their_reason(tmp_path: Path) -> None:
    result = run(tmp_path / "a", pairs=90, max_draws=400, match_lengths=True)
    pairs, rejected = (read_examples(tmp_path / "a" / name) for name in ("pairs.jsonl", "rejected.jsonl"))
    left_out = [e for e in rejected if SURPLUS in e.reject_reasons]
    assert result.complete and len(pairs) == 90 and 0 < len(left_out) == result.reasons[SURPLUS]
    assert abs(mean_log_ratio(pairs)) < abs(mean_log_ratio([*pairs, *left_out])) / 2
    ids = [row["id"] for row in read_jsonl(tmp_path / "a" / "instructions.jsonl")]
    assert sorted(e.id for e in (*pairs, *rejected)) == ids and pairs[-1].id == ids[-1]
    run(tmp_path / "b", ScriptedEngine(4, 32, varied), pairs=30, max_draws=150, match_lengths=True)
    assert (tmp_path / "a/pairs.jsonl").read_bytes().startswith((tmp_path / "b/pairs.jsonl").read_bytes())
    run(tmp_path / "b", ScriptedEngine(5, 32, varied), pairs=90, max_draws=400, match_lengths=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_run_that_ends_within_a_block_keeps_its_pairs(tmp_path: Path) -> None:
    result = run(tmp_path, pairs=90, max_draws=30, match_lengths=True)
    assert not result.complete and 0 < result.accepted < KEEP and SURPLUS not in result.reasons and result.drawn == 30


# ---------------------------------------------------------------- the journal, replayed


def test_an_index_finds_the_last_row_of_an_id_also_behind_lines_that_were_moved_away(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    lines = [encode_line({"id": f"{n % 70}", "n": n}) for n in range(100)]
    lines[3], lines[50] = b"{broken\n", b'{"id": "1", "n": \xff}\n'
    path.write_bytes(b"".join(lines) + b'{"id": "torn')
    journal = Journal(path)
    index = RowIndex(journal)
    for offset, row in journal.located_rows():
        index.add(row["id"], offset)
    assert len(index) == 98 and index.row("70") is None
    assert index.row("29") == {"id": "29", "n": 99} and index.row("69") == {"id": "69", "n": 69}
    assert all(index.row(str(n))["n"] == n + 70 for n in range(30))  # type: ignore[index]
    assert path.with_name("journal.jsonl.bad").read_bytes() == lines[3] + lines[50]


def stubborn(poisoned: Callable[[str], bool]) -> Callable[[Prompt], Completion]:
    """A speaker that fails for ever on some prompts."""
    return lambda p: Completion(p.id, "", "error", error="lost") if poisoned(p.id) else varied(p)


def test_a_poisoned_row_is_asked_three_times_in_all_sessions_together(tmp_path: Path) -> None:
    poisoned = stubborn(lambda id: id == "000002/critique/0")
    first = ScriptedEngine(1, speak=poisoned)
    result = run(tmp_path / "a", first)
    assert first.asked["000002/critique/0"] == 3 and result.reasons["engine_error"] == 1
    again = ScriptedEngine(2, speak=poisoned)
    run(tmp_path / "a", again, pairs=20, max_draws=150)
    assert "000002/critique/0" not in again.asked, "it was retried twice, and stays rejected"
    run(tmp_path / "b", ScriptedEngine(3, speak=poisoned), pairs=20, max_draws=150)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_failures_of_a_broken_engine_are_forgotten(tmp_path: Path) -> None:
    given = iter(range(60))
    dying = stubborn(lambda id: next(given, None) is None)
    with pytest.raises(EngineError, match="failed 30 times running"):
        run(tmp_path / "a", ScriptedEngine(1, speak=dying))
    given = iter(range(40))
    with pytest.raises(EngineError):  # the second session completes 40 prompts after the failures of the first
        run(tmp_path / "a", ScriptedEngine(2, speak=dying))
    with RunFolder(tmp_path / "a") as folder:
        assert not Replies(folder.journal).failures
    run(tmp_path / "a")
    run(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# ---------------------------------------------------------------- memory and time


class Forgotten(Counter[str]):
    """Counts nothing: what the scripted engine was asked would grow with the run."""

    def __setitem__(self, key: str, value: int) -> None:
        pass


@dataclasses.dataclass
class Cost:
    """What a process that makes pairs says of itself."""

    examples: int
    peak_bytes: int
    cpu_seconds: float


def cost_of_a_run(path: Path, pairs: int) -> Cost:
    """Make (or replay, and make the rest of) so many pairs in this process, which must have done nothing before."""
    import datasketch  # noqa: F401 - not part of the time

    began = time.process_time()
    result = run(path, ScriptedEngine(1, 64, varied, asked=Forgotten()), pairs=pairs, max_draws=4 * pairs)
    assert result.accepted == pairs and "torch" not in sys.modules
    return Cost(result.drawn, peak_bytes(), time.process_time() - began)


def in_a_fresh_process(path: Path, pairs: int) -> Cost:
    """A fork of this process would begin with its peak, in which anything that a run keeps disappears."""
    code = "import sys, json, dataclasses, pathlib, test_scale; path, pairs = sys.argv[1:]; "
    code += "print(json.dumps(dataclasses.asdict(test_scale.cost_of_a_run(pathlib.Path(path), int(pairs)))))"
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(pairs)],
        capture_output=True, text=True, cwd=tests, env={**os.environ, "PYTHONPATH": str(tests.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Cost(**json.loads(done.stdout))


# Measured: 630 bytes an example in a first session, of which 250 are the sketch that finds near copies, and 1,100 where
# all are replayed (the journal's index: 16 bytes for each of some eight lines, and as much again while it is sorted).
# With each example's written line kept in memory it was 2,100, with its completions 3,000, with its machine 4,600.
BYTES_AN_EXAMPLE = 1500


def test_memory_and_time_do_not_grow_with_the_run(tmp_path: Path) -> None:
    small = in_a_fresh_process(tmp_path / "small", 300)
    large = in_a_fresh_process(tmp_path / "large", 3000)
    again = in_a_fresh_process(tmp_path / "large", 3001)  # replays 47,000 lines
    more = large.examples - small.examples
    assert large.peak_bytes - small.peak_bytes < BYTES_AN_EXAMPLE * more
    assert again.peak_bytes - small.peak_bytes < BYTES_AN_EXAMPLE * more
    # a wide band: it is there for work that grows with the square of the run
    assert large.cpu_seconds / large.examples < 2 * small.cpu_seconds / small.examples


# ---------------------------------------------------------------- the scripts: --add, --plan, the guard's turn


class ScriptedGuard:
    """Calls about one answer in six unsafe, by its text; one in twenty it cannot read. Counts what it is asked."""

    name, first_line = "scripted-guard", "guard scripted-guard"
    unread, unsafe = 0.05, 0.17  # the shares of answers

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.closed = False

    def judge(self, rows: Iterable[tuple[str, str, str]]) -> Iterator[GuardVerdict]:
        for id, instruction, answer in rows:
            self.asked[id] += 1
            chance = random.Random(f"{instruction}{answer}").random()
            if chance < self.unread:
                yield GuardVerdict(id, None, (), "well")
            else:
                unsafe = chance < self.unread + self.unsafe
                yield GuardVerdict(id, not unsafe, ("S2",) if unsafe else (), "unsafe\nS2" if unsafe else "safe")

    def describe(self) -> dict[str, object]:
        return {"model": "scripted-guard", "guard": "llama-guard"}

    def close(self) -> None:
        self.closed = True


@dataclasses.dataclass
class Loaded:
    """What the scripts loaded."""

    engines: list[ScriptedEngine]
    guards: list[ScriptedGuard]
    order: list[str]


class ClosingEngine(ScriptedEngine):
    """A scripted engine that notes when it gives its memory back."""

    order: list[str]

    def close(self) -> None:
        self.order.append("close")


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """The scripts load scripted engines and guards."""
    found = Loaded([], [], [])

    def load(args: Any) -> tuple[ScriptedEngine, ScriptedEngine]:
        engine = ClosingEngine(len(found.engines), speak=varied)
        engine.order = found.order
        found.engines.append(engine)
        found.order.append("load")
        return engine, engine

    def guard(choice: GuardChoice, hardware: Any, shared: Any) -> ScriptedGuard:
        assert shared is None, "the generator has left"
        found.guards.append(ScriptedGuard())
        found.order.append("guard")
        return found.guards[-1]

    monkeypatch.setattr(_milestone, "load_engines", load)
    monkeypatch.setattr("cai_experiment.scripts._beforehand._same_models", lambda args, models: True)
    monkeypatch.setattr(_guarding, "load_guard", guard)
    choice = GuardChoice("scripted-guard", "x", "llama-guard", "fp32", 8, "for a test")
    monkeypatch.setattr(_guarding, "check_guard", lambda settings, hardware: choice)
    return found


def arguments(folder: Path, *flags: str) -> list[str]:
    """What a small run in `folder` is called with."""
    places = ("--data-dir", str(folder / "data"), "--checkpoint-dir", str(folder / "checkpoints"), "--model", "nano")
    return [*places, "--principles", "random", "--rounds", "1", *flags]


def call(script_module: Any, folder: Path, *flags: str) -> int:
    """Run a script in this process; gives its exit code."""
    return run_main(script_module.main, arguments(folder, *flags))


def test_add_extends_a_finished_run_as_if_it_had_been_begun_so(tmp_path: Path, loaded: Loaded) -> None:
    call(generate_mvp, tmp_path, "--count", "8")
    before = (tmp_path / "data/mvp/pairs.jsonl").read_bytes()
    call(generate_mvp, tmp_path, "--add", "5")
    call(generate_mvp, tmp_path, "--add", "4")
    call(generate_mvp, tmp_path, "--count", "17", "--run", "once")
    assert contents(tmp_path / "data/mvp") == contents(tmp_path / "data/once")
    assert (tmp_path / "data/mvp/pairs.jsonl").read_bytes().startswith(before)
    assert Manifest.read(tmp_path / "data/mvp/manifest.json").extended == [8, 13]


def test_an_extension_that_was_interrupted_goes_on_with_the_same_command(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(generate_mvp, tmp_path, "--count", "8")
    given = iter(range(40))

    def interrupted(prompt: Prompt) -> Completion:
        if next(given, None) is None:
            raise KeyboardInterrupt
        return varied(prompt)

    with monkeypatch.context() as patch:
        patch.setattr(_milestone, "load_engines", lambda args: (ScriptedEngine(speak=interrupted),) * 2)
        assert call(generate_mvp, tmp_path, "--add", "20") == 130
    assert ": 8 -> 28 pairs" in (said := capsys.readouterr().out) and "\nextends " in said
    assert call(generate_mvp, tmp_path, "--add", "7") == 2
    said = capsys.readouterr().err
    assert "is not finished" in said and "of 28 pairs" in said and "without --add" in said
    call(generate_mvp, tmp_path, "--add", "20")
    assert len(read_examples(tmp_path / "data/mvp/pairs.jsonl")) == 28
    assert ": 8 -> 28 pairs" in (said := capsys.readouterr().out) and said.startswith("goes on extending ")
    engines = len(loaded.engines)
    call(generate_mvp, tmp_path, "--add", "20")  # the line was dropped, and the command repeated: it buys nothing
    said = capsys.readouterr().out
    assert "was extended already: 8 -> 28 pairs; --count 48 makes 20 more" in said and "report: " in said
    assert len(loaded.engines) == engines and len(read_examples(tmp_path / "data/mvp/pairs.jsonl")) == 28
    call(generate_mvp, tmp_path, "--count", "28", "--run", "once")
    assert contents(tmp_path / "data/mvp") == contents(tmp_path / "data/once")


def test_the_plain_command_keeps_the_target_of_an_extended_run(tmp_path: Path, loaded: Loaded) -> None:
    call(generate_mvp, tmp_path, "--count", "103")
    engines = len(loaded.engines)
    call(generate_mvp, tmp_path)
    assert len(loaded.engines) == engines and len(ExampleFile(tmp_path / "data/mvp/pairs.jsonl")) == 103


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--add", "3"), "holds no run"),
        (("--add", "3", "--count", "5"), "both say how many"),
        (("--mix", "self:0.5,none.csv:0.5"), "none.csv: cannot be read"),
        (("--mix", "self:1", "--instructions", "x.txt"), "use one of them"),
        (("--exclude", "none.jsonl"), "none.jsonl: cannot be read"),
        (("--engine", "server"), "--server http"),
        (("--server", "http://127.0.0.1:1/v1", "--engine", "hf"), "do not go together"),
        (("--ray", "8.8.8.8:6379"), "--ray 8.8.8.8:6379"),
    ],
)
def test_flags_that_cannot_be_are_one_line_before_anything_is_loaded(
    tmp_path: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], said: str
) -> None:
    assert call(generate_full, tmp_path, *flags) in (1, 2)
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and not loaded.engines


def test_plan_loads_nothing_and_speaks_of_the_guard(
    tmp_path: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(generate_full, tmp_path, "--plan", "--count", "7000") == 0
    said = capsys.readouterr().out
    assert "7,000 pairs" in said and "guard       auto" in said and "5+ hours, $8.70" in said
    assert not loaded.order and not (tmp_path / "data").exists()


def test_the_guard_reads_what_the_gate_let_through_when_the_generator_has_left(
    tmp_path: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    call(generate_full, tmp_path, "--count", "60")
    folder = tmp_path / "data" / "full"
    pairs, rejected = read_examples(folder / "pairs.jsonl"), read_examples(folder / "rejected.jsonl")
    unsafe = [e for e in rejected if e.reject_reasons == ("guard_unsafe",)]
    unread = [e for e in rejected if e.reject_reasons == ("guard_unparsed",)]
    assert len(pairs) == 60 and unsafe and unread and all(e.meta["guard"]["reply"] for e in unread)
    assert all(e.meta["guard"] == {"categories": ["S2"]} for e in unsafe)
    rounds = len(loaded.guards)
    assert rounds > 1 and loaded.order == ["load", "close", "guard"] * rounds
    asked = sum((guard.asked for guard in loaded.guards), Counter[str]())
    read = {e.id for e in (*pairs, *unsafe, *unread)}
    assert set(asked.values()) == {1} and read <= asked.keys()
    assert all(id > pairs[-1].id for id in asked.keys() - read), "pairs that were made to spare"
    assert all(guard.closed for guard in loaded.guards)
    report = json.loads((folder / "report.json").read_text())
    assert report["dataset"]["guard"] == {
        "name": "scripted-guard", "safe": 60, "unparsed": len(unread), "unsafe": len(unsafe),
        "categories": [{"category": "S2", "words": "crime without violence", "count": len(unsafe)}],
    }  # fmt: skip
    reasons = report["counts"]["reasons"]
    assert (reasons["guard_unsafe"], reasons["guard_unparsed"]) == (len(unsafe), len(unread))
    assert report["seconds"]["guard"] >= 0
    said = capsys.readouterr().out
    assert f"{len(unsafe)} unsafe (S2 crime without violence" in said
    assert report["settings"]["generation"]["guard"] == "auto"
    assert Manifest.read(folder / "manifest.json").guard["name"] == "scripted-guard"


def test_a_guarded_run_is_extended_and_matched_and_comes_out_the_same(tmp_path: Path, loaded: Loaded) -> None:
    call(generate_full, tmp_path, "--count", "45", "--match-lengths")
    call(generate_full, tmp_path, "--add", "30", "--match-lengths")
    call(generate_full, tmp_path, "--count", "75", "--match-lengths", "--run", "once")
    assert contents(tmp_path / "data/full") == contents(tmp_path / "data/once")
    rejected = read_examples(tmp_path / "data/full/rejected.jsonl")
    assert {"guard_unsafe", SURPLUS} <= {reason for e in rejected for reason in e.reject_reasons}


def killed(job: Callable[[], object]) -> bool:
    """Do `job`, which ends itself by SIGKILL, in a child; False if it came to its end."""
    child = os.fork()
    if child == 0:
        job()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def killed_at(count: int, counted: Callable[[Any], bool], job: Callable[[], object]) -> bool:
    """Do `job` in a child that gets SIGKILL instead of writing its counted journal line number `count`."""

    def end() -> None:
        left, append = iter(range(count)), Journal.append

        def appending(journal: Journal, row: Any) -> None:
            if counted(row) and next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            append(journal, row)

        Journal.append = appending  # type: ignore[method-assign]
        job()

    return killed(end)


def reported(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("where", [0, 7, 30, 41])
def test_a_guard_pass_that_was_killed_goes_on_without_the_generator(tmp_path: Path, loaded: Loaded, where: int) -> None:
    assert killed_at(
        where, lambda row: row.get("kind") == "guard", lambda: call(generate_full, tmp_path, "--count", "40")
    )
    call(generate_full, tmp_path, "--count", "40")
    assert loaded.order == ["guard"], "what was made to spare is enough"
    assert sum(loaded.guards[0].asked.values()) == 40 + spare_for(40, 1 / 33) - where
    call(generate_full, tmp_path, "--count", "40", "--run", "once")
    assert contents(tmp_path / "data/full") == contents(tmp_path / "data/once")


@pytest.mark.parametrize("place", ["end_after", "finish", "result"])
def test_a_kill_behind_the_last_pair_leaves_a_run_that_comes_out_whole(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """All pairs stand in the file; what does not belong to the run is not cut off yet, or not counted."""
    for name in ("unread", "unsafe"):  # nothing that would have the files written once more
        monkeypatch.setattr(ScriptedGuard, name, 0.0)
    monkeypatch.setattr(_turns, "spare_for", lambda pairs, share: 0)
    where = {"end_after": DerivedFile, "finish": Outputs, "result": _Run}[place]

    def end() -> None:
        setattr(where, place, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        call(generate_full, tmp_path, "--count", "60")

    assert killed(end)
    assert len(ExampleFile(tmp_path / "data/full/pairs.jsonl")) == 60
    call(generate_full, tmp_path, "--count", "60")
    call(generate_full, tmp_path, "--count", "60", "--run", "once")
    assert contents(tmp_path / "data/full") == contents(tmp_path / "data/once")
    ended, once = (Manifest.read(tmp_path / "data" / run / "manifest.json") for run in ("full", "once"))
    assert ended.finished and once.finished
    for name in ("accepted", "rejected"):
        assert ended.counts[name] == once.counts[name] == len(ExampleFile(tmp_path / f"data/full/{FILE_OF[name]}"))


@pytest.mark.parametrize("turn", range(4))
def test_a_kill_while_the_files_are_written_anew_leaves_a_run_that_comes_out_whole(
    tmp_path: Path, loaded: Loaded, turn: int
) -> None:
    flags = ("--count", "60", "--match-lengths")

    def end() -> None:
        left, write = iter(range(20 * turn)), DerivedFile.write

        def writing(file: DerivedFile, row: Any) -> None:
            if loaded.guards and next(left, None) is None:  # behind the first pass of the guard
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, row)

        DerivedFile.write = writing  # type: ignore[method-assign]
        call(generate_full, tmp_path, *flags)

    assert killed(end)
    call(generate_full, tmp_path, *flags)
    call(generate_full, tmp_path, *flags, "--run", "once")
    assert contents(tmp_path / "data/full") == contents(tmp_path / "data/once")


@pytest.mark.parametrize(("share", "loads"), [(0.0, 1), (0.02, 1), (0.16, 2)])
def test_pairs_to_spare_save_loading_the_generator_anew_and_change_no_byte(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, share: float, loads: int
) -> None:
    monkeypatch.setattr(ScriptedGuard, "unread", 0.0)
    monkeypatch.setattr(ScriptedGuard, "unsafe", share)
    call(generate_full, tmp_path, "--count", "100")
    assert len(loaded.engines) == loads
    monkeypatch.setattr(_turns, "spare_for", lambda pairs, share: 0)
    call(generate_full, tmp_path, "--count", "100", "--run", "none")
    monkeypatch.setattr(_turns, "spare_for", lambda pairs, share: 70)
    call(generate_full, tmp_path, "--count", "100", "--run", "many")
    for run in ("none", "many"):
        assert contents(tmp_path / "data/full") == contents(tmp_path / "data" / run)
        assert reported(tmp_path / "data" / run)["counts"] == reported(tmp_path / "data/full")["counts"]


@pytest.mark.parametrize("spare", [0, 13, 60])
def test_matched_lengths_do_not_depend_on_what_was_made_to_spare(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, spare: int
) -> None:
    """Which pairs of a block are left out depends on all of it, so the guard reads the last block to its end."""
    flags = ("--count", "71", "--match-lengths")
    call(generate_full, tmp_path, *flags)
    monkeypatch.setattr(_turns, "spare_for", lambda pairs, share: spare)
    call(generate_full, tmp_path, *flags, "--run", "other")
    assert contents(tmp_path / "data/full") == contents(tmp_path / "data/other")
    assert len(ExampleFile(tmp_path / "data/full/pairs.jsonl")) == 71


def test_how_many_to_spare() -> None:
    assert [spare_for(n, 1 / 33) for n in (0, 1, 100, 1000, 5000)] == [0, 1, 7, 43, 182]
    assert spare_for(61, 0.1) == 13 and spare_for(100, 0.0) == 0


def test_a_guarded_run_that_runs_out_of_instructions_ends(tmp_path: Path, loaded: Loaded) -> None:
    (tmp_path / "few.txt").write_text("\n".join(row.text for row in rows("few", 40)))
    for run, flags in (("mixed", ("--mix", f"{tmp_path / 'few.txt'}:1")),
                       ("given", ("--instructions", str(tmp_path / "few.txt")))):  # fmt: skip
        for more in ((), ("--match-lengths",)):
            call(generate_full, tmp_path, "--count", "50", "--run", run + "".join(more), *flags, *more)
            folder = tmp_path / "data" / (run + "".join(more))
            assert sum(len(ExampleFile(folder / name)) for name in FILE_OF.values()) == 40
            reasons = Counter(r for e in read_examples(folder / "rejected.jsonl") for r in e.reject_reasons)
            assert reasons["guard_unsafe"] and reported(folder)["dataset"]["guard"]["unsafe"] == reasons["guard_unsafe"]
    assert loaded.order.count("load") == 2 * 2 + 2, "rows that are used once are not generated again"


def test_the_content_log_ends_as_the_files_do(tmp_path: Path, loaded: Loaded) -> None:
    """What the guard turns down is told once more, once; what was made to spare is not told before it is wanted."""
    for count in ("30", "60", "60"):
        (tmp_path / "data/full/report.json").unlink(missing_ok=True)
        call(generate_full, tmp_path, "--count", count)
        folder = tmp_path / "data" / "full"
        pairs, rejected = (read_examples(folder / name) for name in FILE_OF.values())
        ends: dict[str, list[str]] = {}
        for entry in read_jsonl(folder / "content_log.jsonl"):
            if entry["stage"].startswith("TRAINING-PAIR-"):
                ends.setdefault(entry["metadata"]["example"], []).append(entry["stage"].rpartition("-")[2])
        assert ends.keys() == {e.id for e in (*pairs, *rejected)}
        assert all(ends[e.id] == ["CREATED"] for e in pairs)
        guarded = {e.id for e in rejected if e.reject_reasons[0].startswith("guard_")}
        assert guarded and all(ends[e.id][-1] == "REJECTED" for e in rejected)
        assert all(ends[id] in (["CREATED", "REJECTED"], ["REJECTED"]) for id in guarded)
        assert any(len(ends[id]) == 2 for id in guarded)


def test_no_guard_is_recorded_and_a_guard_can_come_later(tmp_path: Path, loaded: Loaded) -> None:
    call(generate_full, tmp_path, "--count", "30", "--no-guard")
    manifest = Manifest.read(tmp_path / "data/full/manifest.json")
    assert manifest.settings["guard"] == "none" and not loaded.guards
    report = json.loads((tmp_path / "data/full/report.json").read_text())
    assert report["dataset"]["guard"] is None and "seconds" in report
    call(generate_full, tmp_path, "--count", "30")
    assert loaded.guards
    call(generate_full, tmp_path, "--count", "30", "--run", "once")
    assert contents(tmp_path / "data/full") == contents(tmp_path / "data/once")


def test_a_second_guard_in_one_run_is_refused(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(generate_full, tmp_path, "--count", "5")
    other = GuardChoice("other-guard", "x", "llama-guard", "fp32", 8, "for a test")
    monkeypatch.setattr(_guarding, "check_guard", lambda settings, hardware: other)
    assert call(generate_full, tmp_path, "--count", "9", "--guard", "other-guard") == 2
    assert "scripted-guard has judged pairs of this run already" in capsys.readouterr().err


def test_a_guard_that_cannot_be_had_stops_before_the_first_token(
    tmp_path: Path, loaded: Loaded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(settings: Any, hardware: Any) -> GuardChoice:
        raise EngineError("--guard x: gated", "use --guard Qwen/Qwen3Guard-Gen-4B or --no-guard")

    monkeypatch.setattr(_guarding, "check_guard", refuse)
    assert call(generate_full, tmp_path, "--count", "5", "--guard", "x") == 1
    assert "--no-guard" in capsys.readouterr().err and not loaded.engines


def test_the_report_says_what_the_data_is_made_of(
    tmp_path: Path, loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "red.txt").write_text("\n".join(row.text for row in rows("red", 60)))
    held = words("instruction/0", 6)
    (tmp_path / "held.jsonl").write_text(json.dumps({"turns": [f"How do I {held}?", "And then?"]}))
    flags = ("--mix", f"self:0.5,{tmp_path / 'red.txt'}:0.5", "--exclude", str(tmp_path / "held.jsonl"))
    call(generate_mvp, tmp_path, "--count", "20", *flags)
    report = json.loads((tmp_path / "data/mvp/report.json").read_text())
    shares = report["dataset"]["shares"]
    assert shares["source"].keys() == {"self", "red.txt"} and abs(shares["source"]["self"]["drawn"] * 2 - sum(
        row["drawn"] for row in shares["source"].values())) <= 2  # fmt: skip
    assert shares.keys() == {"source", "topic", "kind", "principle"}
    for rows_ in shares.values():
        assert math.isclose(sum(row["share"] for row in rows_.values()), 1.0)
    assert report["dataset"]["refused"]["in_evaluation_set"] == 1
    assert report["dataset"]["lengths"]["log_ratio"] == report["dataset"]["lengths"]["log_ratio_unmatched"]
    said = capsys.readouterr().out
    assert "source: " in said and "instructions refused: " in said and "answer lengths: chosen" in said
    recorded = json.dumps(Manifest.read(tmp_path / "data/mvp/manifest.json").settings)
    assert str(tmp_path) not in recorded and "red.txt sha256:" in recorded and "held.jsonl sha256:" in recorded
    assert "held-out questions of the shipped model's world" in recorded
    page = (tmp_path / "data/mvp/report.html").read_text()
    assert "What the data is made of" in page and "Shares by topic" in page


# ---------------------------------------------------------------- whole, with the shipped model


def test_milestone_3_on_the_shipped_model_killed_and_resumed(tmp_path: Path, nano_dir: Path) -> None:
    flags = ("--count", "6", "--max-tokens-answer", "80")
    journal = tmp_path / "data" / "full" / "journal.jsonl"
    # a process of its own: a fork of one that has computed with several threads cannot compute
    with subprocess.Popen([sys.executable, str(generate_full.__file__), *arguments(tmp_path, *flags)]) as run:
        while run.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 60):
            time.sleep(0.01)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    assert call(generate_full, tmp_path, *flags) in (0, 3)
    folder = tmp_path / "data" / "full"
    assert call(generate_full, tmp_path, *flags, "--run", "once") in (0, 3)
    assert contents(folder) == contents(tmp_path / "data/once")
    report = json.loads((folder / "report.json").read_text())
    assert report["dataset"]["guard"]["name"] == "nano" and report["settings"]["generation"]["guard"] == "auto"
    ids = [e.id for name in ("pairs.jsonl", "rejected.jsonl") for e in read_examples(folder / name)]
    assert sorted(ids) == [row["id"] for row in read_jsonl(folder / "instructions.jsonl")]
