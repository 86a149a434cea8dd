"""What the tests of training share: ten pairs, a training of few steps, weights and their difference."""

from __future__ import annotations

import functools
import gc
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.training import dpo
from cai_experiment.training.data import Pair
from cai_experiment.training.settings import DPOSettings, TrainResult

PLANTS = ("tomatoes", "beans", "roses", "figs", "mint", "basil", "kale", "leek", "rye", "oats")
PAIRS = tuple(
    Pair(f"{i:06d}", ask_for_answer(f"How do I grow {plant}?"), f"Use a large pot for {plant}. Water it every morning.",
         f"Only a fool asks about {plant}.")
    for i, plant in enumerate(PLANTS)
)  # fmt: skip
BACKENDS = ("fast", "trl")
LONG = {"steps": 6, "effective_batch": 4, "batch_size": 2, "save_every": 2}  # 3 steps an epoch; TRL: 2 passes a step


def settings_for(folder: Path, **changes: Any) -> DPOSettings:
    """Three steps on PAIRS, fast enough to see the loss fall."""
    return DPOSettings(**{"pairs": PAIRS, "output_dir": folder, "steps": 3, "learning_rate": 1e-3, **changes})


@functools.cache
def libraries() -> None:
    """Import what training imports, and take all that out of later garbage collections: each would walk it again."""
    import peft
    import trl.trainer.dpo_trainer

    assert peft and trl
    gc.collect()
    gc.freeze()


def load(folder: Path) -> tuple[Any, Any]:
    """(model, tokenizer)"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    libraries()
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def renderer_of(tokenizer: Any, layout: str = "chat", max_length: int = 2048) -> Any:
    """The renderer that training is given."""
    from cai_experiment.engines.render import Renderer

    return Renderer(tokenizer, layout, max_length)


def train(settings: DPOSettings, model: Any, tokenizer: Any, said: list[str] | None = None) -> TrainResult:
    """`dpo.train`, with what it says in `said`."""
    return dpo.train(settings, model, tokenizer, renderer_of(tokenizer), (said if said is not None else []).append)


def stop_after(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """Calls of `train` stop as by --max-hours after these steps, until the patch is undone."""
    from cai_experiment.training.run import Training

    monkeypatch.setattr(Training, "limit", lambda self: "--max-hours 1" if self.step in steps else "")


def weights(folder: Path) -> dict[str, Any]:
    """The final adapter's tensors, in memory: not the mapped file, which a test may change."""
    from safetensors.torch import load_file

    return {name: tensor.clone() for name, tensor in load_file(folder / "final" / "adapter_model.safetensors").items()}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of two adapters."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)
