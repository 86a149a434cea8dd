"""Trains a finished model of the written world on: its last course, other documents. So nano-b was made from nano."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Callable, Sequence

import torch

from cai_experiment.constitution.principles import Principle
from cai_experiment.nano.tasks import Teacher
from cai_experiment.nano.tokenizer import PieceEncoder
from cai_experiment.nano.train import POOL_STEPS, Batch, TrainSettings, batches, learn, publish, save_model

STEPS, SEED = 1200, 11  # nano-b's; about 8 minutes on two free cores
FIRST_POOL = 100_000  # far from the pools of `train`, so that a document is hardly seen twice
FLOOR = 0.01  # of the rate, at the end of its straight line down


def train_on(
    start: Path, principles: Sequence[Principle], folder: Path, work: Path, settings: TrainSettings,
    report: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """`settings.steps` more steps at `settings.learning_rate` (AdamW afresh), published as `folder` after the last one.

    The rate warms up in `settings.warmup` steps and falls in a straight line. Not resumable: it takes minutes.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(settings.threads)
    tokenizer = AutoTokenizer.from_pretrained(start)
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).train()
    maker = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    maker.param_groups[0]["initial_lr"] = settings.learning_rate
    teacher, encoder = Teacher(principles, len(settings.courses) - 1), PieceEncoder(tokenizer)
    ready: list[Batch] = []
    seen, began = 0, time.monotonic()
    for step in range(settings.steps):
        if step % POOL_STEPS == 0:
            ready = batches(teacher, encoder, settings, FIRST_POOL + step // POOL_STEPS)
        batch = ready[step % len(ready)]
        factor = min(1.0, (step + 1) / settings.warmup) * max(FLOOR, 1 - step / settings.steps)
        loss, plain = learn(model, [maker], batch, factor)
        seen += batch[0].numel()
        if (step + 1) % 20 == 0:
            pace = seen / (time.monotonic() - began)
            losses = f"loss {loss.item():.4f}  plain {plain.item():.4f}"
            report(f"step {step + 1}/{settings.steps}  {losses}  {pace:,.0f} tokens/s")
    save_model(model, tokenizer, work / "model")
    older = publish(work / "model", folder)
    report(f"trained: {folder}" + (f"; the older model is now {older}" if older else ""))
