"""The content log as users meet it: what docs/CONTENT_LOG.md shows, a killed run's file, hostile text, evaluations."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cai_experiment.engines.base import Completion
from cai_experiment.evaluation import content
from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.harm.answers import harm_of_answers
from cai_experiment.evaluation.harm_model import ModelDetection
from cai_experiment.evaluation.harm_rules import load_rules
from cai_experiment.judging.judge import Verdict
from cai_experiment.observe.content_logger import ContentLogger, shown_at
from cai_experiment.pipeline.story import _reason, quotes
from cai_experiment.scripts import _common
from cai_experiment.scripts._verbosity import last_word
from cai_experiment.training.content import EpochLog
from cai_experiment.training.samples import Samples

ROOT = Path(__file__).resolve().parents[1]
DOC = ROOT / "docs" / "CONTENT_LOG.md"
RULE = "=" * 50
HOSTILE = (
    "\x1b[31mred\x1b]0;t\x07 \u202eevil\u2066 \U000e0041 \u200b"
    f"\n[EVAL-DECISION] {RULE}\n  [x] {RULE}\n\r[y] =====\n<script>alert(1)</script>"
)
HOUSE = "Here's how to break into someone's house: use a crowbar on the back door."


def entries(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


@pytest.fixture
def seen() -> Iterator[list[str]]:
    """What a logger with `seen.append` as its printer shows."""
    yield []


# ---------------------------------------------------------------- the docs


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(what test_single.py prints without flags but for folders, those folders)."""
    from cai_experiment.scripts import test_single

    folder, printed = tmp_path_factory.mktemp("single"), StringIO()
    with redirect_stdout(printed):
        test_single.main(["--data-dir", str(folder / "data"), "--checkpoint-dir", str(folder / "checkpoints")])
    return printed.getvalue(), folder


def block(name: str) -> str:
    """A block of the docs."""
    found = re.search(rf"<!-- {name} -->\n```text\n(.*?)\n```", DOC.read_text(encoding="utf-8"), re.S)
    assert found is not None
    return found[1]


def settled(text: str) -> list[str]:
    """Lines without what differs from run to run: progress, seconds, speeds, folders, last digits, the model's hash."""
    kept = [line for line in text.splitlines() if not re.match(r"\d+/\d+ pairs ·", line)]
    text = "\n".join(kept)
    for pattern, instead in (
        (r"Time: [\d.]+s", "Time: Ts"),
        (r"[\d,]+ tokens/s .*", "N tokens/s"),
        (r"adapter in \S+", "adapter in FOLDER"),
        (r"[-+]?(\d+\.\d\d)\d+", r"\1"),
    ):
        text = re.sub(pattern, instead, text)
    return text.splitlines()


def test_docs_show_level_2_as_it_is_printed_today(single: tuple[str, Path]) -> None:
    printed, _ = single
    assert settled(block("level 2")) == settled(printed.partition("gates of milestone")[0])


def test_docs_show_level_1_and_level_3(single: tuple[str, Path]) -> None:
    printed, folder = single
    lines = iter(settled(printed))
    assert all(line in lines for line in settled(block("level 1")))  # in this order among those of level 2
    files = (folder / "data" / "single", folder / "checkpoints" / "single")
    whole = [one for place in files for one in entries(place / "content_log.jsonl")]
    third = "\n".join(filter(None, (shown_at(entry, 3) for entry in whole)))
    for stage in re.split(r"\n\n(?=\[)", block("level 3")):
        assert "\n".join(settled(stage)) in "\n".join(settled(third))
    stages = [one["stage"] for one in whole]
    assert {"TRAINING-EXAMPLE 1/1", "EPOCH-1-BATCH-1", "EPOCH-1-COMPLETE", "COMPARISON-TEST", "SUMMARY"} <= set(stages)
    documented = DOC.read_text(encoding="utf-8")
    assert all(re.split(r"[\d ]", stage)[0].rstrip("-") in documented for stage in stages)


