"""What every backend's trainer has in common: adapter, optimizer and schedule, checkpoints, the errors of a batch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from cai_experiment.engines.weights import keep_trainable
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.training import checkpoints, processes
from cai_experiment.training.backends import backend_of
from cai_experiment.training.settings import DPOSettings

if TYPE_CHECKING:
    from peft import PeftModel

ADAPTER = "default"
LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all linear layers


def with_adapter(settings: DPOSettings, model: PreTrainedModel) -> PeftModel:
    """`model` with a LoRA adapter on all linear layers: fresh, or with the weights of `settings.start_adapter`."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    adapted = _with_fresh_adapter(settings, model)
    if settings.start_adapter is not None:
        set_peft_model_state_dict(adapted, load_file(settings.start_adapter / "adapter_model.safetensors"))
    return adapted


def drop_adapter(model: PeftModel, name: str) -> None:
    """Delete an adapter if it is there."""
    if name in model.peft_config:
        model.delete_adapter(name)


def _with_fresh_adapter(settings: DPOSettings, model: PreTrainedModel) -> PeftModel:
    """Unsloth's own adapter where Unsloth loaded the model, else PEFT's; on every linear layer."""
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
        if backend_of(settings, model) != "fast":  # which keeps embeddings, norms and the residual stream in 16 bits
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


def computes_in_bfloat16(model: Any) -> bool:
    """True for a model in bfloat16. Of a quantised one its config says so: prepare_model_for_kbit_training casts
    embeddings and norms to float32, and with them what `model.dtype` says, for whatever is trained next."""
    quantised = getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    dtype = (getattr(model.config, "dtype", None) if quantised else None) or model.dtype
    return str(dtype).removeprefix("torch.") == "bfloat16"


def common_arguments(settings: DPOSettings, total: int, model: PreTrainedModel) -> dict[str, Any]:
    """The settings that every backend gives to Hugging Face's Trainer, those that matter written out.

    AdamW without weight decay, gradients clipped at norm 1, linear warm-up, then a cosine down to 0.
    """
    device = next(model.parameters()).device.type
    return dict(
        output_dir=str(settings.output_dir),
        learning_rate=settings.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=warmup_steps(settings, total),
        optim="adamw_torch_fused", weight_decay=0.0, max_grad_norm=1.0,
        max_steps=total, num_train_epochs=1,
        use_cpu=device == "cpu", bf16=device == "cuda" and computes_in_bfloat16(model), fp16=False,
        save_strategy="steps", save_steps=settings.save_every or max(1, min(25, total // 10)),
        logging_strategy="steps", logging_steps=1, logging_nan_inf_filter=False, report_to=settings.report_to,
        disable_tqdm=True, remove_unused_columns=False,
        seed=settings.seed, data_seed=settings.seed,
    )  # fmt: skip


def warmup_steps(settings: DPOSettings, total: int) -> int:
    """`warmup_share` of the steps, rounded down. The first warm-up step has learning rate 0, so one alone is none."""
    steps = int(settings.warmup_share * total)
    return steps if steps > 1 else 0


def refuse_sharded() -> None:
    """Raise BadInputError under FSDP, whose weights packed passes cannot read."""
    if processes.is_sharded():
        message = "--backend fast does not train sharded weights (FSDP)"
        raise BadInputError(message, "use accelerate/ddp.yaml: 32B in 4 bits fits one 80 GB card; or --backend trl")


def row_trainer(
    trainer_class: Any, settings: DPOSettings, rows: int, total: int, model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase, watch: TrainerCallback, **arguments: Any,
) -> Any:  # fmt: skip
    """A Trainer of ours over row numbers, its adapter in place: each process is told whole steps and takes its part."""
    config = TrainingArguments(
        **common_arguments(settings, total, model), **arguments,
        per_device_train_batch_size=settings.effective_batch,
        dataloader_pin_memory=False,  # a batch is a list of row numbers
        ddp_find_unused_parameters=False,
    )  # fmt: skip
    config._n_gpu = min(1, config.n_gpu)  # several GPUs in one process would be torch's DataParallel
    set_seed(settings.seed)  # the adapter's A is drawn at random
    trainer = trainer_class(
        model=with_adapter(settings, model), args=config, data_collator=_row_numbers,
        train_dataset=list(range(rows)), processing_class=tokenizer, callbacks=[watch],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def _row_numbers(rows: list[int]) -> dict[str, torch.Tensor]:
    return {"row": torch.tensor(rows)}


class Resumable:
    """Put before a Hugging Face Trainer: checkpoints that are whole or not there, and errors that name the pairs."""

    pair_ids: Sequence[str] = ()
    rows_of_step: list[int]
    margin_tolerance = 0.0  # of the margin before the first step
    keep = checkpoints.KEEP  # newest checkpoints
    _aside: Path | None = None

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
        adapters = len(getattr(model, "peft_config", (ADAPTER,)))  # the reference's copy is written too, then removed
        # float32: the adapters, and two moments of the trained one; the tokenizer
        checkpoints.check_space(folder, 4 * trained * (adapters + 2) + 2**25)
        self._aside = final.with_name(final.name + checkpoints.ASIDE)
        try:
            with checkpoints.disk_errors(final):
                super()._save_checkpoint(model, trial)  # type: ignore[misc]
                processes.wait()  # each has written its random state
                if not processes.is_first():
                    return
                # the reference's copy does not change; beside it Hugging Face's resume would not load the adapter
                shutil.rmtree(self._aside / final.name / "ref", ignore_errors=True)
                (self._aside / final.name / "training_args.bin").unlink()  # a pickle that nobody reads
                # Hugging Face names the best checkpoint by a path, which is this one's name aside, or moves with the
                # folder; best_global_step says it too
                self.state.best_model_checkpoint = None  # type: ignore[attr-defined]
                self.state.save_to_json(str(self._aside / final.name / "trainer_state.json"))  # type: ignore[attr-defined]
            checkpoints.publish(self._aside / final.name, final)
            os.rmdir(self._aside)
            checkpoints.keep_newest(folder, self.keep, self.state.best_global_step)  # type: ignore[attr-defined]
        finally:
            self._aside = None
            processes.wait()


def named(logs: dict[str, float], prefix: str = "") -> dict[str, float]:
    """TRL's metric names in the words of this project."""
    return {
        "margin": logs[f"{prefix}rewards/margins"],
        "accuracy": logs[f"{prefix}rewards/accuracies"],
        "chosen_reward": logs[f"{prefix}rewards/chosen"],
        "rejected_reward": logs[f"{prefix}rewards/rejected"],
        "chosen_logp": logs[f"{prefix}logps/chosen"],
        "rejected_logp": logs[f"{prefix}logps/rejected"],
    }
