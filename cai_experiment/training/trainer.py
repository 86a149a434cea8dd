"""TRL's DPOTrainer as this project runs it: our token ids, our checkpoints, and checks in every batch.

TRL and PEFT are imported where they are used: on CUDA Unsloth replaces TRL's classes while it is being imported (by the
engine), so they must be looked up afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback

from cai_experiment.engines.weights import keep_trainable
from cai_experiment.errors import EngineError
from cai_experiment.training import checkpoints
from cai_experiment.training.data import TokenPair
from cai_experiment.training.settings import MEASURED_PAIRS, DPOSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from trl import DPOConfig

LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all linear layers


def build_trainer(
    settings: DPOSettings,
    rows: Sequence[TokenPair],
    total: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    watch: TrainerCallback,
) -> Any:
    """A DPOTrainer over token ids, with a fresh float32 LoRA adapter whose reference is the model without it."""
    from datasets import Dataset
    from trl import DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    config = dpo_config(settings, len(rows), total, model)
    set_seed(settings.seed)  # the adapter's A is drawn at random
    adapted = with_adapter(settings, model)
    trainer_class = type("PairTrainer", (PairTrainerAdditions, DPOTrainer), {})
    trainer = trainer_class(
        model=adapted,
        args=config,
        data_collator=WholePairs(DataCollatorForPreference(pad_token_id=pad_id(tokenizer, rows), max_length=None)),
        train_dataset=Dataset.from_list(
            [{"row": i, "prompt_ids": r.prompt_ids, "chosen_ids": r.chosen_ids, "rejected_ids": r.rejected_ids}
             for i, r in enumerate(rows)]
        ),
        processing_class=tokenizer,
        callbacks=[watch],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    trainer.pair_ids = [row.id for row in rows]
    # TRL copies any adapter that it is given into a second one, "ref". A fresh adapter needs no copy (switched off,
    # it is the reference), and with the copy there Hugging Face's resume would load the copy and not the adapter.
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL casts them to bf16 with 4-bit models, where an update of 5e-6 rounds away
            parameter.data = parameter.data.to(torch.float32)
    return trainer


def pad_id(tokenizer: PreTrainedTokenizerBase, rows: Sequence[TokenPair]) -> int:
    """What fills a batch up, under mask 0: the pad token, or the end token that every answer ends in."""
    return rows[0].chosen_ids[-1] if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def with_adapter(settings: DPOSettings, model: PreTrainedModel) -> PeftModel:
    """`model` with a fresh LoRA adapter on all linear layers: Unsloth's own where Unsloth loaded it, else PEFT's."""
    if hasattr(model, "peft_config"):
        raise EngineError("the model has an adapter already", "train from the plain model")
    if hasattr(model, "for_training"):  # only models that Unsloth loaded have it
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            model, r=settings.lora_r, target_modules=LORA_LAYERS, lora_alpha=settings.lora_alpha, lora_dropout=0.0,
            bias="none", use_gradient_checkpointing="unsloth", random_state=settings.seed,
            max_seq_length=settings.max_length,
        )  # fmt: skip
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    targets = adapted_layers(model)
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        keep_trainable(model)
        # the trainer switches gradient checkpointing on, with the arguments that it wants
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules=targets, lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, lora)


def adapted_layers(model: PreTrainedModel) -> list[str] | str:
    """LORA_LAYERS where the model has them all, else every linear layer but the head: fused ones have other names."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return LORA_LAYERS if names.issuperset(LORA_LAYERS) else "all-linear"


def dpo_config(settings: DPOSettings, pairs: int, total: int, model: PreTrainedModel) -> DPOConfig:
    """TRL's settings, every value that matters written out: Unsloth changes some of TRL's defaults.

    AdamW without weight decay, gradients clipped at norm 1, linear warm-up, then a cosine down to 0.
    """
    from trl import DPOConfig

    device = next(model.parameters()).device.type
    at_once = pairs_at_once(settings, device)
    return DPOConfig(
        output_dir=str(settings.output_dir),
        beta=settings.beta, loss_type=["sigmoid"], max_length=None, disable_dropout=True,
        learning_rate=settings.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=warmup_steps(settings, total),
        optim="adamw_torch", weight_decay=0.0, max_grad_norm=1.0,
        per_device_train_batch_size=at_once, per_device_eval_batch_size=even_batch(min(pairs, MEASURED_PAIRS), at_once),
        gradient_accumulation_steps=settings.effective_batch // at_once,
        max_steps=total, num_train_epochs=1,
        use_cpu=device == "cpu", bf16=device == "cuda" and model.dtype == torch.bfloat16, fp16=False,
        gradient_checkpointing=device == "cuda",
        save_strategy="steps", save_steps=settings.save_every or max(1, min(25, total // 10)),
        logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False, report_to=settings.report_to,
        disable_tqdm=True, remove_unused_columns=False, dataloader_pin_memory=device == "cuda",
        seed=settings.seed, data_seed=settings.seed,
    )  # fmt: skip


def pairs_at_once(settings: DPOSettings, device: str) -> int:
    """Pairs a forward pass, on "cpu" or "cuda"."""
    return settings.batch_size or (even_batch(settings.effective_batch, 8) if device == "cpu" else 1)


def warmup_steps(settings: DPOSettings, total: int) -> int:
    """`warmup_share` of the steps, rounded down. The first warm-up step has learning rate 0, so one alone is none."""
    steps = int(settings.warmup_share * total)
    return steps if steps > 1 else 0


def even_batch(pairs: int, most: int) -> int:
    """The largest batch of at most `most` that divides `pairs`: TRL averages an evaluation over its batches."""
    return max(size for size in range(1, most + 1) if pairs % size == 0)


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


class PairTrainerAdditions:
    """What is put before TRL's DPOTrainer (a mixin: the class behind it is looked up when a trainer is built)."""

    pair_ids: Sequence[str] = ()
    rows_of_step: list[int]
    _aside: Path | None = None

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

    def not_finite(self, what: str, value: float) -> EngineError:
        """The error that names the pairs of the current batch."""
        ids = ", ".join(self.pair_ids[row] for row in self.rows_of_step)
        step = self.state.global_step  # type: ignore[attr-defined]
        message = f"the {what} is {value} after step {step}, with the pairs {ids}"
        return EngineError(message, "look at these pairs, or lower --learning-rate (older checkpoints are whole)")

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._aside or self.args.output_dir)  # type: ignore[attr-defined]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write adapter, optimizer, schedule, RNG and trainer state aside, then publish them in one rename."""
        folder = Path(self.args.output_dir)  # type: ignore[attr-defined]
        final = folder / f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        checkpoints.check_space(folder, 3 * 4 * trained + 2**25)  # float32 weights and two moments; tokenizer
        self._aside = final.with_name(final.name + checkpoints.ASIDE)
        try:
            with checkpoints.disk_errors(final):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                (self._aside / final.name / "training_args.bin").unlink()  # a pickle that nobody reads
            checkpoints.publish(self._aside / final.name, final)
            os.rmdir(self._aside)
        finally:
            self._aside = None
        checkpoints.keep_newest(folder)
