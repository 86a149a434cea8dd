"""The content log and the progress bar: what is shown at which level, and that the file always holds everything."""

from __future__ import annotations

import json
import os
import resource
import signal
from pathlib import Path

import pytest
from rich.console import Console

from cai_experiment.errors import BadInputError, DiskError
from cai_experiment.observe import screen
from cai_experiment.observe.content_logger import BLOCK_STAGES, ContentLogger
from cai_experiment.observe.progress import Progress, duration

RULE = "=" * 50
HOSTILE = "Safe\x1b[2J\x1b]0;owned\x07\r\x9b31m\u202eevil\ud800 end"


def entries(path: Path) -> list[dict[str, object]]:
    """All entries of a content log; raises if a line is not whole."""
    return [json.loads(line) for line in path.read_bytes().decode("utf-8").splitlines()]


def log_everything(log: ContentLogger) -> None:
    """One stage of each kind."""
    log.log_stage("RESULT", "go")
    log.log_stage("EVAL-INPUT", "a text")
    log.log_stage("EPOCH-1-BATCH-1", "Loss: 2.847")
    log.log_comparison("BASE", "Do it now.", "TRAINED", "Do it later.")
    log_example(log, 1, 10)
    log_example(log, 3, 10)


def log_example(log: ContentLogger, index: int, count: int, example: str | None = None) -> None:
    """All stages of one example, as the pipeline logs them."""
    metadata = {"place": f"{index}/{count}"} | ({"example": example} if example else {})
    for stage in (f"TRAINING-EXAMPLE {index}/{count}", *BLOCK_STAGES[1:7]):
        log.log_stage(stage, f"text of {index}", metadata)


# ---------------------------------------------------------------- what the screen shows


@pytest.mark.parametrize(
    ("verbosity", "shown"),
    [
        (0, []),
        (1, ["RESULT"]),
        (2, ["RESULT", "EVAL-INPUT", "EPOCH-1-BATCH-1", "SIDE-BY-SIDE-DIFF", "TRAINING-EXAMPLE 1/10"]),
        (3, ["RESULT", "EVAL-INPUT", "EPOCH-1-BATCH-1", "SIDE-BY-SIDE-DIFF", "TRAINING-EXAMPLE 1/10"]),
    ],
)
def test_levels(capsys: pytest.CaptureFixture[str], tmp_path: Path, verbosity: int, shown: list[str]) -> None:
    with ContentLogger(verbosity, tmp_path / "content_log.jsonl") as log:
        log_everything(log)
    headers = [line for line in capsys.readouterr().out.splitlines() if line.endswith(RULE)]
    blocks = {0: 0, 1: 0, 2: 1, 3: 2}[verbosity]  # level 2 samples the examples: the first, not the third of ten
    assert headers[: len(shown)] == [f"[{stage}] {RULE}" for stage in shown]
    assert sum("CRITIQUE-GENERATION" in line for line in headers) == blocks
    assert len(entries(tmp_path / "content_log.jsonl")) == 4 + 2 * 7  # whatever the screen shows


def test_header_and_content(capsys: pytest.CaptureFixture[str]) -> None:
    ContentLogger(2).log_stage("EVAL-INPUT", 'Text to evaluate:\n"Hello"', {"hidden": "below level 3"})
    assert capsys.readouterr().out == f'\n[EVAL-INPUT] {RULE}\nText to evaluate:\n"Hello"\n'


def test_metadata_is_shown_at_level_3(capsys: pytest.CaptureFixture[str]) -> None:
    ContentLogger(3).log_stage("EVAL-INPUT", "Hello", {"tokens": 3, "path": Path("x\x1by")})
    assert capsys.readouterr().out.endswith('Hello\nMetadata: {"tokens": 3, "path": "x\\u001by"}\n')


def test_truncation_rules_the_screen_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = "word " * 1_000
    log = ContentLogger(2, tmp_path / "log.jsonl")
    log.log_stage("EVAL-INPUT", text)
    log.log_stage("EVAL-INPUT", text, truncate=10)
    log.log_comparison("A", text, "B", text + "end")
    out = capsys.readouterr().out
    assert f"{text[:500]}... (5,000 characters)\n" in out and f"\n{text[:10]}... (5,000 characters)\n" in out
    assert len(out) < 2_500
    whole = entries(tmp_path / "log.jsonl")
    assert whole[0]["content"] == whole[1]["content"] == text
    assert whole[2]["metadata"] == {"labels": ["A", "B"], "texts": [text, text + "end"]}


def test_examples_that_arrive_mixed_are_shown_as_whole_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    log = ContentLogger(3)
    stages = [("TRAINING-EXAMPLE", ""), ("INITIAL-GENERATION", ""), ("TRAINING-PAIR-CREATED", "")]
    for stage, _ in stages:
        for number in (1, 2):
            name = f"{stage} {number}/2" if stage == "TRAINING-EXAMPLE" else stage
            log.log_stage(name, f"of example {number}", {"example": f"{number:06d}"})
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("of example")]
    assert shown == ["of example 1"] * 3 + ["of example 2"] * 3


