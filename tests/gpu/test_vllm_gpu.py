"""vLLM on a GPU: the same greedy texts and verdicts as the transformers engine, and memory that comes back.

Run: pytest -m gpu tests/gpu/test_vllm_gpu.py
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Iterator

import pytest

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Prompt, Sampling
from cai_experiment.engines.load import LoadSettings, load_engine

pytestmark = pytest.mark.gpu
PROMPTS = 50


@pytest.fixture(scope="module", autouse=True)
def needed() -> None:
    import torch

    if not torch.cuda.is_available() or find_spec("vllm") is None:
        pytest.skip("no CUDA GPU or no vllm here")


def prompts(temperature: float = 0.0) -> Iterator[Prompt]:
    for number in range(PROMPTS):
        turns = (Turn("instruction", f"How do I mend the kettle number {number} at home?"),)
        yield Prompt(str(number), turns, "answer", Sampling(temperature, 60))


def verdicts() -> Iterator[Prompt]:
    for number in range(PROMPTS):
        turns = (
            Turn("instruction", f"How do I mend kettle {number}?"),
            Turn("answer", "Hit it."),
            Turn("question", "Ok?"),
        )
        yield Prompt(str(number), turns, "verdict", Sampling(0.0, 1), ("A", "B"))


def speak(folder: Path, engine: str, quantization: str) -> tuple[dict[str, str], list[tuple[float, ...]], Any]:
    settings = LoadSettings(model=str(folder), engine=engine, quantization=quantization, trains_after=False)
    loaded = load_engine(settings)
    try:
        texts = {c.id: c.text for c in loaded.stream(prompts())}
        return texts, loaded.choose(list(verdicts()), ["A", "B"]), loaded.describe()
    finally:
        loaded.close()


def test_greedy_texts_and_verdicts_equal_those_of_transformers(nano_dir: Path, capsys: Any) -> None:
    """All equal in float32; the share in bfloat16 is printed."""
    import torch

    ours, weights, _ = speak(nano_dir, "hf", "fp32")
    theirs, found, facts = speak(nano_dir, "vllm", "fp32")
    assert facts["dtype"] == "float32" and facts["prefix_caching"]
    assert theirs == ours
    for one, other in zip(weights, found, strict=True):
        assert other == pytest.approx(one, abs=1e-3)
    free, total = torch.cuda.mem_get_info()
    assert free > 0.9 * total  # the child has gone, and its memory with it
    narrow, _, _ = speak(nano_dir, "vllm", "bf16")
    with capsys.disabled():
        print(f"\nbf16 on vLLM: {sum(narrow[k] == ours[k] for k in ours)} of {PROMPTS} greedy texts equal float32's")


def test_a_seed_draws_the_same_text_again(nano_dir: Path) -> None:
    engine = load_engine(LoadSettings(model=str(nano_dir), engine="vllm", trains_after=False))
    try:
        first, second = ({c.id: c.text for c in engine.stream(prompts(0.7))} for _ in range(2))
        assert sum(first[k] == second[k] for k in first) >= 0.9 * PROMPTS  # bfloat16: the batch may turn a last bit
    finally:
        engine.close()
