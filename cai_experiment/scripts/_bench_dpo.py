"""Suite dpo: the fast DPO step against TRL at its best and TRL as it comes, on pairs that milestone mvp makes.

All arms train the same float32 model on the same pairs in the same order, from the same adapter, with the same
optimizer; none writes checkpoints. A run's time is from the trainer's construction to the last step: the reference's
log-probabilities are part of it, loading the model is not.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.models.choice import numbers_of, resolve_model
from cai_experiment.models.hardware import detect
from cai_experiment.models.memory import Architecture
from cai_experiment.scripts._bench_figures import Figure, Report, Rounds, Say, interleaved, medians
from cai_experiment.scripts._bench_head import head_memory
from cai_experiment.scripts._bench_setting import setting_of

PAIRS, BATCH, EPOCHS = 300, 8, (1, 3)
LEARNING_RATE = 1e-4
TARGETS = {1: 1.6, 3: 1.9}  # over TRL at its best
ARMS = ("fast", "trl_best", "trl_default")


@dataclass
class Work:
    """What every arm trains on, and each arm's losses of its longest run."""

    args: argparse.Namespace
    rows: Sequence[Any]  # TokenPair
    folder: Path
    losses: dict[str, list[float]] = field(default_factory=dict)

    def run(self, arm: str, epochs: int) -> Callable[[], float]:
        """A training as pairs a second; the reference's own pass counts as time, not as pairs."""

        def one() -> float:
            engine = _engine(self.args)
            model, tokenizer = engine.release_for_training()
            steps = epochs * math.ceil(len(self.rows) / BATCH) or 2
            with tempfile.TemporaryDirectory(dir=self.folder) as place:
                started = time.perf_counter()
                trainer = _trainer(arm, model, tokenizer, self.rows, steps, Path(place))
                trainer.train()
                seconds = time.perf_counter() - started
            found = [row["loss"] for row in trainer.state.log_history if "loss" in row]
            if epochs and len(found) > len(self.losses.get(arm, [])):
                self.losses[arm] = found
            return epochs * len(self.rows) / seconds

        return one


def dpo(args: argparse.Namespace, say: Say) -> Report:
    """All figures of the suite; the flags of bench.py say of what."""
    engine = _engine(args)
    say(engine.first_line)
    choice = resolve_model(args.model, detect())
    with tempfile.TemporaryDirectory() as folder:
        pairs = _pairs(args, Path(folder), say)
        from cai_experiment.training.data import tokenize_pairs

        rows, _ = tokenize_pairs(pairs, engine.renderer, engine.renderer.max_length)
        work = Work(args, rows, Path(folder))
        shape = _shape(rows, args.seed)
        say(_in_words(shape))
        for arm in ARMS:
            work.run(arm, 0)()  # imports, threads, memory
        rounds = interleaved({f"{arm}_{n}": work.run(arm, n) for n in EPOCHS for arm in ARMS}, args.repeats, say)
    found = _speedups(rounds, shape, numbers_of(choice))
    found.append(_losses(work.losses))
    found.append(head_memory(args, say))
    return Report(found, setting_of(args, len(rows), engine.describe()) | {"pairs": shape})


def _engine(args: argparse.Namespace) -> Any:
    from cai_experiment.engines.load import LoadSettings, load_engine

    return load_engine(LoadSettings(model=args.model, engine="hf", seed=args.seed))


def _pairs(args: argparse.Namespace, folder: Path, say: Say) -> Sequence[Any]:
    """--pairs, else what generate_mvp.py makes."""
    from cai_experiment.scripts._bench_process import run_child
    from cai_experiment.training.data import read_pairs

    count = args.rows or PAIRS
    if args.pairs is None:
        say(f"making {count} pairs with generate_mvp.py")
        script = Path(__file__).with_name("generate_mvp.py")
        command = [sys.executable, str(script), "--count", str(count), "--run", "bench", "--data-dir", str(folder),
                   "--seed", str(args.seed), *(["--model", args.model] if args.model else [])]  # fmt: skip
        run_child(command, {}, "generate_mvp.py", 3600, fine=(0, 3))
    found = read_pairs(args.pairs or folder / "bench" / "pairs.jsonl")
    if len(found) < BATCH:
        raise BadInputError(f"{len(found)} pairs are too few to measure", f"give at least {BATCH}")
    return found[:count]


