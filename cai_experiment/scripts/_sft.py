"""The warm start of train_dpo.py (--sft-first): its flags, its rows, and SFT before DPO."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError
from cai_experiment.judging.result import Result
from cai_experiment.models.choice import ModelChoice
from cai_experiment.models.presets import PRESETS
from cai_experiment.observe.content_logger import SUMMARY
from cai_experiment.records.files import show
from cai_experiment.scripts._common import positive
from cai_experiment.training import dpo, processes, sft
from cai_experiment.training.data import Pair, normalized
from cai_experiment.training.helpful import choose_helpful, read_helpful
from cai_experiment.training.settings import DPOSettings, TrainResult, total_steps

if TYPE_CHECKING:
    from cai_experiment.observe.content_logger import ContentLogger

ITS_FLAGS = ("sft_share", "sft_epochs", "sft_learning_rate", "helpful", "helpful_share")
DPO_FLAGS = ("steps", "epochs", "learning_rate", "beta", "loss", "nll_weight", "eval_every", "early_stop")


@dataclass
class WarmStart:
    """SFT before DPO: its settings, the pairs whose revisions it learns, how many of its rows are helpful ones.

    `settings.output_dir` is CHECKPOINT_DIR/RUN/sft. `alone`: no pairs are left for DPO. `result` comes with `train`.
    """

    settings: DPOSettings
    pairs: tuple[Pair, ...]
    helpful: int
    alone: bool
    result: TrainResult | None = None

    @property
    def line(self) -> str:
        """What is planned, for the terminal."""
        rows, steps = len(self.settings.pairs), total_steps(self.settings, len(self.settings.pairs))
        mixed = f", {self.helpful} of them helpful" if self.helpful else ""
        after = "no DPO follows (--sft-share 1)" if self.alone else "then DPO from its adapter"
        return f"SFT first: {rows} rows{mixed}; {steps} steps at {self.settings.learning_rate:g}; {after}"

    @property
    def note(self) -> str:
        """What was done, for the report."""
        assert self.result is not None
        return sft.summary(self.result, self.helpful)

    @property
    def alarms(self) -> list[str]:
        """What SFT has raised, for the report of DPO."""
        assert self.result is not None
        return [f"SFT: {alarm}" for alarm in self.result.alarms]

    def metrics(self) -> dict[str, Result]:
        """SFT's loss over the same rows, before and after it, in nats a token."""
        assert self.result is not None
        first = self.result
        found = {"sft_loss_before": first.loss_before, "sft_loss_after": first.loss_after}
        return {name: Result(value, first.measured, None) for name, value in found.items()}

    def described(self) -> dict[str, Any]:
        """The settings for the report, beside those of DPO; of SFT alone all there are."""
        then = self.settings.identity()
        if self.alone:
            return {k: v for k, v in then.items() if k not in ("beta", "nll_weight")} | {"sft_helpful": self.helpful}
        found = {f"sft_{name}": then[name] for name in ("pairs", "epochs", "learning_rate")}
        return found | {"sft_helpful": self.helpful}


def share(text: str) -> float:
    """argparse type: a share greater than 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share between 0 and 1")
    return value


def add_flags(flags: argparse.ArgumentParser) -> None:
    """--sft-first and what goes with it."""
    group = flags.add_argument_group("warm start (SL-CAI)")
    group.add_argument("--sft-first", action="store_true", help="fine-tune on revised answers, then DPO from there")
    group.add_argument("--sft-share", type=share, metavar="S", help="of the instructions; 1: no DPO (default: 0.5)")
    group.add_argument("--sft-epochs", type=positive, metavar="N", help="(default: 3, or the preset's)")
    group.add_argument("--sft-learning-rate", type=positive, metavar="RATE", help="(default: 1e-4, or the preset's)")
    group.add_argument("--helpful", type=Path, metavar="FILE", help="instruction/answer rows to mix into SFT")
    group.add_argument("--helpful-share", type=share, metavar="S", help="of SFT's rows (default: 0.2)")


def check_flags(args: argparse.Namespace) -> None:
    """Raise BadInputError for flags of SFT that do nothing, or that contradict each other."""
    given = [name for name in ITS_FLAGS if getattr(args, name) is not None]
    if given and not args.sft_first:
        raise BadInputError(f"--{given[0].replace('_', '-')} speaks of SFT", "add --sft-first")
    if args.sft_first and processes.count() > 1:
        raise BadInputError("--sft-first runs in one process", "warm up alone first (--sft-share 1), or leave it out")
    if is_alone(args):
        default = DPOSettings((), Path())
        given = [name for name in DPO_FLAGS if getattr(args, name) not in (None, getattr(default, name))]
        if given:
            message = f"--{given[0].replace('_', '-')} speaks of DPO, for which --sft-share 1 leaves no pairs"
            raise BadInputError(message, "leave one of the two out (SFT has --sft-epochs and --sft-learning-rate)")
    if args.helpful_share is not None and args.helpful is None:
        raise BadInputError("--helpful-share needs helpful rows", "name a file of them with --helpful")
    if args.helpful_share == 1:
        raise BadInputError("--helpful-share 1 leaves no revisions", "use a smaller share, e.g. 0.2")
    if not (args.fresh or args.plan):
        sft.check_first(args.checkpoint_dir / args.run, args.sft_first)


def is_alone(args: argparse.Namespace) -> bool:
    """True if no DPO follows SFT."""
    return bool(args.sft_first and args.sft_share == 1)


def divide(args: argparse.Namespace, pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """(SFT's pairs, DPO's); without --sft-first all are DPO's."""
    if not args.sft_first:
        return [], list(pairs)
    return sft.split_for_sft(pairs, args.seed, args.sft_share or sft.SHARE)


