"""What the content log says of a training: EPOCH-e-BATCH-b with loss and sample answers, EPOCH-e-COMPLETE with mean
losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cai_experiment.observe.content_logger import TEXTS
from cai_experiment.observe.screen import batch_loss, epoch_loss

if TYPE_CHECKING:
    from cai_experiment.observe.content_logger import ContentLogger
    from cai_experiment.training.samples import Samples

SAMPLE = "SAMPLE-GENERATION"  # the answers beside the first one, which stands with the loss


class EpochLog:
    """Takes every step's row of metrics.jsonl, those before a resume too; tells of some steps and of every epoch."""

    def __init__(self, content: ContentLogger | None, stage: str, steps: int, epoch_steps: int, every: int) -> None:
        """`stage` is "EPOCH"; a training of `steps` steps, `epoch_steps` an epoch, is told of every `every` steps."""
        self.content, self.stage, self.steps, self.epoch_steps, self.every = content, stage, steps, epoch_steps, every
        self.first_loss: float | None = None
        self.loss: float | None = None
        self.losses: dict[int, list[float]] = {}  # by epoch
        self.prompt = ""  # of the last sample answer that was told
        self.told = -1  # the last step told

    def know(self, row: Mapping[str, Any]) -> None:
        """Take a step's loss."""
        self.loss = float(row["loss"])
        self.first_loss = self.loss if self.first_loss is None else self.first_loss
        self.losses.setdefault(self._place(row["step"])[0], []).append(self.loss)

    def samples(self, step: int, prompts: Sequence[str], found: Samples) -> None:
        """Tell a step's loss and the sample answers after it; step 0 is before training."""
        if self.content is None:
            return
        facts = {"step": step, "distinct_bigrams": round(found.distinct, 4)}
        for number, (prompt, answer) in enumerate(zip(prompts, found.answers, strict=True)):
            asked = "same prompt" if prompt == self.prompt and number == 0 else f'"{prompt}"'
            lines = [f"Sample generation ({asked}):", f'→ "{answer}"']
            about = {**facts, "instruction": prompt, TEXTS: [prompt, answer]}
            if number == 0:
                self._batch(step, lines, about)
                self.prompt = prompt
            else:
                self.content.log_stage(SAMPLE, "\n".join(lines), about)

    def ended(self, row: Mapping[str, Any]) -> None:
        """Tell of a step that had no samples, where it is due, and of the epoch that it ends."""
        step = int(row["step"])
        due = step in (1, self.steps) or step % self.every == 0
        if due and self.told != step:
            self._batch(step, [], {"step": step})
        if step % self.epoch_steps == 0 or step == self.steps:
            self._complete(step, row)

    def _batch(self, step: int, lines: Sequence[str], facts: Mapping[str, Any]) -> None:
        if self.content is None:
            return
        epoch, batch = self._place(step)
        loss = None if step == 0 else self.loss
        first = "Before training" if loss is None else batch_loss(loss, None if step == 1 else self.first_loss)
        about = {**facts} | ({} if loss is None else {"loss": loss})
        self.content.log_stage(f"{self.stage}-{epoch}-BATCH-{batch}", "\n".join([first, *lines]), about)
        self.told = step

    def _complete(self, step: int, row: Mapping[str, Any]) -> None:
        """The mean loss of the epoch after that of the one before; before the first stands the first step's loss."""
        epoch, batch = self._place(step)
        if self.content is None or self.first_loss is None:
            return
        before, after = _mean(self.losses.get(epoch - 1, [self.first_loss])), _mean(self.losses[epoch])
        lines = [epoch_loss(before, after)]
        if batch < self.epoch_steps:
            lines.append(f"Ends after {batch} of {self.epoch_steps} batches")
        if "held_out_margin" in row:
            margin, share = row["held_out_margin"], row["held_out_accuracy"]
            sign = "✓" if margin > 0 else "✗"
            lines.append(f"Validation: margin {margin:+.4f}, {share:.0%} of the held-out pairs right {sign}")
        facts = {"step": step, "loss_before": before, "loss": after}
        self.content.log_stage(f"{self.stage}-{epoch}-COMPLETE", "\n".join(lines), facts)

    def _place(self, step: int) -> tuple[int, int]:
        """(epoch, batch) of a step, both from 1; (0, 0) before training."""
        epoch = -(-step // self.epoch_steps)
        return epoch, step - max(0, epoch - 1) * self.epoch_steps


def _mean(losses: Sequence[float]) -> float:
    return sum(losses) / len(losses)
