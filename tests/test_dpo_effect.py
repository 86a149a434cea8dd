"""The effect of DPO and its control: what the table says of two reports, and the whole script at a small size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.records.files import read_examples
from cai_experiment.records.schema import Example, PreferencePair
from cai_experiment.scripts import dpo_effect
from cai_experiment.scripts._common import run_main

FIGURES = {"flawed_answers": (0.6, 0.03), "on_topic": (1.0, 0.98), "ends_by_itself": (1.0, 0.99),
           "arithmetic": (0.95, 0.9), "distinct_2": (0.4, 0.44), "sentences": (4.0, 3.6)}  # fmt: skip


def report(p_value: float = 0.3, **changed: tuple[float | None, float | None]) -> dict[str, Any]:
    """A report.json's metrics and tests, with every target met to the last digit."""
    metrics = {}
    for name, (base, trained) in (FIGURES | changed).items():
        metrics[f"{name}_base"] = {"value": base, "n": 200, "interval": [0.0, 1.0], "unparsed": 0}
        metrics[f"{name}_trained"] = {"value": trained, "n": 200, "interval": [0.0, 1.0], "unparsed": 0}
    test = {"only_base": 20, "only_trained": 5, "p_value": p_value, "p_holm": 1.0}
    return {"metrics": metrics, "tests": {"flawed_answers": test}}


def effect(control: dict[str, Any] | None = None, **changed: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The table's rows of arms that meet every target, but for those that are given."""
    return dpo_effect.effect({arm: report() for arm in dpo_effect.ARMS} | changed | {"control": control or report()})


def test_targets_are_met_at_their_limits_and_missed_beyond_them() -> None:
    rows = effect(report(flawed_answers=(0.6, 0.58)), sft=report(flawed_answers=(0.6, 0.3)))
    assert all(row["met"] for row in rows.values()) and len(rows) == 8
    assert rows["flawed_answers"]["sft"]["value"] == rows["sft_dpo_flawed_answers"]["sft"]["value"] == 0.3
    assert rows["distinct_2_ratio"]["value"] == pytest.approx(1.1) and rows["sentences_ratio"]["value"] == 0.9
    assert rows["flawed_answers"]["control"]["value"] == rows["control_flawed_answers"]["value"] == 0.58
    for name, pair in {"flawed_answers": (0.6, 0.055), "on_topic": (1.0, 0.945), "ends_by_itself": (1.0, None),
                       "arithmetic": (0.95, 0.895)}.items():  # fmt: skip
        rows = effect(dpo=report(**{name: pair}))
        assert [key for key, row in rows.items() if not row["met"]] == [name]
    for name, pair in {"distinct_2": (0.4, 0.35), "sentences": (4.0, 4.5)}.items():
        for arm in ("dpo", "sft_dpo"):  # what SFT alone costs is shown, not asked
            rows = effect(**{arm: report(**{name: pair}), "sft": report(**{name: pair})})
            assert [key for key, row in rows.items() if not row["met"]] == [f"{name}_ratio"]
    rows = effect(report(p_value=0.04))
    assert [key for key, row in rows.items() if not row["met"]] == ["control_flawed_answers"]
    rows = effect(sft_dpo=report(flawed_answers=(0.6, 0.031)))
    assert [key for key, row in rows.items() if not row["met"]] == ["sft_dpo_flawed_answers"]


def test_the_control_swaps_about_half_by_its_seed_and_changes_nothing_else() -> None:
    examples = [
        Example(str(i), "q", "bad", "p", "c", "good", PreferencePair("q", "good", "bad"), (), {}) for i in range(100)
    ]
    mixed = dpo_effect.shuffled(examples, 0)
    swapped = [i for i, example in enumerate(mixed) if example.preference_pair == PreferencePair("q", "bad", "good")]
    assert 35 <= len(swapped) <= 65 and mixed == dpo_effect.shuffled(examples, 0) != dpo_effect.shuffled(examples, 1)
    assert all(mixed[i] == examples[i] for i in set(range(100)) - set(swapped))
    assert all(one.initial_answer == "bad" and one.id == str(i) for i, one in enumerate(mixed))


def test_the_table_shows_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    dpo_effect.show(effect(dpo=report(ends_by_itself=(1.0, None))))
    said = capsys.readouterr().out
    assert "not measured" in said and "0.030 (0.000-1.000)" in said and "missed" in said


@pytest.mark.slow
def test_the_whole_script_at_a_small_size(tmp_path: Path, nano_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai_experiment.evaluation.measure.HELD_OUT", 10)
    flags = ["--count", "8", "--steps", "3", "--data-dir", str(tmp_path / "data"), "--json", str(tmp_path / "x.json"),
             "--checkpoint-dir", str(tmp_path / "checkpoints")]  # fmt: skip
    assert run_main(dpo_effect.main, flags) in (0, 3)
    rows = json.loads((tmp_path / "x.json").read_text())
    assert rows["flawed_answers"]["n"] == 10 and rows["arithmetic"]["n"] == 400
    assert rows["sft_dpo_flawed_answers"]["n"] == 10 and rows["sft_dpo_flawed_answers"]["sft"]["value"] is not None
    bases = [report["metrics"]["flawed_answers_base"] for report in reports_of(tmp_path / "data")]
    assert bases == [bases[0]] * 4  # the same model, before, on the same questions
    runs = ("dpo_effect", "dpo_effect-sft", "dpo_effect-sft_dpo", "dpo_effect-control")
    true, same, also, mixed = (read_examples(tmp_path / "data" / run / "pairs.jsonl") for run in runs)
    assert len(true) == len(mixed) == 8 and true == same == also != mixed


def reports_of(data: Path) -> list[dict[str, Any]]:
    """The arms' report.json."""
    return [json.loads(path.read_text()) for path in sorted(data.glob("*/report.json"))]