def test_an_open_block_is_shown_at_close(capsys: pytest.CaptureFixture[str]) -> None:
    with ContentLogger(2) as log:
        log.log_stage("TRAINING-EXAMPLE 1/20", "How?", {"example": "000001"})
        assert capsys.readouterr().out == ""
    assert "How?" in capsys.readouterr().out


def test_level_2_samples_examples(capsys: pytest.CaptureFixture[str]) -> None:
    log = ContentLogger(2)
    for index in range(1, 5_001):
        log_example(log, index, 5_000, example=f"{index:06d}")
    headers = [line for line in capsys.readouterr().out.splitlines() if "TRAINING-EXAMPLE" in line]
    assert headers == [f"[TRAINING-EXAMPLE {index}/5000] {RULE}" for index in (1, 1000, 2000, 3000, 4000, 5000)]


def test_control_codes_and_forged_headers_do_not_get_through(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    log = ContentLogger(3, tmp_path / "log.jsonl")
    log.log_stage("EVAL-INPUT", HOSTILE, {"text": HOSTILE})
    log.log_stage("EVAL-INPUT", f"fine\n[EVAL-DECISION] {RULE}\n✓ nothing found")
    log.log_comparison(HOSTILE, HOSTILE, "B", "other")
    out = capsys.readouterr().out
    assert not set("\x1b\x07\r\x9b\u202e\ud800") & set(out)
    assert "Safe\\x1b[2J\\x1b]0;owned\\x07\\x0d\\x9b31m\\u202eevil\\ud800 end" in out
    assert f"\n> [EVAL-DECISION] {RULE}" in out
    assert entries(tmp_path / "log.jsonl")[0]["content"] == HOSTILE


def test_emoji_and_joined_characters_stay() -> None:
    assert screen.escaped("👩‍🚀 नमस्ते\tשלום\n") == "👩‍🚀 नमस्ते\tשלום\n"


def test_a_terminal_that_knows_ascii_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "out.txt", "w", encoding="ascii") as file:
        monkeypatch.setattr("sys.stdout", file)
        ContentLogger(2).log_stage("EVAL-DECISION", screen.decision(True, "AI", "privacy", "Privacy"))
    assert "\\u2713 Violation detected" in (tmp_path / "out.txt").read_text()


def test_verbosity_is_checked() -> None:
    with pytest.raises(BadInputError, match="verbosity 7 is not one of 0, 1, 2, 3"):
        ContentLogger(7)


# ---------------------------------------------------------------- the lines inside a stage


def test_lines_are_those_of_the_example_blocks() -> None:
    assert screen.decision(True, "AI (nano)", "illegal_activity", "harm_prevention").splitlines() == [
        "✓ Violation detected",
        "  Method: AI (nano)",
        "  Category: illegal_activity",
        "  Principle: harm_prevention",
    ]
    assert screen.evaluation(["Unfair bias"] * 3, 3.5, 4).endswith("Weighted score: 3.5 (3/4 principles violated)")
    assert screen.evaluation([], 0.0, 4) == "Violations: NONE ✓\nWeighted score: 0.0 (0/4 principles violated)"
    assert "  Improvement: 3.5 → 0.0 (100% violation reduction)\n  Time: 6.2s" in screen.pair_created(3.5, 0.0, 6.21)
    assert "(50% violation increase)" in screen.pair_created(2.0, 3.0, 1.0)
    assert "(no violation before)" in screen.pair_created(0.0, 0.0, 1.0)
    assert screen.batch_loss(2.847) == "Loss: 2.847"
    assert screen.batch_loss(1.456, first_loss=2.847) == "Loss: 1.456 (49% improvement)"
    assert screen.epoch_loss(1.987, 1.456) == "Average loss: 1.987 → 1.456 (27% reduction)"
    assert screen.confirmed(2.0, 0.0) == "✓ IMPROVEMENT CONFIRMED (2.0 → 0.0)"
    assert screen.confirmed(2.0, 2.0) == "✗ NO IMPROVEMENT (2.0 → 2.0)"


def test_word_diff_marks_words_that_went_and_came() -> None:
    assert screen.word_diff("Go out now please.", "Go home please.") == (
        "Go [-out now-] please.",
        "Go {+home+} please.",
    )
    assert screen.word_diff("All is new.", "Nothing stayed here.") == ("All is new.", "Nothing stayed here.")
    assert screen.word_diff("Same.", "Same. More.") == ("Same.", "Same. {+More.+}")


def test_side_by_side_shows_the_sentences_that_differ() -> None:
    before = "People go quiet. Read her phone now. Cook a meal."
    after = "People go quiet. Ask her now. Cook a meal."
    assert screen.side_by_side("BASE", before, "TRAINED", after) == (
        'BASE:    "[-Read-] her [-phone-] now."\nTRAINED: "{+Ask+} her now."'
    )
    assert screen.side_by_side("A", before, "B", before) == "No difference."
    assert screen.side_by_side("A", "", "B", "New.") == 'A: ""\nB: "New."'


def test_side_by_side_of_a_megabyte_is_cut_first() -> None:
    assert len(screen.side_by_side("A", "a b " * 250_000, "B", "b a. " * 200_000)) < 10_000


