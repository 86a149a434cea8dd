"""One training from start to end: clock, limits, stop signals, what is kept. The backends' trainers do the maths, and
`watch.py` what is done after every step."""

from __future__ import annotations

import gc
import shutil
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import TrainerState

from cai_experiment.errors import EXIT_CTRL_C, EXIT_HANGUP, EXIT_TERMINATED
from cai_experiment.records.files import show, write_jsonl
from cai_experiment.records.store import Journal
from cai_experiment.training import checkpoints, processes
from cai_experiment.training.alarms import Alarms
from cai_experiment.training.backends import backend_of, build_trainer
from cai_experiment.training.content import EpochLog
from cai_experiment.training.data import TokenPair
from cai_experiment.training.fast.start_check import foreign_kind
from cai_experiment.training.samples import Sampler
from cai_experiment.training.settings import MEASURED_PAIRS, METRICS, DPOSettings
from cai_experiment.training.watch import Patience, Watch

if TYPE_CHECKING:
    from peft import PeftModel

    from cai_experiment.observe.content_logger import ContentLogger

FEW = 10  # pairs: measured in no time
SIGNALS = {signal.SIGINT: EXIT_CTRL_C, signal.SIGTERM: EXIT_TERMINATED, signal.SIGHUP: EXIT_HANGUP}


