"""SFT's trainer, one for all backends: answers' negative log-probability a token, inside Hugging Face's Trainer.

Backend `fast` scores rows in packed passes with the chunked head, as fast DPO does: a row is a pair whose two answers
are the same, so its tree is all trunk and nothing is computed twice. `trl` and `unsloth` call the model plainly; TRL's
own SFTTrainer would add nothing but a second way to build token ids and to save checkpoints. tests/test_sft.py holds
both to the formula.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from cai_experiment.training import processes
from cai_experiment.training.alarms import Alarms
from cai_experiment.training.data import TokenPair
from cai_experiment.training.fast.budget import Budget, budget_for, recompute
from cai_experiment.training.fast.packing import pack
from cai_experiment.training.fast.policy import Policy
from cai_experiment.training.fast.start_check import check_layout
from cai_experiment.training.fast_dpo import FastTrainer, PairSet
from cai_experiment.training.run import Training
from cai_experiment.training.settings import MEASURED_PAIRS, DPOSettings, pairs_at_once
from cai_experiment.training.trainer import computes_in_bfloat16, refuse_sharded, row_trainer
from cai_experiment.training.watch import Watch


class SFTTraining(Training):
    """A fine-tuning with the clock, the limits, the stop signals and the checkpoints of every training."""

    stage = "EPOCH-SFT"

    def measured_first(self, held_out: Sequence[TokenPair]) -> int:
        """Rows that are read before the first step."""
        return min(len(self.rows), MEASURED_PAIRS)

    def build(
        self, rows: Sequence[TokenPair], held_out: Sequence[TokenPair], model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Any:  # fmt: skip
        """SFT's trainer, its adapter in place."""
        self.alarms = SFTAlarms(self.settings)
        return build_sft_trainer(self.backend, self.settings, rows, self.total, model, tokenizer, SFTWatch(self))


def build_sft_trainer(
    backend: str, settings: DPOSettings, rows: Sequence[TokenPair], total: int, model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase, watch: Watch,
) -> SFTTrainer:  # fmt: skip
    """An SFTTrainer over token ids with a fresh adapter; packed passes for the backend "fast"."""
    packed = backend == "fast"
    if packed:
        refuse_sharded()
    again = next(model.parameters()).device.type == "cuda" and not packed  # packed passes do so where memory asks
    trainer: SFTTrainer = row_trainer(
        SFTTrainer, settings, len(rows), total, model, tokenizer, watch, gradient_checkpointing=again
    )
    trainer.begin_sft(settings, rows, packed)
    return trainer


class PlainPolicy:
    """The model as transformers, PEFT or Unsloth compute it: padded rows, all logits of an answer at once."""

    fill = 1

    def __init__(self, model: Any) -> None:
        self.model = model
        self.causal_lm = model.get_base_model()
        self.device = next(model.parameters()).device

    def autocast(self) -> torch.autocast:
        """bfloat16 for what may be computed in it, where the model is in bfloat16; nothing otherwise."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=computes_in_bfloat16(self.causal_lm))

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


class PlainRows(PairSet):
    """Rows for plain passes: a budget is a number of rows, and rows of like length share a pass."""

    def passes(self, numbers: Sequence[int], budget: int, least: int = 1) -> list[list[int]]:
        """`numbers` in passes of at most `budget` rows, and at least `least` passes where there are rows for them."""
        order = sorted(numbers, key=lambda n: (self.rows[n].length, n))
        size = max(1, min(budget, len(order) // least))
        return [order[start : start + size] for start in range(0, len(order), size)]


class SFTTrainer(FastTrainer):
    """Fast DPO's trainer with another loss; without `packed`, with plain passes over the model."""

    def begin_sft(self, settings: DPOSettings, rows: Sequence[TokenPair], packed: bool) -> None:
        """Take the rows and decide how large passes are. Call it before training, instead of `begin`."""
        self.settings, self.pair_ids, self.packed = settings, [row.id for row in rows], packed
        self.pairs = PairSet(rows) if packed else PlainRows(rows)
        self.policy: Any = Policy(self.model) if packed else PlainPolicy(self.model)
        self.tokens_seen, self.of_step = 0, []
        if packed:
            told = processes.of_all(budget_for(self.policy.causal_lm, self.pairs.longest, settings.token_budget))
            self.budget = Budget(min(b.tokens for b in told), max(b.recomputed_layers for b in told))
            recompute(self.policy.causal_lm, self.budget.recomputed_layers)
        else:
            self.budget = Budget(pairs_at_once(settings, self.policy.device.type), 0)

    def _loss(self, part: Sequence[int], pairs: int, chosen_tokens: int) -> torch.Tensor:
        """A pass's share of the mean over the step's answer tokens."""
        if not part:  # in step with the other processes, which have a pass more
            return 0.0 * self._row_logps(self.rows_of_step[:1]).sum()
        loss = -self._row_logps(part).sum() / chosen_tokens
        return loss * self.accelerator.num_processes  # whose gradients are averaged, and shares are to be added

    def _row_logps(self, part: Sequence[int]) -> torch.Tensor:
        """(n,): sums over each answer's tokens, nats."""
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
        with self.policy.ready(), self.policy.autocast():
            passes = self.pairs.passes(numbers, self.budget.tokens)
            logps = sum(self._row_logps(part).double().sum().item() for part in passes)
        return {"loss": -logps / sum(len(self.pairs.rows[n].chosen_ids) for n in numbers)}

    def check_start(self) -> None:
        """Raise EngineError if a packed pass scores the two shortest rows otherwise than a plain one."""
        if not self.packed:
            return
        numbers = sorted(range(len(self.pairs.rows)), key=lambda n: self.pairs.costs[n])[:2]
        self.policy.model.eval()
        with torch.no_grad(), self.policy.autocast():
            check_layout(self, [self.pairs.rows[n] for n in numbers])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hugging Face's log, with the tokens so far; fast DPO has counted both sides of a row."""
        if "loss" in logs:
            logs["num_tokens"] = self.tokens_seen / 2
        Trainer.log(self, logs, start_time)


class SFTAlarms(Alarms):
    """Of DPO's alarms the one that SFT can raise."""

    def due(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Whether the text of sample answers collapses."""
        return {"collapsed": self.collapsed(row)}


class SFTWatch(Watch):
    """As in every training, with SFT's metrics, which are the loss alone."""

    def metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """None: there are no pairs."""
        return {}

    def words(self, row: dict[str, float]) -> str:
        """What a line says of a step."""
        return f"SFT step {row['step']}/{self.training.total}  loss {row['loss']:.4f}"
