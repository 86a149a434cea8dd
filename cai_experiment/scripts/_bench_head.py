"""What the loss head holds at most: ours, TRL's chunked one, TRL's full logits. Each in a process of its own.

Run by bench.py as: python _bench_head.py ARM OUT TOKENS VOCAB HIDDEN
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.models.hardware import detect
from cai_experiment.scripts._bench_figures import Figure, Say
from cai_experiment.scripts._bench_process import peak_bytes, run_child

TOKENS, VOCAB, HIDDEN = 2 * 4096, 152_064, 256  # two rows of 4,096 tokens; Qwen2.5-32B's vocabulary
FULL_LOGITS_GB = 20  # of memory, which TRL's default takes most of
ARMS = ("fast", "trl_best", "trl_default")


def head_memory(args: argparse.Namespace, say: Say) -> Figure:
    """Peak of forward and backward over what the process held before; TRL's best is the measure."""
    peaks: dict[str, float | None] = {}
    for arm in ARMS:
        if arm == "trl_default" and detect().ram_gb < FULL_LOGITS_GB:
            peaks[arm] = None
            continue
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "peak.json"
            command = [sys.executable, str(Path(__file__).resolve()), arm, str(out), *map(str, (TOKENS, VOCAB, HIDDEN))]
            run_child(command, {"OMP_NUM_THREADS": str(args.threads)}, f"the head of {arm}", 900)
            peaks[arm] = json.loads(out.read_text())["gib"]
        say(f"loss head of {arm}: {peaks[arm]:.2f} GiB")
    ours, best = peaks["fast"], peaks["trl_best"]
    assert ours is not None and best is not None
    return Figure("loss_head_memory_over_trl", ours / best, 1.0, None, peaks, at_most=True)


def _loss(arm: str, hidden: Any, weight: Any, targets: Any) -> Any:
    import torch

    if arm == "fast":
        from cai_experiment.training.fast.head import target_logps

        return target_logps(hidden, weight, None, targets).sum()
    if arm == "trl_best":
        from trl.trainer.dpo_trainer import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

        logps, _ = _ChunkedLogProbFunction.apply(
            hidden, weight, None, targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0
        )
        return logps.sum()
    from trl.trainer.dpo_trainer import selective_log_softmax_and_entropy

    logits = torch.nn.functional.linear(hidden, weight).view(2, -1, len(weight))
    mask = torch.ones(logits.shape[:2], dtype=torch.long)
    found = selective_log_softmax_and_entropy(logits, targets.view(2, -1), entropy_requires_grad=False, row_mask=mask)
    return found[0].sum()


def _child(arm: str, out: str, tokens: str, vocab: str, hidden: str) -> None:
    """Measure one arm and write its peak."""
    import torch

    torch.manual_seed(0)
    states = torch.randn(int(tokens), int(hidden), requires_grad=True)
    weight = torch.randn(int(vocab), int(hidden)) / 16
    targets = torch.randint(int(vocab), (int(tokens),))
    _loss(arm, states[:32], weight, targets[:32]).backward()  # imports, threads and their buffers
    states.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: imports reached higher than a small head
    before = peak_bytes()
    _loss(arm, states, weight, targets).backward()
    Path(out).write_text(json.dumps({"gib": (peak_bytes() - before) / 2**30}))


if __name__ == "__main__":
    _child(*sys.argv[1:])
