"""The project's own DPO step inside Hugging Face's Trainer: the same maths as TRL's, with far less to compute.

A step takes its pairs as packed passes (`packing.py`): what both answers begin with is computed once, nothing is padded
and passes are filled up to a budget of tokens (`budget.py`). Attention knows who belongs to whom (`attention.py`),
the head sees answer tokens alone, chunk by chunk (`head.py`), LoRA layers, norms and the last layer compute and keep no
more than they must (`lora.py`, `blocks.py`, `last_layer.py`), and the reference's log-probabilities are computed once,
before training (`reference.py`). tests/test_fast_dpo.py holds loss, margins, gradients and twenty steps to TRL's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback

from cai_experiment.training import processes
from cai_experiment.training.data import TokenPair
from cai_experiment.training.fast.budget import Budget, budget_for, recompute
from cai_experiment.training.fast.packing import into_passes, pack, tree_of
from cai_experiment.training.fast.policy import Policy
from cai_experiment.training.fast.reference import FOLDER, Reference, reference_key
from cai_experiment.training.fast.start_check import check_kind, check_start
from cai_experiment.training.losses import TRUNK_CANCELS, Scores, preference_loss
from cai_experiment.training.settings import MEASURED_PAIRS, DPOSettings, adapter_sha256
from cai_experiment.training.trainer import Resumable, named, refuse_sharded, row_trainer


def build_fast_trainer(
    settings: DPOSettings,
    rows: Sequence[TokenPair],
    held_out: Sequence[TokenPair],
    total: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    watch: TrainerCallback,
) -> FastTrainer:
    """A FastTrainer over token ids; the adapter is fresh, or starts with the weights of `settings.start_adapter`."""
    refuse_sharded()
    trainer: FastTrainer = row_trainer(FastTrainer, settings, len(rows), total, model, tokenizer, watch)
    trainer.begin(settings, rows, held_out)
    return trainer


class PairSet:
    """Token pairs as trees, with the reference's log-probabilities (n, 2) once they are known."""

    def __init__(self, rows: Sequence[TokenPair]) -> None:
        self.rows = rows
        self.trees = [tree_of(row) for row in rows]
        self.costs = [tree.tokens for tree in self.trees]
        self.reference = torch.empty(0, 2)

    def passes(self, numbers: Sequence[int], budget: int, least: int = 1) -> list[list[int]]:
        """`numbers` in passes of at most `budget` tokens, the shortest first in each: attention groups neighbours."""
        found = into_passes([self.costs[n] for n in numbers], budget, least)
        return [sorted((numbers[i] for i in part), key=lambda n: (self.costs[n], n)) for part in found]

    @property
    def longest(self) -> int:
        """Tokens of the longest pair."""
        return max(self.costs, default=0)


