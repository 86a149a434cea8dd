"""TRL's DPOTrainer as this project runs it: our token ids, our checkpoints, our metrics, and checks at every step.

`Training` is the only name that others use. TRL and PEFT are imported where they are used: on CUDA Unsloth replaces
TRL's classes while it is being imported (by the engine), so they must be looked up afterwards.
"""

from __future__ import annotations

import gc
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from cai_experiment.errors import EXIT_CTRL_C, EXIT_HANGUP, EXIT_TERMINATED, BadInputError, EngineError
from cai_experiment.records.files import write_jsonl
from cai_experiment.records.store import Journal
from cai_experiment.training import checkpoints
from cai_experiment.training.data import TokenPair
from cai_experiment.training.dpo import MEASURED_PAIRS, METRICS, DPOSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from trl import DPOConfig

LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # all linear layers
ALARM_STEPS, ALARM_NATS = 10, 1.0  # alarm if the chosen answers lost more than this over so many steps
SIGNALS = {signal.SIGINT: EXIT_CTRL_C, signal.SIGTERM: EXIT_TERMINATED, signal.SIGHUP: EXIT_HANGUP}


class Training:
    """One training: trainer, adapter and clock. `signal` is the exit code of a stop signal, once one has come."""

    def __init__(
        self,
        settings: DPOSettings,
        rows: Sequence[TokenPair],
        total: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.total, self.say = settings, total, say
        self.signal: int | None = None
        self.alarms: list[str] = []
        self.started = time.monotonic()
        self.metrics = Journal(settings.output_dir / METRICS)
        self.trainer = build_trainer(settings, rows, total, model, tokenizer, Watch(self))

    @property
    def step(self) -> int:
        """Optimizer steps done, those before a resume included."""
        return self.trainer.state.global_step

    def measure(self) -> dict[str, float]:
        """Mean loss, margin, accuracy and log-probabilities over the first pairs, in TRL's own layout, no dropout."""
        dataset = self.trainer.train_dataset
        found = self.trainer.evaluate(dataset.select(range(min(len(dataset), MEASURED_PAIRS))))
        return {"loss": found["eval_loss"], **_named(found, "eval_")}

    def run(self, start: Path | None) -> str:
        """Train from the beginning or from the checkpoint `start`; "" or the limit that stopped it early.

        A stop signal ends the current step, writes its checkpoint and sets `signal`.
        """
        done = checkpoints.step_of(start) if start else 0
        checkpoints.set_aside_newer(self.settings.output_dir, done, self.say)
        kept = [row for row in self.metrics.rows() if row["step"] <= done]
        write_jsonl(self.metrics.path, kept)
        if start is not None and done >= self.total:  # Hugging Face's Trainer would run one step too many
            self.trainer._load_from_checkpoint(str(start))
            self.trainer.state.global_step = done
            return ""
        try:
            with StopSignals(self):
                self.trainer.train(resume_from_checkpoint=str(start) if start else None)
        finally:
            self.metrics.close()
        return self.limit() if self.step < self.total and self.signal is None else ""

    def limit(self) -> str:
        """The limit that this call has reached, or ""."""
        hours = (time.monotonic() - self.started) / 3600
        if self.settings.max_hours is not None and hours >= self.settings.max_hours:
            return f"--max-hours {self.settings.max_hours:g}"
        if self.settings.max_cost is not None and hours * self.settings.price_per_hour >= self.settings.max_cost:
            return f"--max-cost {self.settings.max_cost:g}"
        return ""

    def history(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return self.metrics.rows()

    def publish(self, final: Path, texts: dict[str, str]) -> None:
        """Write the adapter, the tokenizer and some text files as the folder `final`, whole or not at all."""
        aside = final.with_name(final.name + checkpoints.ASIDE)
        with checkpoints.disk_errors(final):
            self.trainer.model.save_pretrained(str(aside))
            self.trainer.processing_class.save_pretrained(str(aside))
            for name, text in texts.items():
                (aside / name).write_text(text, encoding="utf-8")
        checkpoints.publish(aside, final)

    def release(self) -> PeftModel:
        """The model with its adapter, without what training wrapped around it, ready to generate."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model, keep_fp32_wrapper=False)
        if hasattr(model, "for_inference"):  # Unsloth
            model.for_inference()
        else:
            model.gradient_checkpointing_disable()
        model.config.use_cache = True
        self.trainer.accelerator.free_memory()
        del self.trainer  # with the optimizer's moments and the gradients
        model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return model.eval()


# ---------------------------------------------------------------- the trainer


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
        data_collator=WholePairs(DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id, max_length=None)),
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

    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        keep_trainable(model)
        # the trainer switches gradient checkpointing on, with the arguments that it wants
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    lora = LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules=LORA_LAYERS, lora_dropout=0.0, bias="none",
        task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, lora)


def keep_trainable(model: PreTrainedModel) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference, as it does on CPUs with AVX512-BF16.

    Repacked weights have no gradient and rounded scales. It happens in the first forward pass without gradients, so
    whoever generates with a model before training it calls this at load. EngineError if it has happened already.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                message = "bitsandbytes has repacked the 4-bit weights for inference, so they cannot be trained"
                raise EngineError(message, "load the model anew for training")


def dpo_config(settings: DPOSettings, pairs: int, total: int, model: PreTrainedModel) -> DPOConfig:
    """TRL's settings, every value that matters written out: Unsloth changes some of TRL's defaults.

    AdamW without weight decay, gradients clipped at norm 1, linear warm-up, then a cosine down to 0.
    """
    from trl import DPOConfig

    device = next(model.parameters()).device.type
    at_once = settings.batch_size or (min(settings.effective_batch, 8) if device == "cpu" else 1)
    if settings.effective_batch % at_once:
        message = f"--batch-size {at_once} does not divide the effective batch of {settings.effective_batch} pairs"
        raise BadInputError(message, "use a divisor, e.g. --batch-size 1")
    _check_reporter(settings.report_to)
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


def warmup_steps(settings: DPOSettings, total: int) -> int:
    """`warmup_share` of the steps, rounded down. The first warm-up step has learning rate 0, so one alone is none."""
    steps = int(settings.warmup_share * total)
    return steps if steps > 1 else 0


def even_batch(pairs: int, most: int) -> int:
    """The largest batch of at most `most` that divides `pairs`: TRL averages an evaluation over its batches."""
    return max(size for size in range(1, most + 1) if pairs % size == 0)


def _check_reporter(report_to: str) -> None:
    from importlib.util import find_spec

    if report_to != "none" and find_spec(report_to) is None:
        message = f"--report-to {report_to}: the package {report_to} is not installed"
        raise BadInputError(message, f"install it with pip install {report_to}, or leave the flag out")


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


# ---------------------------------------------------------------- watching


def _named(logs: dict[str, float], prefix: str = "") -> dict[str, float]:
    """TRL's metric names in the words of this project."""
    return {
        "margin": logs[f"{prefix}rewards/margins"],
        "accuracy": logs[f"{prefix}rewards/accuracies"],
        "chosen_reward": logs[f"{prefix}rewards/chosen"],
        "rejected_reward": logs[f"{prefix}rewards/rejected"],
        "chosen_logp": logs[f"{prefix}logps/chosen"],
        "rejected_logp": logs[f"{prefix}logps/rejected"],
    }


class Watch(TrainerCallback):
    """After every step: a line of metrics.jsonl, the limits, the stop signals, the alarm, a word now and then."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.step_started = 0.0
        self.tokens_before = 0.0
        self.chosen_nats: list[float] = []

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.step_started = time.monotonic()
        self.training.trainer.rows_of_step = []

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training.signal is not None or self.training.limit():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:  # an evaluation, or the summary at the end
            return
        if not math.isfinite(logs["grad_norm"]):
            raise self.training.trainer.not_finite("gradient", logs["grad_norm"])
        row = {
            "step": state.global_step,
            "loss": logs["loss"],
            **_named(logs),
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens": int(logs["num_tokens"] - self.tokens_before),
            "seconds": round(time.monotonic() - self.step_started, 3),
        }
        self.tokens_before = logs["num_tokens"]
        self.training.metrics.append(row)
        self._alarm(row)
        self._say(row)

    def _alarm(self, row: dict[str, float]) -> None:
        """DPO on similar pairs can lower both log-probabilities; say so once, while it can still be stopped."""
        self.chosen_nats.append(row["chosen_reward"] / self.training.settings.beta)
        recent = self.chosen_nats[-ALARM_STEPS:]
        if not self.training.alarms and len(recent) == ALARM_STEPS and sum(recent) / ALARM_STEPS < -ALARM_NATS:
            self.training.alarms.append(
                f"ALARM at step {row['step']}: over the last {ALARM_STEPS} steps chosen answers have lost "
                f"{-sum(recent) / ALARM_STEPS:.2f} nats of log-probability against the reference"
            )
            self.training.say(self.training.alarms[-1])

    def _say(self, row: dict[str, float]) -> None:
        """A line for every tenth of the run, with time left and cost."""
        step, total = int(row["step"]), self.training.total
        if step % max(1, total // 10) and step != total:
            return
        spent = time.monotonic() - self.training.started
        left = (total - step) * row["seconds"]
        cost = spent / 3600 * self.training.settings.price_per_hour
        speed = row["tokens"] / max(row["seconds"], 1e-3)
        self.training.say(
            f"step {step}/{total}  loss {row['loss']:.4f}  margin {row['margin']:+.4f}  "
            f"accuracy {row['accuracy']:.2f}  {speed:,.0f} tokens/s  {left / 60:.0f} min left  ${cost:.2f}"
        )


class StopSignals:
    """Within it, the first SIGINT, SIGTERM or SIGHUP is remembered until the step has ended; a second acts at once."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            caught = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]  # nohup stays nohup
            self.before = {number: signal.signal(number, self._remember) for number in caught}

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.training.signal = SIGNALS[signal.Signals(number)]
        self.training.say("stopping after this step: its checkpoint is being written (again to stop at once)")
        self.__exit__()
