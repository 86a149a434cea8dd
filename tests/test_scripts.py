"""The milestone scripts: with a scripted engine for their flow, and whole with the shipped model."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine, script

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import BadInputError
from cai_experiment.milestones import MILESTONES
from cai_experiment.records.files import read_examples, read_jsonl
from cai_experiment.records.manifest import Manifest
from cai_experiment.scripts import _milestone, generate_mvp, test_batch, test_single, train_dpo
from cai_experiment.scripts._common import run_main
from cai_experiment.scripts._following import next_command, take_generator
from cai_experiment.scripts._generation import generation_parser

FILES = ("instructions.jsonl", "pairs.jsonl", "rejected.jsonl")


def call(script_module: Any, folder: Path, *flags: str) -> int:
    """Run a script in this process with its data and checkpoints under `folder`; gives its exit code."""
    places = ("--data-dir", str(folder / "data"), "--checkpoint-dir", str(folder / "checkpoints"))
    return run_main(script_module.main, [*places, *flags])


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ScriptedEngine]]:
    """The scripts load a scripted engine; the list holds those that were loaded."""
    loaded: list[ScriptedEngine] = []

    def load(args: Any) -> tuple[ScriptedEngine, ScriptedEngine]:
        loaded.append(ScriptedEngine(len(loaded)))
        return loaded[-1], loaded[-1]

    monkeypatch.setattr(_milestone, "load_engines", load)
    monkeypatch.setattr("cai_experiment.scripts._beforehand._same_models", lambda args, models: True)
    yield loaded


# ---------------------------------------------------------------- the flow, scripted


def test_generate_mvp_ends_with_a_report_and_the_next_command(
    tmp_path: Path, scripted: list[ScriptedEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(generate_mvp, tmp_path, "--count", "15", "--model", "nano") in (0, 3)
    folder = tmp_path / "data" / "mvp"
    assert len(read_examples(folder / "pairs.jsonl")) == 15
    report = json.loads((folder / "report.json").read_text())
    assert {gate["part"] for gate in report["gates"]} == {"generation"}
    assert report["seconds"].keys() == {"loading", "generation"}
    assert (folder / "report.html").stat().st_size > 1000
    said = capsys.readouterr().out
    assert "gave a pair that passed the gate" in said and "rejected: " in said
    assert "train_dpo.py --milestone mvp --data-dir" in said or report["verdict"] == "no-go"


def test_a_finished_run_shows_its_report_again_without_a_model(
    tmp_path: Path, scripted: list[ScriptedEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    first = call(generate_mvp, tmp_path, "--count", "5", "--model", "nano")
    before = capsys.readouterr().out
    assert call(generate_mvp, tmp_path, "--count", "5", "--model", "nano") == first
    assert len(scripted) == 1
    assert capsys.readouterr().out.splitlines()[-3:] == before.splitlines()[-3:]


def test_a_larger_count_extends_a_finished_run(tmp_path: Path, scripted: list[ScriptedEngine]) -> None:
    for count in ("5", "9"):
        call(generate_mvp, tmp_path, "--count", count, "--model", "nano")
    call(generate_mvp, tmp_path, "--count", "9", "--run", "once", "--model", "nano")
    for name in FILES:
        assert (tmp_path / "data/mvp" / name).read_bytes() == (tmp_path / "data/once" / name).read_bytes()


def test_changed_settings_stop_and_fresh_moves_the_old_folder(
    tmp_path: Path, scripted: list[ScriptedEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    call(generate_mvp, tmp_path, "--count", "5", "--model", "nano")
    assert call(generate_mvp, tmp_path, "--count", "5", "--seed", "1", "--model", "nano") == 2
    error = capsys.readouterr().err.strip()
    assert "seed was 0, now 1" in error and "--fresh" in error and "\n" not in error
    assert call(generate_mvp, tmp_path, "--count", "5", "--seed", "1", "--fresh", "--model", "nano") in (0, 3)
    assert len(list((tmp_path / "data").glob("mvp.*/pairs.jsonl"))) == 1


def test_every_row_of_a_file_ends_in_pairs_or_rejected(tmp_path: Path, scripted: list[ScriptedEngine]) -> None:
    rows = tmp_path / "rows.txt"
    rows.write_text("\n".join(f"Question {i}?" for i in range(14)))
    assert call(generate_mvp, tmp_path, "--instructions", str(rows), "--count", "12", "--model", "nano") in (0, 3)
    folder = tmp_path / "data" / "mvp"
    found = [*read_examples(folder / "pairs.jsonl"), *read_examples(folder / "rejected.jsonl")]
    assert sorted(e.instruction for e in found) == sorted(f"Question {i}?" for i in range(12))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_stops_within_seconds_and_the_same_command_resumes(
    tmp_path: Path, scripted: list[ScriptedEngine], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:
        given = iter(range(150))

        def hanging(prompt: Prompt) -> Completion:
            if next(given, None) is None:
                os.write(tell, b"x")
                time.sleep(600)  # an engine in the middle of a long step
            return script(prompt)

        monkeypatch.setattr(_milestone, "load_engines", lambda args: (ScriptedEngine(speak=hanging),) * 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored
        os._exit(call(generate_mvp, tmp_path, "--count", "9", "--model", "nano"))
    os.read(ready, 1)
    os.kill(child, number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    done = {row["id"] for row in read_jsonl(tmp_path / "data/mvp/journal.jsonl")}
    assert len(done) == 150
    call(generate_mvp, tmp_path, "--count", "9", "--model", "nano")
    assert not done & scripted[-1].asked.keys()
    call(generate_mvp, tmp_path, "--count", "9", "--run", "unbroken", "--model", "nano")
    for name in FILES:
        assert (tmp_path / "data/mvp" / name).read_bytes() == (tmp_path / "data/unbroken" / name).read_bytes()


def test_a_full_disk_ends_in_one_line_and_loses_nothing(
    tmp_path: Path, scripted: list[ScriptedEngine], capfd: pytest.CaptureFixture[str]
) -> None:
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # no file may grow beyond 30 kB
        os._exit(call(generate_mvp, tmp_path, "--count", "9", "--model", "nano"))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    error = capfd.readouterr().err.strip()
    assert "cannot write" in error and "Traceback" not in error and "\n" not in error
    call(generate_mvp, tmp_path, "--count", "9", "--model", "nano")
    call(generate_mvp, tmp_path, "--count", "9", "--run", "unbroken", "--model", "nano")
    for name in FILES:
        assert (tmp_path / "data/mvp" / name).read_bytes() == (tmp_path / "data/unbroken" / name).read_bytes()


def test_loading_is_counted_apart_and_paid_for(tmp_path: Path, scripted: list[ScriptedEngine]) -> None:
    call(generate_mvp, tmp_path, "--count", "2", "--model", "nano", "--price-per-hour", "3.6")
    place = tmp_path / "data/mvp/manifest.json"
    before = Manifest.read(place)
    for _ in range(2):  # two sessions
        _milestone.note_loading(place, 100.0, 3.6)
    after = Manifest.read(place)
    assert after.loading_seconds == pytest.approx(before.loading_seconds + 200.0)
    assert after.cost_dollars == pytest.approx(before.cost_dollars + 0.2)
    call(generate_mvp, tmp_path, "--count", "3", "--model", "nano", "--price-per-hour", "3.6")
    report = json.loads((tmp_path / "data/mvp/report.json").read_text())
    assert report["seconds"]["loading"] >= 200.0 and Manifest.read(place).loading_seconds >= 200.0


# ---------------------------------------------------------------- from one script to the next

TOLD = ("--data-dir", "my data", "--checkpoint-dir", "kept", "--constitution", "mine.yaml", "--seed", "5", "--model",
        "qwen2.5-7b", "--generator", "org/name", "--critic", "nano", "--format", "base", "--quantization", "8bit",
        "--run", "mine")  # fmt: skip


@pytest.mark.parametrize("name", MILESTONES)
def test_the_next_command_runs_the_same_model_with_the_same_settings(name: str) -> None:
    milestone = MILESTONES[name]
    told = generation_parser(None, name).parse_args(TOLD)
    command = shlex.split(next_command(told, milestone, milestone.next_command))
    assert command[:2] == milestone.next_command.split()[:2]
    trains = command[1].endswith("train_dpo.py")
    args = (train_dpo.parser() if trains else generation_parser(None, "x")).parse_args(command[2:])
    same = {"data_dir", "checkpoint_dir", "seed", "format", "quantization"}
    same |= {"run"} if trains else {"constitution", "model", "generator", "critic"}
    assert {key: getattr(args, key) for key in same} == {key: getattr(told, key) for key in same}
    assert args.model == ("org/name" if trains else "qwen2.5-7b")
    if trains:
        assert "--quantization" not in next_command(told, milestone, milestone.next_command, served=True)
    untold = generation_parser(None, name).parse_args([])
    assert next_command(untold, milestone, milestone.next_command) == milestone.next_command


@pytest.mark.parametrize(("generator", "flags", "model", "words"), [
    ({"model": "qwen2.5-7b"}, (), "qwen2.5-7b", "qwen2.5-7b generated the pairs, so it is trained on them"),
    ({"model": "nano", "weights_sha256": "0"}, (), "nano", "nano generated"),
    ({"model": "org/name"}, ("--model", "org/name"), "org/name", ""),
    ({"model": "org/name"}, ("--model", "nano"), "nano", "were generated by org/name; nano is trained on them"),
    ({"model": "random:qwen2.5-7b"}, (), None, "random:qwen2.5-7b generated"),
    ({"model": "qwen2.5-7b", "weights_sha256": "0"}, (), None, r"batch: its pairs were generated by qwen2.5-7b, a fol"),
    ({"model": "gpt-oss-120b"}, (), None, "gpt-oss-120b, a folder or a server's own name; say with --model where"),
])  # fmt: skip
def test_training_takes_the_model_that_generated_or_says_that_it_differs(
    tmp_path: Path, generator: dict[str, str], flags: tuple[str, ...], model: str | None, words: str
) -> None:
    (tmp_path / "batch").mkdir()
    manifest = Manifest(settings={}, seed=0, models={"generator": generator}, constitution={})
    manifest.write(tmp_path / "batch" / "manifest.json")
    args = train_dpo.parser().parse_args(["--data-dir", str(tmp_path), "--run", "batch", *flags])
    if "its pairs" in words or "say with" in words:
        with pytest.raises(BadInputError, match=words):
            take_generator(args)
        return
    said = take_generator(args)
    assert words in said and bool(said) == bool(words)
    assert args.model == model and args.random_weights == ("qwen2.5-7b" if "random" in generator["model"] else None)


def test_a_variable_does_not_put_another_model_in_the_place_of_the_one_that_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "batch").mkdir()
    Manifest(settings={}, seed=0, models={"generator": {"model": "qwen2.5-7b"}}, constitution={}).write(
        tmp_path / "batch" / "manifest.json"
    )
    monkeypatch.setenv("CAI_MODEL", "qwen2.5-14b")
    args = train_dpo.parser().parse_args(["--data-dir", str(tmp_path), "--run", "batch"])
    assert "CAI_MODEL=qwen2.5-14b is for new runs" in take_generator(args) and args.model == "qwen2.5-7b"


# ---------------------------------------------------------------- bad input, before a model is loaded


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--instructions", "none.txt"], "none.txt: cannot be read"),
        (["--instructions", "empty.txt"], "empty.txt: holds no instructions"),
        (["--instructions", "latin.txt"], "latin.txt:2: byte 0xe9 is not UTF-8"),
        (["--instructions", "rows.jsonl", "--field", "ask"], "rows.jsonl: row 1 has no field 'ask'"),
        (["--model", "qwen2.5-33b"], "unknown preset"),
        (["--constitution", "broken.yaml"], "broken.yaml"),
        (["--constitution", "none.yaml"], "none.yaml"),
        (["--count", "0"], "0 is not 1 or more"),
        (["--skip-gate", "identical"], "identical"),
        (["--skip-gate", "too_long"], "too_long"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_bad_input_is_one_line_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n\n")
    Path("latin.txt").write_bytes("fine\ncafé\n".encode("latin-1"))
    Path("rows.jsonl").write_text('{"instruction": "Why?"}\n')
    Path("broken.yaml").write_text("principles:\n  - id: [\n")
    try:
        code = call(test_batch, tmp_path, *flags)
    except SystemExit as stop:  # argparse's own
        code = stop.code
    error = capsys.readouterr().err.strip()
    assert code == 2 and words in error and "\n" not in error and "Traceback" not in error


# ---------------------------------------------------------------- whole, with the shipped model


def check_pairs(folder: Path, count: int) -> None:
    """Every line has the house plan's fields, and `datasets` reads the file as it is."""
    import datasets

    rows = datasets.load_dataset("json", data_files=str(folder / "pairs.jsonl"), split="train",
                                 cache_dir=str(folder / "cache"))  # fmt: skip
    assert len(rows) == count
    for row in rows:
        assert {"id", "instruction", "initial_answer", "principle", "critique", "revised_answer", "preference_pair",
                "rounds", "meta"} <= row.keys()  # fmt: skip
        assert row["preference_pair"] == {
            "prompt": row["instruction"], "chosen": row["revised_answer"], "rejected": row["initial_answer"],
        }  # fmt: skip


