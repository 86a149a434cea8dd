"""After every step: a row of metrics.jsonl, held-out measurements, sample answers, alarms, limits, a word now and then.

Decisions rest on what a checkpoint carries (`best_metric` and `best_global_step` of Hugging Face's trainer state) and
on the rows of metrics.jsonl up to it, so that a resumed training decides as an unbroken one.
"""

from __future__ import annotations

import math
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState

from cai_experiment.training import processes
from cai_experiment.training.alarms import DISTINCT
from cai_experiment.training.samples import undisturbed
from cai_experiment.training.trainer import named

if TYPE_CHECKING:
    from cai_experiment.training.run import Training

HELD_OUT = ("margin", "accuracy", "loss", "chosen_logp", "rejected_logp")  # as held_out_margin, ... in a row
SPEAK_AFTER = 120  # seconds


class Watch(TrainerCallback):
    """Hugging Face's Trainer calls it; everything it knows is in `training` and in the trainer's state."""

    def __init__(self, training: Training) -> None:
        self.training = training
        self.step_started = 0.0
        self.tokens_before = 0.0
        self.pace = Pace()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the step's clock."""
        self.step_started = time.monotonic()
        self.training.trainer.rows_of_step = []

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the training, with a checkpoint, after a stop signal or at a limit."""
        if self.training.must_stop():
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After a step, before its checkpoint: measure, sample, write the row, raise alarms."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs:  # an evaluation, or the summary at the end
            return
        training = self.training
        if not math.isfinite(logs["grad_norm"]):
            raise training.trainer.not_finite("gradient", logs["grad_norm"])
        row = {
            "step": state.global_step,
            "loss": logs["loss"],
            **self.metrics(logs),
            "learning_rate": logs["learning_rate"],
            "grad_norm": logs["grad_norm"],
            "tokens": int(logs["num_tokens"] - self.tokens_before),
            "seconds": round(time.monotonic() - self.step_started, 3),
        }
        self.tokens_before = logs["num_tokens"]
        training.epochs.know(row)
        row |= self._held_out(state, control) | self._distinct(state.global_step)
        if processes.is_first():
            training.metrics.append(row)
            training.epochs.ended(row)
        for alarm in training.alarms.look(row):
            training.say(alarm)
        self._say(row)

    def metrics(self, logs: dict[str, float]) -> dict[str, float]:
        """What a row says of the pairs beside the loss; SFT has other metrics (sft_trainer.py)."""
        return named(logs)

    def words(self, row: dict[str, float]) -> str:
        """What a line says of a step."""
        return (
            f"step {row['step']}/{self.training.total}  loss {row['loss']:.4f}  margin {row['margin']:+.4f}  "
            f"accuracy {row['accuracy']:.2f}"
        )

    def _held_out(self, state: TrainerState, control: TrainerControl) -> dict[str, float]:
        """Measure the held-out pairs where it is due. A better margin than before is worth a checkpoint."""
        step, patience = state.global_step, self.training.patience
        if not patience.is_due(step):
            return {}
        with undisturbed(self.training.trainer.model):
            found = processes.of_all(self.training.measure(of_held_out=True))[0]  # all decide by the same numbers
        if found["margin"] > (-math.inf if state.best_metric is None else state.best_metric):
            state.best_metric, state.best_global_step = found["margin"], step
            control.should_save = True
        elif patience.is_over(state):
            control.should_save = control.should_training_stop = True
        return {f"held_out_{name}": found[name] for name in HELD_OUT}

    def _distinct(self, step: int) -> dict[str, float]:
        """Sample answers where they are due; the share of distinct bigrams in them."""
        every = self.training.sample_every
        distinct = self.training.sample(step) if every and (step % every == 0 or step == self.training.total) else None
        return {} if distinct is None else {DISTINCT: distinct}

    def _say(self, row: dict[str, float]) -> None:
        """A line now and then, with time left and cost, and one for every measurement."""
        step, total = int(row["step"]), self.training.total
        if "held_out_margin" in row:
            self.training.say(
                f"step {step}/{total}  held out: margin {row['held_out_margin']:+.4f}  accuracy "
                f"{row['held_out_accuracy']:.2f}  loss {row['held_out_loss']:.4f}"
            )
        if not self.pace.is_due(step, total, row["seconds"], time.monotonic()):
            return
        cost = (time.monotonic() - self.training.started) / 3600 * self.training.settings.price_per_hour
        speed = row["tokens"] / max(row["seconds"], 1e-3)
        left = self.pace.left(total - step)
        self.training.say(f"{self.words(row)}  {speed:,.0f} tokens/s  {left} left  ${cost:.2f}")


class Pace:
    """When a line is due: after a call's first step, then for every tenth of the run or after SPEAK_AFTER seconds."""

    def __init__(self) -> None:
        self.seconds: deque[float] = deque(maxlen=10)  # of the last steps
        self.said: float | None = None  # when the last line was due

    def is_due(self, step: int, total: int, seconds: float, now: float) -> bool:
        """Take a step, which took so many seconds; `now` is time.monotonic()."""
        self.seconds.append(seconds)
        due = step % max(1, total // 10) == 0 or step == total
        if not due and self.said is not None and now - self.said < SPEAK_AFTER:
            return False
        self.said = now
        return True

    def left(self, steps: int) -> str:
        """What so many steps take, each as the mean of the last ones: minutes, above 90 of them hours."""
        minutes = steps * sum(self.seconds) / len(self.seconds) / 60
        return f"{minutes:.0f} min" if minutes <= 90 else f"{minutes / 60:.1f} hours"


class Patience:
    """When held-out pairs are measured (every `every` steps, and after the last), and when waiting for better ends.

    `every` is 0 without held-out pairs; `patience` is a number of measurements, None to train to the end in any case.
    """

    def __init__(self, every: int, total: int, patience: int | None) -> None:
        self.every, self.total, self.patience = every, total, patience

    def is_due(self, step: int) -> bool:
        """True for a step after which held-out pairs are measured."""
        return self.every > 0 and (step % self.every == 0 or step == self.total)

    def is_over(self, state: TrainerState) -> bool:
        """True once `patience` measurements in a row, the last one at this step, were no better than the best."""
        if self.patience is None or not self.every:
            return False
        return state.global_step // self.every - (state.best_global_step or 0) // self.every >= self.patience