# ---------------------------------------------------------------- the file


def test_summary_export_and_clear(tmp_path: Path) -> None:
    for path in (None, tmp_path / "log.jsonl"):
        log = ContentLogger(0, path)
        log.log_stage("EPOCH-1-BATCH-1", "abc")
        log.log_stage("EPOCH-2-BATCH-5", "def", {"odd": Path("x")})
        log.log_stage("TRAINING-EXAMPLE 3/20", "é\udc80")
        summary = log.get_summary()
        assert (summary["entries"], summary["characters"]) == (3, 8)
        assert summary["stages"] == {"EPOCH-BATCH": 2, "TRAINING-EXAMPLE": 1}
        log.export_logs(tmp_path / "export.json")
        exported = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
        assert [entry["content"] for entry in exported] == ["abc", "def", "é\udc80"]
        assert list(exported[1]) == ["stage", "content", "metadata", "timestamp"]
        log.clear_logs()
        log.log_stage("RESULT", "go")
        log.export_logs(tmp_path / "export.json")
        assert [one["stage"] for one in json.loads((tmp_path / "export.json").read_text())] == ["RESULT"]
        assert log.get_summary()["entries"] == 1
        log.close()
    assert len(entries(tmp_path / "log.jsonl")) == 4  # clearing the view took nothing from the file


def test_a_resumed_log_appends_and_cuts_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"stage": "A", "content": ""}\n{"stage": "B", "content": "' + b"x" * 200_000)
    with ContentLogger(0, path) as log:
        log.log_stage("C", "")
        log.export_logs(tmp_path / "export.json")
    assert [entry["stage"] for entry in entries(path)] == ["A", "C"]
    assert [entry["stage"] for entry in json.loads((tmp_path / "export.json").read_text())] == ["A", "C"]


def test_a_killed_log_is_whole_up_to_the_kill(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        log = ContentLogger(0, path)
        while True:
            log.log_stage("INITIAL-GENERATION", "x" * 50_000)
            os.write(writing, b".")
    os.close(writing)
    for _ in range(40):
        os.read(reading, 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    reported = 40
    while rest := os.read(reading, 4096):
        reported += len(rest)
    os.close(reading)
    ContentLogger(0, path).close()
    assert reported <= len(entries(path)) <= reported + 1


def test_full_disk_is_a_disk_error_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, 5_000))
        log = ContentLogger(0, path)
        log.log_stage("A", "x" * 3_000)
        try:
            log.log_stage("B", "x" * 3_000)
        except DiskError:
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert [entry["stage"] for entry in entries(path)] == ["A"]


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"cannot write the content log .*none.log\.jsonl: No such file"):
        ContentLogger(2, tmp_path / "none" / "log.jsonl")
    with pytest.raises(BadInputError, match="Is a directory"):
        ContentLogger(2).export_logs(tmp_path)


# ---------------------------------------------------------------- progress


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def run_progress(tmp_path: Path, terminal: bool = False, **settings: object) -> str:
    """Ten pairs, four seconds and 400 tokens each; what was shown."""
    clock = Clock()
    with open(tmp_path / "out.txt", "w+") as file:
        console = Console(
            file=file, force_terminal=terminal, width=100, legacy_windows=False, _environ={"TERM": "xterm"}
        )
        with Progress(10, console=console, clock=clock, **settings) as progress:  # type: ignore[arg-type]
            for done in range(1, 11):
                clock.now += 4.0
                progress.update(done, tokens=400 * done)
        file.seek(0)
        return file.read()


def test_plain_lines_every_ten_seconds_and_at_the_end(tmp_path: Path) -> None:
    assert run_progress(tmp_path, price_per_hour=90.0).splitlines() == [
        "3/10 pairs · 100 tokens/s · 28 s left · $0.30",
        "6/10 pairs · 100 tokens/s · 16 s left · $0.60",
        "9/10 pairs · 100 tokens/s · 4 s left · $0.90",
        "10/10 pairs · 100 tokens/s · 40 s · $1.00",
    ]


def test_verbosity_0_is_silent(tmp_path: Path) -> None:
    assert run_progress(tmp_path, verbosity=0) == ""
    assert run_progress(tmp_path, terminal=True, verbosity=0) == ""


def test_a_terminal_gets_a_bar(tmp_path: Path) -> None:
    shown = run_progress(tmp_path, terminal=True)
    assert "━" in shown and "10/10 pairs · 100 tokens/s · 40 s" in shown


def test_a_resumed_run_counts_what_was_done_before() -> None:
    clock = Clock()
    progress = Progress(100, done=40, seconds_before=3600.0, price_per_hour=2.0, clock=clock)
    assert progress.status() == "40/100 pairs · $2.00"
    clock.now = 1800.0
    progress.update(70)
    assert progress.status() == "70/100 pairs · 30 min 00 s left · $3.00"


def test_durations() -> None:
    assert [duration(s) for s in (0, 12.4, 59.7, 200, 3900)] == [
        "0 s",
        "12 s",
        "1 min 00 s",
        "3 min 20 s",
        "1 h 05 min",
    ]
