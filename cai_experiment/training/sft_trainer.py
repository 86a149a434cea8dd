"""SFT's trainer, one for all backends: answers' negative log-probability a token, inside Hugging Face's Trainer.

Backend `fast` scores rows in packed passes with the chunked head, as fast DPO does: a row is a pair whose two answers
are the same, so its tree is all trunk and nothing is computed twice. `trl` and `unsloth` call the model plainly; TRL's
own SFTTrainer would add nothing but a second way to build token ids and to save checkpoints. tests/test_sft.py holds
both to the formula.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from cai_experiment.errors import BadInputError
from cai_experiment.training.budget import budget_for, recompute
from cai_experiment.training.data import TokenPair
from cai_experiment.training.fast_dpo import FastTrainer, PairSet
from cai_experiment.training.packing import pack
from cai_experiment.training.policy import Policy
from cai_experiment.training.run import Training, Watch
from cai_experiment.training.settings import MEASURED_PAIRS, DPOSettings, pairs_at_once
from cai_experiment.training.start_check import check_layout
from cai_experiment.training.trainer import common_arguments, with_adapter


class SFTTraining(Training):
    """A fine-tuning with the clock, the limits, the stop signals and the checkpoints of every training."""

    def build(
        self, rows: Sequence[TokenPair], held_out: Sequence[TokenPair], model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Any:  # fmt: skip
        """SFT's trainer, its adapter in place."""
        return build_sft_trainer(self.backend, self.settings, rows, self.total, model, tokenizer, SFTWatch(self))


