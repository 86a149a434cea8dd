"""The engines on CUDA: the same texts as transformers, memory that runs out, the 32B's architecture, Unsloth.

Run: python -m pytest -m gpu tests/gpu/test_engines_gpu.py
"""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Prompt, Sampling
from cai_experiment.engines.load import LoadSettings, load_engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]


def ask(i: int, max_tokens: int = 20, heat: float = 0.0) -> Prompt:
    turns = (Turn("instruction", f"How do I grow tomatoes number {i}?"),)
    return Prompt(str(i), turns, "answer", Sampling(heat, max_tokens, 0, f"k{i}"))


def test_greedy_text_on_cuda_is_that_of_transformers(tiny_model_dir: Path) -> None:
    engine: Any = load_engine(LoadSettings(model=str(tiny_model_dir), quantization="fp32", engine="hf"))
    found = {c.id: c.text for c in engine.stream([ask(i) for i in range(40)])}
    renderer = engine.renderer
    for i in range(5):
        ids = torch.tensor([renderer.prompt_ids(ask(i).turns, "answer")], device="cuda")
        out = engine.model.generate(ids, do_sample=False, max_new_tokens=20, eos_token_id=list(renderer.stop_token_ids))
        assert found[str(i)] == renderer.stops.text(out[0, ids.shape[1] :].tolist())[0]
    assert engine.describe()["device"] == "cuda:0"


@pytest.mark.parametrize("quantization", ["4bit", "8bit", "bf16"])
def test_every_quantisation_speaks_and_weighs(tiny_model_dir: Path, quantization: str) -> None:
    engine: Any = load_engine(LoadSettings(model=str(tiny_model_dir), quantization=quantization, engine="hf"))
    assert all(c.finish in ("stop", "length") for c in engine.stream([ask(i, heat=0.7) for i in range(40)]))
    assert all(a < 0 and b < 0 for a, b in engine.choose([ask(i) for i in range(5)], ("A", "B")))


def test_memory_that_runs_out_halves_the_slots(tiny_model_dir: Path) -> None:
    """The process may take 2% of the GPU: keys for 4,096 slots do not fit."""
    torch.cuda.set_per_process_memory_fraction(0.02)
    try:
        engine: Any = load_engine(
            LoadSettings(model=str(tiny_model_dir), quantization="fp32", engine="hf", batch_size=65_536)
        )
        done = list(engine.stream([ask(i, 8) for i in range(100)]))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert engine.halved > 0 and {c.finish for c in done} <= {"stop", "length"} and len(done) == 100


def test_the_32b_architecture_in_4bit_with_random_weights() -> None:
    """About 19 GB on the GPU, made layer by layer: the host never holds the 65 GB of its weights."""
    if torch.cuda.get_device_properties(0).total_memory < 40e9:
        pytest.skip("less than 40 GB of GPU memory")
    import resource

    engine: Any = load_engine(LoadSettings(random_weights="qwen2.5-32b", quantization="4bit", batch_size=4))
    assert {c.finish for c in engine.stream([ask(i, 5) for i in range(4)])} <= {"stop", "length"}
    assert torch.cuda.max_memory_allocated() < 30e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 20e9


def test_unsloth_speaks_and_goes_to_training(tiny_model_dir: Path) -> None:
    """In a process of its own: unsloth must be imported before transformers is."""
    if find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed here")
    code = f"""
from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Prompt, Sampling
from cai_experiment.engines.load import LoadSettings, load_engine
engine = load_engine(LoadSettings(model={str(tiny_model_dir)!r}, engine="unsloth", quantization="4bit"))
turns = [(Turn("instruction", "Why?" * (i + 1)),) for i in range(5)]
prompts = [Prompt(str(i), turn, "answer", Sampling(0.7, 8, 0, str(i))) for i, turn in enumerate(turns)]
first = {{c.id: c.text for c in engine.stream(prompts)}}
assert len(first) == 5 and len(engine.choose(prompts, ("A", "B"))) == 5
model, tokenizer = engine.release_for_training()
assert model.training
print("said", engine.name, len(first))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert "said unsloth 5" in done.stdout, done.stderr[-2000:]
