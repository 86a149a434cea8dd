"""--max-length where it is not given: one decision for plan, run, resumption and recommendation."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.milestones import MILESTONES
from cai_experiment.models import plan
from cai_experiment.models.choice import VARIABLES, resolve_model
from cai_experiment.models.profiles import PROFILES, Hardware
from cai_experiment.models.recommend import LENGTHS, recommend
from cai_experiment.models.workload import Workload
from cai_experiment.scripts import _plan, _plan_parts, _training, _training_work, test_batch, train_dpo
from cai_experiment.scripts._common import run_main
from cai_experiment.scripts._plan_training import training_after
from cai_experiment.training.data import Pair
from cai_experiment.training.settings import DPOSettings
from tests.training_tools import PAIRS

A100_40 = PROFILES["colab_pro_plus_a100"]


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable names a model."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def flags(tmp_path: Path, hardware: str, *more: str) -> argparse.Namespace:
    """Those of train_dpo.py's plan, as main() completes them."""
    told = ["--plan", "--milestone", "batch", "--run", "x", "--checkpoint-dir", str(tmp_path), "--hardware", hardware]
    return train_dpo.parser().parse_args([*told, *more])


def decided(args: argparse.Namespace, pairs: list[Pair] = PAIRS) -> DPOSettings:
    """The settings of a run with these flags."""
    hardware = PROFILES[args.hardware]
    return _training.training_settings(args, pairs, 10, resolve_model(args.model, hardware), hardware)


@pytest.mark.parametrize("key", PROFILES)
def test_the_plan_of_the_default_command_fits_everywhere(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """test_batch.py and train_dpo.py without --model: generation and training, with the length that is recommended."""
    machine = PROFILES[key]
    choice = resolve_model(None, machine)
    args = flags(tmp_path, key)
    settings = decided(args)
    work = _training_work.work_of(args, choice, machine, (10, 0), 10, replace(settings, pairs=()))[0]
    assert work.fits and settings.max_length in LENGTHS
    told = recommend(machine, for_training=True)
    assert settings.max_length == (told.length or LENGTHS[0]) and choice.name == told.preset.key
    line = capsys.readouterr().out
    assert (f"--max-length {settings.max_length}: 4,096 needs" in line) == (settings.max_length < 4096)
    batch = _plan_parts_args(tmp_path, key)
    arms, _ = _plan_parts._engines(batch, choice, machine, trains_after=True)
    engine, quantization = arms[0]
    assert plan.generation(choice, machine, engine, quantization, Workload(10, 2)).fits
    parts, _, lines = training_after(batch, MILESTONES["batch"], choice, machine, 10, 20, engine)
    assert all(part.fits for part in parts) and not any("DOES NOT FIT" in line for line in lines)
    assert any(f"--max-length {settings.max_length}: " in line for line in lines) == (settings.max_length < 4096)


def _plan_parts_args(tmp_path: Path, key: str) -> argparse.Namespace:
    """test_batch.py's flags."""
    from cai_experiment.scripts._generation import generation_parser

    told = ["--plan", "--hardware", key, "--run", "x", "--checkpoint-dir", str(tmp_path)]
    return generation_parser("", "batch").parse_args(told)


def test_a_given_length_stays_and_a_larger_model_is_said_not_to_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = decided(flags(tmp_path, "colab_free_t4", "--max-length", "4096"))
    assert given.max_length == 4096 and capsys.readouterr().out == ""
    too_large = decided(flags(tmp_path, "colab_free_t4", "--model", "qwen2.5-32b"))
    said = capsys.readouterr().out
    assert too_large.max_length == 1024 and "needs 46.1 GB of 15" in said and said.endswith("it does not fit\n")
    places = ["--data-dir", str(tmp_path / "d"), "--checkpoint-dir", str(tmp_path / "c")]
    for script in (test_batch, train_dpo):
        milestone = ["--milestone", "batch"] if script is train_dpo else []
        told = ["--plan", "--hardware", "colab_free_t4", "--model", "qwen2.5-32b", *milestone, *places]
        assert run_main(script.main, told) == 0
        lines = capsys.readouterr().out.splitlines()
        training = next(line for line in lines if line.startswith("training"))
        assert training.endswith("DOES NOT FIT") and "total       none: it does not fit" in lines


def test_the_trainer_and_what_it_is_told_decide(tmp_path: Path) -> None:
    key = "colab_pro_plus_a100"
    unsloth, fast = (decided(flags(tmp_path, key, "--backend", name)).max_length for name in ("unsloth", "fast"))
    assert unsloth == 2048 < fast
    assert decided(flags(tmp_path, key, "--model", "qwen2.5-7b", "--batch-size", "4")).max_length == 2048
    assert decided(flags(tmp_path, key, "--random-weights", "qwen2.5-0.5b")).max_length == 4096


def test_a_run_that_has_begun_keeps_its_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = flags(tmp_path, "colab_pro_plus_a100")
    first = decided(args)
    assert first.max_length == 2048
    assert decided(args, []).max_length == 2048  # whatever pairs there are

    def begun(length: int, folder: Path = first.output_dir) -> None:
        (folder / "final").mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(json.dumps({**first.identity(), "max_length": length}))

    capsys.readouterr()
    begun(1536, first.output_dir / "sft")
    assert decided(args).max_length == 1536  # of --sft-first, of which DPO has not begun yet
    begun(3072)
    assert decided(args).max_length == 3072
    assert "with which" in capsys.readouterr().out
    elsewhere = flags(tmp_path, "runpod_a100_80gb")
    assert decided(elsewhere).changes_since({**first.identity(), "max_length": 3072}) == []
    assert decided(flags(tmp_path, "colab_pro_plus_a100", "--fresh")).max_length == 2048
    other = flags(tmp_path, "colab_pro_plus_a100", "--model", "qwen2.5-7b")
    assert decided(other).max_length == 4096  # what has begun is another model's
    assert decided(flags(tmp_path, "colab_pro_plus_a100", "--max-length", "512")).max_length == 512
    begun(4096)
    capsys.readouterr()
    assert decided(args).max_length == 4096 and capsys.readouterr().out == ""


def test_memory_that_is_not_known_limits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = Hardware("this machine", "cuda", "NVIDIA GB10", 0.0, "4bit", 119, 20)
    args = flags(tmp_path, "cpu", "--model", "qwen2.5-7b")
    choice = resolve_model("qwen2.5-7b", silent)
    assert _training.training_settings(args, PAIRS, 10, choice, silent).max_length == 4096
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    unknown: Any = resolve_model("org/name", A100_40)
    assert _training.training_settings(args, PAIRS, 10, unknown, A100_40).max_length == 4096
    assert _plan.machine(args).kind == "cpu"
