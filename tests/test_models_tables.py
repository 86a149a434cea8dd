"""models.py: rows beyond a context, one model with --length and --fit, what variables name, what is about right."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from cai_experiment.models.choice import VARIABLES
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.profiles import PROFILES
from cai_experiment.models.recommend import list_available_models
from cai_experiment.models.tables import broken
from cai_experiment.scripts import _models_fit
from cai_experiment.scripts import models as script
from cai_experiment.scripts._common import ROOT, run_main


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable names a model."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def told(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What models.py prints."""
    assert run_main(script.main, list(flags)) == 0
    return capsys.readouterr().out


def test_rows_longer_than_the_context_are_no_figures(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--fit", "--hardware", "colab_free_t4", "--length", "100000")
    rows = {row["key"]: row for row in json.loads(told(capsys, *flags, "--json"))["models"]}
    assert rows["phi-2"] | {"have_gb": 15} == rows["phi-2"] and not rows["phi-2"]["generates"]
    assert rows["phi-2"]["generation_gb"] is rows["phi-2"]["training_gb"] is None
    assert rows["qwen3-4b"]["generation_gb"] > PRESETS["qwen3-4b"].vram_gb("4bit", 50_000)
    line = next(line for line in told(capsys, *flags).splitlines() if line.startswith(" phi-2 "))
    assert "no: context 2,048" in line


def test_fit_trains_in_the_longest_rows_that_fit(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(told(capsys, "--fit", "--hardware", "local_3090", "--json"))["models"]
    for row in rows:
        preset = PRESETS[row["key"]]
        assert row["training_tokens"] <= preset.context
        longer = row["training_tokens"] + 1024
        assert not row["trains"] or longer > min(4096, preset.context) or (
            preset.training_vram_gb("4bit", longer) > row["have_gb"])  # fmt: skip


def test_a_cpu_has_no_cuda_and_this_machine_what_is_free(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_models_fit, "free_ram_gb", lambda: 3.0)
    monkeypatch.setattr(script, "detect", lambda: replace(PROFILES["cpu"], name="this machine"))
    here = json.loads(told(capsys, "nano", "--fit", "--json"))["models"][0]
    assert here["have_gb"] == 3.0 and here["generation_gb"] < 0.1
    assert "3 GB free now" in told(capsys, "nano", "--fit")
    profile = json.loads(told(capsys, "nano", "--fit", "--hardware", "cpu", "--json"))["models"][0]
    assert profile["have_gb"] == PROFILES["cpu"].ram_gb - _models_fit.SYSTEM_GB


def test_one_model_takes_length_and_fit(capsys: pytest.CaptureFixture[str]) -> None:
    text = told(capsys, "nano", "--length", "500")
    assert re.search(r"^ generation +500 +8 ", text, re.MULTILINE) and "rows of 500 tokens" in text
    assert not re.search(r"^ generation +1,024 ", text, re.MULTILINE)
    fitted = told(capsys, "nano", "--fit", "--length", "500", "--hardware", "cpu")
    assert " nano " in fitted and "yes: 500" in fitted and "qwen" not in fitted


def test_a_variable_that_names_a_model_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")  # whatever an earlier test or the terminal says
    monkeypatch.setenv("AGI_MODEL_NAME", "qwen2.5-7b-instruct")
    said = "AGI_MODEL_NAME=qwen2.5-7b-instruct (qwen2.5-7b) is set: scripts take it where no --model is given"
    assert said in told(capsys).splitlines()
    monkeypatch.setenv("CAI_MODEL", "qwen2.5-9b")
    assert "scripts stop where no --model is given: CAI_MODEL=qwen2.5-9b: unknown preset" in told(capsys)


def test_no_path_of_this_machine_in_what_is_told_of_shipped_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert str(ROOT) not in told(capsys, "nano") + told(capsys, "--json") + told(capsys, "nano", "--json")


def test_a_kind_that_is_not_counted_is_about_right_beside_every_figure(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    fields = {"model_type": "brand_new", "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4,
              "num_attention_heads": 4, "vocab_size": 3072, "max_position_embeddings": 2048}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    text, folder = told(capsys, str(tmp_path)), str(tmp_path)
    assert re.search(r"^size +about [\d.]+M, reckoned as Llama: brand_new is no family", text, re.MULTILINE)
    assert text.count("about, reckoned as Llama") == 2
    assert "about, reckoned as Llama (brand_new)" in told(capsys, folder, "--fit")
    assert json.loads(told(capsys, folder, "--json"))["about"] == "about, reckoned as Llama (brand_new)"


def test_long_lines_are_broken_at_their_parts() -> None:
    assert broken("a | b", 10) == "a | b"
    assert broken("what is said | why it is so", 20) == "what is said\n  why it is so"
    assert broken("one two three four", 10, 4) == "one two\n    three\n    four"


def test_no_row_is_longer_than_the_context(capsys: pytest.CaptureFixture[str]) -> None:
    for preset in PRESETS.values():
        assert preset.vram_gb("bf16") == preset.vram_gb("bf16", min(4096, preset.context))
    assert "phi-2" in {one.key for one in list_available_models(3.5)}
    assert "tokens or the context" in told(capsys)
