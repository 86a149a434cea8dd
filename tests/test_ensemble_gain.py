"""The claim of the ensemble on the shipped experts, from the two commands of the README."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from cai_experiment.ensemble.experts import SHIPPED
from cai_experiment.scripts import eval_ensemble, train_ensemble

LIMIT = 600.0  # seconds for both on two cores, the issue's


@pytest.mark.slow
def test_the_ensemble_is_above_its_best_expert_a_uniform_mixture_and_a_router(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    assert train_ensemble.main(["-v", "1", "--device", "cpu", "--models", *SHIPPED]) == 0
    assert eval_ensemble.main(["-v", "1", "--device", "cpu", "--no_plots"]) == 0
    assert time.monotonic() - began < LIMIT
    found = json.loads((tmp_path / "evaluation_results" / "results.json").read_text(encoding="utf-8"))
    differences = found["differences"]
    for other in ("best_single", "uniform", "router"):
        assert differences[f"ensemble_minus_{other}"]["all"]["interval"][0] > 0, other
    assert differences["ensemble_over_oracle"]["all"]["interval"][0] >= 0.9
    assert found["settings"]["temperature"] == 0.3 and differences["ensemble_minus_router"]["all"]["n"] == 200