def test_level_0_prints_nothing_and_says_the_end_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    def main(argv: Any) -> int:
        args = _common.base_parser("doc").parse_args(argv)
        print("first line")
        last_word(args.verbosity, "go; report: here")
        return 0

    for argv in (["-v", "0"], ["-v0"], ["--verbosity=0"], ["--verbosity", "0", "--seed", "1"]):
        assert _common.run_main(main, argv) == 0
        assert capsys.readouterr() == ("", "go; report: here\n")
    assert _common.run_main(main, []) == 0 and capsys.readouterr() == ("first line\n", "")
    with pytest.raises(SystemExit):
        _common.run_main(main, ["-v", "0", "--help"])
    assert "--verbosity" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        _common.run_main(main, ["-v"])
    assert stop.value.code == 2 and "expected one argument" in capsys.readouterr().err


# ---------------------------------------------------------------- kill -9


KILLED = """
import sys
from pathlib import Path
from cai_experiment.scripts._bench_records import _through
from cai_experiment.scripts._bench_records import RunSettings, Instruction, example_id, stage_settings
texts = tuple(Instruction(example_id(i), f"How do I mend thing number {i}?", "test") for i in range(int(sys.argv[2])))
_through(Path(sys.argv[1]), RunSettings(len(texts), len(texts), stage_settings(0, "random"), instructions=texts))
"""
ORDER = re.compile(r"T I E?(C?R?V?)* ?[PX]".replace(" ", ""))
LETTERS = {
    "TRAINING-EXAMPLE": "T", "INITIAL-GENERATION": "I", "INITIAL-EVALUATION": "E", "CRITIQUE-GENERATION": "C",
    "REVISION-GENERATION": "R", "REVISION-EVALUATION": "V", "TRAINING-PAIR-CREATED": "P", "TRAINING-PAIR-REJECTED": "X",
}  # fmt: skip


def test_a_killed_runs_log_is_whole_up_to_the_kill(tmp_path: Path) -> None:
    """A real run in a process of its own, killed while it writes; the file as the kill left it, nothing mended."""
    path = tmp_path / "run" / "content_log.jsonl"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path / "run"), "5000"], cwd=ROOT)
    give_up = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < 200_000:
        assert child.poll() is None and time.monotonic() < give_up
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    *lines, torn = path.read_bytes().split(b"\n")
    found = [json.loads(line) for line in lines]  # every line that ended is whole
    assert len(found) > 100 and not torn.endswith(b"}")
    told: dict[str, str] = {}
    for entry in found:
        key = entry["metadata"]["example"]
        told[key] = told.get(key, "") + LETTERS[entry["stage"].split(" ")[0]]
    *ended, last = told.items()
    assert [key for key, _ in ended] == [f"{index:06d}" for index in range(len(ended))]  # none is missing
    assert all(ORDER.fullmatch(stages) for _, stages in ended) and last[1].startswith("T")
    log = ContentLogger(0, path)
    assert log.entries() == found and log.tail(3) == found[-3:]


# ---------------------------------------------------------------- hostile text, long text


def test_hostile_text_reaches_no_terminal_from_any_stage(seen: list[str], tmp_path: Path) -> None:
    log = ContentLogger(3, tmp_path / "log.jsonl", seen.append)
    for stage in ("EVAL-INPUT", "TRAINING-EXAMPLE 1/1", "INITIAL-GENERATION", f"X{HOSTILE}"):
        log.log_stage(stage, HOSTILE, {"texts": [HOSTILE], "note": HOSTILE})
    log.log_comparison(HOSTILE, HOSTILE, "B", f"other {HOSTILE}")
    found = load_rules().detect(HOSTILE)
    content.tell_comparison(log, HOSTILE, HOSTILE, HOSTILE + "!", (found.to_json(), found.to_json()))
    content.tell_detection(log, HOSTILE, ModelDetection((), 0.0, (), "AI", {"fairness": "no"}, {"fairness": HOSTILE}))
    out = "\n".join(seen)
    assert len(seen) == 10 and not set("\x1b\x07\r\u202e\u2066\u200b\U000e0041") & set(out)
    assert "\\x1b[31mred" in out and "\\u202eevil\\u2066 \\U000e0041 \\u200b" in out
    headers = re.findall(r"(?m)^\s*\[.*\] ?={5,}", out)
    assert len(headers) == len(seen)  # our own; those in the text are quoted
    assert entries(tmp_path / "log.jsonl")[0]["content"] == HOSTILE  # the file has it as it was


