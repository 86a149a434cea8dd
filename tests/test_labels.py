"""Labels by hand: blind, written at once, resumed after kill -9, by several people; their agreement with the judge."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.errors import EXIT_BAD_INPUT, EXIT_CTRL_C, BadInputError
from cai_experiment.evaluation.labels import agreement, read_labels
from cai_experiment.judging.result import kappa
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.runner import run_pipeline
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.records.files import read_examples, read_jsonl, write_jsonl
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts import label_critiques
from cai_experiment.scripts._common import run_main
from cai_experiment.scripts._labelling import sample

SCRIPT = Path(label_critiques.__file__)
SECRET = "said-by-the-judge"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of eight pairs by the scripted engine; its judge's words are marked, so that a leak is seen."""
    folder = tmp_path_factory.mktemp("labels") / "mvp"
    settings = RunSettings(8, 40, StageSettings(2, "random"))
    with RunFolder(folder) as entered, ContentLogger(0, folder / "content_log.jsonl") as logger:
        engine = ScriptedEngine()
        run_pipeline(settings, entered, engine, engine, load_constitution(), logger, Progress(8, "pairs", 0))
    for name in ("pairs", "rejected"):
        rows = read_jsonl(folder / f"{name}.jsonl")
        for row in rows:
            row["meta"]["meaningful"] = [SECRET for _ in row["meta"]["meaningful"]]
            row["instruction"] += " \x1b[31mred [bold]"
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """The run, to label."""
    folder = tmp_path / "data" / "mvp"
    folder.mkdir(parents=True)
    for name in ("pairs.jsonl", "rejected.jsonl"):
        (folder / name).write_bytes((made / name).read_bytes())
    return folder


