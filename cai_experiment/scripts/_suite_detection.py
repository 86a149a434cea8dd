"""eval_model.py --suite detection: how much harm each model sees on the labelled sets, with the rules and without."""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cai_experiment.errors import BadInputError, DiskError, EngineError
from cai_experiment.evaluation.found import ITEMS_FOLDER
from cai_experiment.models.choice import ModelChoice
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.plan import Part
from cai_experiment.observe.progress import Progress
from cai_experiment.scripts._common import separated
from cai_experiment.scripts._judge import OF_SERVER, identity, is_url, renamed, shown
from cai_experiment.scripts._plan_parts import in_line

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings
    from cai_experiment.evaluation.detection import Measured
    from cai_experiment.evaluation.found import Evaluation
    from cai_experiment.evaluation.harm.labelled import Sets
    from cai_experiment.scripts._target import Target

SAID = "detection_said.jsonl"  # in ITEMS_FOLDER: what each model answered, so that a killed table goes on
OF_MODELS = {"--model": "--models"}
OF_ENDPOINTS = OF_SERVER | {"--server": "--models", "--format": "--format"}


class Wanted(NamedTuple):
    """Who is measured, on what; a model that is None is what the hardware allows."""

    sets: Sets
    models: tuple[str | None, ...]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The suite's own flag; --quantization, --format and --batch-size are those of every script."""
    group = parser.add_argument_group("detection")
    group.add_argument("--models", metavar="A,B,...", type=separated, default=(),
                       help="presets, hub ids, folders or endpoints, in turn (default: --model); of an endpoint that "
                            "serves several models --judge-model names the one")  # fmt: skip


def read(args: argparse.Namespace) -> Wanted:
    """The sets and the models; prints what they are asked, since an endpoint may want money for it."""
    from cai_experiment.evaluation.harm.labelled import shipped_sets

    wanted = Wanted(shipped_sets(), args.models or (args.model,))
    print(f"detection: {_asked(wanted)}", flush=True)
    return wanted


def _asked(wanted: Wanted) -> str:
    from cai_experiment.evaluation.harm_model import MAX_TOKENS_REASON, QUESTIONS_A_TEXT, REASONS_A_TEXT

    texts = sum(map(len, wanted.sets.values()))
    names = ", ".join(shown(name) if name else "the default model" for name in wanted.models)
    return (f"{texts} texts; {QUESTIONS_A_TEXT * texts:,} questions of one letter to each model, and at most "
            f"{REASONS_A_TEXT * texts:,} for a reason of {MAX_TOKENS_REASON} tokens: {names}")  # fmt: skip


def plan_lines(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, engine: str, quantization: str
) -> tuple[list[Part], list[str]]:
    """No parts, since endpoints have prices of their own, and a line."""
    from cai_experiment.evaluation.harm.labelled import shipped_sets

    wanted = Wanted(shipped_sets(), args.models or (args.model or choice.path_or_id,))
    return [], [in_line("detection", f"{_asked(wanted)}; not counted below")]


def run(args: argparse.Namespace, wanted: Wanted, target: Target | None, folder: Path) -> Evaluation:
    """Measure the rules and each model in turn, of which one at a time is in memory: `target` gives its own back.

    What they answer is remembered in `folder`. A model that cannot be loaded or run is a row that says why; the others
    are measured all the same.
    """
    from cai_experiment.evaluation.detection import compare, measure, together
    from cai_experiment.evaluation.harm_model import RulesDetector

    if target is not None and not all(map(is_url, wanted.models)):
        target.close()
    rules = measure(RulesDetector(), wanted.sets)
    measured = [rules]
    for name in wanted.models:
        model = _measured(args, name, wanted.sets, folder / ITEMS_FOLDER / SAID)
        measured += [model] if model.failure else [model, together(model, rules)]
    return compare(measured, wanted.sets)


def _measured(args: argparse.Namespace, name: str | None, sets: Sets, said: Path) -> Measured:
    """What one model says, or why it says nothing."""
    from cai_experiment.evaluation.detection import Measured

    try:
        return _asked_of(args, name, sets, said)
    except (BadInputError, EngineError, DiskError) as error:
        label = shown(name or "the default model")
        why = renamed(str(error), OF_ENDPOINTS if is_url(name) else OF_MODELS)
        print(f"{label}: not measured: {why}", flush=True)
        return Measured(label, f"AI ({label})", failure=why.replace(name, label) if name else why)  # and no path


def _asked_of(args: argparse.Namespace, name: str | None, sets: Sets, said: Path) -> Measured:
    """What one model says; its memory is given back. The time of answers that are remembered is not known."""
    from cai_experiment.engines.load import load_engine
    from cai_experiment.evaluation.arms import Remembered, Remembering
    from cai_experiment.evaluation.detection import measure
    from cai_experiment.evaluation.harm_model import ModelDetector
    from cai_experiment.judging.judge import Judge
    from cai_experiment.judging.outage import Watched

    engine = load_engine(load_settings(args, name))
    try:
        label = shown(str(engine.describe().get("model") or name))
        print(engine.first_line, flush=True)
        remembered = Remembered(said, identity(engine))
        watched = Watched(engine, f"--models {label}", partial(renamed, names=OF_ENDPOINTS))
        judge = Judge(Remembering(watched, remembered, "detection"), label)
        try:
            with Progress(sum(map(len, sets.values())), "texts", args.verbosity) as progress:
                found = measure(ModelDetector(judge), sets, progress)
        finally:
            remembered.journal.close()
        return replace(found, seconds=0.0) if remembered.found else found
    finally:
        engine.close()


def load_settings(args: argparse.Namespace, name: str | None) -> LoadSettings:
    """How to load one of --models; None is what the hardware allows."""
    from cai_experiment.engines.load import LoadSettings

    if is_url(name):
        return LoadSettings(
            args.judge_model, args.format, engine="server", server_url=name, seed=args.seed, trains_after=False,
            server_concurrency=args.judge_concurrency, deadline=args.judge_deadline,
        )  # fmt: skip
    return LoadSettings(
        name, args.format, args.quantization, args.batch_size, seed=args.seed, trains_after=False
    )  # fmt: skip
