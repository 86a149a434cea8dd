"""eval_model.py end to end on the shipped model: a small run, a judge at random, bad input, a killed evaluation."""

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
from openai_server import Answer, Body, ModelBehind, Serving, chat, models

from cai_experiment.scripts import eval_model, generate_mvp, train_dpo
from cai_experiment.scripts._common import run_main

ROOT = Path(__file__).resolve().parents[1]
PAIRS, STEPS, HELD_OUT, SUMS, KNOWN = 12, 6, 14, 40, 40


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, nano_dir: Path) -> Path:
    """A folder with data/mvp (pairs, held-out pairs, a report) and checkpoints/mvp (an adapter), evaluated once."""
    folder = tmp_path_factory.mktemp("made")
    assert run_main(generate_mvp.main, ["--count", str(PAIRS), "-v", "0", *places(folder)]) == 0
    flags = ["--milestone", "mvp", "--steps", str(STEPS), "--no-eval", "-v", "0"]
    assert run_main(train_dpo.main, [*flags, *places(folder)]) == 0
    assert evaluate(folder) in (0, 3)
    return folder


@pytest.fixture(scope="module", autouse=True)
def few() -> Iterator[None]:
    """Fewer sums and comparisons than the real evaluation asks, which tests/test_eval_mvp.py (slow) runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cai_experiment.scripts._evaluation.SUMS", SUMS)
        patch.setattr("cai_experiment.evaluation.verdicts.KNOWN", KNOWN)
        yield


def places(folder: Path) -> list[str]:
    return ["--data-dir", str(folder / "data"), "--checkpoint-dir", str(folder / "checkpoints"), "--model", "nano"]


def evaluate(folder: Path, *flags: str) -> int:
    asked = ["--milestone", "mvp", "--held-out", str(HELD_OUT), "-v", "0"]
    return run_main(eval_model.main, [*asked, *places(folder), *flags])


def report_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "data" / "mvp" / "report.json").read_text())
    return found


def test_the_milestones_suite_measures_everything_on_separate_instructions(made: Path) -> None:
    report, data = report_of(made), made / "data" / "mvp"
    metrics = report["metrics"]
    assert metrics["flawed_answers_base"]["n"] == metrics["words_trained"]["n"] == HELD_OUT
    assert metrics["arithmetic_trained"]["n"] == SUMS and report["differences"]["arithmetic"]["interval"]
    held_out = [json.loads(line) for line in (data / "held_out" / "pairs.jsonl").read_text().splitlines()]
    assert metrics["preference_accuracy"]["n"] == len(held_out) > 0
    trained_on = {json.loads(line)["instruction"] for line in (data / "pairs.jsonl").read_text().splitlines()}
    assert not trained_on & {row["instruction"] for row in held_out}
    assert {"length_only_accuracy", "bag_of_words_accuracy", "judge_fitness", "win_rate", "harm_score_base",
            "clean_nll_trained", "repetition_base"} <= metrics.keys()  # fmt: skip
    assert report["settings"]["training"]["steps"] == STEPS, "an ablation of training is told apart by it"
    gates = {gate["name"] for gate in report["gates"]}
    assert {"no collapse", "quality up: fewer flawed answers", "no forgetting: arithmetic"} <= gates
    assert {"preference_by_principle", "win_rate_by_principle", "collapse"} <= {t["name"] for t in report["tables"]}


def test_every_rate_has_its_n_its_interval_and_its_items(made: Path) -> None:
    report, data = report_of(made), made / "data" / "mvp"
    for name, metric in report["metrics"].items():
        assert metric["n"] is not None and {"value", "interval", "unparsed"} <= metric.keys(), name
        if "items" in metric:
            rows = [json.loads(line) for line in (data / metric["items"]).read_text().splitlines()]
            assert rows and len({row["id"] for row in rows}) == len(rows), name
    page = (data / "report.html").read_text()
    assert "What it gained, what it cost" in page and "http://" not in page.replace("http://www.w3.org", "")


def test_a_judge_at_random_is_not_fit_and_never_a_go(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "made")
    coin = random.Random(0)

    def answer(path: str, body: Body | None) -> Any:
        if path == "/models":
            return models("coin", max_model_len=2048)
        assert body is not None
        a, b = coin.random(), coin.random()
        listed = [{"token": t, "logprob": -v, "bytes": None} for t, v in (("A", a), ("B", b))]
        if not body.get("logprobs"):
            return chat("A" if a < b else "B")
        return chat("A", logprobs={"content": [{**listed[0], "top_logprobs": listed}]})

    with Serving(answer) as server:
        assert evaluate(tmp_path / "made", "--judge", server.url, "--judge-format", "chat") == 3
    report = report_of(tmp_path / "made")
    (gate,) = [gate for gate in report["gates"] if "known answers" in gate["name"]]
    assert not gate["passed"] and abs(gate["value"]) < 0.35 and report["verdict"] == "no-go"
    assert report["metrics"]["win_rate_undecided"]["value"] > 0.2
    assert any("nothing that it says counts" in alarm for alarm in report["alarms"])
    assert "harm_score_by_judge_base" not in report["metrics"], "an unfit judge is not asked for that"
    assert "critique_meaningful_judge" in report["metrics"] and report["methods"]["critiques"].startswith("coin")


def gate_names(report: dict[str, Any]) -> list[str]:
    return [gate["name"] for gate in report["gates"]]


def test_another_suite_leaves_the_milestones_gates_alone(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    before = report_of(folder)
    problems = tmp_path / "gsm8k.jsonl"
    problems.write_text(json.dumps({"question": "What is 2 plus 3?", "answer": "#### 5"}) + "\n")
    tasks = own_task(tmp_path)
    flags = ["--suite", "forgetting", "--gsm8k", str(problems), "--tasks", "sums", "--task-folder", str(tasks)]
    assert evaluate(folder, *flags) == (0 if before["verdict"] == "go" else 3)
    after = report_of(folder)
    assert set(gate_names(before)) < set(gate_names(after)) and after["verdict"] == before["verdict"]
    assert {"gsm8k_direct_base", "flawed_answers_base"} <= after["metrics"].keys()


def own_task(folder: Path) -> Path:
    """A task of lm-eval's in files of our own."""
    place = folder / "tasks"
    place.mkdir()
    rows = [{"question": f"What is {n} plus 1?", "choices": [str(n + 1), str(n + 7)], "gold": 0} for n in range(4)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {place / 'rows.jsonl'}\n"
        "test_split: test\noutput_type: multiple_choice\ndoc_to_text: '{{question}}'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: gold\nmetric_list:\n  - metric: acc\n"
    )
    return place


