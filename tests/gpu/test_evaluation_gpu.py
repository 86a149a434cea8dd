"""The evaluation on CUDA: both arms in 4 bit and bfloat16, and whether the target's memory really comes back.

Run: python -m pytest -m gpu tests/gpu/test_evaluation_gpu.py     (not yet run: no card was at hand)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cai_experiment.records.files import write_jsonl
from cai_experiment.scripts import eval_model, train_dpo
from cai_experiment.scripts._common import run_main
from cai_experiment.scripts._evaluation_flags import parser
from cai_experiment.scripts._target import Target, finished_training
from cai_experiment.training.plumbing import plumbing_pairs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")]
PRESET = "qwen2.5-0.5b"  # its true architecture and vocabulary; the words of random weights mean nothing


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a run on random weights, trained for three steps."""
    folder = tmp_path_factory.mktemp("gpu")
    pairs = [{"prompt": p.instruction, "chosen": p.chosen, "rejected": p.rejected} for p in plumbing_pairs(40)]
    write_jsonl(folder / "pairs.jsonl", pairs)
    places = ["--milestone", "mvp", "--pairs", str(folder / "pairs.jsonl"), "--random-weights", PRESET, "-v", "0",
              "--data-dir", str(folder / "data"), "--checkpoint-dir", str(folder / "checkpoints")]  # fmt: skip
    assert run_main(train_dpo.main, [*places, "--steps", "3", "--backend", "fast", "--no-eval"]) == 0
    return places


@pytest.mark.parametrize("quantization", ["4bit", "bf16"])
def test_the_milestones_suite_runs_to_its_report(made: list[str], quantization: str) -> None:
    assert run_main(eval_model.main, [*made, "--held-out", "20", "--quantization", quantization]) == 3
    data = Path(made[made.index("--data-dir") + 1])
    assert (data / "mvp" / "report.html").is_file()


def test_the_targets_memory_comes_back(made: list[str]) -> None:
    args: Any = parser(None).parse_args(made)
    args.run = args.milestone
    before = torch.cuda.memory_allocated()
    target = Target(args, finished_training(args))
    speakers = target.speakers()
    assert torch.cuda.memory_allocated() > before + 2e8
    del speakers
    target.free()
    assert torch.cuda.memory_allocated() <= before + 1e7 and torch.cuda.memory_reserved() < 2e8