class Training:
    """One training: trainer, adapter and clock. `signal` is the exit code of a stop signal, once one has come.

    `held_out` is measured now and then; `sampler` answers instructions for the log `content`.
    """

    stage = "EPOCH"  # in the content log

    def __init__(
        self,
        settings: DPOSettings,
        rows: Sequence[TokenPair],
        total: int,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        say: Callable[[str], None],
        held_out: Sequence[TokenPair] = (),
        sampler: Sampler | None = None,
        content: ContentLogger | None = None,
    ) -> None:
        self.settings, self.rows, self.total, self.say = settings, rows, total, say
        self.sampler = sampler
        self.signal: int | None = None
        self.reached = ""  # the limit that ends the call
        self.alarms = Alarms(settings)
        tenth = max(1, total // 10)
        self.patience = Patience(settings.eval_every or tenth if held_out else 0, total, settings.early_stop)
        self.sample_every = settings.sample_every or tenth
        an_epoch = -(-len(rows) // settings.effective_batch)
        self.epochs = EpochLog(content, self.stage, total, an_epoch, self.sample_every)
        self.started = time.monotonic() if settings.started is None else settings.started
        self.metrics = Journal(settings.output_dir / METRICS)
        self.backend = backend_of(settings, model)
        if settings.backend == "auto" and self.backend == "trl" and (what := foreign_kind(model)):
            say(f"backend trl: fast does not train {model.config.model_type} ({what})")
        if len(rows) > FEW:
            say(f"measuring {self.measured_first(held_out):,} pairs before the first step; each step's row goes to "
                f"{show(self.metrics.path)}")  # fmt: skip
        self.trainer = self.build(rows, held_out, model, tokenizer)
        self.trainer.keep = settings.keep
        self.trainer.check_start()

    def build(
        self, rows: Sequence[TokenPair], held_out: Sequence[TokenPair], model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> Any:  # fmt: skip
        """The trainer, and what watches it; SFT has its own (sft_trainer.py)."""
        return build_trainer(self.backend, self.settings, rows, held_out, self.total, model, tokenizer, Watch(self))

    def measured_first(self, held_out: Sequence[TokenPair]) -> int:
        """Pairs that are read before the first step: fast DPO takes the reference's log-probabilities of all."""
        return len(self.rows) + len(held_out) if self.backend == "fast" else min(len(self.rows), MEASURED_PAIRS)

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
        with processes.first_goes_ahead():
            checkpoints.set_aside_newer(self.settings.output_dir, done, self.say)
            kept = [row for row in self.metrics.rows() if row["step"] <= done]
            if processes.is_first():
                write_jsonl(self.metrics.path, kept)
        self.alarms.distinct_before = self.sample(0, into_log=start is None)
        for row in kept:
            self.alarms.look(row)
            self.epochs.know(row)
        if start is not None and self._was_over(start, done):
            return ""
        try:
            with StopSignals(self):
                self.trainer.train(resume_from_checkpoint=str(start) if start else None)
        finally:
            self.metrics.close()
        return self.reached if self.signal is None and not self.is_over else ""

    def _was_over(self, start: Path, done: int) -> bool:
        """Load a checkpoint after which nothing is trained; Hugging Face's Trainer would run one step too many."""
        state = TrainerState.load_from_json(str(start / "trainer_state.json"))
        if done < self.total and not self.patience.is_over(state):
            return False
        self.trainer._load_from_checkpoint(str(start))
        self.trainer.state = state
        return True

    @property
    def is_over(self) -> bool:
        """True when no step is to follow: after the last one, or when the held-out margin has not grown for long."""
        return self.step >= self.total or self.patience.is_over(self.trainer.state)

    @property
    def early(self) -> str:
        """Why training ended before its last step and is over nevertheless, or ""."""
        if self.step >= self.total or not self.patience.is_over(self.trainer.state):
            return ""
        times = self.patience.patience
        return f"no better held-out margin in {times} measurement{'' if times == 1 else 's'}"

    def take_best(self) -> int:
        """With `early_stop`: load the adapter with the best held-out margin. The step whose adapter the model now has.

        Where that checkpoint is gone or damaged an alarm says so, and the last adapter stays.
        """
        best = self.trainer.state.best_global_step
        if self.settings.early_stop is None or best is None or best == self.step:
            return self.step
        folder = self.settings.output_dir / f"checkpoint-{best}"
        try:
            checkpoints.verify(folder)
        except checkpoints.Damaged as reason:
            self.alarms.found["best"] = (
                f"ALARM: {folder.name}, which has the best held-out margin, is damaged ({reason}): the final adapter "
                f"is that of step {self.step}"
            )
            self.say(self.alarms.found["best"])
            return self.step
        self.trainer._load_from_checkpoint(str(folder))
        return int(best)

    def sample(self, step: int, into_log: bool = True) -> float | None:
        """Answer the sample instructions, write them into the content log; the share of distinct bigrams.

        None without instructions, and from the first failure on: training does not depend on it.
        """
        alone = processes.is_first() and not processes.is_sharded()  # sharded weights generate only together
        if self.sampler is None or not self.sampler.prompts or not alone:
            return None
        try:
            found = self.sampler.answer(self.trainer.accelerator.unwrap_model(self.trainer.model))
        except Exception as error:
            line = str(error).splitlines()[0] if str(error) else ""
            self.say(f"no sample answers from step {step} on: {type(error).__name__}: {line}")
            self.sampler = None
            return None
        if into_log:
            self.epochs.samples(step, self.sampler.prompts, found)
        return found.distinct

    def must_stop(self) -> bool:
        """True if any process has had a stop signal or reached a limit; then all know it. All must ask."""
        told = processes.of_all((self.signal, self.limit()))
        self.signal = next((signal for signal, _ in told if signal is not None), None)
        self.reached = next((limit for _, limit in told if limit), "")
        return self.signal is not None or bool(self.reached)

    def limit(self) -> str:
        """The limit that this call has reached, or ""."""
        hours = (time.monotonic() - self.started) / 3600
        if self.settings.max_hours is not None and hours >= self.settings.max_hours:
            return f"--max-hours {self.settings.max_hours:g}"
        if self.settings.max_cost is not None and hours * self.settings.price_per_hour >= self.settings.max_cost:
            return f"--max-cost {self.settings.max_cost:g}"
        return ""

    def history(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl; the first process has written its last one."""
        with processes.first_goes_ahead():
            return self.metrics.rows()

    def publish(self, final: Path, texts: dict[str, str]) -> None:
        """Write the adapter, the tokenizer and some text files as the folder `final`, whole or not at all."""
        if not processes.is_first():
            return processes.wait()
        aside = final.with_name(final.name + checkpoints.ASIDE)
        with checkpoints.disk_errors(final):
            self.trainer.model.save_pretrained(str(aside))
            shutil.rmtree(aside / "ref", ignore_errors=True)  # TRL's copy of the adapter that DPO started from
            self.trainer.processing_class.save_pretrained(str(aside))
            for name, text in texts.items():
                (aside / name).write_text(text, encoding="utf-8")
        checkpoints.publish(aside, final)
        processes.wait()

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


# ---------------------------------------------------------------- stopping


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
