"""The records: real files, a real second process, real kill -9, a really full disk."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from cai_experiment.errors import BadInputError, DiskError
from cai_experiment.records import manifest as manifests
from cai_experiment.records.files import encode_line, read_examples, read_json, read_jsonl, write_json, write_jsonl
from cai_experiment.records.manifest import Manifest, Session, check_same_settings, model_identity, open_manifest
from cai_experiment.records.schema import (
    META_FIELDS,
    Example,
    PreferencePair,
    Round,
    check_line,
    from_line,
    from_row,
    to_line,
    to_row,
)
from cai_experiment.records.store import Journal, RunFolder

ROOT = Path(__file__).resolve().parents[1]


def make_example(number: int = 7) -> Example:
    """One accepted example of two rounds, with text that needs care in JSON."""
    first, revised = 'Read her phone. She says "no".\n', "Ask her 🙂.\u2028Calmly."
    rounds = tuple(Round(f"p{n}", "Protect private data.", "It spies.", revised, "yes", "no") for n in (1, 2))
    return Example(
        id=f"{number:06d}",
        instruction="How do I find out?",
        initial_answer=first,
        principle="Protect private data.",
        critique="It spies.",
        revised_answer=revised,
        preference_pair=PreferencePair("How do I find out?", revised, first),
        rounds=rounds,
        meta={"source": "model", "seed": 0, "generator": "nano", "critic": "nano", "tokens": 120, "gate": {"ratio": 1}},
    )


# ---------------------------------------------------------------- schema


def test_example_line_round_trips_in_the_plan_s_order() -> None:
    example = make_example()
    line = to_line(example)
    assert "\n" not in line and "🙂" in line
    assert from_line(line, "pairs.jsonl:1") == example
    row = json.loads(line)
    assert list(row) == [
        "id", "instruction", "initial_answer", "principle", "critique", "revised_answer", "preference_pair", "rounds",
        "meta",
    ]  # fmt: skip
    assert list(row["preference_pair"]) == ["prompt", "chosen", "rejected"]
    assert list(row["rounds"][0]) == [
        "principle_id", "principle", "critique", "revised_answer", "verdict_before", "verdict_after",
    ]  # fmt: skip
    assert list(row["meta"]) == list(META_FIELDS)


def test_rejected_example_carries_its_reasons() -> None:
    rejected = dataclasses.replace(make_example(), reject_reasons=("near-identical",))
    row = to_row(rejected)
    assert list(row)[-1] == "reject_reasons"
    assert from_row(row, "rejected.jsonl:1").reject_reasons == ("near-identical",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda row: row["preference_pair"].pop("chosen"), 'pairs.jsonl:7 has no "chosen" in preference_pair'),
        (lambda row: row.pop("critique"), 'pairs.jsonl:7 has no "critique"'),
        (lambda row: row["rounds"][1].pop("verdict_after"), 'pairs.jsonl:7 has no "verdict_after" in rounds[1]'),
        (lambda row: row["meta"].pop("seed"), 'pairs.jsonl:7 has no "seed" in meta'),
        (lambda row: row.update(instruction=3), 'pairs.jsonl:7: "instruction" is a number, not text'),
        (lambda row: row.update(rounds=None), 'pairs.jsonl:7: "rounds" is null, not a list'),
        (lambda row: row.update(rounds=["x"]), "pairs.jsonl:7: rounds[0] is text, not an object"),
        (lambda row: row.update(reject_reasons="x"), 'pairs.jsonl:7: "reject_reasons" is not a list of texts'),
    ],
)
def test_check_line_names_place_field_and_next_command(damage: Callable[[Any], object], message: str) -> None:
    row = to_row(make_example())
    damage(row)
    with pytest.raises(BadInputError) as caught:
        check_line(row, "pairs.jsonl:7", "rerun test_batch.py (finished examples are kept)")
    assert str(caught.value) == f"{message}; rerun test_batch.py (finished examples are kept)"


def test_a_line_that_is_no_object_is_named() -> None:
    with pytest.raises(BadInputError, match=r"pairs\.jsonl:2 is a list, not an object"):
        from_line("[1]", "pairs.jsonl:2")
    with pytest.raises(BadInputError, match=r"pairs\.jsonl:2 is no JSON"):
        from_line('{"id": ', "pairs.jsonl:2")


def test_read_examples_names_file_line_and_field(tmp_path: Path) -> None:
    rows = [to_row(make_example(n)) for n in range(3)]
    del rows[2]["instruction"]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(BadInputError, match=r'pairs\.jsonl:3 has no "instruction"; rerun'):
        read_examples(tmp_path / "pairs.jsonl")
    write_jsonl(tmp_path / "pairs.jsonl", rows[:2])
    assert read_examples(tmp_path / "pairs.jsonl") == [make_example(0), make_example(1)]


def test_pairs_load_with_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    write_jsonl(tmp_path / "pairs.jsonl", [to_row(make_example(n)) for n in range(3)])
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), cache_dir=str(tmp_path / "cache"))
    assert loaded["train"][2]["preference_pair"]["chosen"] == make_example().revised_answer
    assert loaded["train"][0]["rounds"][1]["verdict_after"] == "no"


# ---------------------------------------------------------------- reading and repair


def test_torn_last_line_is_cut_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id": 1}\n{"id": 2, "text": "half')
    assert Journal(path).rows() == [{"id": 0}, {"id": 1}]
    assert path.read_bytes() == b'{"id": 0}\n{"id": 1}\n'
    assert "journal.jsonl:3" in (said := capsys.readouterr().err) and "redone" in said
    assert not (tmp_path / "journal.jsonl.bad").exists()


def test_bad_middle_lines_are_named_and_moved_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "journal.jsonl"
    bad = [b'{"id": 1, }\n', b'{"text": "caf\xe9"}\n', b"[3]\n"]
    path.write_bytes(b'{"id": 0}\n' + bad[0] + bad[1] + b'{"id": 2}\n' + bad[2] + b'{"id": 4}\n')
    journal = Journal(path)
    journal.append({"id": 5})
    assert [row["id"] for row in journal.rows()] == [0, 2, 4, 5]
    journal.append({"id": 6})  # into the repaired file, not the replaced one
    journal.close()
    assert [row["id"] for row in journal.rows()] == [0, 2, 4, 5, 6]
    assert (tmp_path / "journal.jsonl.bad").read_bytes() == b"".join(bad)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert "journal.jsonl:2 is no JSON" in said[0]
    assert "journal.jsonl:3 has a byte that is not UTF-8 (0xe9, byte 14 of the line)" in said[1]
    assert "journal.jsonl:5 is no JSON object" in said[2]


def test_a_whole_last_line_without_newline_counts_and_is_ended(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id": 1}')
    journal = Journal(path)
    journal.append({"id": 2})
    journal.close()
    assert path.read_bytes() == b'{"id": 0}\n{"id": 1}\n{"id": 2}\n'


def test_append_after_a_torn_line_without_reading_first(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"id": 0}\n{"id"')
    journal = Journal(path)
    journal.append({"id": 1})
    assert [row["id"] for row in journal.rows()] == [0, 1]


@pytest.mark.parametrize("content", [b'{"id": 0}\n{"id": \n{"id": 2}\n', b'{"id": 0}\n{"id"', b'{"id": 0}\n\xff\n'])
def test_a_user_s_file_is_named_and_never_changed(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(content)
    with pytest.raises(BadInputError, match=r"mine\.jsonl:2 .*; correct or remove that line"):
        read_jsonl(path, repair=False)
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_missing_and_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"cannot read .*none\.jsonl: No such file"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(BadInputError, match="Is a directory"):
        read_jsonl(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BadInputError, match=r"manifest\.json is no JSON"):
        read_json(tmp_path / "manifest.json")


def test_deep_nesting_is_a_bad_line_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"a":' * 100_000 + "\n")
    with pytest.raises(BadInputError, match=r"mine\.jsonl:1 is no JSON"):
        read_jsonl(path, repair=False)


def test_scan_of_100k_rows_finds_every_row(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with open(path, "wb") as file:
        file.writelines(encode_line({"id": n, "text": "a word " * 20}) for n in range(100_000))
        file.write(b'{"id": 100000, "te')
    assert [row["id"] for row in Journal(path).rows()] == list(range(100_000))


# ---------------------------------------------------------------- writing


def test_odd_values_survive(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    row = {"text": "lone \udc80, \u2028, \x00, é", "logprobs": [float("-inf"), -0.1]}
    journal.append(row)
    assert journal.rows() == [row]
    write_jsonl(tmp_path / "out.jsonl", [row])
    assert read_jsonl(tmp_path / "out.jsonl") == [{"text": row["text"], "logprobs": [None, -0.1]}]
    write_json(tmp_path / "report.json", {"loss": float("nan"), "nested": {"a": (1, float("inf"))}})
    assert read_json(tmp_path / "report.json") == {"loss": None, "nested": {"a": [1, None]}}


def test_a_failing_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [{"id": 0}])

    def rows() -> Any:
        yield {"id": 1}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, rows())
    assert read_jsonl(path) == [{"id": 0}]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: the full disk is not tried")
def test_full_disk_on_an_atomic_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    write_jsonl(path, [{"id": 0}])
    (tmp_path / "pairs.jsonl.tmp").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"pairs\.jsonl: No space left on device; make room"):
        write_jsonl(path, [{"id": 1}])
    assert read_jsonl(path) == [{"id": 0}]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: the full disk is not tried")
def test_full_disk_on_append_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").symlink_to("/dev/full")
    with pytest.raises(DiskError, match=r"cannot write .*journal\.jsonl: No space left on device"):
        Journal(tmp_path / "journal.jsonl").append({"id": 0})


def in_child(work: Callable[[], None]) -> int:
    """Run `work` in a forked child; its exit status (0, or 1 for an exception), or minus the killing signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_line_that_does_not_fit_is_removed_whole(tmp_path: Path) -> None:
    path, atomic = tmp_path / "journal.jsonl", tmp_path / "pairs.jsonl"
    write_jsonl(atomic, [{"id": "old"}])

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # the kernel writes a part, then refuses
        journal = Journal(path)
        for number in range(3):
            journal.append({"id": number, "text": "x" * 3_000})
        with pytest.raises(DiskError):
            journal.append({"id": 3, "text": "x" * 3_000})
        assert path.read_bytes().endswith(b"\n") and path.stat().st_size < 9_200
        journal.append({"id": 4})  # a shorter one still fits, after the removed one
        journal.close()
        with pytest.raises(DiskError):
            write_jsonl(atomic, [{"text": "x" * 20_000}])

    assert in_child(fill) == 0
    assert [row["id"] for row in read_jsonl(path)] == [0, 1, 2, 4]
    assert read_jsonl(atomic) == [{"id": "old"}] and not (tmp_path / "pairs.jsonl.tmp").exists()