def _trainer(arm: str, model: Any, tokenizer: Any, rows: Sequence[Any], steps: int, folder: Path) -> Any:
    """An arm's trainer: ours by the project's own builder, TRL's DPOTrainer as its documentation has it."""
    if arm == "fast":
        from transformers import TrainerCallback

        from cai_experiment.training.fast_dpo import build_fast_trainer
        from cai_experiment.training.settings import DPOSettings

        settings = DPOSettings((), folder / "fast", steps=steps, learning_rate=LEARNING_RATE, effective_batch=BATCH)
        trainer: Any = build_fast_trainer(settings, rows, (), steps, model, tokenizer, TrainerCallback())
        trainer.check_start()
        trainer.args.save_strategy = "no"
        return trainer
    from cai_experiment.scripts._bench_trl import trl_trainer

    return trl_trainer(arm == "trl_best", model, tokenizer, rows, steps, folder)


# ---------------------------------------------------------------- figures


def _shape(rows: Sequence[Any], seed: int) -> dict[str, float]:
    """Mean lengths, tokens of an epoch as each arm computes them, the share of padding in batches in random order."""
    import random

    from cai_experiment.training.fast.packing import tree_of

    numbers = list(range(len(rows)))
    random.Random(seed).shuffle(numbers)
    padded = 0
    for start in range(0, len(numbers), BATCH):
        batch = [rows[n] for n in numbers[start : start + BATCH]]
        padded += 2 * len(batch) * max(row.length for row in batch)
    real = sum(2 * len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) for r in rows)
    trees = [tree_of(row) for row in rows]
    answers = sum(len(r.chosen_ids) + len(r.rejected_ids) for r in rows)
    return {
        "mean_prompt": sum(len(r.prompt_ids) for r in rows) / len(rows),
        "mean_answer": answers / 2 / len(rows),
        "mean_shared": sum(len(t.trunk) - t.prompt for t in trees) / len(rows),
        "tokens_padded": padded,
        "tokens_real": real,
        "tokens_packed": sum(t.tokens for t in trees),
        "targets": answers,
        "targets_packed": sum(len(t.trunk) - t.prompt + len(t.chosen) + len(t.rejected) for t in trees),
        "padding_share": 1 - real / padded,
    }


def _in_words(shape: dict[str, float]) -> str:
    return (
        f"mean tokens: prompt {shape['mean_prompt']:.1f}, answer {shape['mean_answer']:.1f}, of which both answers "
        f"share {shape['mean_shared']:.1f}; an epoch is {shape['tokens_real']:,} tokens, {shape['tokens_padded']:,} "
        f"padded ({shape['padding_share']:.0%} padding), {shape['tokens_packed']:,} packed"
    )


def _flops(numbers: Architecture, shape: dict[str, float], ours: bool, epochs: int) -> float:
    """Floating-point operations of a whole training, linear layers and head: its time at one and the same rate.

    A frozen layer is one product forward and one backward; the adapter three where it stands beside the layer, two
    where it is merged; the head two (ours keeps d log p / d h) or three (TRL's chunked one computes its logits again).
    The reference is one forward pass over all pairs, without the adapter.
    """
    from cai_experiment.models.memory import adapter_parameters

    tokens = shape["tokens_packed" if ours else "tokens_padded"]
    targets = shape["targets_packed" if ours else "targets"]
    body, adapter = 2 * numbers.linear_parameters, 2 * adapter_parameters(numbers)
    head = 2 * numbers.hidden * numbers.vocab
    step = tokens * (2 * body + (2 if ours else 3) * adapter) + targets * (2 if ours else 3) * head
    return epochs * step + tokens * body + targets * head


def _speedups(rounds: Rounds, shape: dict[str, float], numbers: Architecture) -> list[Figure]:
    """Ours over TRL at its best, and over its defaults, in one and in three epochs; the limit is the ratio of FLOPs."""
    speeds = medians(rounds)
    found = []
    for rival, suffix in (("trl_best", ""), ("trl_default", "_default")):
        for epochs in EPOCHS:
            arms = (f"fast_{epochs}", f"{rival}_{epochs}")
            limit = _flops(numbers, shape, False, epochs) / _flops(numbers, shape, True, epochs) if not suffix else None
            name = f"speedup_vs_trl_{epochs}_epoch{'s' if epochs > 1 else ''}{suffix}"
            found.append(
                Figure(name, speeds[arms[0]] / speeds[arms[1]], TARGETS[epochs], limit, {a: speeds[a] for a in arms},
                       rounds={arm: rounds[arm] for arm in arms})
            )  # fmt: skip
    return found


def _losses(losses: dict[str, list[float]]) -> Figure:
    """The largest difference between our loss and either of TRL's at any step of the longest run."""
    ours = losses["fast"]
    if any(len(other) != len(ours) for other in losses.values()):
        raise EngineError("the arms of the suite took different numbers of steps", "report this as a bug")
    apart = {arm: max(abs(a - b) for a, b in zip(ours, other, strict=True)) for arm, other in losses.items()}
    del apart["fast"]
    return Figure("max_loss_difference", max(apart.values()), 1e-4, 0.0, apart, at_most=True)