def warm_start(
    args: argparse.Namespace, settings: DPOSettings, pairs: Sequence[Pair], others: Sequence[Pair], choice: ModelChoice
) -> WarmStart | None:
    """The warm start on `pairs`; None without --sft-first. `others` (DPO's pairs and the held-out) it must not see."""
    if not args.sft_first:
        return None
    helpful = _helpful(args, pairs, others)
    preset = PRESETS.get(args.random_weights) if args.random_weights else choice.preset
    rate, epochs = args.sft_learning_rate, args.sft_epochs
    if preset is not None and preset.training is not None and (rate is None or epochs is None):
        rate, epochs = rate or preset.training.sft_learning_rate, epochs or preset.training.sft_epochs
        print(f"SFT at {rate:g} for {epochs:g} epochs by the preset {preset.key}: {preset.training.sft_reason}")
    rows = sft.sft_rows(pairs, helpful)
    first = sft.sft_settings(settings, rows, epochs or sft.EPOCHS, rate or sft.LEARNING_RATE)
    if settings.resume is not None and is_of_sft(args):
        first = replace(first, resume=settings.resume)
    return WarmStart(first, tuple(pairs), len(helpful), not settings.pairs)


def _helpful(args: argparse.Namespace, pairs: Sequence[Pair], others: Sequence[Pair]) -> list[Pair]:
    """The helpful rows of --helpful, none of which is an evaluation set's or asks what a pair asks."""
    if args.helpful is None:
        return []
    from cai_experiment.pipeline.evaluation_sets import EvaluationTexts, shipped_sets
    from cai_experiment.pipeline.known import fingerprint

    rows, texts = read_helpful(args.helpful), EvaluationTexts(shipped_sets())
    usable = [row for row in rows if not texts.holds(fingerprint(row.instruction))]
    if len(usable) < len(rows):
        print(f"{len(rows) - len(usable)} of {len(rows)} rows of {show(args.helpful)} are evaluation sets': left out")
    wanted = args.helpful_share or sft.HELPFUL_SHARE
    known = {normalized(pair.instruction) for pair in (*pairs, *others)}
    revisions = len(sft.sft_rows(pairs))
    chosen = choose_helpful(usable, revisions, wanted, known, args.seed)
    if not chosen:
        message = f"{show(args.helpful)} holds no row to mix in"
        raise BadInputError(message, "use another file, or a larger --helpful-share")
    if len(chosen) < round(revisions * wanted / (1 - wanted)):
        found = len(chosen) / (len(chosen) + revisions)
        print(f"{show(args.helpful)} holds {len(chosen)} usable rows: {found:.0%} of SFT's, not {wanted:.0%}")
    return chosen


def is_of_sft(args: argparse.Namespace) -> bool:
    """True if --resume names a checkpoint of the run's SFT."""
    return bool(args.resume.resolve().parent == (args.checkpoint_dir / args.run / sft.FOLDER).resolve())


def from_adapter(settings: DPOSettings, warm: WarmStart | None) -> DPOSettings:
    """DPO's settings with SFT's adapter as its start; not for SFT alone."""
    if warm is None or warm.alone:
        return settings
    resume = None if warm.settings.resume is not None else settings.resume
    return replace(settings, start_adapter=warm.settings.output_dir / "final", resume=resume)


def trainings(settings: DPOSettings, warm: WarmStart | None) -> list[DPOSettings]:
    """What is trained, in order: DPO, SFT and DPO, or SFT alone."""
    if warm is None:
        return [settings]
    return [warm.settings] if warm.alone else [warm.settings, settings]


def all_finished(settings: DPOSettings, warm: WarmStart | None) -> bool:
    """True if every part of the run is finished; BadInputError if one was made with other settings."""
    parts = trainings(settings, warm)
    if not all([dpo.is_finished(part.output_dir) for part in parts]):
        return False
    for part in parts:
        dpo.check_settings(part if warm is None or part is warm.settings else from_adapter(part, warm))
    return True


def seconds_before(warm: WarmStart | None, trained: TrainResult) -> float:
    """Wall seconds of SFT's steps in earlier calls; those of `trained` are counted elsewhere."""
    first = None if warm is None else warm.result
    if first is None or first is trained:
        return 0.0
    return float(sum(row["seconds"] for row in first.history if row["step"] <= first.resumed_from))


def train(
    settings: DPOSettings, warm: WarmStart | None, engine: Any, content: ContentLogger
) -> tuple[DPOSettings, TrainResult]:
    """SFT if asked for, then DPO; what either said. Gives DPO's settings as used, and the result of the last part."""
    model, tokenizer = engine.release_for_training()
    if warm is not None:
        warm.settings = replace(warm.settings, base=settings.base)  # known since the model is loaded
        warm.result = first = sft.train(warm.settings, model, tokenizer, engine.renderer, content=content)
        content.log_stage(SUMMARY, warm.note)
        if first.stopped or warm.alone:
            if first.model is None:
                first.model = dpo.load_adapter(model, first.adapter_dir)
            return settings, first
        model, first.model = sft.plain(first.model or model), None
        settings = from_adapter(settings, warm)
    trained = dpo.train(settings, model, tokenizer, engine.renderer, content=content)
    if processes.is_first():
        content.log_stage(SUMMARY, "\n".join(dpo.summary(trained)))
    return settings, trained