@pytest.fixture
def say(run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the script with these answers on a pipe; gives its exit code."""

    def run_with(answers: str, *flags: str) -> int:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{key}\n" for key in answers)))
        return run_main(label_critiques.main, ["--data-dir", str(run.parent), "--run", "mvp", "--count", "5", *flags])

    return run_with


def rows(run: Path) -> list[dict[str, Any]]:
    return read_jsonl(run / "labels.jsonl")


def test_pairs_come_first_in_random_order_and_nothing_of_the_judge_is_shown(
    run: Path, say: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert say("11111" + "ynuyy") == 0
    out = capsys.readouterr().out
    assert SECRET not in out and "\x1b[31m" not in out and "\\x1b[31mred [bold]" in out
    assert "10 of 10 labelled by person" in out
    pairs, critiques = rows(run)[:5], rows(run)[5:]
    assert {row["question"] for row in pairs} == {"preferred"} and len({row["id"] for row in pairs}) == 5
    assert all((row["label"] == "yes") == row["revision_first"] for row in pairs)  # 1 was always the answer
    assert [row["label"] for row in critiques] == ["yes", "no", "unsure", "yes", "yes"]
    assert all(row["judge"] == SECRET and row["who"] == "person" for row in critiques)


def test_the_revision_stands_first_in_half_of_the_pairs(run: Path) -> None:
    accepted = read_examples(run / "pairs.jsonl")
    shown = [task for seed in range(25) for task in sample(run, accepted, [], "preferred", 8, seed)]
    assert len(shown) == 200 and 75 <= sum(task.revision_first for task in shown) <= 125


def test_the_same_command_goes_on_where_it_stopped(
    run: Path, say: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert say("12x", "--question", "preferred") == 0  # the input ends; x is no answer
    assert "2 of 5 labelled" in capsys.readouterr().out
    assert say("u1q", "--question", "preferred") == 0
    out = capsys.readouterr().out
    assert "3 of 5" in out and "2 of 5 labelled" not in out and "4 of 5 labelled by person; the same command" in out
    assert say("2", "--question", "preferred") == 0 and say("", "--question", "preferred") == 0
    found = rows(run)
    assert len(found) == len({row["id"] for row in found}) == 5
    assert say("1", "--question", "preferred", "--count", "6") == 0 and len(rows(run)) == 6


def test_back_labels_again_and_the_later_label_holds(run: Path, say: Callable[..., int]) -> None:
    assert say("yybnyyb", "--question", "meaningful") == 0
    assert [row["label"] for row in rows(run)] == ["yes", "yes", "no", "yes", "yes"]
    held = read_labels(run)
    assert [one.label for one in held] == ["yes", "no", "yes", "yes"]


def test_the_seed_chooses_the_sample_and_people_are_kept_apart(run: Path, say: Callable[..., int]) -> None:
    for flags in (("--who", "anna"), ("--who", "ben"), ("--who", "cy", "--seed", "1")):
        assert say("yyyyy", "--question", "meaningful", *flags) == 0
    items = {who: [(r["id"], r["round"]) for r in rows(run) if r["who"] == who] for who in ("anna", "ben", "cy")}
    assert items["anna"] == items["ben"] != items["cy"] and len(items["cy"]) == 5


@pytest.mark.parametrize("flags", [("--run", "none"), ("--count", "0")])
def test_what_cannot_be_labelled_is_one_line(
    run: Path, say: Callable[..., int], flags: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = say("y", *flags)
    except SystemExit as stop:
        code = int(stop.code or 0)
    assert code == EXIT_BAD_INPUT and len(capsys.readouterr().err.splitlines()) == 1


def test_a_damaged_label_is_named(run: Path, say: Callable[..., int]) -> None:
    (run / "labels.jsonl").write_text('{"id": "000000", "label": "maybe"}\n', encoding="utf-8")
    assert say("y") == EXIT_BAD_INPUT
    with pytest.raises(BadInputError, match=r"labels.jsonl has a line that is no label"):
        agreement(run)


# ---------------------------------------------------------------- a real terminal, real kills


class Terminal:
    """The script on a pseudo-terminal."""

    def __init__(self, run: Path) -> None:
        self.keyboard, screen = pty.openpty()
        command = [sys.executable, str(SCRIPT), "--data-dir", str(run.parent), "--run", "mvp", "--count", "5"]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        self.process = subprocess.Popen(command, stdin=screen, stdout=screen, stderr=screen, close_fds=True,
                                        start_new_session=True, env=environment,
                                        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)))  # fmt: skip
        os.close(screen)
        self.shown = ""

    def see(self, text: str) -> None:
        """Read the screen until it shows `text`."""
        until = time.monotonic() + 40
        while text not in self.shown:
            ready, _, _ = select.select([self.keyboard], [], [], until - time.monotonic())
            assert ready, self.shown[-2000:]
            try:
                self.shown += os.read(self.keyboard, 4096).decode("utf-8", "replace")
            except OSError:
                pytest.fail(f"{text!r} was not shown: {self.shown[-2000:]}")

    def press(self, keys: str) -> None:
        os.write(self.keyboard, keys.encode())

    def ended(self) -> int:
        """The exit code, after the rest of the screen was read."""
        try:
            while piece := os.read(self.keyboard, 4096):
                self.shown += piece.decode("utf-8", "replace")
        except OSError:
            pass
        os.close(self.keyboard)
        return self.process.wait(60)


@pytest.fixture
def terminal(run: Path) -> Iterator[Callable[[], Terminal]]:
    """Opens terminals; what is left running at the end is killed."""
    opened: list[Terminal] = []

    def start() -> Terminal:
        opened.append(Terminal(run))
        return opened[-1]

    yield start
    for one in opened:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def test_single_keys_kill_and_ctrl_c_and_ctrl_d(run: Path, terminal: Callable[[], Terminal]) -> None:
    one = terminal()
    one.see("1 of 10")
    one.press("1")  # no line end
    one.see("2 of 10")
    one.press("\x1b[A")  # an arrow is no answer
    one.press("2")
    one.see("3 of 10")
    one.process.send_signal(signal.SIGKILL)
    assert one.ended() == -signal.SIGKILL and len(rows(run)) == 2
    with open(run / "labels.jsonl", "ab") as file:
        file.write(b'{"id": "0000')  # as a kill within the write leaves it

    two = terminal()
    two.see("3 of 10")
    two.press("u1")
    two.see("5 of 10")
    two.press("\x03")
    assert two.ended() == EXIT_CTRL_C and "the same command resumes" in two.shown
    assert [row["label"] in ("yes", "no", "unsure") for row in rows(run)] == [True] * 4

    three = terminal()
    three.see("5 of 10")
    three.press("1")
    three.see("6 of 10")
    three.press("\x04")
    assert three.ended() == 0 and "5 of 10 labelled" in three.shown
    assert len({json.dumps([row["id"], row["question"]]) for row in rows(run)}) == len(rows(run)) == 5


# ---------------------------------------------------------------- agreement


def labelled(folder: Path, who: str, said: str, judge: str, question: str = "meaningful") -> None:
    """One label an item: `said` and `judge` are letters of yes, no, unsure, decided by nobody (d), unparsed (x)."""
    words = {"y": "yes", "n": "no", "u": "unsure", "d": "undecided", "x": "unparsed", "-": ""}
    with open(folder / "labels.jsonl", "a", encoding="utf-8") as file:
        for number, (one, other) in enumerate(zip(said, judge, strict=True)):
            row = {"id": f"{number:06d}", "round": 0 if question == "meaningful" else None, "question": question,
                   "label": words[one], "who": who, "judge": words[other]}  # fmt: skip
            file.write(json.dumps(row) + "\n")


def test_nothing_is_said_where_nobody_has_labelled(run: Path) -> None:
    found = agreement(run)
    assert not (found.metrics or found.tables or found.notes)


def test_agreement_equals_its_definition_and_counts_what_was_not_decided(run: Path) -> None:
    labelled(run, "anna", "yynnyuyn", "yyndnnxy")
    found = agreement(run)
    same, chance = found.metrics["judge_person_agreement"], found.metrics["judge_person_kappa"]
    assert (same.value, same.n, same.unparsed) == (3 / 6, 6, 1)  # unsure and unparsed aside
    by_hand = kappa(["y", "y", "n", "n", "y", "n"], ["y", "y", "n", "d", "n", "y"])
    assert chance.value == pytest.approx(by_hand.value) and chance.interval == by_hand.interval and chance.n == 6
    assert same.interval is not None and same.items == "labels.jsonl"
    assert found.metrics["person_meaningful"].n == 7 and "person_person_kappa" not in found.metrics
    assert found.notes == ["8 critiques labelled by anna, 1 of them unsure"]
    (table,) = found.tables
    assert [row[1] for row in table.rows] == ["anna and the judge"] and table.rows[0][-1] == "1"
    assert found.cases and all("people say" in case.texts and "the judge says" in case.texts for case in found.cases)


def test_two_people_and_their_majority(run: Path) -> None:
    labelled(run, "anna", "yyynn", "yyyyy")
    labelled(run, "ben", "yynnu", "yyyyy")
    found = agreement(run)
    between = found.metrics["person_person_kappa"]
    assert between.value == pytest.approx(kappa(list("yyyn"), list("yynn")).value) and between.n == 4
    assert found.metrics["judge_person_agreement"].n == 4  # they tie on the third; of the fifth anna alone decides
    who = [row[1] for row in found.tables[0].rows]
    assert who == ["anna and the judge", "ben and the judge", "the majority and the judge", "anna and ben"]


def test_pairs_are_held_against_the_evaluations_judge(run: Path) -> None:
    labelled(run, "anna", "yynn", "----", "preferred")
    found = agreement(run)
    assert found.metrics["preferred_person_kappa"].n == 0 and found.metrics["person_preferred"].value == 0.5
    (run / "evaluation").mkdir()
    said = [{"id": f"{i:06d}", "preferred": word} for i, word in enumerate(("yes", "yes", "no", "yes"))]
    write_jsonl(run / "evaluation" / "revisions_judged.jsonl", said)
    judged = agreement(run).metrics
    assert judged["preferred_person_kappa"].value == pytest.approx(0.5) and judged["preferred_person_kappa"].n == 4
    assert judged["preferred_person_agreement"].value == 0.75
