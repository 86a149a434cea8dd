"""compare_models.py: the matrix on the shipped models, a kill, wrong names; rates in groups and the bias by hand."""

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
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.comparison.bias import missed_own, self_bias
from cai_experiment.comparison.clustered import difference, rate
from cai_experiment.comparison.measures import critique_is_right, is_repaired
from cai_experiment.evaluation.harm.labelled import shipped_sets
from cai_experiment.judging.result import Result
from cai_experiment.scripts import compare_models
from cai_experiment.scripts._common import run_main

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
    """Few of the labelled texts."""
    sets = {name: texts[:TEXTS] for name, texts in shipped_sets().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cai_experiment.evaluation.harm.labelled.shipped_sets", lambda: sets)
        yield


def compare(folder: Path, *flags: str) -> int:
    asked = ["--data-dir", str(folder), "--count", str(COUNT), "--models", "nano,nano-b,rules", "-v", "0", *flags]
    return run_main(compare_models.main, asked)


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
    assert "Self-judging bias" in page and page.count("<svg") >= 2
    assert {"models.csv", "matrix_flaw_seen.csv", "self_bias.csv"} <= {one.name for one in (run / "tables").iterdir()}
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


def test_killed_it_goes_on_to_the_same_cells(made: Path, tmp_path: Path) -> None:
    flags = ["--data-dir", str(tmp_path), "--count", str(COUNT), "--models", "nano,nano-b,rules", "-v", "0"]
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
    assert compare(tmp_path) == 0
    assert said.read_bytes().startswith(known[: known.rfind(b"\n") + 1]), "nothing that was said is asked again"
    assert rows_of(tmp_path) == rows_of(made)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--models", "nano,qwen2.5-7bb"), "qwen2.5-7b"),
        (("--models", "rules"), "no model beside the rules"),
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
    assert "qwen2.5-32b" in out and "4 cells" in out and not list(tmp_path.iterdir())


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


# ---------------------------------------------------------------- the bias


def words(models: str, kind: str, n: int = 60) -> list[dict[str, Any]]:
    """Rows of critics that see flaws in all answers, but `kind` sees none in its own."""
    return [
        {"instruction_id": str(number), "critic": critic, "generator": generator,
         "flaw_seen": not (critic == generator == kind and number % 2 == 0), "truth": {"flawed": True}}
        for number in range(n) for critic in models for generator in models
    ]  # fmt: skip


def test_a_critic_that_spares_its_own_answers_is_found_and_no_other() -> None:
    found = {one.who: one for one in self_bias(words("abc", "b"), "abc")}
    assert found["b"].result.value == 0.5 and (found["b"].result.interval or (0,))[0] > 0.3
    assert found["b"].p_value < 0.001
    assert found["a"].result.value == found["c"].result.value == 0.0, "its kindness is not another's harshness"
    own, others, less = missed_own(words("abc", "b"), "b")
    assert rate(own).value == 0.5 and rate(others).value == 0.0 and less is not None and less.result.value == 0.5


def test_of_two_models_the_mean_of_both_biases_is_told() -> None:
    (both,) = self_bias(words("ab", "a"), "ab")
    assert both.result.value == 0.25 and "mean" in both.who
    assert self_bias(words("a", "a"), "a") == []


def test_better_answers_are_no_bias() -> None:
    rows = [
        {"instruction_id": str(n), "critic": critic, "generator": generator, "flaw_seen": generator != "a"}
        for n in range(20) for critic in "ab" for generator in "ab"
    ]  # fmt: skip
    assert self_bias(rows, "ab")[0].result.value == 0.0
    rows[0]["flaw_seen"] = None
    assert self_bias(rows, "ab")[0].result.unparsed == 1


# ---------------------------------------------------------------- on whose word


def test_without_truth_a_judge_or_the_critic_has_the_word() -> None:
    row = {
        "critique": 'The answer says "x".', "abstained": False, "meaningful": "yes", "revision": "y",
        "broken_before": "yes", "broken_after": "no", "truth": None,
        "judge": {"meaningful": "no", "broken_before": "yes", "broken_after": "undecided"},
    }  # fmt: skip
    assert critique_is_right(row, "itself") is True and critique_is_right(row, "judge") is False
    assert is_repaired(row, "itself") is True and is_repaired(row, "judge") is False
    assert critique_is_right(row | {"judge": None}, "judge") is None and is_repaired(row, "truth") is None
    assert critique_is_right(row | {"abstained": True}, "itself") is None
