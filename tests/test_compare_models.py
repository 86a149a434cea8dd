"""compare_models.py: the matrix on the shipped models, a kill, wrong names; rates, differences, own against others."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.comparison.bias import kinder, missed, missed_more
from cai_experiment.comparison.cells import Cell
from cai_experiment.comparison.clustered import difference, rate
from cai_experiment.comparison.judged import agreement
from cai_experiment.comparison.measures import critique_is_right, false_critique, flaw_is_found, is_repaired
from cai_experiment.comparison.reading import readings, says_of_bias
from cai_experiment.comparison.result import ended_early
from cai_experiment.constitution.principles import load_constitution
from cai_experiment.engines.base import Completion
from cai_experiment.evaluation.harm.labelled import shipped_sets
from cai_experiment.judging.result import Result
from cai_experiment.models.hardware import profile
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.scripts import compare_models
from cai_experiment.scripts._common import run_main
from cai_experiment.scripts._compare_wanted import default_models, twin_of

ROOT = Path(__file__).resolve().parents[1]
COUNT, TEXTS = 2, 2
FEW = f"""
import sys
from cai_experiment.evaluation.harm import labelled
all_of = labelled.shipped_sets
labelled.shipped_sets = lambda: {{name: texts[:{TEXTS}] for name, texts in all_of().items()}}
from cai_experiment.scripts import compare_models
from cai_experiment.scripts._common import run_main
raise SystemExit(run_main(compare_models.main, sys.argv[1:]))
"""


@pytest.fixture(autouse=True, scope="module")
def few() -> Iterator[None]:
    """Few of the labelled texts, and few resamples."""
    sets = {name: texts[:TEXTS] for name, texts in shipped_sets().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cai_experiment.evaluation.harm.labelled.shipped_sets", lambda: sets)
        patch.setattr("cai_experiment.comparison.clustered.RESAMPLES", 1000)
        yield


def compare(folder: Path, *flags: str) -> int:
    asked = ["--data-dir", str(folder), "--count", str(COUNT), "--models", "nano,nano-b,rules", "-v", "1", *flags]
    return run_main(compare_models.main, asked)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without plots, for tests that do not look at them."""
    monkeypatch.setattr("cai_experiment.comparison.page.plots", lambda result: [])


def result_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "compare" / "comparison.json").read_text())
    return found


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "compare" / "items" / "cells.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, nano_dir: Path, few: None) -> Path:
    """A finished comparison; read it, do not write into it."""
    folder = tmp_path_factory.mktemp("compared")
    assert compare(folder) == 0
    return folder


# ---------------------------------------------------------------- the whole


def test_every_cell_is_there_and_every_rate_has_its_interval(made: Path) -> None:
    result, rows = result_of(made), rows_of(made)
    assert len(rows) == 4 * COUNT and result["by"] == "truth"
    assert len({row["id"] for row in rows}) == len(rows)
    for one in result["measures"].values():
        for figure in [*one["rates"].values(), *one["against_first"].values()]:
            low, high = figure["interval"]
            assert figure["n"] > 0 and low <= figure["value"] <= high
    assert {"detection_obvious", "detection_subtle"} <= result["measures"].keys()
    assert "rules" in result["measures"]["detection_obvious"]["rates"]
    for name in ("nano", "nano-b"):
        used = result["usage"][name]
        assert used["tokens_per_second"] > 0 and used["memory_gb"] > 0 and 1 <= used["loads"] <= 3


def test_an_answer_is_the_same_whoever_criticises_it(made: Path) -> None:
    answers: dict[tuple[str, str], set[str]] = {}
    for row in rows_of(made):
        answers.setdefault((row["instruction_id"], row["generator"]), set()).add(row["answer"])
    assert all(len(texts) == 1 for texts in answers.values())
    said = {name: {answer for (_, g), texts in answers.items() if g == name for answer in texts}
            for name in ("nano", "nano-b")}  # fmt: skip
    assert said["nano"] != said["nano-b"], "two models speak"