def build_sft_trainer(
    backend: str, settings: DPOSettings, rows: Sequence[TokenPair], total: int, model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase, watch: Watch,
) -> SFTTrainer:  # fmt: skip
    """An SFTTrainer over token ids with a fresh adapter; packed passes for the backend "fast"."""
    import os

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.effective_batch % processes:
        message = f"--effective-batch {settings.effective_batch} rows do not divide among {processes} processes"
        raise BadInputError(message, f"use a multiple of {processes}")
    packed, device = backend == "fast", next(model.parameters()).device.type
    config = TrainingArguments(
        **common_arguments(settings, total, model),
        per_device_train_batch_size=settings.effective_batch // processes,
        gradient_checkpointing=device == "cuda" and not packed,  # packed passes recompute where memory asks
        dataloader_pin_memory=False,  # a batch is a list of row numbers
    )
    set_seed(settings.seed)  # the adapter's A is drawn at random
    trainer = SFTTrainer(
        model=with_adapter(settings, model), args=config, data_collator=_row_numbers,
        train_dataset=list(range(len(rows))), processing_class=tokenizer, callbacks=[watch],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.begin_sft(settings, rows, packed)
    return trainer


def _row_numbers(rows: list[int]) -> dict[str, torch.Tensor]:
    return {"row": torch.tensor(rows)}


class PlainPolicy:
    """The model as transformers, PEFT or Unsloth compute it: padded rows, all logits of an answer at once."""

    fill = 1

    def __init__(self, model: Any) -> None:
        self.model = model
        self.causal_lm = model.get_base_model()
        self.device = next(model.parameters()).device

    def autocast(self) -> torch.autocast:
        """bfloat16 for what may be computed in it, where the model is in bfloat16; nothing otherwise."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.causal_lm.dtype == torch.bfloat16)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Nothing to prepare."""
        yield

    def row_logps(self, rows: Sequence[TokenPair]) -> torch.Tensor:
        """(n,) float32: sums over each answer's tokens, nats. Padded on the right, where a causal model never looks."""
        ids = torch.zeros(len(rows), max(row.length for row in rows), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            ids[number, : row.length] = torch.tensor([*row.prompt_ids, *row.chosen_ids])
            mask[number, : row.length] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        sums = []
        for number, row in enumerate(rows):
            start = len(row.prompt_ids)
            logps = logits[number, start - 1 : row.length - 1].float().log_softmax(-1)
            sums.append(logps.gather(1, ids[number, start : row.length, None]).sum())
        return torch.stack(sums)


class SFTTrainer(FastTrainer):
    """Fast DPO's trainer with another loss; without `packed`, with plain passes over the model."""

    def begin_sft(self, settings: DPOSettings, rows: Sequence[TokenPair], packed: bool) -> None:
        """Take the rows and decide how large passes are. Call it before training, instead of `begin`."""
        self.settings, self.pair_ids, self.packed = settings, [row.id for row in rows], packed
        self.pairs = PairSet(rows)
        self.policy: Any = Policy(self.model) if packed else PlainPolicy(self.model)
        self.at_once = pairs_at_once(settings, self.policy.device.type)
        self.tokens_seen, self.of_step = 0, []
        self.row_tokens, self.step_tokens = 0.0, 1.0
        if packed:
            self.budget = budget_for(self.policy.causal_lm, self.pairs.longest, settings.token_budget)
            recompute(self.policy.causal_lm, self.budget.recomputed_layers)

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The step's loss, a mean over the answer tokens of all processes (which average their gradients)."""
        rows = inputs["row"].tolist()
        tokens = [[self._answer_tokens(rows), sum(self.pairs.rows[n].length for n in rows)]]
        everywhere = self.accelerator.gather(torch.tensor(tokens, device=self.args.device)).float()
        self.step_tokens = everywhere[:, 0].mean().item()
        self.row_tokens += everywhere[:, 1].sum().item()
        return super().training_step(model, inputs, num_items_in_batch)

    def _answer_tokens(self, numbers: Sequence[int]) -> int:
        return sum(len(self.pairs.rows[n].chosen_ids) for n in numbers)

    def _equally_many(self, rows: Sequence[int]) -> list[list[int]]:
        return super()._equally_many(rows) if self.packed else self._by_length(rows)

    def _by_length(self, numbers: Sequence[int]) -> list[list[int]]:
        """Plain passes: rows of like length share one."""
        order = sorted(numbers, key=lambda n: (self.pairs.rows[n].length, n))
        return [order[start : start + self.at_once] for start in range(0, len(order), self.at_once)]

    def _loss(self, part: Sequence[int], pairs: int, chosen_tokens: int) -> torch.Tensor:
        """A pass's share of the step's mean."""
        return -self._row_logps(part).sum() / self.step_tokens

    def _row_logps(self, part: Sequence[int]) -> torch.Tensor:
        if not self.packed:
            logps: torch.Tensor = self.policy.row_logps([self.pairs.rows[n] for n in part])
            return logps
        trees = [self.pairs.trees[n] for n in part]
        packed: torch.Tensor = self.policy.answer_logps(pack(trees, self.policy.fill).to(self.args.device))[0]
        return packed

    @torch.no_grad()
    def measure(self, of_held_out: bool = False) -> dict[str, float]:
        """{"loss": nats a token} over the first rows, no dropout."""
        self.policy.model.eval()
        numbers = range(min(len(self.pairs.rows), MEASURED_PAIRS))
        passes = self.pairs.passes(numbers, self.budget.tokens) if self.packed else self._by_length(numbers)
        with self.policy.ready(), self.policy.autocast():
            logps = sum(self._row_logps(part).double().sum().item() for part in passes)
        return {"loss": -logps / self._answer_tokens(numbers)}

    def check_start(self) -> None:
        """Raise EngineError if a packed pass scores the two shortest rows otherwise than a plain one."""
        if not self.packed:
            return
        numbers = sorted(range(len(self.pairs.rows)), key=lambda n: self.pairs.costs[n])[:2]
        self.policy.model.eval()
        with torch.no_grad(), self.policy.autocast():
            check_layout(self, [self.pairs.rows[n] for n in numbers])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hugging Face's log, with the tokens so far."""
        if "loss" in logs:
            logs["num_tokens"] = self.row_tokens
        Trainer.log(self, logs, start_time)


class SFTWatch(Watch):
    """As in every training, with SFT's metrics: a line of metrics.jsonl a step, a word for every tenth of the run."""

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Hugging Face calls it after every step."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:  # the summary at the end
            return
        training = self.training
        if not math.isfinite(logs["grad_norm"]):
            raise training.trainer.not_finite("gradient", logs["grad_norm"])
        row = {
            "step": state.global_step,
            "loss": logs["loss"],
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens": int(logs["num_tokens"] - self.tokens_before),
            "seconds": round(time.monotonic() - self.step_started, 3),
        }
        self.tokens_before = logs["num_tokens"]
        training.metrics.append(row)
        if row["step"] % max(1, training.total // 10) and row["step"] != training.total:
            return
        spent = (time.monotonic() - training.started) / 3600
        speed = row["tokens"] / max(row["seconds"], 1e-3)
        training.say(
            f"SFT step {row['step']}/{training.total}  loss {row['loss']:.4f}  {speed:,.0f} tokens/s  "
            f"{(training.total - row['step']) * row['seconds'] / 60:.0f} min left  "
            f"${spent * training.settings.price_per_hour:.2f}"
        )
