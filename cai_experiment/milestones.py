"""The four sizes of a run: how many pairs, rounds and DPO steps, which gates, and what the spec's budget is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
DATA_DIR = PACKAGE / "data"
CHECKPOINT_DIR = PACKAGE / "checkpoints"
SPEC_HOURS = {"single": "30 minutes", "batch": "1 hour", "mvp": "2-3 hours", "full": "5+ hours"}  # in its own words
POD_DOLLARS_PER_HOUR = 1.74  # RunPod A100 SXM 80 GB, the spec's price


@dataclass(frozen=True, slots=True)
class Milestone:
    """One size. `dpo_steps` None means `epochs` passes; `max_draws` bounds the instructions drawn to reach `pairs`."""

    name: str
    pairs: int
    rounds: int
    dpo_steps: int | None
    epochs: float | None
    max_draws: int
    budget_hours: float
    script: str
    next_command: str

    @property
    def budget_dollars(self) -> float:
        """The spec's cost of this milestone in US dollars on the pod."""
        return self.budget_hours * POD_DOLLARS_PER_HOUR

    @property
    def budget(self) -> str:
        """The spec's time and cost of this milestone, training and evaluation included: "2-3 hours, $5.22"."""
        return f"{SPEC_HOURS[self.name]}, ${self.budget_dollars:.2f}"


SCRIPTS = "python cai_experiment/scripts/"
MILESTONES: dict[str, Milestone] = {
    m.name: m
    for m in (
        Milestone("single", 1, 1, 1, None, 20, 0.5, "test_single.py", SCRIPTS + "test_batch.py"),
        Milestone("batch", 10, 2, 10, None, 30, 1.0, "test_batch.py", SCRIPTS + "generate_mvp.py"),
        Milestone("mvp", 100, 2, 100, None, 300, 3.0, "generate_mvp.py", SCRIPTS + "train_dpo.py --milestone mvp"),
        Milestone("full", 5000, 2, None, 3, 15000, 5.0, "generate_full.py", SCRIPTS + "train_dpo.py --milestone full"),
    )
}

TEMPERATURE_ANSWER = 0.7
TEMPERATURE_CRITIQUE = 0.3
MAX_TOKENS_ANSWER = 500
MAX_TOKENS_CRITIQUE = 300
SHORTLIST = 3  # principles that are judged in both orders at least, the likeliest violated
MAX_TOKENS_INSTRUCTION = 120
MAX_TOKENS_SUM = 64  # "27 plus 28 is 55." and room to ramble
MAX_TOKENS_MESSAGE = 200  # of the broad grid: five sentences, or a passage to work on
