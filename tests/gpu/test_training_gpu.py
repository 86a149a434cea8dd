"""Fast DPO on CUDA: FlexAttention, bfloat16 and NF4, recomputation; against TRL, and its own start check.

Run: python -m pytest -m gpu tests/gpu/test_training_gpu.py     (not yet run: no card was at hand)
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from cai_experiment.engines.load import LoadSettings, load_engine
from cai_experiment.training.data import TokenPair
from cai_experiment.training.settings import DPOSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]


def some_pairs(count: int = 8) -> list[TokenPair]:
    source = random.Random(0)

    def ids(least: int, most: int) -> list[int]:
        return [source.randrange(5, 100) for _ in range(source.randint(least, most))]

    found = []
    for number in range(count):
        begin = ids(5, 40)
        chosen, rejected = ([*begin, first, *ids(20, 200), 2] for first in (3, 4))
        found.append(TokenPair(str(number), ids(10, 60), chosen, rejected))
    return found


def one_step(model_dir: Path, out: Path, backend: str, quantization: str, layers: int = 0) -> dict[str, torch.Tensor]:
    """The gradients of the first step."""
    from transformers import TrainerCallback

    from cai_experiment.training.backends import build_trainer
    from cai_experiment.training.fast.budget import recompute

    engine: Any = load_engine(LoadSettings(model=str(model_dir), quantization=quantization, engine="hf"))
    model, tokenizer = engine.release_for_training()
    settings = DPOSettings((), out / backend, steps=1, backend=backend)
    trainer = build_trainer(backend, settings, some_pairs(), (), 1, model, tokenizer, TrainerCallback())
    trainer.check_start()
    if backend == "fast":
        recompute(trainer.policy.causal_lm, layers)
    trainer.args.save_strategy = "no"
    found: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        """The gradients before they are zeroed."""

        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            for name, parameter in trainer.model.named_parameters():
                if parameter.requires_grad and parameter.grad is not None:
                    found[name.replace("_orig_mod.", "")] = parameter.grad.detach().float().cpu().clone()

    trainer.add_callback(Keep())
    trainer.train()
    return found


@pytest.mark.parametrize(("quantization", "apart"), [("fp32", 1e-3), ("bf16", 0.1), ("4bit", 0.1)])
def test_gradients_of_fast_and_trl(tiny_model_dir: Path, tmp_path: Path, quantization: str, apart: float) -> None:
    """In 16 bits both round; a wrong mask or position would change gradients by their own size."""
    ours, theirs = (one_step(tiny_model_dir, tmp_path, arm, quantization) for arm in ("fast", "trl"))
    assert ours.keys() == theirs.keys()
    moved = [name for name in ours if theirs[name].norm() > 0]
    assert moved and all((ours[n] - theirs[n]).norm() <= apart * theirs[n].norm() for n in moved)


@pytest.mark.parametrize("layers", [1, 10**6])
def test_recomputed_layers_give_the_same_gradients(tiny_model_dir: Path, tmp_path: Path, layers: int) -> None:
    kept, again = (one_step(tiny_model_dir, tmp_path / str(n), "fast", "bf16", n) for n in (0, layers))
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-4, rtol=0.05)