def test_a_suite_alone_is_no_ground_for_a_go(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    (folder / "data" / "mvp" / "report.json").unlink()
    problems = tmp_path / "gsm8k.jsonl"
    problems.write_text(json.dumps({"question": "What is 2 plus 3?", "answer": "#### 5"}) + "\n")
    tasks = own_task(tmp_path)
    assert evaluate(folder, "--suite", "forgetting", "--tasks", "sums", "--task-folder", str(tasks)) == 3
    assert "the milestone's own suite has been run" in gate_names(report_of(folder))


def test_a_judge_that_fails_on_the_real_comparisons_is_no_go(made: Path, tmp_path: Path, nano_dir: Path) -> None:
    """It is fit on the known ones, which are asked first, and reads none of the others: its context is too small."""
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    behind, asked = ModelBehind(nano_dir, "chat", max_length=2048), [0]

    def answer(path: str, body: Body | None) -> Any:
        if body is None or not body.get("logprobs") or "Which answer is better" not in json.dumps(body):
            return behind(path, body)
        asked[0] += 1
        if asked[0] > 2 * KNOWN + 5:  # the probe's few among them
            raise Answer(400, {"error": {"message": "this model's maximum context length is 16 tokens"}})
        return behind(path, body)

    try:
        with Serving(answer) as server:
            assert evaluate(folder, "--judge", server.url, "--judge-format", "chat") == 3
    finally:
        behind.close()
    report = report_of(folder)
    assert report["metrics"]["harm_score_by_judge_base"]["n"] == HELD_OUT
    assert report["differences"]["harm_score_by_judge"]["interval"]
    gates = {gate["name"]: gate["passed"] for gate in report["gates"]}
    assert gates["the judge agrees with known answers (kappa)"] and not gates["comparisons that the judge could read"]


def test_pairs_of_ones_own_serve_as_held_out_ones_unless_they_were_trained_on(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    own = folder / "data" / "mvp" / "held_out" / "pairs.jsonl"
    assert evaluate(folder, "--held-out-pairs", str(own)) in (0, 3)
    assert report_of(folder)["metrics"]["words_base"]["n"] == len(own.read_text().splitlines())
    assert evaluate(folder, "--held-out-pairs", str(folder / "data" / "mvp" / "pairs.jsonl")) == 2
    assert "asks what the adapter was trained on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--run", "nosuch"], "holds no trained adapter"),
        (["--pairs", "nosuch.jsonl"], "nosuch.jsonl"),
        (["--compare", "mvp"], "--compare"),
        (["--judge", "no-such-model"], "--judge"),
        (["--held-out", "0"], "--held-out"),
        (["--suite", "nonsense"], "--suite"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    made: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    try:
        code = evaluate(made, *flags)
    except SystemExit as stop:
        code = int(stop.code or 0)
    said = capsys.readouterr().err.strip().splitlines()
    assert code == 2 and len(said) == 1 and says in said[0]


def test_an_adapter_of_other_weights_is_refused(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made, tmp_path / "made")
    place = tmp_path / "made" / "checkpoints" / "mvp" / "settings.json"
    settings = json.loads(place.read_text())
    place.write_text(json.dumps({**settings, "base_weights_sha256": "0" * 64}))
    assert evaluate(tmp_path / "made") == 2
    assert "was trained on other weights" in capsys.readouterr().err


def test_a_killed_evaluation_goes_on_with_what_was_said(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    said = folder / "data" / "mvp" / "evaluation" / "said.jsonl"
    whole = said.read_text().splitlines()
    said.unlink()
    command = [sys.executable, str(ROOT / "cai_experiment/scripts/eval_model.py"), "--milestone", "mvp", "--held-out",
               str(HELD_OUT), *places(folder)]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (said.exists() and said.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    begun = said.read_text().splitlines()
    assert 0 < len(begun) < len(whole) + 1
    before = report_of(folder)
    assert evaluate(folder) in (0, 3)
    assert said.read_text().splitlines()[: len(begun) - 1] == begun[:-1]
    after = report_of(folder)
    assert {k: v["value"] for k, v in after["metrics"].items()} == {k: v["value"] for k, v in before["metrics"].items()}


def test_a_plan_of_the_detection_table_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = "nano,http://127.0.0.1:1/v1"
    flags = ["--suite", "detection", "--models", models, "--plan", "--data-dir", str(tmp_path / "d")]
    assert run_main(eval_model.main, flags) == 0
    assert "detection" in capsys.readouterr().out and not (tmp_path / "d").exists()