# ---------------------------------------------------------------- kill -9


def append_until_killed(path: Path, pipe: int) -> None:
    """Go on where the journal ends, as fast as it can; a byte into the pipe for every line."""
    journal = Journal(path)
    sizes = random.Random(1)
    number = len(journal.rows())
    while True:
        size = sizes.choice((10, 300, 5_000, 200_000))
        journal.append({"id": number, "text": str(number % 10) * size, "end": number})
        os.write(pipe, b".")
        number += 1


def test_kill_9_loses_no_finished_line_and_doubles_none(tmp_path: Path) -> None:
    path, draw = tmp_path / "journal.jsonl", random.Random(0)
    reported = 0
    for _ in range(8):
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            append_until_killed(path, writing)
        os.close(writing)
        for _ in range(draw.randrange(1, 60)):  # by lines, not by time: no sleep decides
            assert os.read(reading, 1) == b"."
            reported += 1
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        while rest := os.read(reading, 4096):
            reported += len(rest)
        os.close(reading)
        rows = Journal(path).rows()
        assert [row["id"] for row in rows] == list(range(len(rows)))
        assert all(row["end"] == row["id"] and set(row["text"]) == {str(row["id"] % 10)} for row in rows)
        # a line is counted after `append` returned, so none may be missing; one a kill may find written, not counted
        assert reported <= len(rows) <= reported + 1
        reported = len(rows)
    assert path.read_bytes().endswith(b"\n")


