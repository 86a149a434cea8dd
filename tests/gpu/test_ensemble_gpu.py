"""The ensemble on CUDA: heads trained and judged, accelerated decoding beside the plain loop, true sizes, 4 and 8 bit.

Run: python -m pytest -s -m gpu tests/gpu/test_ensemble_gpu.py     (not yet run: no card was at hand)
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cai_experiment.ensemble.data import load_rows
from cai_experiment.ensemble.decode import DecodeSettings, decode
from cai_experiment.ensemble.experts import SHIPPED
from cai_experiment.ensemble.model import MultiModelWithScalarHeads
from cai_experiment.scripts import eval_ensemble, train_ensemble
from cai_experiment.scripts._common import run_main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]
TRUE = ("random:qwen2.5-1.5b-base", "random:qwen2.5-1.5b", "random:qwen2.5-math-1.5b")
SAME = 0.9  # share of texts that blocks leave as they are; near ties may flip by the last bits of another matrix shape


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("gpu")
    flags = ["-v", "1", "--device", "cuda", "--precision", "fp32", "--models", *SHIPPED]
    assert run_main(train_ensemble.main, [*flags, "--output_dir", str(folder / "heads")]) == 0
    yield folder


def test_the_gain_is_there_on_a_gpu_too(trained: Path) -> None:
    flags = ["-v", "1", "--device", "cuda", "--model_weights", str(trained / "heads")]
    assert run_main(eval_ensemble.main, [*flags, "--output_dir", str(trained / "found"), "--no_plots"]) == 0
    found = json.loads((trained / "found" / "results.json").read_text(encoding="utf-8"))
    for other in ("best_single", "uniform", "router"):
        assert found["differences"][f"ensemble_minus_{other}"]["all"]["interval"][0] > 0


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(("mode", "temperature"), [("select", 0.0), ("mixture", 0.7)])
def test_blocks_say_what_the_plain_loop_says(trained: Path, mode: str, temperature: float, batch: int) -> None:
    model = MultiModelWithScalarHeads.from_pretrained(None, trained / "heads", device="cuda", precision="fp32")
    rows = [row for name in ("general", "medical", "mathematical", "two") for row in load_rows(name, "test", 20)]
    prompts, keys = [model.encode(row.prompt) for row in rows], [row.id for row in rows]
    settings = DecodeSettings(mode=mode, temperature=temperature, max_new_tokens=100, batch_size=batch)
    spoken, seconds = [], []
    for accelerate in (True, False):
        began = time.perf_counter()
        spoken.append(decode(model, prompts, replace(settings, accelerate=accelerate), keys)[0])
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    again = decode(model, prompts, settings, keys)[0]
    same = sum(one.ids == other.ids for one, other in zip(*spoken, strict=True)) / len(rows)
    print(f"{mode} {temperature} batch {batch}: {same:.3f} the same, {seconds[1] / seconds[0]:.2f} times as fast")
    assert [one.ids for one in again] == [one.ids for one in spoken[0]], "two runs of one command differ"
    assert same >= SAME


@pytest.mark.parametrize("precision", ["bf16", "8bit", "4bit"])
def test_three_experts_of_the_true_size_speak(shared_data: Path, precision: str) -> None:
    if precision == "8bit":
        names = [str(folder) for folder in SHIPPED.values()]  # random weights in 8 bit are not made
        model = MultiModelWithScalarHeads.from_pretrained(names, device="cuda", precision=precision)
    else:
        words = str(shared_data / "qwen2_tokenizer")
        model = MultiModelWithScalarHeads.from_pretrained(TRUE, device="cuda", precision=precision, tokenizer=words)
    began = time.perf_counter()
    spoken = model.speak(["Question: Is water wet?\nAnswer:"] * 4, max_new_tokens=64, temperature=0.7)
    peak = torch.cuda.max_memory_allocated() / 1e9
    tokens = sum(len(one.ids) for one in spoken)
    print(f"{precision}: {tokens / (time.perf_counter() - began):.0f} tokens/s, peak {peak:.1f} GB")
    assert all(one.ids for one in spoken)