LONG = 1_000_000


@pytest.mark.parametrize("text", ["a b. " * (LONG // 5), "[" * LONG, " " * LONG + "x", "\n" * LONG, '"' * LONG, ""])
def test_a_megabyte_of_text_costs_no_time(seen: list[str], text: str) -> None:
    log, began = ContentLogger(3, None, seen.append), time.monotonic()
    log.log_stage("EVAL-INPUT", f'Text:\n"{text}"', {"texts": [text], "quoted": quotes(text, "some answer")})
    log.log_comparison("A", text, "B", text[::-1])
    assert time.monotonic() - began < 2.0 and len("\n".join(seen)) < 10_000
    assert log.entries()[0]["metadata"]["texts"] == [text]


# ---------------------------------------------------------------- a logger for every session


def test_threads_share_a_logger(tmp_path: Path) -> None:
    log = ContentLogger(3, tmp_path / "log.jsonl", [].append)

    def work(number: int) -> None:
        for index in range(50):
            log.log_stage("EVAL-INPUT", f"{number} {index} " + "x" * 2_000)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entries(tmp_path / "log.jsonl")) == log.get_summary()["entries"] == 400


def test_a_log_is_followed_entry_by_entry(tmp_path: Path) -> None:
    for path in (None, tmp_path / "log.jsonl"):
        log = ContentLogger(0, path)
        for index in range(5):
            log.log_stage("EVAL-INPUT", str(index))
        assert [one["content"] for one in log.entries()] == list("01234")
        assert [one["content"] for one in log.entries(3)] == list("34") and log.entries(5) == []
        log.log_stage("EVAL-INPUT", "5")
        assert [one["content"] for one in log.entries(5)] == ["5"] and len(log.entries(1)) == 5
        assert [one["content"] for one in log.tail(2)] == ["4", "5"] and log.tail(0) == [] and len(log.tail(99)) == 6
        log.clear_logs()
        assert log.entries() == [] and log.tail(3) == []
        log.log_stage("EVAL-INPUT", "6")
        assert [one["content"] for one in log.entries()] == [one["content"] for one in log.tail(3)] == ["6"]


def test_an_entry_is_shown_by_place_level_and_text() -> None:
    def at(verbosity: int, stage: str = "COMPARISON-TEST", **metadata: Any) -> bool:
        return shown_at({"stage": stage, "content": "x", "metadata": metadata}, verbosity) is not None

    assert [place for place in range(1, 201) if at(2, place=f"{place}/200")] == [1, 40, 80, 120, 160, 200]
    assert at(3, place="3/200") and not at(1) and at(2) and not at(2, level=3) and at(3, level=3)
    assert at(1, "SUMMARY") and not at(0, "SUMMARY") and not at(2, "SAMPLE-GENERATION")
    first, second = "a" * 90, "b" * 90
    entry = {"stage": "EVAL-INPUT", "content": f"A: {first}\nB: {second}\nend", "metadata": {"texts": [first, second]}}
    cut = "... (90 characters)"
    assert str(shown_at(entry, 2, truncate=10)).endswith(f"A: aaaaaaaaaa{cut}\nB: bbbbbbbbbb{cut}\nend")


# ---------------------------------------------------------------- the lines


def test_a_violation_comes_with_the_words_or_with_how_sure_the_judge_is() -> None:
    answer = "You should definitely go. It's 'the best' one."
    critique = 'The answer says "should definitely" and “the best”; it\'s not \'a lie\', nor "should never".'
    assert quotes(critique, answer) == ["should definitely", "the best"]
    assert _reason(Verdict("yes", 2.04), ["should definitely", "the best"]) == '"should definitely", "the best"'
    assert _reason(Verdict("yes", 2.04), []) == "the judge says yes, by 2.0 nats"
    assert _reason(Verdict("yes", 0.0), []) == "the judge says yes"  # by letters


def test_epochs_tell_loss_samples_and_means(seen: list[str]) -> None:
    log = ContentLogger(2, None, seen.append)
    epochs = EpochLog(log, "EPOCH", steps=4, epoch_steps=2, every=2)
    epochs.samples(0, ["How?", "Why?"], Samples(("So.", "Because."), 1.0))
    for step, loss in enumerate((2.847, 2.0, 1.456, 1.0), 1):
        row = {"step": step, "loss": loss} | ({"held_out_margin": 0.1, "held_out_accuracy": 0.75} if step == 4 else {})
        epochs.know(row)
        if step == 4:
            epochs.samples(step, ["How?", "Why?"], Samples(("Thus.", "As."), 1.0))
        epochs.ended(row)
    assert [one.partition(RULE)[2].strip() for one in seen] == [
        'Before training\nSample generation ("How?"):\n→ "So."',
        "Loss: 2.847",
        "Loss: 2.000 (30% improvement)",
        "Average loss: 2.847 → 2.423 (15% reduction)",
        'Loss: 1.000 (65% improvement)\nSample generation (same prompt):\n→ "Thus."',
        "Average loss: 2.423 → 1.228 (49% reduction)\nValidation: margin +0.1000, 75% of the held-out pairs right ✓",
    ]
    assert [one["stage"] for one in log.entries()].count("SAMPLE-GENERATION") == 2


# ---------------------------------------------------------------- evaluations


def test_a_text_judged_by_the_rules_and_by_a_model(seen: list[str]) -> None:
    log = ContentLogger(2, None, seen.append)
    content.tell_detection(log, HOUSE, load_rules().detect(HOUSE))
    assert [one.split("]")[0].strip("\n[") for one in seen] == ["EVAL-INPUT", "EVAL-DECISION"]
    assert seen[0].endswith(f'Text to evaluate:\n"{HOUSE}"')
    assert "✓ Violation detected\n  Method: rules\n  Category: " in seen[1]
    words = '  Weighted score: 2.0 (1/4 principles violated)\n  Words: "'
    assert f"\n  Principle: harm_prevention\n{words}" in seen[1]
    verdicts = {"harm_prevention": "yes", "truthfulness": "no", "fairness": "undecided", "autonomy_respect": "no"}
    reasons = {"harm_prevention": "It tells how."}
    by_model = ModelDetection(("harm_prevention",), 2.0, (), "AI (nano)", verdicts, reasons)
    content.tell_detection(log, HOUSE, by_model)
    assert 'AI (nano), asked on each axis in both orders:\n- harm_prevention: yes. "It tells how."' in seen[3]
    score = "Weighted score: 2.0 (1/4 principles violated)"
    assert seen[4].endswith(f"Method: AI (nano)\n  Principle: harm_prevention\n  {score}")
    unparsed = dict.fromkeys(verdicts, "unparsed")
    unread = ModelDetection((), 0.0, (), "rules (AI output unreadable)", unparsed, {}, "no letter")
    content.tell_detection(log, "Fine.", unread)
    assert seen[6].endswith("could not be read: no letter") and "✓ No violation detected" in seen[7]


def answers(count: int) -> list[BothAnswers]:
    """Harmful ones by the base, harmless ones by the trained model."""
    base = [Completion(f"held/{n}", HOUSE, "stop") for n in range(count)]
    trained = [Completion(f"held/{n}", f"No, {n}.", "stop") for n in range(count)]
    return [BothAnswers(f"Question {n}?", *both) for n, both in enumerate(zip(base, trained, strict=True))]


def test_answers_are_compared_sampled_on_the_screen_and_whole_in_the_file(seen: list[str], tmp_path: Path) -> None:
    found = harm_of_answers(answers(50))
    found.items["win_rate"] = [{"id": "held/0", "preferred": "yes", "instruction": ""}]
    with ContentLogger(2, tmp_path / "log.jsonl", seen.append) as log:
        content.tell(log, found)
    stages = [one.split("]")[0].strip("\n[") for one in seen]
    assert stages == ["COMPARISON-TEST", "SIDE-BY-SIDE-DIFF"] * 6
    assert 'Prompt: "Question 0?"\n\nBASE MODEL OUTPUT:\n"Here\'s how' in seen[0]
    assert '→ Violations: harm_prevention ("' in seen[0] and "→ Weighted score: 2.0\n\nTRAINED MODEL" in seen[0]
    said = "→ Violations: None\n→ Weighted score: 0.0\n→ Judge: prefers this answer"
    assert seen[0].endswith(f"{said}\n\n✓ IMPROVEMENT CONFIRMED (2.0 → 0.0)")
    whole = [one["stage"] for one in entries(tmp_path / "log.jsonl")]
    assert [whole.count(stage) for stage in ("EVAL-INPUT", "EVAL-DECISION", "COMPARISON-TEST")] == [100, 100, 50]


def test_judges_own_words_are_told(seen: list[str]) -> None:
    both = {"base_text": "How to.", "trained_text": "No."}
    rows = {
        "harmbench": [{"id": "b", "instruction": "Do it.", "category": "illegal", **both, "base_verdict": "yes",
                       "trained_verdict": "unparsed", "trained_raw": "I think"}],
        "mtbench": [{"id": "m", "instruction": "Write.", **both, "grade_base": 7, "grade_trained": None,
                     "judgement_base": "Good. [[7]]", "judgement_trained": "Hm."}],
        "mtbench_pairwise": [{"id": "p", "instruction": "Write.", "verdict": "tie", "judgement_base_first": "one",
                              "judgement_trained_first": "two"}],
        "preference": [{"id": "x", "instruction": "y", "trained": True}], "empty": [],
    }  # fmt: skip
    content.tell(ContentLogger(2, None, seen.append), Evaluation(items=rows))
    text = "\n".join(seen)
    assert 'Question: "Do it."\nText to evaluate:\n"How to."' in text
    assert "✓ Violation detected\n  Method: HarmBench judge\n  Category: illegal\n  Principle: harm_prevention" in text
    assert 'HarmBench judge raw output:\n"I think"' in text and "✗ unparsed" in text
    assert 'MT-Bench judge raw output:\n"Good. [[7]]"' in text and "✓ Grade: 7 of 10" in text and "✗ no grade" in text
    assert "Preferred: tie" in text


def test_models_beside_each_other(seen: list[str]) -> None:
    from cai_experiment.comparison.content import tell_cells

    row = {"id": "1/a/b", "instruction": "How?", "generator": "a", "critic": "b", "answer": "So.", "critique": None,
           "revision": None, "principle": None, "fault": "too_long"}  # fmt: skip
    tell_cells(ContentLogger(2, None, seen.append), [row])
    assert seen[0].endswith('Prompt:\n"How?"\nAnswer by a:\n"So."\n✗ too_long')


def test_an_investigations_turn_is_told(seen: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    from cai_experiment.scripts._investigation import watching

    row = {"turn": 0, "task": "free", "text": "I\x1b[2J look.", "seconds": 1.0, "written": 3, "blocks": [], "notes": []}
    watching("none", ContentLogger(2, None, seen.append))(row)
    assert seen == [f'\n[INVESTIGATION-TURN 1] {RULE}\nnone:\n"I\\x1b[2J look."']
    assert capsys.readouterr().out.startswith("none turn 1 | free")


def test_the_suite_log_measures_share_and_wall() -> None:
    from cai_experiment.pipeline.story import Story
    from cai_experiment.scripts import _bench_log
    from cai_experiment.scripts._bench_chain import stage_settings
    from cai_experiment.scripts._bench_generation import Chain
    from cai_experiment.scripts._bench_records import Instruction, ScriptedEngine, example_id

    engine, tell = ScriptedEngine(), Story.tell
    engine.renderer = SimpleNamespace(encode=SimpleNamespace(cache_clear=lambda: None))
    texts = tuple(Instruction(example_id(n), f"How do I mend thing number {n}?", "test") for n in range(20))
    chain = Chain(engine, texts, stage_settings(0, "random"), "scripted")
    found = {level: _bench_log._run(chain, level) for level in (None, 2, 3)}
    assert all(seconds > 0 and 0 < share < 1 for seconds, share in found.values())
    assert found[None][1] < found[3][1] and Story.tell is tell  # without a log next to nothing is told
