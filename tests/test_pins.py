"""The installed versions are the pinned ones: found here at once, not in the middle of a training."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest

from cai_experiment.scripts import doctor

ROOT = Path(__file__).resolve().parents[1]
TOGETHER = {"torch": "2.13.0", "transformers": "5.17.0", "trl": "1.14.2", "peft": "0.21.2", "datasets": "4.8.5",
            "bitsandbytes": "0.50.2", "accelerate": "1.15.0", "unsloth": "2026.10.7", "unsloth-zoo": "2026.10.7",
            "vllm": "0.32.0", "xformers": "0.0.35"}  # fmt: skip


@pytest.mark.parametrize(("name", "pinned"), doctor.pins(ROOT / "requirements-cpu.txt"))
def test_an_installed_version_that_differs_from_its_pin_is_told(name: str, pinned: str) -> None:
    assert version(name).partition("+")[0] == pinned, f"{name}: bash setup_runpod.sh installs {pinned}"


def test_one_set_that_works_together_on_cpu_and_gpu() -> None:
    pinned = dict(doctor.pins(ROOT / "requirements.txt"))
    assert {name: pinned[name] for name in TOGETHER} == TOGETHER
