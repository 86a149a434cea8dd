"""What can go wrong in preference training while every number still looks well: said once, while it can be stopped.

All of it is worked out from the rows of metrics.jsonl, so that a resumed training knows what an unbroken one would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cai_experiment.training.settings import DPOSettings

STEPS = 10  # looked back on: one step's batch says little
FALLEN_NATS = 1.0  # log-probability that chosen answers may lose against the reference
# beta times nats. The gradient of a pair is scaled by sigmoid(-margin), 4.5e-5 here: nothing more is learned from a
# pair that the model has right, and the policy is 10 / beta nats (100 at the usual 0.1) away from the reference on it.
SATURATED_MARGIN = 10.0
EXPLODED = 3.0  # times that, whatever the accuracy
SATURATING = ("sigmoid", "apo_zero")  # losses of sums of log-probabilities; ipo is bounded, sigmoid_norm goes by token
COLLAPSED = 0.5  # of the distinct bigrams of sample answers before training

DISTINCT = "distinct_bigrams"  # in rows of steps with sample answers: see samples.py
LOG_OF_SAMPLES = "content_log.jsonl"


class Alarms:
    """Looks at the rows of a training, in order; `found` holds one sentence of each kind that was due.

    `distinct_before` is distinct-2 of the sample answers before the first step.
    """

    def __init__(self, settings: DPOSettings) -> None:
        self.settings = settings
        self.distinct_before: float | None = None
        self.found: dict[str, str] = {}
        self.recent: list[Mapping[str, Any]] = []

    def look(self, row: Mapping[str, Any]) -> list[str]:
        """Take a row; the alarms that are due for the first time."""
        self.recent = [*self.recent, row][-STEPS:]
        new = {kind: text for kind, text in self.due(row).items() if text and kind not in self.found}
        self.found |= {kind: f"ALARM at step {row['step']}: {text}" for kind, text in new.items()}
        return [self.found[kind] for kind in new]

    def due(self, row: Mapping[str, Any]) -> dict[str, str]:
        """A text by kind of alarm, "" where all is well; SFT has fewer kinds (sft_trainer.py)."""
        return {"fallen": self._fallen(), "saturated": self._saturated(), "collapsed": self.collapsed(row)}

    def _fallen(self) -> str:
        """DPO on similar pairs can lower both log-probabilities."""
        nats = _mean(self.recent, "chosen_reward") / self.settings.beta
        if len(self.recent) < STEPS or nats >= -FALLEN_NATS:
            return ""
        return (
            f"over the last {STEPS} steps chosen answers have lost {-nats:.2f} nats of log-probability against the "
            "reference"
        )

    def _saturated(self) -> str:
        margin = _mean(self.recent, "margin")
        if len(self.recent) < STEPS or self.settings.loss not in SATURATING or margin < SATURATED_MARGIN:
            return ""
        if _mean(self.recent, "accuracy") < 1.0:
            if margin < EXPLODED * SATURATED_MARGIN:
                return ""
            return f"over the last {STEPS} steps the mean margin was {margin:.1f}: the model is far from the reference"
        return (
            f"over the last {STEPS} steps every pair was right, with a mean margin of {margin:.1f}: there is nothing "
            "left to learn from them, and the model is far from the reference; fewer steps, a lower --learning-rate "
            "or a higher --beta keep it closer"
        )

    def collapsed(self, row: Mapping[str, Any]) -> str:
        """The text of the alarm if sample answers have become poor in bigrams, else ""."""
        now = row.get(DISTINCT)
        if now is None or not self.distinct_before or now >= COLLAPSED * self.distinct_before:
            return ""
        accuracy = _mean(self.recent, "accuracy") if "accuracy" in row else None
        on_pairs = "" if accuracy is None else f", with an accuracy of {accuracy:.2f} on the pairs"
        return (
            f"sample answers collapse: {now:.0%} of their bigrams are distinct, {self.distinct_before:.0%} before "
            f"training{on_pairs}; read them in {LOG_OF_SAMPLES}"
        )


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    return float(sum(row[name] for row in rows) / len(rows))