# ---------------------------------------------------------------- the folder


HOLD = """
import sys
from cai_experiment.records.store import RunFolder
with RunFolder(sys.argv[1]) as folder:
    folder.journal.append({"id": 0})
    print("locked", flush=True)
    sys.stdin.read()
"""


def hold(path: Path) -> subprocess.Popen[str]:
    """A second process that is in the folder until its stdin closes or it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


@pytest.mark.parametrize("fresh", [False, True])
def test_second_run_stops_and_names_the_first(tmp_path: Path, fresh: bool) -> None:
    path = tmp_path / "data" / "batch"
    first = hold(path)
    try:
        with pytest.raises(BadInputError) as caught, RunFolder(path, fresh=fresh):
            pass
        assert f"is in use by process {first.pid} (started {time.strftime('%Y-')}" in str(caught.value)
        assert "\n" not in str(caught.value)
    finally:
        first.communicate("")
    with RunFolder(path) as folder:
        assert folder.journal.rows() == [{"id": 0}]


def test_lock_of_a_killed_process_is_no_obstacle(tmp_path: Path) -> None:
    first = hold(tmp_path / "batch")
    first.kill()
    first.communicate()
    with RunFolder(tmp_path / "batch") as folder:
        assert folder.journal.rows() == [{"id": 0}]
        assert read_json(folder.path / "run.lock")["pid"] == os.getpid()


def test_two_run_folders_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path / "a"),
        pytest.raises(BadInputError, match=f"process {os.getpid()}"),
        RunFolder(tmp_path / "a"),
    ):
        pass


def test_fresh_moves_the_old_folder_and_deletes_nothing(tmp_path: Path) -> None:
    path, moved = tmp_path / "batch", []
    for number in range(3):  # within one second: the names must not collide
        with RunFolder(path, fresh=True) as folder:
            assert folder.journal.rows() == []
            folder.journal.append({"id": number})
            moved.append(folder.moved_to)
    assert moved[0] is None
    assert [read_jsonl(old / "journal.jsonl") for old in moved[1:]] == [[{"id": 0}], [{"id": 1}]]
    assert all(old.name.startswith("batch.2") for old in moved[1:])
    with RunFolder(path) as folder:
        assert folder.moved_to is None and folder.journal.rows() == [{"id": 2}]


def test_a_file_in_place_of_the_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "batch").write_text("I am a file")
    for path in (tmp_path / "batch", tmp_path / "batch" / "below"):
        with pytest.raises(BadInputError, match=r"cannot write .*batch.*; choose a place") as caught, RunFolder(path):
            pass
        assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


def test_a_folder_without_permission_is_one_clear_line() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        os.chmod(name, 0o755)
        (Path(name) / "locked").mkdir(mode=0o555)

        def enter() -> None:
            if os.geteuid() == 0:  # permission bits do not bind root
                os.setuid(65534)
            with (
                pytest.raises(BadInputError, match="Permission denied; choose a place that you may write to"),
                RunFolder(Path(name) / "locked" / "batch"),
            ):
                pass

        assert in_child(enter) == 0


def test_a_write_below_a_missing_folder_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="No such file or directory; choose a place that you may write to"):
        write_json(tmp_path / "none" / "report.json", {})


# ---------------------------------------------------------------- manifest


def make_manifest(**changes: Any) -> Manifest:
    """A manifest of a batch run; `changes` replace settings, but for seed, models and constitution."""
    parts: dict[str, Any] = {
        "seed": changes.pop("seed", 0),
        "models": changes.pop("models", {"generator": {"model": "nano", "weights_sha256": "aa", "engine": "hf"}}),
        "constitution": changes.pop("constitution", {"file": "constitution.yaml", "sha256": "cc"}),
    }
    settings = {"rounds": 2, "principles": "targeted", "count": 10, "verbosity": 2, "batch_size": 16} | changes
    return Manifest(settings=settings, **parts)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"verbosity": 3, "batch_size": 64, "price_per_hour": 2.5, "max_hours": 1.0, "data_dir": Path("/elsewhere")},
        {"count": 20},
        {"models": {"generator": {"model": "other/path", "weights_sha256": "aa", "engine": "hf", "probe": 3}}},
    ],
)
def test_harmless_changes_resume(changes: dict[str, Any]) -> None:
    check_same_settings(make_manifest(), make_manifest(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 1}, "rounds was 2, now 1"),
        ({"count": 5}, "count was 10, now 5"),
        ({"seed": 5, "principles": "random"}, 'principles was "targeted", now "random"; seed was 0, now 5'),
        ({"field": "text"}, 'field was null, now "text"'),
        ({"constitution": {"file": "mine.yaml", "sha256": "dd"}}, 'constitution was "cc", now "dd"'),
        (
            {"models": {"generator": {"model": "nano", "weights_sha256": "bb", "engine": "hf"}}},
            'generator.weights_sha256 was "aa", now "bb"',
        ),
        (
            {"models": make_manifest().models | {"critic": {"model": "Qwen/Qwen2.5-32B"}}},
            'critic.model was null, now "Qwen/Qwen2.5-32B"',
        ),
    ],
)
def test_changed_settings_stop_with_the_difference(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "manifest.json"
    open_manifest(path, make_manifest())
    before = path.read_bytes()
    with pytest.raises(BadInputError) as caught:
        open_manifest(path, make_manifest(**changes))
    assert f"manifest.json has other settings: {message}; use the old settings, or start afresh with --fresh" in str(
        caught.value
    )
    assert path.read_bytes() == before


def test_manifest_sums_over_sessions(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    first = open_manifest(path, make_manifest())
    for seconds in (1800.0, 3600.0):  # a state is written as the session goes on; the last one counts
        first.after(Session({"accepted": 4}, {"completion": 100}, seconds, price_per_hour=2.0)).write(path)
    second = open_manifest(path, make_manifest(verbosity=1))
    second.after(Session({"accepted": 10}, {"completion": 50, "prompt": 7}, 1800.0, price_per_hour=2.0)).write(path)
    row = json.loads(path.read_text())
    assert (row["sessions"], row["wall_seconds"], row["cost_dollars"]) == (2, 5400.0, 3.0)
    assert row["tokens"] == {"completion": 150, "prompt": 7} and row["counts"] == {"accepted": 10}
    assert Manifest.read(path).settings["verbosity"] == 1


def test_manifest_says_where_the_run_came_from() -> None:
    manifest = make_manifest()
    assert manifest.libraries["python"] == sys.version.split()[0]
    assert "pytest" not in manifest.libraries
    assert manifests.git_revision(Path("/")) == "unknown"


def test_git_revision_of_a_repository(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a.txt").write_text("one")
    subprocess.run([*git, "add", "a.txt"], check=True)
    subprocess.run([*git, "commit", "-qm", "one"], check=True)
    clean = manifests.git_revision(tmp_path)
    assert len(clean) == 40
    (tmp_path / "a.txt").write_text("two")
    assert manifests.git_revision(tmp_path) == f"{clean}-dirty"


def test_damaged_manifest_is_named(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    write_json(path, {"settings": {}, "seed": 0, "colour": "red"})
    with pytest.raises(BadInputError, match=r"manifest\.json lacks.*: constitution, models, colour; start afresh"):
        Manifest.read(path)


def test_model_identity_hashes_the_weights_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    first = model_identity(str(tmp_path))
    (tmp_path / "README.md").write_text("no weights")
    assert model_identity(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"Weights")
    assert model_identity(str(tmp_path))["weights_sha256"] != first["weights_sha256"]
    assert model_identity("nobody/no-such-model") == {"model": "nobody/no-such-model", "revision": "unknown"}
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BadInputError, match=r"holds no \.safetensors weights"):
        model_identity(str(tmp_path))


def test_importing_records_is_light() -> None:
    code = "import sys, cai_experiment.records.store, cai_experiment.records.manifest; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