def test_milestone_0_on_the_shipped_model(tmp_path: Path, nano_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(test_single, tmp_path, "--model", "nano") == 0
    said = capsys.readouterr().out
    assert said.startswith("model nano") and "1 of " in said and "test_batch.py" in said
    folder = tmp_path / "data" / "single"
    check_pairs(folder, 1)
    report = json.loads((folder / "report.json").read_text())
    assert {gate["part"] for gate in report["gates"]} == {"generation", "training"}
    adapter = tmp_path / "checkpoints/single/final/adapter_model.safetensors"
    written = adapter.stat().st_mtime_ns
    assert call(test_single, tmp_path, "--model", "nano") == 0  # finished: the report again, no training
    assert adapter.stat().st_mtime_ns == written


def test_milestone_1_on_the_shipped_model(tmp_path: Path, nano_dir: Path) -> None:
    assert call(test_batch, tmp_path, "--model", "nano") in (0, 3)
    folder = tmp_path / "data" / "batch"
    check_pairs(folder, 10)
    metrics = json.loads((folder / "report.json").read_text())["metrics"]
    assert metrics["critique_right"]["value"] >= 0.7
    assert metrics["critique_meaningful"]["value"] >= 0.7
    assert {"preference_accuracy", "judge_kappa"} <= metrics.keys()
    assert all(len(e.rounds) == 2 for e in read_examples(folder / "pairs.jsonl"))


def test_the_base_layout_makes_pairs_too(tmp_path: Path, nano_dir: Path) -> None:
    assert call(generate_mvp, tmp_path, "--model", "nano", "--format", "base", "--count", "3") in (0, 3)
    check_pairs(tmp_path / "data" / "mvp", 3)


@pytest.mark.parametrize(
    "name", ["harmbench/harmbench_behaviors_text_all.csv", "hh_rlhf/harmless_base_test_first1000.jsonl"]
)
def test_real_prompts_run_through_and_are_accounted_for(
    tmp_path: Path, nano_dir: Path, shared_data: Path, name: str
) -> None:
    flags = ("--model", "nano", "--instructions", str(shared_data / name), "--count", "20", "--allow-evaluation-sets")
    assert call(generate_mvp, tmp_path, *flags) in (0, 3)
    folder = tmp_path / "data" / "mvp"
    ids = [e.id for file in ("pairs.jsonl", "rejected.jsonl") for e in read_examples(folder / file)]
    assert sorted(ids) == [row["id"] for row in read_jsonl(folder / "instructions.jsonl")]
    assert len(ids) == 20
    assert all(e.reject_reasons for e in read_examples(folder / "rejected.jsonl"))
