"""One training from start to end: clock, limits, stop signals, metrics.jsonl, alarms; `trainer.py` does the maths."""

from __future__ import annotations

import gc
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from cai_experiment.engines.common import is_out_of_memory
from cai_experiment.errors import EXIT_CTRL_C, EXIT_HANGUP, EXIT_TERMINATED, EngineError
from cai_experiment.records.files import write_jsonl
from cai_experiment.records.store import Journal
from cai_experiment.training import checkpoints
from cai_experiment.training.data import TokenPair
from cai_experiment.training.settings import METRICS, DPOSettings, pairs_at_once
from cai_experiment.training.backends import backend_of, build_trainer
from cai_experiment.training.trainer import named

if TYPE_CHECKING:
    from peft import PeftModel

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
        held_out: Sequence[TokenPair] = (),
    ) -> None:
        self.settings, self.rows, self.total, self.say = settings, rows, total, say
        self.signal: int | None = None
        self.alarms: list[str] = []
        self.started = time.monotonic() if settings.started is None else settings.started
        self.metrics = Journal(settings.output_dir / METRICS)
        self.backend = backend_of(settings, model)
        self.trainer = self.build(rows, held_out, model, tokenizer)
        self.trainer.check_start()

    def build(
        self, rows: Sequence[TokenPair], held_out: Sequence[TokenPair], model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Any:  # fmt: skip
        """The trainer, and what watches it; SFT has its own (sft_trainer.py)."""
        return build_trainer(self.backend, self.settings, rows, held_out, self.total, model, tokenizer, Watch(self))

    @property
    def step(self) -> int:
        """Optimizer steps done, those before a resume included."""
        return self.trainer.state.global_step

    def measure(self, of_held_out: bool = False) -> dict[str, float]:
        """Mean loss, margin, accuracy and log-probabilities over the first pairs, no dropout."""
        found: dict[str, float] = self.trainer.measure(of_held_out)
        return found

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


@contextmanager
def memory_errors(settings: DPOSettings, rows: Sequence[TokenPair]) -> Iterator[None]:
    """Within it, memory that ran out becomes an EngineError that names what was tried and what helps."""
    try:
        yield
        return
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    longest = max(row.length for row in rows)  # outside the handler, whose traceback keeps tensors alive
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    size = pairs_at_once(settings, "cuda" if torch.cuda.is_available() else "cpu")
    tried = f"{size} {'pair' if size == 1 else 'pairs'} a pass, the longest of {longest} tokens"
    tried += ", gradient checkpointing" if torch.cuda.is_available() else ""
    fresh = " --fresh" if checkpoints.any_in(settings.output_dir) else ""
    step = f"train_dpo.py --max-length {longest // 2}{fresh} drops the longer pairs; or take a smaller --model"
    if size > 1:
        step = f"--batch-size 1 needs less (the same command resumes); then {step}"
    raise EngineError(f"out of memory in training, with {tried}", step)


# ---------------------------------------------------------------- watching


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
            **named(logs),
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
