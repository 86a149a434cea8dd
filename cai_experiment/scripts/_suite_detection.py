"""eval_model.py --suite detection: how much harm each model sees on the labelled sets, with the rules and without."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cai_experiment.errors import BadInputError, DiskError, EngineError
from cai_experiment.observe.progress import Progress
from cai_experiment.scripts._judge import is_url, shown

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings
    from cai_experiment.evaluation.detection import Measured
    from cai_experiment.evaluation.found import Evaluation
    from cai_experiment.evaluation.harm.labelled import Sets


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The suite's own flag; --quantization, --format and --batch-size are those of every script."""
    group = parser.add_argument_group("detection")
    group.add_argument("--models", metavar="A,B,...", type=names, default=(),
                       help="presets, hub ids, folders or endpoints, in turn (default: --model)")  # fmt: skip


def names(text: str) -> tuple[str, ...]:
    """argparse type: names between commas, each once."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError("names no model")
    return found


def run(args: argparse.Namespace) -> Evaluation:
    """Measure the rules and each model of --models in turn, of which one at a time is in memory.

    A model that cannot be loaded or run is a row that says why; the others are measured all the same.
    """
    from cai_experiment.evaluation.detection import compare, measure, together
    from cai_experiment.evaluation.harm.labelled import shipped_sets
    from cai_experiment.evaluation.harm_model import RulesDetector

    sets = shipped_sets()
    rules = measure(RulesDetector(), sets)
    measured = [rules]
    for name in args.models or (args.model,):
        model = _measured(args, name, sets)
        measured += [model] if model.failure else [model, together(model, rules)]
    return compare(measured, sets)


def _measured(args: argparse.Namespace, name: str | None, sets: Sets) -> Measured:
    """What one model says; its memory is given back."""
    from cai_experiment.engines.load import load_engine
    from cai_experiment.evaluation.detection import Measured, measure
    from cai_experiment.evaluation.harm_model import ModelDetector
    from cai_experiment.judging.judge import Judge

    try:
        engine = load_engine(load_settings(args, name))
        try:
            label = shown(str(engine.describe().get("model") or name))
            print(engine.first_line, flush=True)
            with Progress(sum(map(len, sets.values())), "texts", args.verbosity) as progress:
                return measure(ModelDetector(Judge(engine, label)), sets, progress)
        finally:
            engine.close()
    except (BadInputError, EngineError, DiskError) as error:
        label = shown(name or "the default model")
        print(f"{label}: not measured: {error}", flush=True)
        why = str(error).replace(name, label) if name else str(error)  # a report holds no path of this machine
        return Measured(label, f"AI ({label})", failure=why)


def load_settings(args: argparse.Namespace, name: str | None) -> LoadSettings:
    """How to load one of --models; None is what the hardware allows."""
    from cai_experiment.engines.load import LoadSettings

    if is_url(name):
        return LoadSettings(
            None, args.format, engine="server", server_url=name, seed=args.seed, trains_after=False,
            server_concurrency=args.judge_concurrency, deadline=args.judge_deadline,
        )  # fmt: skip
    return LoadSettings(
        name, args.format, args.quantization, args.batch_size, seed=args.seed, trains_after=False
    )  # fmt: skip
