"""The ensemble's evaluation: arms, marks, paired differences, who spoke, the page, resuming after a kill."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import build_tiny_model

from cai_experiment.ensemble import arms, page, patterns, results, score
from cai_experiment.ensemble.arms import Asked, Asking, Cost, ask
from cai_experiment.ensemble.decode import Counts, Spoken
from cai_experiment.ensemble.layout import Row
from cai_experiment.ensemble.score import ALL, Marks
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.records.store import Journal, RunFolder

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "cai_experiment" / "scripts" / "eval_ensemble.py"
HOSTILE = "<script>alert(1)</script> & \x1b[31mred"
NAMES = ["general", "medical", "mathematical"]
WORDS = {"yes": " The answer is yes.", "no": " The answer is no.", "?": " I do not know."}


def row(number: int, dataset: str = "boolq", gold: str = "yes") -> Row:
    return Row(f"{dataset}-{number}", dataset, "yesno", f"Question: Is it {number}?\nAnswer:", WORDS[gold], gold)


def said(text: str, experts: Sequence[int] = (0,), **more: Any) -> dict[str, Any]:
    """An answer as the journal has it, a token a character."""
    ids = [ord(one) for one in text]
    spoken = [experts[i * len(experts) // max(len(ids), 1)] for i in range(len(ids))]
    pi = [[0.8 if m == one else 0.1 for m in range(3)] for one in spoken]
    return {"text": text, "finish": "stop", "ids": ids, "experts": spoken, "pi": pi, **more}


class Letters:
    """A tokenizer of single characters."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, token_ids))


# ---------------------------------------------------------------- accuracy and differences


