"""TRL's arms of the suite dpo: its defaults, and the fastest that its own settings make of it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cai_experiment.training.trainer import LORA_LAYERS


def trl_trainer(best: bool, model: Any, tokenizer: Any, rows: Sequence[Any], steps: int, folder: Path) -> Any:
    """A DPOTrainer over token ids with a fresh LoRA adapter.

    `best`: the reference computed beforehand, and the chunked head of answer tokens (`use_liger_kernel`). In TRL 1.14
    that head is TRL's own; the package liger-kernel is only looked for, and its Triton kernels, which need a GPU, would
    replace layers of the model. So on a CPU the search is answered and the replacement left out.
    """
    import torch
    import transformers.trainer
    import trl.trainer.dpo_trainer as module
    from datasets import Dataset
    from peft import LoraConfig
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    if best and not torch.cuda.is_available():
        module.is_liger_kernel_available = lambda *args, **kwargs: True
        transformers.trainer.apply_liger_kernel = lambda *args, **kwargs: None

    class Trainer(DPOTrainer):
        """Takes rows that are token ids already."""

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _send_telemetry(self) -> None:
            """Nothing is reported home."""

    config = DPOConfig(
        output_dir=str(folder / "trl"), beta=0.1, loss_type=["sigmoid"], max_length=None, learning_rate=1e-4,
        lr_scheduler_type="cosine", warmup_steps=warmup(steps), optim="adamw_torch_fused", weight_decay=0.0,
        max_grad_norm=1.0, max_steps=steps, per_device_train_batch_size=8, use_cpu=not torch.cuda.is_available(),
        bf16=False, gradient_checkpointing=False, save_strategy="no", logging_steps=1, report_to="none",
        disable_tqdm=True, precompute_ref_log_probs=best, use_liger_kernel=best, dataloader_pin_memory=False,
        seed=0, data_seed=0,
    )  # fmt: skip
    torch.manual_seed(0)
    lora = LoraConfig(r=32, lora_alpha=64, target_modules=LORA_LAYERS, lora_dropout=0.0, bias="none",
                      task_type="CAUSAL_LM")  # fmt: skip
    fields = ("prompt_ids", "chosen_ids", "rejected_ids")
    data = Dataset.from_list([{name: getattr(row, name) for name in fields} for row in rows])
    data._fingerprint = uuid.uuid4().hex  # or a second run would read the first one's reference from datasets' cache
    trainer = Trainer(model=model, args=config, train_dataset=data, processing_class=tokenizer, peft_config=lora)
    trainer.remove_callback(PrinterCallback)
    return trainer


def warmup(steps: int) -> int:
    """As in training/trainer.py's `warmup_steps` at its default share."""
    found = int(0.1 * steps)
    return found if found > 1 else 0