class FastTrainer(Resumable, Trainer):
    """Hugging Face's Trainer with the step described above. `begin` must be called before training."""

    def begin(self, settings: DPOSettings, rows: Sequence[TokenPair], held_out: Sequence[TokenPair]) -> None:
        """Take the pairs, decide how large passes are, and get the reference's log-probabilities."""
        self.settings, self.pair_ids = settings, [row.id for row in rows]
        self.pairs, self.held_out = PairSet(rows), PairSet(held_out)
        self.policy = Policy(self.model)
        check_kind(self.policy.causal_lm)
        longest = max(self.pairs.longest, self.held_out.longest)
        self.budget = budget_for(self.policy.causal_lm, longest, settings.token_budget)
        told = processes.of_all(self.budget)  # free memory may differ, the number of passes must not
        self.budget = Budget(min(b.tokens for b in told), max(b.recomputed_layers for b in told))
        recompute(self.policy.causal_lm, self.budget.recomputed_layers)
        self.tokens_seen = 0
        self.of_step: list[torch.Tensor] = []  # (4, n) of each pass: see _remember
        adapter = "" if settings.start_adapter is None else adapter_sha256(settings.start_adapter)
        folder = settings.output_dir.parent / FOLDER
        self.reference = Reference(self.policy, folder, fresh=settings.start_adapter is None)
        started = time.perf_counter()
        for pairs in (self.pairs, self.held_out):
            if pairs.rows:
                key = settings.base and reference_key(settings.base, adapter, pairs.rows, self.policy.arithmetic)
                pairs.reference = self.reference.of(pairs, self._measured_passes(pairs), key)
        self.reference_seconds = time.perf_counter() - started

    # ------------------------------------------------------------ a step

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """The loss of this process's share of the step, with its gradients; pass by pass."""
        model.train()
        rows = self.rows_of_step = inputs["row"].tolist()
        passes = self._mine(rows)
        chosen_tokens = sum(len(self.pairs.rows[row].chosen_ids) for row in rows)
        whole = torch.zeros((), device=self.args.device)
        with self.policy.ready():
            for number, part in enumerate(passes):
                last = number == len(passes) - 1
                with nullcontext() if last else self.accelerator.no_sync(model):
                    loss = self._within(model, partial(self._loss, part, len(rows), chosen_tokens))
                    if not torch.isfinite(loss.detach()):
                        self.rows_of_step = part
                        raise self.not_finite("loss", loss.item())
                    self.accelerator.backward(loss)
                whole += loss.detach()
        self.tokens_seen += sum(_row_tokens(self.pairs.rows[row]) for row in rows)
        return whole

    def get_train_dataloader(self) -> Any:
        """Every process gets the row numbers of whole steps: accelerate would deal out rows without their lengths.

        (Hugging Face's Trainer does the same for samplers that know of the processes.)
        """
        loader = super().get_train_dataloader()
        shard: Any = getattr(loader, "batch_sampler", None)
        if hasattr(shard, "num_processes"):
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def _mine(self, rows: Sequence[int]) -> list[list[int]]:
        """This process's passes of a step: as many as every other's, of like lengths, some empty if rows are few."""
        world, budget = self.accelerator.num_processes, self.budget.tokens
        passes = self.pairs.passes(rows, budget)
        if world == 1:
            return passes
        passes = self.pairs.passes(rows, budget, least=-(-len(passes) // world) * world)
        passes.sort(key=lambda part: sum(self.pairs.costs[row] for row in part), reverse=True)
        each = -(-len(passes) // world)
        mine = passes[self.accelerator.process_index :: world]
        return mine + [[]] * (each - len(mine))

    def _within(self, model: Any, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """`compute` inside the forward of what accelerate wraps around the model: it gathers and reduces there."""
        inner = self.policy.model
        if model is inner:
            with self.policy.autocast():
                return compute()
        before = inner.__dict__.get("forward")

        def instead(*args: Any, **kwargs: Any) -> torch.Tensor:
            if before is None:
                del inner.forward
            else:
                inner.forward = before
            with self.policy.autocast():
                return compute()

        inner.forward = instead
        return model()

    def _loss(self, part: Sequence[int], pairs: int, chosen_tokens: int) -> torch.Tensor:
        """A pass's share of the mean loss over `pairs` pairs (and of the NLL's mean over `chosen_tokens` tokens)."""
        if not part:  # in step with the other processes, which have a pass more
            return 0.0 * self._scores(self.pairs, self.rows_of_step[:1]).chosen.sum()
        settings = self.settings
        trunk_cancels = not settings.nll_weight and settings.loss in TRUNK_CANCELS
        scores = self._scores(self.pairs, part, trunk_cancels)
        loss = preference_loss(settings.loss, settings.beta, scores).sum() / pairs
        if settings.nll_weight:
            loss = loss - settings.nll_weight * scores.chosen.sum() / chosen_tokens
        self._remember(scores)
        return loss * self.accelerator.num_processes  # whose gradients are averaged, and shares are to be added

    def _scores(self, pairs: PairSet, part: Sequence[int], trunk_cancels: bool = False) -> Scores:
        packed = pack([pairs.trees[row] for row in part], self.policy.fill).to(self.args.device)
        chosen, rejected = self.policy.answer_logps(packed, trunk_cancels)
        reference = pairs.reference[list(part)].to(self.args.device)
        return Scores(chosen, rejected, reference[:, 0], reference[:, 1], packed.chosen_tokens, packed.rejected_tokens)

    # ------------------------------------------------------------ what is said of it

    def _remember(self, scores: Scores) -> None:
        self.of_step.append(torch.stack([s.detach() for s in scores[:4]]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Hugging Face's log, with the step's metrics under TRL's names."""
        if "loss" in logs:
            mine = torch.cat(self.of_step, 1).cpu() if self.of_step else torch.empty(4, 0)
            scores = torch.cat(processes.of_all(mine), 1)
            logs |= _metrics(scores, self.settings.beta) | {"num_tokens": self.tokens_seen}
            self.of_step = []
        super().log(logs, start_time)

    @torch.no_grad()
    def measure(self, of_held_out: bool = False) -> dict[str, float]:
        """Means over the first training pairs, or the held-out ones: loss, margin, accuracy, log-probabilities."""
        pairs = self.held_out if of_held_out else self.pairs
        self.policy.model.eval()
        found: list[Scores] = []
        with self.policy.ready(), self.policy.autocast():
            found = [self._scores(pairs, part) for part in self._measured_passes(pairs)[0]]
        whole = Scores(*(torch.cat(parts) for parts in zip(*found, strict=True)))
        loss = preference_loss(self.settings.loss, self.settings.beta, whole).mean()
        if self.settings.nll_weight:
            loss -= self.settings.nll_weight * whole.chosen.sum() / whole.chosen_tokens.sum()
        return {"loss": loss.item(), **named(_metrics(torch.stack(whole[:4]), self.settings.beta))}

    def _measured_passes(self, pairs: PairSet) -> tuple[list[list[int]], list[list[int]]]:
        """(passes over the measured pairs, passes over the rest): the reference is computed in the very same."""
        first = min(len(pairs.rows), MEASURED_PAIRS)
        return (
            pairs.passes(range(first), self.budget.tokens),
            pairs.passes(range(first, len(pairs.rows)), self.budget.tokens),
        )

    def check_start(self) -> None:
        """Raise EngineError unless packed passes score as the plain model does and the reference is what it must be."""
        self.margin_tolerance = check_start(self)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not counted: a batch is row numbers."""
        return 0


def _row_tokens(row: TokenPair) -> int:
    return 2 * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids)


def _metrics(scores: torch.Tensor, beta: float) -> dict[str, float]:
    """TRL's names. `scores` (4, n): chosen, rejected, the reference's two; rewards: beta times the log-ratio to it."""
    chosen, rejected = beta * (scores[0] - scores[2]), beta * (scores[1] - scores[3])
    return {
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margins": (chosen - rejected).mean().item(),
        "rewards/accuracies": (chosen > rejected).double().mean().item(),
        "logps/chosen": scores[0].mean().item(),
        "logps/rejected": scores[1].mean().item(),
    }
