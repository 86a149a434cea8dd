"""TRL's DPOTrainer as this project runs it: our token ids, our checkpoints, and checks in every batch.

TRL and PEFT are imported where they are used: on CUDA Unsloth replaces TRL's classes while it is being imported (by the
engine), so they must be looked up afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from cai_experiment.errors import EngineError
from cai_experiment.training.data import TokenPair
from cai_experiment.training.settings import MEASURED_PAIRS, DPOSettings, even_batch, pairs_at_once
from cai_experiment.training.trainer import Resumable, common_arguments, drop_adapter, named, with_adapter

if TYPE_CHECKING:
    from trl import DPOConfig

REFERENCE = "ref"  # TRL's name for a frozen copy of the adapter that training starts from


def build_trl_trainer(
    settings: DPOSettings,
    rows: Sequence[TokenPair],
    held_out: Sequence[TokenPair],
    total: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    watch: TrainerCallback,
) -> Any:
    """A DPOTrainer over token ids. A fresh adapter's reference is the model without it, another's a frozen copy."""
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    config = dpo_config(settings, len(rows), total, model)
    set_seed(settings.seed)  # the adapter's A is drawn at random
    adapted = with_adapter(settings, model)
    # TRL rounds the adapter of a 4-bit model to bf16, where an update of 5e-6 vanishes and a start adapter loses digits
    exact = {name: p.detach().float().clone() for name, p in adapted.named_parameters() if p.requires_grad}
    trainer_class = type("PairTrainer", (PairTrainerAdditions, DPOTrainer), {})
    trainer = trainer_class(
        model=adapted,
        args=config,
        data_collator=WholePairs(DataCollatorForPreference(pad_token_id=pad_id(tokenizer, rows), max_length=None)),
        train_dataset=_dataset(rows),
        processing_class=tokenizer,
        callbacks=[watch],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.pair_ids = [row.id for row in rows]
    trainer.held_out = _dataset(held_out) if held_out else None
    # TRL copies any adapter that it is given into a second one. A fresh adapter needs no copy: switched off, it is the
    # reference.
    if settings.start_adapter is None:
        drop_adapter(trainer.model, REFERENCE)
    for name, parameter in trainer.model.named_parameters():
        if name in exact:
            parameter.data = exact[name]
    return trainer


def _dataset(rows: Sequence[TokenPair]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [{"row": i, "prompt_ids": r.prompt_ids, "chosen_ids": r.chosen_ids, "rejected_ids": r.rejected_ids}
         for i, r in enumerate(rows)]
    )  # fmt: skip


def pad_id(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenPair]) -> int:
    """What fills a batch up, under mask 0: the pad token, or the end token that every answer ends in."""
    return rows[0].chosen_ids[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def dpo_config(settings: DPOSettings, pairs: int, total: int, model: PreTrainedModel) -> DPOConfig:
    """TRL's settings, every value that matters written out: Unsloth changes some of TRL's defaults."""
    from trl import DPOConfig

    device = next(model.parameters()).device.type
    at_once = pairs_at_once(settings, device)
    return DPOConfig(
        **common_arguments(settings, total, model),
        **loss_arguments(settings), max_length=None, disable_dropout=True,
        per_device_train_batch_size=at_once, per_device_eval_batch_size=even_batch(min(pairs, MEASURED_PAIRS), at_once),
        gradient_accumulation_steps=settings.effective_batch // at_once,
        gradient_checkpointing=device == "cuda", dataloader_pin_memory=device == "cuda",
    )  # fmt: skip


def loss_arguments(settings: DPOSettings) -> dict[str, Any]:
    """Beta, losses and their weights as TRL 1.14 names them; its "sft" is the NLL of chosen answers."""
    types, weights = [settings.loss], [1.0]
    if settings.nll_weight:
        types, weights = [*types, "sft"], [*weights, settings.nll_weight]
    return {"beta": settings.beta, "loss_type": types, "loss_weights": weights}


class WholePairs:
    """TRL's collator, plus which rows are in the batch; refuses a batch that lost a token to truncation."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]) -> None:
        self.collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask, completion_mask: (2 * pairs, tokens), chosen rows first; row: (pairs,)."""
        batch = self.collate(examples)
        answers = sum(len(example["chosen_ids"]) + len(example["rejected_ids"]) for example in examples)
        prompts = 2 * sum(len(example["prompt_ids"]) for example in examples)
        if int(batch["completion_mask"].sum()) != answers or int(batch["attention_mask"].sum()) != answers + prompts:
            raise EngineError("a pair was truncated on its way into the batch", "report this as a bug")
        return {**batch, "row": torch.tensor([example["row"] for example in examples])}


class PairTrainerAdditions(Resumable):
    """What is put before TRL's DPOTrainer (a mixin: the class behind it is looked up when a trainer is built)."""

    held_out: Any = None

    def measure(self, of_held_out: bool = False) -> dict[str, float]:
        """Means over the first training pairs, or the held-out ones, in TRL's own layout, no dropout."""
        dataset = self.held_out if of_held_out else self.train_dataset  # type: ignore[attr-defined]
        dataset = dataset.select(range(min(len(dataset), MEASURED_PAIRS)))
        args = self.args  # type: ignore[attr-defined]
        args.per_device_eval_batch_size = even_batch(len(dataset), args.per_device_train_batch_size)
        found = self.evaluate(dataset)  # type: ignore[attr-defined]
        return named(found, "eval_") | {"loss": found["eval_loss"]}

    def check_start(self) -> None:
        """Nothing beyond the margin of 0 that `dpo.train` asks for: policy and reference are computed alike."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows are token ids already; TRL would look for texts and add its own end tokens."""
        return dataset

    def _send_telemetry(self) -> None:
        """Nothing is reported home."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card in the checkpoint folder: it would be written in place."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """TRL's loss. A value that is not finite stops training before it can reach the weights."""
        inputs = dict(inputs)
        rows = inputs.pop("row").tolist()
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        loss = found[0] if return_outputs else found
        self.rows_of_step = rows if not model.training else [*getattr(self, "rows_of_step", []), *rows]
        if not torch.isfinite(loss.detach()).all():
            self.rows_of_step = rows
            raise self.not_finite("loss", loss.detach().mean().item())
        return found
