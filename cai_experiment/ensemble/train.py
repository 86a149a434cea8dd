"""Train the heads on the experts' states: AdamW, linear warm-up and decline, the best heads kept, resumable exactly.

Order and dropout are keyed by seed, epoch and step, so a training that was killed and resumed ends at the same weights,
bit for bit, as one that was not (on the same device).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cai_experiment.ensemble import checkpoint
from cai_experiment.ensemble.checkpoint import Checkpoint
from cai_experiment.ensemble.clock import Clock, Watch
from cai_experiment.ensemble.encoding import EncodedRow
from cai_experiment.ensemble.files import BEST, read_heads, write_heads
from cai_experiment.ensemble.held_out import ALL, Measures, measure
from cai_experiment.ensemble.loss import perfect_alignment_loss
from cai_experiment.ensemble.schedule import TrainSettings, keyed, learning_rate_at, order_of, warmup_of
from cai_experiment.ensemble.states import Source, States
from cai_experiment.ensemble.threads import one_thread
from cai_experiment.ensemble.train_log import TrainLog
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.records.files import show

if TYPE_CHECKING:
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads

WEIGHT_DECAY = 0.01  # AdamW's default
MOST_NORM = 1.0  # of the gradient: one odd row must not undo an epoch
TINY = 2**27  # multiplications of a step: below it, some milliseconds, threads on a CPU cost more than they bring
OPTIMIZER, HEADS, BEST_HEADS, SUMS = "optimizer.", "heads.", "best.", "sums"  # of a checkpoint's tensors


@dataclass(slots=True)
class TrainResult:
    """What a training came to. `held_out`: by data set and ALL, of the best epoch; `history`: a row an epoch, from 0
    (before training); `resumed_from`: the step at which this call took over; `saved`: the best heads."""

    saved: Path
    best_epoch: int
    held_out: dict[str, dict[str, Any]]
    steps: int
    resumed_from: int
    history: list[dict[str, Any]] = field(default_factory=list)


class HeadTrainer:
    """One training. Rows 0 to `training` - 1 of the source are trained on, the others are held out."""

    def __init__(
        self,
        model: MultiModelWithScalarHeads,
        source: Source,
        rows: Sequence[EncodedRow],
        training: int,
        folder: Path,
        settings: TrainSettings,
        identity: dict[str, Any],
        say: Callable[[str], None] = print,
    ) -> None:
        """`identity`: what the checkpoints in `folder` must have been trained on (states, heads, settings).

        Raises BadInputError if no row is left on either side, or if a checkpoint is of another training.
        """
        if not 0 < training < len(rows):
            message = f"{training} rows to train on and {len(rows) - training} held out are too few"
            raise BadInputError(message, "give more rows, or a longer --max_length if rows were left out")
        self.model, self.source, self.rows, self.training = model, source, rows, training
        self.folder, self.settings, self.identity, self.say = folder, settings, identity, say
        self.steps_an_epoch = math.ceil(training / settings.batch_size)
        self.total = self.steps_an_epoch * settings.num_epochs
        self.parameters = list(model.heads.parameters())
        self.weights = sum(parameter.numel() for parameter in self.parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, weight_decay=WEIGHT_DECAY, fused=model.device.type != "mps"
        )
        self.step, self.resumed_from = 0, 0
        exact = torch.float32 if model.device.type == "mps" else torch.float64
        # of the running epoch: loss, alignment, entropy, steps; on the device, so that no step waits for it
        self.sums = torch.zeros(4, dtype=exact, device=model.device)
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.best_heads: dict[str, torch.Tensor] = {}
        self.before = Clock()  # of the running epoch, in earlier calls
        if (warmup := warmup_of(self.total, settings)) < settings.warmup_steps:
            self.say(f"warm-up: {warmup} of {self.total} steps; --warmup_steps {settings.warmup_steps} is over half")
        self._resume()

    # ------------------------------------------------------------ the run

    def run(self, states: Clock | None = None) -> TrainResult:
        """Train to the end. `states`: what computing states took, which counts as the first epoch's."""
        device = self.model.device
        log = TrainLog(self.folder, self.settings.report_to, self.step if self.history else -1, self.identity)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            try:
                if not self.history:
                    self._end_epoch(log, 0, Clock(), Clock())
                for epoch in range(self.step // self.steps_an_epoch + 1, self.settings.num_epochs + 1):
                    self._epoch(log, epoch, states if states and epoch == 1 else Clock())
            finally:
                log.close()
        return TrainResult(
            self.folder / f"{BEST}.safetensors", self.best["epoch"], self.best["held_out"], self.step,
            self.resumed_from, self.history,
        )  # fmt: skip

    def _epoch(self, log: TrainLog, epoch: int, states: Clock) -> None:
        clock, before, saved = Watch(), self.before, time.monotonic()
        order = order_of(epoch, self.training, self.settings.seed)
        size, first = self.settings.batch_size, (epoch - 1) * self.steps_an_epoch
        self.model.heads.train()
        while self.step < first + self.steps_an_epoch:
            at = (self.step - first) * size
            parts = self._step(order[at : at + size])
            if self.step % self.settings.log_every_n_steps == 0:
                self._log_step(log, epoch, parts)
            now = time.monotonic()
            if now - saved >= self.settings.checkpoint_seconds and self.step < first + self.steps_an_epoch:
                self.before = before + clock.passed()
                self._save()
                saved = now
        self._end_epoch(log, epoch, before + clock.passed(), states)

    def _step(self, rows: Sequence[int]) -> torch.Tensor:
        """One step of the optimizer over these rows; returns [loss, alignment, entropy] before it."""
        self._seed_dropout()
        rate = learning_rate_at(self.step, self.total, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        found = self.source.states(rows)
        with one_thread(self.weights * len(found.log_p) < TINY):  # a GPU's work knows no such threads
            values = self._descend(found)
        self.sums[:3] += values
        self.sums[3] += 1
        self.step += 1
        return values

    def _descend(self, found: States) -> torch.Tensor:
        """[loss, alignment, entropy] on these states, and the optimizer's step down its gradient."""
        counted = torch.ones(1, len(found.log_p), dtype=torch.bool, device=found.log_p.device)
        scalars = self.model.scalars(found.hidden)
        parts = perfect_alignment_loss(scalars[None], found.log_p[None], counted, self.settings.entropy_weight)
        self.optimizer.zero_grad(set_to_none=True)
        parts.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MOST_NORM)
        self.optimizer.step()
        return torch.stack([part.detach() for part in parts])

    def _seed_dropout(self) -> None:
        """By seed and step. (torch.manual_seed would keep a traceback of each call for a GPU that is not there.)"""
        number = keyed(self.settings.seed, "dropout", self.step)
        if self.model.device.type == "cpu":
            torch.default_generator.manual_seed(number)
        else:
            torch.manual_seed(number)

    def _log_step(self, log: TrainLog, epoch: int, parts: torch.Tensor) -> None:
        loss, alignment, entropy = parts.tolist()
        self._check_finite("loss", loss)
        rate = learning_rate_at(self.step - 1, self.total, self.settings)
        log.write("step", self.step, epoch=epoch, loss=loss, alignment=alignment, entropy=entropy, learning_rate=rate)

    def _check_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            message = f"step {self.step}: the {what} is {value}, so a weight of the heads is no number any more"
            kept = "; the best heads so far are kept" if self.best else ""
            raise EngineError(message, f"lower --learning_rate and add --fresh{kept}")

    # ------------------------------------------------------------ an epoch's end

    def _end_epoch(self, log: TrainLog, epoch: int, took: Clock, states: Clock) -> None:
        """Measure the held-out rows, keep the heads if they are the best so far, write log and checkpoint.

        Raises EngineError, before anything is written, for a loss that is no finite number.
        """
        clock = Watch()
        self._check_finite("loss", float(self.sums[0]))
        held_out = self._measure()
        took = took + clock.passed() if epoch else took
        loss = held_out[ALL].loss
        self._check_finite("held-out loss", loss)
        better = epoch > 0 and (not self.best or loss < self.best["loss"])
        train = (self.sums[:3] / self.sums[3].clamp(min=1)).tolist() if epoch else [None, None, None]
        row = {"epoch": epoch, "train_loss": train[0], "train_alignment": train[1], "train_entropy": train[2],
               "held_out": {name: found.row() for name, found in held_out.items()}, "best": better,
               "seconds": took.wall, "cpu_seconds": took.cpu, "states_seconds": states.wall,
               "states_cpu_seconds": states.cpu}  # fmt: skip
        if better:
            self.best = {"epoch": epoch, "loss": loss, "held_out": row["held_out"],
                         "facts": self._facts(epoch, held_out)}  # fmt: skip
            self.best_heads = {name: t.detach().cpu().clone() for name, t in self.model.heads.state_dict().items()}
            self._write_best()
        self.history.append(row)
        log.write("epoch", self.step, **row)
        self.sums, self.before = torch.zeros_like(self.sums), Clock()
        self._save()
        self.say(epoch_line(row, self.settings.num_epochs))

    def _write_best(self) -> None:
        write_heads(self.folder, BEST, self.model.info(self.best["facts"]), self.best_heads)

    def _measure(self) -> dict[str, Measures]:
        numbers = range(self.training, len(self.rows))
        return measure(
            self.model, self.source, numbers, [self.rows[n].dataset for n in numbers],
            [self.rows[n].counted for n in numbers], self.settings.entropy_weight,
        )  # fmt: skip

    def _facts(self, epoch: int, held_out: dict[str, Measures]) -> dict[str, Any]:
        """What the heads' file says of their training."""
        return {**self.identity, "epoch": epoch, "step": self.step, "rows": self.training,
                "held_out_rows": len(self.rows) - self.training, "held_out": held_out[ALL].row()}  # fmt: skip

    # ------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        tensors = {HEADS + name: tensor for name, tensor in self.model.heads.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"{OPTIMIZER}{number}.{name}": torch.as_tensor(value) for name, value in state.items()}
        tensors |= {BEST_HEADS + name: tensor for name, tensor in self.best_heads.items()}
        tensors[SUMS] = self.sums
        facts = {"step": self.step, "best": self.best, "history": self.history, "seconds": list(self.before),
                 "identity": self.identity}  # fmt: skip
        checkpoint.write(self.folder, Checkpoint(tensors, facts))

    def _resume(self) -> None:
        """Go on from the newest whole checkpoint, if there is one."""
        found = checkpoint.newest(self.folder, self.say)
        if found is None:
            return
        check_same(found.facts["identity"], self.identity, self.folder)
        heads, self.best_heads = (
            {name.removeprefix(kind): t for name, t in found.tensors.items() if name.startswith(kind)}
            for kind in (HEADS, BEST_HEADS)
        )
        self.model.heads.load_state_dict(heads)
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in found.tensors.items():
            if name.startswith(OPTIMIZER):
                number, kind = name.removeprefix(OPTIMIZER).split(".")
                state.setdefault(int(number), {})[kind] = tensor
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})
        self.sums, self.before = found.tensors[SUMS].to(self.sums), Clock(*found.facts["seconds"])
        self.step, self.best, self.history = (found.facts[name] for name in ("step", "best", "history"))
        self.resumed_from = self.step
        if self.step:
            self.say(f"resumed at step {self.step} of {self.total}")
        if self.best and not self._best_is_there():
            self._write_best()
            self.say(f"{BEST}.safetensors was not what the checkpoint calls the best heads: written again")

    def _best_is_there(self) -> bool:
        """True if the file holds the checkpoint's best heads: it may be deleted, damaged or a killed epoch's."""
        try:
            _, tensors = read_heads(self.folder / f"{BEST}.safetensors")
        except BadInputError:
            if not self.best_heads:
                raise
            return False
        return not self.best_heads or (tensors.keys() == self.best_heads.keys() and all(
            torch.equal(tensor, self.best_heads[name]) for name, tensor in tensors.items()
        ))


