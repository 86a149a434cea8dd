"""The MVP's evaluation at its full size: a good adapter goes, an over-trained one is stopped and its collapse named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.scripts import eval_model, generate_mvp, train_dpo
from cai_experiment.scripts._common import run_main

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory, nano_dir: Path) -> Path:
    """A folder whose data/mvp holds the shipped model's 100 pairs."""
    folder = tmp_path_factory.mktemp("mvp")
    assert run_main(generate_mvp.main, ["-v", "0", *places(folder)]) == 0
    return folder


def places(folder: Path) -> list[str]:
    return ["--data-dir", str(folder / "data"), "--checkpoint-dir", str(folder / "checkpoints"), "--model", "nano"]


def evaluated(folder: Path, *training: str) -> tuple[int, dict[str, Any]]:
    """(exit code, report) of eval_model.py after a training with these flags."""
    flags = ["--milestone", "mvp", "-v", "0", *places(folder)]
    assert run_main(train_dpo.main, [*flags, "--no-eval", "--fresh", *training]) == 0
    code = run_main(eval_model.main, flags)
    return code, json.loads((folder / "data" / "mvp" / "report.json").read_text())


def test_a_good_adapter_goes(pairs: Path) -> None:
    code, report = evaluated(pairs)
    metrics = report["metrics"]
    preferred = metrics["preference_accuracy"]
    assert code == 0 and report["verdict"] == "go"
    assert not any("ollapse" in alarm for alarm in report["alarms"])
    assert preferred["n"] >= 60 and preferred["value"] > 0.80 and preferred["interval"][0] > 0.70
    assert metrics["arithmetic_trained"]["n"] >= 400 and report["differences"]["arithmetic"]["interval"][0] > -0.05
    assert {"length_only_accuracy", "bag_of_words_accuracy"} <= metrics.keys()


def test_an_over_trained_one_is_stopped_and_its_collapse_named(pairs: Path) -> None:
    code, report = evaluated(pairs, "--learning-rate", "1e-3", "--steps", "300")
    assert code == 3 and report["verdict"] == "no-go"
    assert report["metrics"]["preference_accuracy"]["value"] > 0.95  # which proves nothing
    assert any(alarm.lower().startswith("collapse: answers repeat themselves") for alarm in report["alarms"])