def marks_of(**found: Sequence[bool | None]) -> Marks:
    n = len(next(iter(found.values())))
    experts = [name for name in ("a", "b") if name in found]
    return Marks.of(["x"] * (n // 2) + ["y"] * (n - n // 2), experts, found)


def test_unread_answers_are_counted_and_are_wrong() -> None:
    found = score.accuracies(marks_of(ensemble=[True, None, False, True]))["ensemble"]
    assert (found[ALL]["value"], found[ALL]["n"], found[ALL]["unread"]) == (0.5, 4, 1)
    assert (found["x"]["value"], found["x"]["unread"], found["y"]["value"]) == (0.5, 1, 0.5)
    low, high = found[ALL]["interval"]
    assert low == pytest.approx(0.150, abs=1e-3) and high == pytest.approx(0.850, abs=1e-3)  # Wilson, by hand


def test_best_single_is_pooled_and_the_oracle_takes_any() -> None:
    marks = marks_of(ensemble=[True, True, True, False], a=[True, False, False, False], b=[False, False, True, True])
    assert marks.best_single() == "b"
    picked = score.with_picked(marks, [0, 0, 0, 1])
    assert picked.right["oracle"] == (True, False, True, True)
    assert picked.right["by_dataset"] == (True, False, True, True), "a is best in x, b in y"
    assert picked.right["router"] == (True, False, False, True)
    found = score.differences(picked)
    assert found["ensemble_minus_best_single"][ALL]["value"] == 0.25
    assert found["ensemble_minus_best_single"][ALL]["against"] == "b"
    assert found["ensemble_over_oracle"][ALL]["value"] == 1.0
    assert score.with_picked(marks_of(ensemble=[True, False]), None).right.keys() == {"ensemble"}
    assert score.differences(marks_of(ensemble=[True, False])) == {}


def test_differences_have_paired_intervals_and_holm_over_the_rivals() -> None:
    rng = random.Random(0)
    ensemble = [rng.random() < 0.8 for _ in range(200)]
    weak = [one and rng.random() < 0.7 for one in ensemble]
    same = list(ensemble)
    found = score.differences(score.with_picked(marks_of(ensemble=ensemble, a=weak, b=weak, uniform=same), None))
    above = found["ensemble_minus_best_single"][ALL]
    assert above["interval"][0] > 0 and above["p_holm"] < 0.001 and above["needed"] is None
    none = found["ensemble_minus_uniform"][ALL]
    assert none["value"] == 0 and none["interval"][0] < 0 < none["interval"][1] and none["p_holm"] == 1.0
    assert "p_holm" not in found["ensemble_minus_oracle"][ALL] and "p_holm" not in none.get("x", {})


def test_needed_questions_would_tell_the_difference() -> None:
    """With so many questions and the same shares, the interval leaves 0 out; with half of them it does not."""
    before, after = [False] * 3 + [True] + [True] * 16, [True] * 3 + [False] + [True] * 16
    needed = score.questions_needed(before, after)
    assert needed is not None and 20 < needed < 200
    times = round(1.25 * needed / 20)
    assert score.questions_needed(before * times, after * times) is None
    assert score.questions_needed(before * (times // 3), after * (times // 3)) is not None


def test_ratio_by_bootstrap() -> None:
    over, under = [1.0] * 90 + [0.0] * 10, [1.0] * 95 + [0.0] * 5
    found = score.ratio(over, under)
    assert found.value == pytest.approx(90 / 95) and found.interval is not None
    assert found.interval[0] < found.value < found.interval[1] <= 1.0
    assert found == score.ratio(over, under), "seeded"
    assert score.ratio([1.0], [0.0]).value is None and score.ratio([], []).n == 0
    assert score.ratio([1.0, 0.0], [1.0, 0.0]).interval is None, "a quarter of the draws has nothing below"


# ---------------------------------------------------------------- who spoke


def test_shares_switches_and_tenths() -> None:
    turns = [patterns.Turns((0, 0, 1, 1)), patterns.Turns((2, 2)), patterns.Turns(())]
    found = patterns.patterns(turns, ["x", "y", "y"], NAMES)
    assert (found[ALL]["answers"], found[ALL]["tokens"]) == (3, 6)
    assert [found[ALL]["share"][name]["value"] for name in NAMES] == pytest.approx([2 / 6, 2 / 6, 2 / 6])
    assert found["x"]["switches"]["value"] == 1 and found["y"]["switches"]["value"] == 0
    assert found[ALL]["switches_per_100_tokens"] == pytest.approx(100 / 6)
    assert found["x"]["tenths"]["general"][0] == 1 and found["x"]["tenths"]["medical"][7] == 1
    assert found["x"]["weight"]["general"] is None, "no weights were kept"
    weighed = patterns.patterns([patterns.Turns((0, 1), ((0.6, 0.4), (0.2, 0.8)))], ["x"], NAMES[:2])
    assert weighed["x"]["weight"] == pytest.approx({"general": 0.4, "medical": 0.6})
    silent = patterns.patterns([patterns.Turns(())], ["x"], NAMES)
    assert silent[ALL]["switches"]["value"] is None and silent[ALL]["share"]["general"]["value"] is None


def test_pieces_join_to_the_text_and_keep_characters_whole(tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    text = " Grow 🍅 für 12 €"  # several tokens a character in this vocabulary
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text.split())
    found = patterns.pieces(tokenizer, ids, [i % 3 for i in range(len(ids))])
    assert "".join(piece.text for piece in found) == text
    assert all(one.expert != other.expert for one, other in pairwise(found))
    broken = patterns.pieces(tokenizer, ids[:4], [0, 1, 1, 0])
    assert "".join(piece.text for piece in broken) == tokenizer.decode(ids[:4])
    cut = patterns.pieces(tokenizer, ids, [0] * 3 + [1] * (len(ids) - 3), " Grow")
    assert "".join(piece.text for piece in cut) == " Grow"


def test_names_and_letters() -> None:
    assert patterns.short_names(["Qwen/Qwen2.5-1.5B", "a/b"]) == ["Qwen2.5-1.5B", "b"]
    assert patterns.short_names(["x/model", "y/model"]) == ["x/model", "y/model"]
    assert (patterns.letter(0), patterns.letter(25), patterns.letter(26)) == ("A", "Z", "E26")


def test_examples_are_won_lost_and_others_by_turns() -> None:
    marks = {"ensemble": [True, True, True, False, False], "a": [False, True, True, True, False]}
    assert patterns.examples(marks, ["a"], "ensemble", range(5), 3) == [0, 1, 3]
    assert patterns.examples(marks, ["a"], "ensemble", range(5), 9) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- asking, with a scripted decoder


class Scripted:
    """Stands for `decode`: tokens are characters; notes what it was asked, and fails where it is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[tuple[str, int, tuple[str, ...]]] = []
        self.fail_at: int | None = None
        monkeypatch.setattr(arms, "decode", self)
        monkeypatch.setattr(arms, "prompt_log_probs", self.log_probs)
        monkeypatch.setattr(arms, "CHUNK", 2)

    def __call__(
        self, model: Any, prompts: Sequence[Sequence[int]], settings: Any, keys: Sequence[str], stop: Sequence[str],
        on_token: Any,
    ) -> tuple[list[Spoken], Counts]:  # fmt: skip
        if self.fail_at == len(self.asked):
            raise EngineError("the model broke")
        self.asked.append((settings.mode, settings.expert, tuple(keys)))
        texts = [WORDS["yes"] if settings.mode != "single" or settings.expert == 1 else WORDS["no"] for _ in prompts]
        for index in range(len(prompts)):
            on_token(index, 1, 0)
        spoken = [Spoken(t, tuple(map(ord, t)), (0,) * len(t), ((1.0, 0.0),) * len(t), "stop") for t in texts]
        return spoken, Counts(tokens=len(texts), prompts=len(texts), row_passes=2 * len(texts), seconds=0.5)

    def log_probs(self, model: Any, prompts: Sequence[Sequence[int]], batch_size: int) -> np.ndarray:
        return np.array([[-2.0, -1.0] if len(prompt) % 2 else [-1.0, -2.0] for prompt in prompts])


def scripted_model(bias: float = 0.0) -> Any:
    import torch

    head = torch.nn.Linear(2, 1)
    torch.nn.init.constant_(head.weight, bias)
    torch.nn.init.zeros_(head.bias)
    experts = [SimpleNamespace(name=name, weights=f"sha256:{name}", precision="fp32") for name in ("one", "two")]
    return SimpleNamespace(
        experts=experts, heads=torch.nn.ModuleList([head]), device=torch.device("cpu"), encode=lambda text: list(text),
        tokenizer=Letters(),
    )  # fmt: skip


def test_every_arm_is_asked_the_same_with_the_same_keys(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    decoder, rows = Scripted(monkeypatch), [row(i) for i in range(3)]
    told: list[tuple[int, int]] = []
    asked = ask(scripted_model(), rows, Asking(), Journal(tmp_path / "j.jsonl"), lambda *one: told.append(one))
    assert list(asked.answers) == ["ensemble", "one", "two", "uniform"]
    assert [mode for mode, _, _ in decoder.asked] == ["select"] * 2 + ["single"] * 4 + ["uniform"] * 2
    assert len({keys for _, _, keys in decoder.asked[::2]}) == 1, "the same random numbers for each arm"
    assert told[-1] == (12, 12)
    assert asked.cost["one"].to_json()["passes_per_token"] == 2 and asked.cost["one"].seconds == 1.0
    assert len(asked.picks or []) == 3
    alone = ask(scripted_model(), rows, Asking(only_ensemble=True), Journal(tmp_path / "k.jsonl"))
    assert list(alone.answers) == ["ensemble"] and alone.picks is None


def test_what_was_answered_is_kept_and_only_what_is_new_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decoder, rows = Scripted(monkeypatch), [row(i) for i in range(4)]
    path = tmp_path / "journal.jsonl"
    decoder.fail_at = 3
    with pytest.raises(EngineError):
        ask(scripted_model(), rows, Asking(), Journal(path))
    decoder.fail_at = None
    with open(path, "ab") as file:
        file.write(b'{"arm": "torn')  # a kill in the middle of a line
    assert arms.Known(Journal(path)).count(arms.arms(scripted_model(), Asking()), rows) == 6
    asked = ask(scripted_model(), rows, Asking(), Journal(path))
    assert len(decoder.asked) == 8, "nothing was asked twice"
    first = {arm: [one["text"] for one in own] for arm, own in asked.answers.items()}

    def new(asking: Asking, model: Any, questions: Sequence[Row] = rows) -> list[str]:
        before = len(decoder.asked)
        ask(model, questions, asking, Journal(path))
        return [mode for mode, _, _ in decoder.asked[before:]]

    assert new(Asking(), scripted_model()) == []
    assert new(Asking(), scripted_model(bias=1.0)) == ["select"] * 2, "new heads: the ensemble alone"
    assert new(Asking(mode="mixture"), scripted_model()) == ["mixture"] * 2
    assert new(Asking(accelerate=False), scripted_model()) == ["select"] * 2 + ["uniform"] * 2, "their cost differs"
    assert new(Asking(), scripted_model(), [*rows, row(9)]) == ["select", "single", "single", "uniform"]
    assert set(new(Asking(temperature=0.7), scripted_model())) == {"select", "single", "uniform"}
    again = ask(scripted_model(), rows, Asking(), Journal(path))
    assert {arm: [one["text"] for one in again.answers[arm]] for arm in first} == first
    assert "mixture" in again.answers, "the other mode's answers are shown beside"


def test_a_foreign_journal_and_full_memory_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    path = tmp_path / "journal.jsonl"
    path.write_text('{"id": "q1", "stage": "critique"}\n', encoding="utf-8")
    with pytest.raises(BadInputError, match=r"another kind of run.*--output_dir"):
        ask(scripted_model(), [row(1)], Asking(), Journal(path))

    def full(*given: Any, **more: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(arms, "decode", full)
    with pytest.raises(EngineError, match="ensemble: out of memory with 16 answers at a time; use --batch_size 8"):
        ask(scripted_model(), [row(1)], Asking(), Journal(tmp_path / "k.jsonl"))


def test_expert_names_are_arms_of_their_own() -> None:
    model = SimpleNamespace(experts=[SimpleNamespace(name=name) for name in ("a", "a", "oracle", "b")])
    assert arms.expert_names(model) == ["a#1", "a#2", "oracle#3", "b"]


# ---------------------------------------------------------------- what was found, and the page


def asked_of(questions: int = 40) -> tuple[list[Row], Asked]:
    """Three experts who each know a third of the questions; the ensemble nearly all of them."""
    rows = [row(i, ("reading", "illness", HOSTILE)[i % 3], "no" if i % 2 else "yes") for i in range(questions)]
    asked = Asked(prompt_log_probs=[[float(m == i % 3) for m in range(3)] for i in range(questions)])
    wrong = {"yes": "no", "no": "yes"}
    asked.answers["ensemble"] = [
        said(WORDS[one.gold if i % 10 else wrong[one.gold]] + (HOSTILE if i == 1 else ""), (i % 3, 0))
        for i, one in enumerate(rows)
    ]
    for m, name in enumerate(NAMES):
        asked.answers[name] = [
            said(WORDS[one.gold if i % 3 == m else "?" if i % 7 == 0 else wrong[one.gold]], (m,),
                 finish="length" if m == 1 else "stop")
            for i, one in enumerate(rows)
        ]  # fmt: skip
    asked.answers["uniform"] = [said(WORDS["yes"]) for _ in rows]
    asked.cost = {arm: Cost(100, 2.0, 250, 90, 80) for arm in asked.answers}
    return rows, asked


@pytest.fixture(scope="module")
def found() -> results.Findings:
    rows, asked = asked_of()
    settings = {"mode": "select", "max_new_tokens": 64, "datasets": ["all"], "notes": [HOSTILE]}
    return results.findings(rows, asked, NAMES, Letters(), settings, 2)


def test_findings_hold_arms_differences_patterns_settings(found: results.Findings) -> None:
    table = found.results
    assert list(table)[:3] == ["arms", "differences", "patterns"] and table["settings"]["experts"] == NAMES
    assert list(table["arms"]) == ["ensemble", "uniform", *NAMES, "router", "by_dataset", "oracle"]
    assert table["arms"]["ensemble"]["accuracy"][ALL]["value"] == 0.9
    assert table["arms"]["oracle"]["accuracy"][ALL]["value"] == 1.0
    assert table["arms"]["router"]["accuracy"][ALL]["value"] == 1.0, "it found every question's expert"
    assert table["arms"]["medical"] | {"accuracy": 0, "cost": 0} == {
        "kind": "expert", "label": "B medical", "expert": 1, "accuracy": 0, "cost": 0, "cut": 40,
        "cut_unread": 4, "drafting": "–",
    }  # fmt: skip
    assert table["router"]["reading"] == {"general": 14, "medical": 0, "mathematical": 0}
    assert table["differences"]["ensemble_minus_best_single"][ALL]["interval"][0] > 0
    assert len(found.answers) == 40 * 5 and found.answers[0]["spoken"].startswith("A A")
    assert json.loads(json.dumps(table)) == table, "plain JSON"


def test_readings_say_what_is_clear_and_what_is_doubtful(found: results.Findings) -> None:
    lines = results.readings(found.results)
    text = "\n".join(lines)
    assert lines[0].startswith("The ensemble (select) answers 90.0% of 40 questions right (")
    assert re.search(r"\+55\.0 points against its best single expert \(A general\) \(.*\): clearly above\.", text)
    assert "It reaches 90.0% of what an oracle would" in text
    assert "Cut at 64 tokens before there was an answer to read, of 40: B medical 4; give --max_new" in text
    assert "Cut at 64 tokens, an answer was read all the same, of 40: B medical 36;" in text
    assert re.search(r"Not read, so counted as wrong, of 40 answers: A general \d", text)
    assert "points against the router by prompt perplexity" in text and "not told apart; about" in text


def test_an_ensemble_alone_has_no_rivals() -> None:
    rows, asked = asked_of(6)
    alone = Asked({"ensemble": asked.answers["ensemble"]}, {"ensemble": Cost()})
    found = results.findings(rows, alone, NAMES, Letters(), {"mode": "mixture", "max_new_tokens": 9})
    assert found.results["differences"] == {} and list(found.results["arms"]) == ["ensemble"]
    assert "ensemble (mixture)" in page.render(found.results, found.examples, [])


class Texts(HTMLParser):
    """Tags, and the ensemble's answers as (letter, text)."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pieces: list[tuple[str, str]] = []
        self.letter = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.letter = dict(attributes).get("data-e") or ""

    def handle_data(self, data: str) -> None:
        if self.letter:
            self.pieces.append((self.letter, data))
            self.letter = ""


def test_the_page_is_one_escaped_file_with_answers_by_speaker(found: results.Findings, tmp_path: Path) -> None:
    page.write(tmp_path, found, save_examples=True)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    texts = Texts()
    texts.feed(html)
    assert not {"script", "img", "link", "iframe"} & set(texts.tags) and "\x1b" not in html
    assert not re.search(r'(?:src|href)="(?!#)', html), "nothing is fetched"
    assert ("A", " The answer is ") not in texts.pieces[:1] or texts.pieces
    joined = "".join(text for _, text in texts.pieces)
    assert "The answer is" in joined and {letter for letter, _ in texts.pieces} == {"A", "B", "C"}
    assert html.count("<svg") == html.count("</svg>") == 4 + 1 + 2
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    assert {"accuracy_all.pdf", "accuracy_illness.pdf"} < {path.name for path in (tmp_path / "plots").iterdir()}
    assert all(path.read_bytes().startswith(b"%PDF") for path in (tmp_path / "plots").iterdir())
    assert json.loads((tmp_path / "results.json").read_bytes())["arms"]["ensemble"]["accuracy"][ALL]["n"] == 40
    examples = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_bytes().splitlines()]
    assert len(examples) == 6 and len(examples[0]["tokens"][0]["pi"]) == 3
    assert len((tmp_path / "answers.jsonl").read_bytes().splitlines()) == 200


def test_without_plots_none_are_drawn(found: results.Findings, tmp_path: Path) -> None:
    page.write(tmp_path, found, draw=False)
    assert not (tmp_path / "plots").exists() and not (tmp_path / "examples.jsonl").exists()
    assert "<svg" not in (tmp_path / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- the script, with real (tiny) models


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh heads over two tiny random experts."""
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads

    folder = tmp_path_factory.mktemp("ensemble")
    for seed in range(2):
        build_tiny_model(folder / f"tiny{seed}", seed)
    model = MultiModelWithScalarHeads.from_pretrained([str(folder / f"tiny{seed}") for seed in range(2)], device="cpu")
    model.save_pretrained(folder / "heads")
    return folder / "heads"


def questions(folder: Path, count: int = 6) -> Path:
    path = folder / "asked.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {i} + {i}?", "answer": f"#### {2 * i}"}) + "\n"
                            for i in range(count)), encoding="utf-8")  # fmt: skip
    return path


def evaluate(capsys: pytest.CaptureFixture[str], *given: Any) -> tuple[int, str, str]:
    from cai_experiment.scripts import eval_ensemble
    from cai_experiment.scripts._common import run_main

    code = run_main(eval_ensemble.main, [str(one) for one in given])
    return code, *capsys.readouterr()


def test_the_script_end_to_end_and_again(capsys: pytest.CaptureFixture[str], heads: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    given = ["--model_weights", heads, "--datasets", questions(tmp_path), "--output_dir", out, "--max_new_tokens", 6,
             "--sample_size", 3, "--device", "cpu"]  # fmt: skip
    code, shown, _ = evaluate(capsys, *given)
    assert code == 0 and shown.startswith("experts: A ") and "12/12 answers" in shown
    assert "report: " in shown and "--mode mixture" in shown
    before = (out / "answers.jsonl").read_bytes()
    assert {json.loads(line)["arm"] for line in before.splitlines()} >= {"ensemble", "uniform"}
    code, shown, _ = evaluate(capsys, *given)
    assert code == 0 and "12 of 12 answers are kept" in shown
    assert (out / "answers.jsonl").read_bytes() == before
    code, shown, _ = evaluate(capsys, *given, "--mode", "mixture", "--no_plots", "-v", "1")
    assert code == 0 and "ensemble (mixture)" in shown and "ensemble (select)" in shown
    code, shown, _ = evaluate(capsys, *given, "--fresh", "--only_ensemble", "-v", "0")
    assert (code, shown) == (0, "") and len(list(tmp_path.glob("results.*"))) == 1


def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str], heads: Path, tmp_path: Path) -> None:
    code, _, error = evaluate(capsys, "--model_weights", tmp_path / "none.safetensors")
    assert code == 2 and "train_ensemble.py" in error and error.count("\n") == 1
    code, _, error = evaluate(capsys, "--model_weights", heads, "--datasets", tmp_path / "none.jsonl")
    assert code == 2 and "none.jsonl" in error and error.count("\n") == 1
    code, _, error = evaluate(capsys, "--model_weights", heads, "--models", "nano", "--datasets", questions(tmp_path),
                              "--output_dir", tmp_path / "r")  # fmt: skip
    assert code == 2 and "not for" in error and error.count("\n") == 1
    (tmp_path / "long.jsonl").write_text(json.dumps({"question": "long " * 3000, "answer": "#### 1"}) + "\n")
    code, shown, error = evaluate(capsys, "--model_weights", heads, "--datasets", tmp_path / "long.jsonl",
                                  "--output_dir", tmp_path / "r", "--device", "cpu")  # fmt: skip
    assert code == 2 and "1 of 1 questions have more tokens" in shown and "no question is left" in error


@pytest.fixture
def started(heads: Path, tmp_path: Path) -> Iterator[tuple[list[str], Path]]:
    """A command that takes a while, and its folder."""
    out = tmp_path / "out"
    given = ["--model_weights", heads, "--datasets", questions(tmp_path, 200), "--sample_size", 200, "--output_dir",
             out, "--max_new_tokens", 8, "--device", "cpu", "--no_plots"]  # fmt: skip
    yield [sys.executable, str(SCRIPT), *map(str, given)], out


@pytest.mark.slow
def test_killed_and_gone_on_is_as_unbroken(started: tuple[list[str], Path], tmp_path: Path) -> None:
    """kill -9 as soon as a chunk stands in the journal; the same command then writes what an unbroken run writes."""
    command, out = started
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    journal = out / "journal.jsonl"
    while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < 2):
        os.sched_yield()
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "answers are kept" in done.stdout
    unbroken = [str(tmp_path / "whole") if part == str(out) else part for part in command]
    assert subprocess.run(unbroken, capture_output=True).returncode == 0
    assert (out / "answers.jsonl").read_bytes() == (tmp_path / "whole" / "answers.jsonl").read_bytes()


def test_two_evaluations_in_one_folder_are_refused(
    capsys: pytest.CaptureFixture[str], heads: Path, tmp_path: Path
) -> None:
    with RunFolder(tmp_path / "r"):
        code, _, error = evaluate(capsys, "--model_weights", heads, "--datasets", questions(tmp_path), "--output_dir",
                                  tmp_path / "r", "--device", "cpu")  # fmt: skip
    assert code == 2 and str(os.getpid()) in error


def test_training_says_what_each_data_set_weighs() -> None:
    from cai_experiment.ensemble.encoding import EncodedRow
    from cai_experiment.scripts._train_ensemble import _weights_of_sets

    short, long = EncodedRow("1", "boolq", (1, 2, 3, 4), 2), EncodedRow("2", "gsm8k", tuple(range(20)), 2)
    assert _weights_of_sets([short, long]) == (
        "share of the tokens that count: boolq 10%, gsm8k 90%; warning: the heads learn gsm8k for the most part "
        "(its texts are the longest)"
    )
    assert "warning" not in _weights_of_sets([long]) and "warning" not in _weights_of_sets([short] * 9 + [long])


def test_clearly_needs_the_interval_and_the_adjusted_p() -> None:
    """The words, the plot's colour and the page's sign all come of `score.side`."""
    found = {"value": 0.1, "interval": [0.01, 0.19], "p_holm": 0.08, "needed": None}
    assert score.side(found) == 0 and results.verdict(found) == "not told apart once adjusted for the number of rivals"
    assert score.side(found | {"p_holm": 0.04}) == 1 and results.verdict(found | {"p_holm": 0.04}) == "clearly above"
    below = {"value": -0.1, "interval": [-0.19, -0.01]}
    assert score.side(below) == -1 and results.verdict(below) == "clearly below"
    assert score.side({"value": None, "interval": None}) == 0


def test_an_oracle_that_is_hardly_ever_right_is_told_by_counts() -> None:
    """A ratio of 12 to 1 says nothing; and why an ensemble can be above the oracle is said."""
    rows = [row(i) for i in range(20)]
    asked = Asked()
    asked.answers = {"ensemble": [said(WORDS["yes" if i < 12 else "no"]) for i in range(20)]}
    asked.answers |= {name: [said(WORDS["yes" if i < 1 else "no"]) for i in range(20)] for name in NAMES}
    asked.cost = {arm: Cost(100, 2.0, 300, 1, 1) for arm in asked.answers}
    found = results.findings(rows, asked, NAMES, Letters(), {"mode": "select", "max_new_tokens": 64})
    text = "\n".join(results.readings(found.results))
    assert "above an oracle that picks a right expert for each question, 12 of 20 to 1: the oracle has one" in text
    html = page.render(found.results, found.examples, [])
    assert "above the oracle, 12 of 20 to 1" in html and "1200.0%" not in html
    assert "plain steps: the batch is full" in html and html.count("may score below their published figures") == 2


def test_a_cost_is_that_of_the_answers_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Scripted(monkeypatch)
    path = tmp_path / "journal.jsonl"
    rows = [row(i) for i in range(3)]
    once = ask(scripted_model(), rows[:1], Asking(), Journal(path)).cost["ensemble"]
    assert once.answers == 1 and once.tokens > 0
    assert ask(scripted_model(), rows, Asking(), Journal(path)).cost["ensemble"].answers == 3
    assert ask(scripted_model(), rows[:1], Asking(), Journal(path)).cost["ensemble"] == once
    assert ask(scripted_model(), rows[1:2], Asking(), Journal(path)).cost["ensemble"].answers == 2, "decoded together"


def test_plots_of_an_older_run_are_removed_and_nothing_else(found: results.Findings, tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    for name in ("accuracy_gone.pdf", "shares.pdf", "mine.pdf"):
        (tmp_path / "plots" / name).write_bytes(b"%PDF")
    page.write(tmp_path, found, draw=False)
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["mine.pdf"]


def test_what_can_be_known_is_said_before_questions_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, heads: Path, tmp_path: Path
) -> None:
    """Experts and heads are checked before data sets are fetched; --fresh moves neither away."""
    from cai_experiment.scripts import _eval_ensemble

    monkeypatch.setattr(_eval_ensemble, "load_sets", lambda *given, **more: pytest.fail("questions were read"))
    code, _, error = evaluate(capsys, "--model_weights", heads, "--models", "nano")
    assert code == 2 and "not for" in error and error.count("\n") == 1
    code, _, error = evaluate(capsys, "--model_weights", heads, "--fresh", "--output_dir", heads)
    assert code == 2 and "--fresh would move" in error and "another --output_dir" in error and error.count("\n") == 1
    code, _, error = evaluate(capsys, "--model_weights", heads, "--fresh", "--output_dir", heads.parent)
    assert code == 2 and "--fresh would move" in error
    if not torch_has_cuda():
        code, _, error = evaluate(capsys, "--model_weights", heads, "--device", "cuda")
        assert (code, error) == (1, "there is no GPU here; leave --device out\n") or "this torch cannot use" in error
    (tmp_path / "heads").mkdir()
    file = tmp_path / "heads" / "best_model_heads.safetensors"
    whole = bytearray((heads / file.name).read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)
    code, _, error = evaluate(capsys, "--model_weights", file)
    assert code == 2 and "is damaged" in error and error.count("\n") == 1


def torch_has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def test_an_interrupted_question_promises_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_experiment.scripts import _answers, answer_generator
    from cai_experiment.scripts._common import run_main

    def stop(args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_answers, "Speaker", stop)
    assert run_main(answer_generator.main, ["Is it?"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
