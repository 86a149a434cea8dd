"""What a DPO training is given and what it gives: settings with their checks, the number of steps, the result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError
from cai_experiment.milestones import Milestone
from cai_experiment.training.data import Pair, pairs_sha256

SPEC_LEARNING_RATE = 5e-6
MEASURED_PAIRS = 200  # before and after are measured on the first 200 training pairs: enough, and cheap at 5,000
METRICS = "metrics.jsonl"
LOSSES = ("sigmoid", "ipo", "apo_zero", "sigmoid_norm")  # see losses.py
BACKENDS = ("auto", "trl", "unsloth", "fast")
BASE = "base_"  # before the names of what says which weights were trained
WEIGHTS = ("weights_sha256", "revision", "random_seed")  # of a folder, of a hub model, of random weights


@dataclass(frozen=True, slots=True)
class DPOSettings:
    """One training. The values are the spec's unless a reason stands beside them."""

    pairs: tuple[Pair, ...]
    output_dir: Path
    steps: int | None = None  # optimizer steps; with `epochs` as well, the larger of both
    epochs: float | None = None
    learning_rate: float = SPEC_LEARNING_RATE
    beta: float = 0.1
    lora_r: int = 32
    lora_alpha: int = 64  # 2 * rank
    loss: str = "sigmoid"  # LOSSES
    nll_weight: float = 0.0  # of the NLL of chosen answers, added to the loss
    effective_batch: int = 8  # pairs a step
    max_length: int = 4096  # tokens; less where the model's context is shorter
    warmup_share: float = 0.1  # of the steps; a run of fewer than 20 has no warm-up, and a cosine follows
    seed: int = 0
    model_name: str = ""
    start_adapter: Path | None = None  # train on from this adapter (SFT's), which then is the reference
    # the rest does not change the result, or by no more than rounding
    backend: str = "auto"  # BACKENDS
    batch_size: int | None = None  # trl, unsloth: pairs a pass; None: up to 8 on a CPU, 1 on a GPU (two rows' logits)
    token_budget: int | None = None  # fast: tokens a pass; None: by the memory at hand
    base: str = ""  # which weights the model has, as JSON; with it the reference's log-probabilities stay on disk
    held_out: tuple[Pair, ...] = ()  # measured while training, if `eval_every` says so
    save_every: int | None = None  # steps; None: a tenth of the run, at most 25
    keep: int = 2  # newest checkpoints, beside the best one
    eval_every: int | None = None  # steps between measurements of the held-out pairs; None: a tenth of the run
    early_stop: int | None = None  # measurements without a better held-out margin after which training ends
    sample_every: int | None = None  # steps between sample answers in the content log; None: a tenth of the run
    sample_prompts: tuple[str, ...] = ()  # instructions that are answered then
    started: float | None = None  # time.monotonic() from which hours and cost count; None: when training begins
    max_hours: float | None = None
    max_cost: float | None = None
    price_per_hour: float = 0.0
    report_to: str = "none"
    resume: Path | None = None  # a checkpoint by name instead of the newest whole one

    def identity(self) -> dict[str, Any]:
        """What must not change between an interrupted call and the one that resumes it."""
        names = ("steps", "epochs", "learning_rate", "beta", "lora_r", "lora_alpha", "effective_batch",
                 "max_length", "warmup_share", "seed", "model_name", "loss", "nll_weight")  # fmt: skip
        pairs = f"{len(self.pairs)} with sha256 {pairs_sha256(self.pairs)[:16]}"
        start = {} if self.start_adapter is None else {"start_adapter": adapter_sha256(self.start_adapter)}
        said = {name: getattr(self, name) for name in names}
        return {"pairs": pairs, **said, **start, **self._early_stop_identity(), **self.base_identity()}

    def base_identity(self) -> dict[str, Any]:
        """Which weights are trained, as far as `base` says it: base_weights_sha256, base_revision, base_random_seed."""
        try:
            known = json.loads(self.base)
        except ValueError:  # "", or a text that is a key alone
            return {}
        return {BASE + name: known[name] for name in WEIGHTS if name in known} if isinstance(known, dict) else {}

    def changes_since(self, then: dict[str, Any]) -> list[str]:
        """What differs from the identity `then` of an earlier call, as "name old -> new".

        The base's weights are compared where both know them: before the model is loaded `self` does not, and
        settings.json of an earlier version never does.
        """
        now = json.loads(json.dumps(self.identity()))
        unknown = {BASE + name for name in WEIGHTS} - (now.keys() & then.keys())
        names = [name for name in dict.fromkeys([*now, *then]) if name not in unknown]
        return [f"{name} {then.get(name)!r} -> {now.get(name)!r}" for name in names if then.get(name) != now.get(name)]

    def _early_stop_identity(self) -> dict[str, Any]:
        """With `early_stop` what is measured, and when, decides which adapter is the final one."""
        if self.early_stop is None:
            return {}
        held_out = f"{len(self.held_out)} with sha256 {pairs_sha256(self.held_out)[:16]}"
        return {"early_stop": self.early_stop, "eval_every": self.eval_every, "held_out": held_out}