def check_same(then: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    """Raise BadInputError, with what differs, if `folder` holds a training with other settings."""
    changes = [f"{name} {then.get(name)!r} -> {now.get(name)!r}" for name in dict.fromkeys([*now, *then])
               if then.get(name) != now.get(name)]  # fmt: skip
    if changes:
        message = f"{show(folder)} holds a training with other settings: {'; '.join(changes)}"
        raise BadInputError(message, "add --fresh to begin anew (the old folder is moved, never deleted)")


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """An epoch in a line: "epoch 2/5 | loss 0.412 | held out 0.398 (best): mixture 0.49, uniform 0.61 | 3.1 s"."""
    held = Measures(**row["held_out"][ALL])
    said = f"held out {held.loss:.4f}{' (best)' if row['best'] else ''}: mixture {held.mixture:.4f}, select "
    said += f"{held.select:.4f}, uniform {held.uniform:.4f}, best single {min(held.experts):.4f}"
    if not row["epoch"]:
        return f"before training | {said} (nats a token)"
    took = f"{row['seconds']:.1f} s" + (f" + {row['states_seconds']:.1f} s for states" if row["states_seconds"] else "")
    return f"epoch {row['epoch']}/{epochs} | loss {row['train_loss']:.4f} | {said} | {took}"