def test_the_files_are_whole_and_the_page_asks_for_nothing(made: Path) -> None:
    run = made / "compare"
    page = (run / "comparison.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "") and "<script" not in page
    assert "Of answers with a flaw" in page and page.count("<svg") >= 2 and "favours" not in page
    written = {one.name for one in (run / "tables").iterdir()}
    assert {"models.csv", "matrix_flaw_seen.csv", "missed_more.csv", "kinder.csv"} <= written
    assert (run / "figures" / "matrix_flaw_seen.pdf").read_bytes().startswith(b"%PDF")
    assert len((run / "instructions.jsonl").read_text().splitlines()) == COUNT


def test_a_finished_run_prints_its_table_and_loads_nothing(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cai_experiment.engines.load.load_engine", None)
    monkeypatch.setenv("COLUMNS", "100")
    assert compare(made) == 0
    out = capsys.readouterr().out
    assert "is finished" in out and "critiques that are right" in out
    assert max(map(len, out.splitlines()[:-1])) <= 100


def test_changed_settings_stop(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare(made, "--seed", "1") == 2
    assert "seed was 0, now 1" in capsys.readouterr().err


@pytest.mark.slow
def test_more_instructions_extend_a_run(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "made")
    before = rows_of(made)
    assert compare(tmp_path / "made", "--count", str(COUNT + 1)) == 0
    assert rows_of(tmp_path / "made")[: len(before)] == before
    assert result_of(tmp_path / "made")["instructions"] == COUNT + 1


@pytest.mark.usefixtures("undrawn")
def test_killed_it_goes_on_to_the_same_cells(made: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", str(tmp_path), "--count", str(COUNT), "--models", "nano,rules", "-v", "1"]
    said = tmp_path / "compare" / "said" / "nano.jsonl"
    run = subprocess.Popen([sys.executable, "-c", FEW, *flags], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        while run.poll() is None and not (said.exists() and said.read_bytes().count(b"\n") > 3):
            time.sleep(0.01)
    finally:
        if run.poll() is None:
            os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert run.returncode == -signal.SIGKILL
    known = said.read_bytes()
    assert compare(tmp_path, "--models", "nano,rules") == 0
    assert said.read_bytes().startswith(known[: known.rfind(b"\n") + 1]), "nothing that was said is asked again"
    assert rows_of(tmp_path) == [row for row in rows_of(made) if row["generator"] == row["critic"] == "nano"]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--models", "nano,qwen2.5-7bb"), "qwen2.5-7b"),
        (("--models", "rules"), "no model beside the rules"),
        (("--models", "nano,nano"), "both called nano"),
        (("--models", "nano,NANO"), "both called nano"),
        (("--model", "nano"), "use --models nano"),
        (("--models", "nano,no/such/folder"), "--models no/such/folder"),
        (("--instructions", "absent.txt"), "absent.txt"),
        (("--judge", "nanno"), "--judge nanno"),
        (("--models", "nano,nano-b", "--judge", "nano"), "no independent judge"),
    ],
)
def test_wrong_input_is_one_line_before_anything_is_loaded(
    flags: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("cai_experiment.engines.load.load_engine", None)
    assert run_main(compare_models.main, ["--data-dir", str(tmp_path), *flags]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "compare").exists()


def test_the_plan_loads_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--data-dir", str(tmp_path), "--plan", "--hardware", "a100-80gb", "--models", "qwen2.5-7b,qwen2.5-32b"]
    assert run_main(compare_models.main, flags) == 0
    out = capsys.readouterr().out
    assert "qwen2.5-32b: vllm, bf16" in out and "4 cells" in out and "3 times" in out and not list(tmp_path.iterdir())
    flags[4] = "colab_free_t4"
    assert run_main(compare_models.main, flags) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT into 15 GB; qwen2.5-7b does" in out and "none: a model does not fit" in out


def test_the_default_pair_differs_in_size_alone(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("CAI_MODEL", raising=False)
    monkeypatch.delenv("AGI_MODEL_NAME", raising=False)
    assert default_models(profile("a100-80gb")) == ("qwen2.5-32b", "qwen2.5-14b-base", "rules")
    assert "both base" in capsys.readouterr().out
    assert default_models(profile("cpu")) == ("nano", "nano-b", "rules")


def test_the_same_weights_under_two_names_are_found() -> None:
    facts = {"weights_sha256": "ab", "quantization": "fp32", "layout": "chat"}
    assert twin_of("b", facts, {"a": facts, "b": facts}) == "a"
    assert twin_of("b", facts | {"quantization": "4bit"}, {"a": facts}) is None
    assert twin_of("b", {}, {"a": {}}) is None


# ---------------------------------------------------------------- a judge, the critics' own word, failures


@pytest.mark.slow
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("by", ["judge", "itself"])
def test_without_truth_the_tables_go_by_a_judge_or_by_each_critic(
    by: str, tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cai_experiment.judging.fitness.Fitness.is_fit", True)
    short = partial(StageSettings, max_tokens_answer=100, max_tokens_critique=100)
    monkeypatch.setattr("cai_experiment.scripts._compare_models.StageSettings", short)
    flags = ["--judge", "nano-b"] if by == "judge" else []
    assert compare(tmp_path, "--models", f"nano,{tiny_model_dir}", *flags) == 0
    result, out = result_of(tmp_path), capsys.readouterr().out
    assert result["by"] == by and "critique_recall" not in result["measures"] and result["missed_more"] == []
    assert "no proof of a bias" in out and "favours" not in out
    assert any(one["model"] == tiny_model_dir.name for one in result["ended_early"]) and "ended early" in out
    judged = [row for row in rows_of(tmp_path) if row["judge"]]
    assert bool(judged) is (by == "judge") and (by == "itself" or any("judge nano-b" in one for one in result["notes"]))


class Failing:
    """An engine that fails at everything it speaks."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def stream(self, prompts: Any) -> Iterator[Completion]:
        return (Completion(one.id, "", "error", error="the engine died") for one in prompts if one is not None)


@pytest.mark.usefixtures("undrawn")
def test_what_an_engine_failed_at_is_asked_again(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cai_experiment.engines import load

    shutil.copytree(made / "compare", tmp_path / "compare")
    manifest, said = tmp_path / "compare" / "manifest.json", tmp_path / "compare" / "said" / "nano.jsonl"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"finished": False}))
    lines = said.read_text().splitlines(keepends=True)
    answer = next(one for one in lines if json.loads(one)["completion"]["text"] == rows_of(made)[0]["answer"])
    said.write_text("".join(one for one in lines if one != answer))
    real = load.load_engine
    monkeypatch.setattr(load, "load_engine", lambda settings: Failing(real(settings)))
    assert compare(tmp_path) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 cells or verdicts failed" in out and "nano: answer, engine error (1)" in out
    assert json.loads(manifest.read_text())["finished"] is False
    monkeypatch.setattr(load, "load_engine", real)
    assert compare(tmp_path) == 0
    assert json.loads(manifest.read_text())["finished"] is True and rows_of(tmp_path) == rows_of(made)


def ended(critique: str, finish: str) -> dict[str, Any]:
    """The row of a cell whose critique ends so; the critic calls every principle broken."""
    cell = Cell("a", "b", Instruction("i", "What is it?", ""), load_constitution().principles[:2], StageSettings())

    def known(who: str, prompt: Any) -> Completion:
        if prompt.options:
            odds = (-0.1, -3.0) if "yes_first" in prompt.id else (-3.0, -0.1)
            return Completion(prompt.id, "", "stop", logprobs=odds)
        text, ends = (critique, finish) if prompt.speak_as == "critique" else ("An answer.", "stop")
        return Completion(prompt.id, text, ends)  # type: ignore[arg-type]

    assert cell.advance(known) == []
    return cell.row(False) | {"truth": {"flawed": True, "right": True, "repaired": None}}


@pytest.mark.parametrize(("critique", "finish", "fault"), [("", "stop", "empty"), ("It says", "length", "too_long")])
def test_an_empty_or_cut_critique_is_a_miss_and_no_critique_to_be_right(critique: str, finish: Any, fault: str) -> None:
    row = ended(critique, finish)
    assert (row["fault"], row["fault_in"]) == (fault, "critique")
    assert flaw_is_found(row, "truth") is False
    assert [critique_is_right(row, by) for by in ("truth", "judge", "itself")] == [None] * 3  # type: ignore[arg-type]
    assert is_repaired(row, "truth") is None
    clean = row | {"truth": {"flawed": False}}
    assert false_critique(clean, "truth") is bool(critique)
    assert ended_early([row]) == [{"model": "b", "turn": "critique", "reason": fault, "times": 1}]


def test_an_answers_fault_counts_once_whoever_would_criticise_it() -> None:
    rows = [{"instruction_id": "i", "generator": "a", "critic": c, "fault": "too_long", "fault_in": "answer"}
            for c in "ab"]  # fmt: skip
    assert ended_early(rows) == [{"model": "a", "turn": "answer", "reason": "too_long", "times": 1}]


# ---------------------------------------------------------------- rates in groups


def test_single_items_have_wilsons_interval() -> None:
    items = [(str(place), place % 3 == 0) for place in range(30)]
    assert rate(items) == Result.rate(10, 30)


def test_items_that_are_one_in_a_group_count_once() -> None:
    once = [(str(place), place % 3 == 0) for place in range(30)]
    twice = rate([item for item in once for _ in range(2)])
    alone = rate(once)
    assert twice.n == 60 and twice.value == alone.value and twice.interval and alone.interval
    assert twice.interval == pytest.approx(alone.interval, abs=0.01)
    assert rate([("a", True), ("a", True), ("b", True)]).interval == pytest.approx(Result.rate(2, 2).interval)


def test_the_interval_in_groups_covers_the_truth() -> None:
    rng, covered, draws = random.Random(0), 0, 300
    for _ in range(draws):
        items = []
        for group in range(40):
            inclined = rng.betavariate(2, 1)  # its mean is 2/3
            items += [(str(group), rng.random() < inclined) for _ in range(3)]
        low, high = rate(items).interval or (0.0, 0.0)
        covered += low <= 2 / 3 <= high
    assert covered / draws > 0.91


def test_differences_are_paired_where_items_are_the_same() -> None:
    first, second = [("a", True), ("b", False)], [("a", True), ("b", True)]
    found = difference(first, second)
    assert found is not None and found.paired and found.result.value == 0.5 and found.p_value == 1.0
    more = difference(first, [*second, ("b", False)])
    assert more is not None and not more.paired and more.result.value == pytest.approx(2 / 3 - 1 / 2)
    assert difference([], second) is None


def test_a_difference_by_groups_finds_what_is_there_and_no_more() -> None:
    one = [(str(g), g % 4 == 0) for g in range(60) for _ in range(2)]
    two = [(str(g), g % 4 != 0) for g in range(60) for _ in range(2)]
    there, none = difference(one, two), difference(one, list(reversed(one)))
    assert there is not None and there.p_value < 0.01 and there.result.interval and there.result.interval[0] > 0.2
    assert none is not None and none.result.value == 0 and none.p_value == 1.0
    all_hold = difference([("a", True), ("a", True)], [("a", True), ("a", True)])
    assert all_hold is not None and all_hold.result.interval and all_hold.result.interval[0] < 0, "never a point"


@pytest.mark.parametrize(("one", "two", "holds"), [(0.9, 0.1, 0.5), (0.9, 0.2, 0.5), (0.8, 0.3, 0.7)])
def test_equal_models_are_seldom_called_different_however_unlike_their_numbers_of_items(
    one: float, two: float, holds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cai_experiment.comparison.clustered.RESAMPLES", 300)
    rng, found, draws = random.Random(0), 0, 500

    def items(share: float) -> list[tuple[str, bool]]:
        return [(str(g), rng.random() < holds) for g in range(60) for _ in range(2) if rng.random() < share]

    for draw in range(draws):
        less = difference(items(one), items(two), draw)
        found += less is not None and less.p_value < 0.05
    assert found / draws <= 0.07


def test_one_item_each_is_no_difference() -> None:
    less = difference([("a", True)], [("b", False)])
    assert less is not None and less.p_value > 0.3 and less.result.interval and less.result.interval[1] > 0


# ---------------------------------------------------------------- own against others' answers


def words(models: str, kind: str, n: int = 60) -> list[dict[str, Any]]:
    """Rows of critics that see flaws in all answers, but `kind` sees none in its own."""
    return [
        {"instruction_id": str(number), "critic": critic, "generator": generator,
         "flaw_seen": not (critic == generator == kind and number % 2 == 0), "truth": {"flawed": True}}
        for number in range(n) for critic in models for generator in models
    ]  # fmt: skip


def test_a_critic_that_misses_its_own_flaws_is_found_and_no_other() -> None:
    for found in (missed_more(words("abc", "b"), "abc"), kinder(words("abc", "b"), "abc")):
        by = {one.who: one for one in found}
        assert by["b"].result.value == 0.5 and (by["b"].result.interval or (0,))[0] > 0.3 and by["b"].p_holm < 0.005
        assert by["a"].result.value == by["c"].result.value == 0.0, "its kindness is not another's harshness"
    own, others = missed(words("abc", "b"), "b")
    assert rate(own).value == 0.5 and rate(others).value == 0.0


def test_of_two_models_the_mean_of_both_is_told() -> None:
    (both,) = missed_more(words("ab", "a"), "ab")
    assert both.result.value == 0.25 and "mean" in both.who
    assert missed_more(words("a", "a"), "a") == kinder(words("a", "a"), "a") == []


def unbiased(models: str, rng: random.Random, n: int = 60) -> list[dict[str, Any]]:
    """Rows of critics that look at all answers alike; "a" answers better and sees more."""
    flaws, sees = {"a": 0.1, "b": 0.6, "c": 0.6}, {"a": 0.9, "b": 0.5, "c": 0.5}
    rows = []
    for number in range(n):
        flawed = {one: rng.random() < flaws[one] for one in models}
        rows += [
            {"instruction_id": str(number), "critic": critic, "generator": generator,
             "flaw_seen": flawed[generator] and rng.random() < sees[critic], "truth": {"flawed": flawed[generator]}}
            for critic in models for generator in models
        ]  # fmt: skip
    return rows


@pytest.mark.parametrize("models", ["ab", "abc"])
def test_a_keener_critic_with_better_answers_has_no_bias_by_the_truth(
    models: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cai_experiment.comparison.clustered.RESAMPLES", 300)
    monkeypatch.setattr("cai_experiment.comparison.bias.holm", lambda p: [min(1.0, len(p) * one) for one in p])  # quick
    rng, draws, values, claimed = random.Random(0), 100, [], 0
    for draw in range(draws):
        found = missed_more(unbiased(models, rng), models, draw)
        values += [one.result.value for one in found if one.result.value is not None]
        said = [says_of_bias(asdict(one) | {"result": one.result.to_json()}, "missed_more") for one in found]
        claimed += any("explains" in one for one in said)
    assert abs(sum(values) / len(values)) < 0.04 and claimed / draws <= 0.1
    (one, *_) = kinder(unbiased(models, rng), models)
    told = says_of_bias(asdict(one) | {"result": one.result.to_json()}, "kinder")
    assert "no proof of a bias" in told, "without the truth it cannot be told apart, and that is said"


def test_without_variation_there_is_no_interval_and_that_is_said() -> None:
    always = [
        {"instruction_id": str(n), "critic": c, "generator": g, "flaw_seen": c != g, "truth": {"flawed": True}}
        for n in range(12) for c in "ab" for g in "ab"
    ]  # fmt: skip
    for found in (missed_more(always, "ab"), kinder(always, "ab")):
        assert found[0].result.value == 1.0 and found[0].result.interval is None and found[0].p_value < 0.001
        said = says_of_bias(asdict(found[0]) | {"result": found[0].result.to_json()}, "kinder")
        assert "no variation among 12 instructions" in said
    never = [row | {"flaw_seen": False} for row in always]
    assert kinder(never, "ab")[0].result.interval is None and kinder(never, "ab")[0].p_value == 1.0
    never[0]["flaw_seen"] = None
    assert kinder(never, "ab")[0].result.unparsed == 1


def test_few_instructions_are_said_to_be_few(made: Path) -> None:
    assert any("fewer than 20" in line for line in readings(result_of(made)))


# ---------------------------------------------------------------- on whose word


def test_without_truth_a_judge_or_the_critic_has_the_word() -> None:
    row = {
        "critique": 'The answer says "x".', "abstained": False, "fault_in": "", "meaningful": "yes", "revision": "y",
        "broken_before": "yes", "broken_after": "no", "truth": None,
        "judge": {"meaningful": "no", "broken_before": "yes", "broken_after": "undecided"},
    }  # fmt: skip
    assert critique_is_right(row, "itself") is True and critique_is_right(row, "judge") is False
    assert is_repaired(row, "itself") is True and is_repaired(row, "judge") is False
    assert critique_is_right(row | {"judge": None}, "judge") is None and is_repaired(row, "truth") is None
    assert critique_is_right(row | {"abstained": True}, "itself") is None


def test_a_judge_beside_the_truth_is_held_against_it() -> None:
    said = {"broken_before": "yes", "broken_after": "no"}
    rows = [
        {"critique": "x", "abstained": False, "fault_in": "", "revision": "", "truth": {"right": right},
         "judge": said | {"meaningful": word}}
        for right, word in [(True, "yes")] * 6 + [(False, "no")] * 5 + [(False, "yes")]
    ]  # fmt: skip
    (line,) = agreement(rows)
    assert "which critiques are right: kappa" in line and "n = 12" in line and "go by the truth" in line