@dataclass
class TrainResult:
    """What training did. Losses are means over the same pairs (the first `measured`), dropout off; logps are sums
    over an answer's tokens in nats, averaged over the pairs. `stopped` is "" or the limit that ended it early."""

    adapter_dir: Path
    steps: int
    history: list[dict[str, Any]]
    dropped: list[str]
    step0_margin: float
    loss_before: float
    loss_after: float | None
    stopped: str = ""
    before: dict[str, float] = field(default_factory=dict)  # loss, margin, accuracy, chosen_logp, rejected_logp
    after: dict[str, float] = field(default_factory=dict)
    measured: int = 0
    pairs: int = 0
    total_steps: int = 0
    resumed_from: int = 0  # the step at which this call took over
    alarms: list[str] = field(default_factory=list)
    backend: str = ""
    early: str = ""  # why it is over before its last step (early_stop)
    best_step: int = 0  # whose adapter is the final one: the last step, or with early_stop the best
    held_out: dict[str, float] = field(default_factory=dict)  # margin, accuracy, loss, ... of the final adapter
    model: Any = field(default=None, repr=False)  # the model with its trained adapter, ready to generate

    @property
    def loss_falls(self) -> bool:
        """True if the mean loss over the same pairs is lower than before training."""
        return self.loss_after is not None and self.loss_after < self.loss_before

    def to_json(self) -> dict[str, Any]:
        """Everything but the model, and the history, which stands in metrics.jsonl."""
        skip = ("model", "history", "adapter_dir")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in skip}


def adapter_sha256(folder: Path) -> str:
    """Hash of an adapter's weights."""
    with (folder / "adapter_model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def steps_for(milestone: Milestone | None, pairs: int) -> dict[str, Any]:
    """`steps` and `epochs` for DPOSettings: the milestone's; for a pairs file by size: 1, 10, max(100, 1 epoch)."""
    if milestone is not None:
        return {"steps": milestone.dpo_steps, "epochs": milestone.epochs}
    if pairs <= 10:
        return {"steps": 1 if pairs <= 1 else 10, "epochs": None}
    return {"steps": 100, "epochs": 1.0}


def total_steps(settings: DPOSettings, pairs: int) -> int:
    """Optimizer steps of the whole training on `pairs` pairs. BadInputError if neither steps nor epochs are set."""
    if settings.steps is None and settings.epochs is None:
        raise BadInputError("neither steps nor epochs are set", "pass --steps or --epochs")
    in_an_epoch = math.ceil(pairs / settings.effective_batch)
    return max(settings.steps or 0, math.ceil((settings.epochs or 0) * in_an_epoch))


def pairs_at_once(settings: DPOSettings, device: str) -> int:
    """Pairs a forward pass, on "cpu" or "cuda"."""
    return settings.batch_size or (even_batch(settings.effective_batch, 8) if device == "cpu" else 1)


def even_batch(pairs: int, most: int) -> int:
    """The largest batch of at most `most` that divides `pairs`: TRL averages an evaluation over its batches."""
    return max(size for size in range(1, most + 1) if pairs % size == 0)


def check_flags(settings: DPOSettings) -> None:
    """Raise BadInputError for a batch size, an early stop or a reporter that cannot be used; needs no model."""
    from importlib.util import find_spec

    size, whole = settings.batch_size, settings.effective_batch
    if size is not None and whole % size:
        divisor = max(n for n in range(1, min(size, whole) + 1) if whole % n == 0)
        message = f"--batch-size {size} does not divide the effective batch of {whole} pairs"
        raise BadInputError(message, f"use a divisor, e.g. --batch-size {divisor}")
    if settings.early_stop is not None and not settings.held_out:
        raise BadInputError(
            "--early-stop needs held-out pairs, and this run holds none out",
            "use a milestone or a --pairs file of more than ten pairs, or leave the flag out",
        )
    reporter = settings.report_to
    if reporter != "none" and find_spec(reporter) is None:
        message = f"--report-to {reporter}: the package {reporter} is not installed"
        raise BadInputError(message, f"install it with pip install {reporter}, or leave the flag out")
