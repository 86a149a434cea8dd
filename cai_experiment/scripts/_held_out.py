"""Held-out pairs: the training run's pipeline on instructions of their own, for the evaluation of what was trained.

They lie in DATA_DIR/RUN/held_out/, a run folder like any other: a killed run resumes, a finished one is read.
Model, constitution, stages and gate are those of the training run's manifest; the seed is another, and an instruction
that stands in the training run, or near one that does, is refused. Every instruction gets its pair or its reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.engines.load import ELSEWHERE
from cai_experiment.errors import BadInputError
from cai_experiment.milestones import Milestone
from cai_experiment.models.choice import ModelChoice, resolve_model
from cai_experiment.models.ensembles import ENSEMBLE
from cai_experiment.models.hardware import Hardware, detect
from cai_experiment.models.plan import Part as PlanPart
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.workload import Workload
from cai_experiment.pipeline.evaluation_sets import EvaluationSet
from cai_experiment.pipeline.gate import GateSettings
from cai_experiment.pipeline.instruct import example_id
from cai_experiment.pipeline.mix import Part
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.pipeline.work_list import IN_EVALUATION_SET
from cai_experiment.records.files import read_examples, read_jsonl, show
from cai_experiment.records.manifest import FRESH, Manifest, check_same_settings
from cai_experiment.records.schema import Example
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._common import QUANTIZATIONS, positive_int
from cai_experiment.scripts._following import RANDOM
from cai_experiment.scripts._generation import close_all, generate, generation_parser, load_engines, tell_summary
from cai_experiment.scripts._inputs import earlier, rows_of
from cai_experiment.scripts._plan_parts import Need, download_gb_of, generation_lines, in_line
from cai_experiment.scripts._plumbing import plumbing_examples

FOLDER = "held_out"  # in the run's data folder
HELD_OUT = 200  # instructions: the gate passes about half, and a rate of 100 pairs is known to within 9 points
FEW = {"single": 20, "batch": 20}  # where a training of a few steps is looked at
CARRIED = ("run", "data_dir", "constitution", "batch_size", "random_weights", "seed", "price_per_hour", "verbosity")
NEAR_TRAINING = "in_or_near_the_training_run"
SAME_MODEL = ("model", "weights_sha256")  # whatever engine and precision speak for it


def add_held_out_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a script that makes held-out pairs."""
    group = parser.add_argument_group("held-out pairs")
    group.add_argument("--held-out", type=positive_int, metavar="N",
                       help=f"to make them of, none near the training run's (default: {HELD_OUT}; at milestones 0 and "
                            f"1 {FEW['batch']})")  # fmt: skip
    group.add_argument("--held-out-instructions", type=Path, metavar="FILE",
                       help="take them from FILE (default: written by the model)")  # fmt: skip
    group.add_argument("--held-out-pairs", type=Path, metavar="FILE",
                       help="these pairs instead, which nobody trained on (any preference file)")  # fmt: skip
    group.add_argument("--held-out-field", metavar="NAME", help="the field of FILE that holds the instruction")


def held_out_run(
    args: argparse.Namespace, milestone: Milestone, engine: Any = None, trained_on: Sequence[str] = ()
) -> tuple[list[Example], list[Example]]:
    """(accepted, rejected) of `args.held_out` held-out instructions; made, resumed, or read if they are all there.

    `engine` speaks for generator and critic (it stays open); without it the training run's models are loaded as
    generation loads them, and closed again. `trained_on` are further instructions to keep out (SFT's rows). Raises
    BadInputError for a run that is not there, or made with other settings, models or constitution; and what loading
    and the pipeline raise.
    """
    training = None if args.random_weights else earlier(args.data_dir / args.run)
    if args.random_weights or (training is not None and _is_random(training)):
        return plumbing_examples(args.held_out), []
    training = _known(args, training)
    settings = held_out_settings(args, training, training_instructions(args.data_dir / args.run, trained_on))
    path = args.data_dir / args.run / FOLDER
    with RunFolder(path, fresh=bool(vars(args).get("fresh"))) as folder:
        if not _is_finished(path, settings, training):
            _make(_flags(args, milestone, training), settings, folder, training, engine)
    files = (path / f"{name}.jsonl" for name in ("pairs", "rejected"))
    accepted, rejected = ([one for one in read_examples(file) if one.id < example_id(args.held_out)] for file in files)
    return accepted, rejected


def held_out_questions(accepted: Iterable[Example], rejected: Iterable[Example]) -> list[str]:
    """The instructions of a held-out run, in their order: what base and trained model are both asked."""
    return [one.instruction for one in sorted([*accepted, *rejected], key=lambda one: one.id)]


def held_out_seed(seed: int) -> int:
    """The seed of the held-out run beside a training run of `seed`: a hash of it, so that it is no neighbour's."""
    return int.from_bytes(hashlib.sha256(f"held-out/{seed}".encode()).digest()[:4]) // 2


# ---------------------------------------------------------------- what the training run was


def _is_random(training: Manifest) -> bool:
    return str(training.models["generator"].get("model")).startswith(RANDOM)


def _known(args: argparse.Namespace, training: Manifest | None) -> Manifest:
    """The training run's manifest; BadInputError if there is none, or if it knows another constitution."""
    place = show(args.data_dir / args.run)
    if training is None:
        raise BadInputError(f"{place} holds no run", "make its pairs first, e.g. with generate_mvp.py")
    if load_constitution(args.constitution).sha256 != training.constitution.get("sha256"):
        raise BadInputError(f"{args.constitution} is not the constitution that {place} was made with",
                            "name that one with --constitution")  # fmt: skip
    return training


def training_instructions(path: Path, trained_on: Sequence[str] = ()) -> list[str]:
    """Every instruction of the run in `path`, accepted or not, and `trained_on`. BadInputError: a damaged file."""
    drawn = [str(row["instruction"]) for row in read_jsonl(path / "instructions.jsonl", repair=False)]
    return [*drawn, *(one.instruction for one in read_examples(path / "pairs.jsonl")), *trained_on]


def held_out_settings(args: argparse.Namespace, training: Manifest, known: Iterable[str]) -> RunSettings:
    """The held-out run's settings: the training run's, on other instructions; `known` ones are refused.

    A guard does not read them. Fewer instructions than a finished held-out run has are its first ones.
    """
    told, seed = training.settings, held_out_seed(training.seed)
    gate = {name.removeprefix("gate_"): value for name, value in told.items() if name.startswith("gate_")}
    stages = {one.name: told[one.name] for one in dataclasses.fields(StageSettings) if one.name in told}
    mix, mix_name = _given(args)
    drawn = max(args.held_out, _had(args))
    return RunSettings(
        pairs=drawn, max_draws=drawn, every_draw=True,
        stages=StageSettings(**stages, seed=seed),
        gate=GateSettings(**gate | {"skip": tuple(gate["skip"])}),
        mix=mix, mix_name=mix_name, grid=told["grid"],
        evaluation_sets=(EvaluationSet.of("the training run's instructions", known),),
        match_lengths=told["match_lengths"], seed=seed, price_per_hour=args.price_per_hour,
    )  # fmt: skip


def _given(args: argparse.Namespace) -> tuple[tuple[Part, ...], str]:
    """(the file of --held-out-instructions as the one part of a mix, which leaves out near copies; its name)."""
    path = vars(args).get("held_out_instructions")
    if path is None:
        return (), ""
    rows, name = rows_of(path, vars(args).get("held_out_field"))
    return (Part(str(path), 1.0, rows),), name


def _had(args: argparse.Namespace) -> int:
    """How many instructions a finished held-out run has."""
    before = None if vars(args).get("fresh") else earlier(args.data_dir / args.run / FOLDER)
    return int(before.settings.get("max_draws", 0)) if before is not None and before.finished else 0


# ---------------------------------------------------------------- making them


def _is_finished(path: Path, settings: RunSettings, training: Manifest) -> bool:
    """True if all that `settings` ask for is there. Raises BadInputError if it was made with other ones."""
    before = earlier(path)
    if before is None:
        return False
    if before.settings.get("exclude") != settings.recorded()["exclude"]:
        raise BadInputError(f"{show(path)} was made beside other training instructions than {show(path.parent)} has "
                            "now (it was extended or made anew)", FRESH)  # fmt: skip
    asked = Manifest(settings.recorded(), settings.seed, _names(training), training.constitution)
    check_same_settings(replace(before, models=_names(before)), asked, show(path / "manifest.json"))
    return before.finished and int(before.settings["max_draws"]) >= settings.max_draws


def _names(manifest: Manifest) -> dict[str, dict[str, Any]]:
    return {
        role: {name: facts[name] for name in SAME_MODEL if name in facts} for role, facts in manifest.models.items()
    }


def _flags(args: argparse.Namespace, milestone: Milestone, training: Manifest | None) -> argparse.Namespace:
    """A generation script's flags for the held-out run: engine and precision as generation chooses them."""
    flags = generation_parser(None, milestone.name).parse_args([])
    for name in CARRIED:
        setattr(flags, name, getattr(args, name))
    flags.trains_after, flags.guard, flags.hardware = False, None, vars(args).get("hardware")
    flags.model, flags.format, flags.quantization = args.model, args.format, args.quantization
    if training is not None:
        flags.model = None
        flags.generator, flags.critic = (_loadable(args, training.models[role]) for role in ("generator", "critic"))
        facts = training.models["generator"]
        layout, precision = str(facts.get("layout")), str(facts.get("quantization"))
        flags.format = layout if args.format == "auto" and layout in ("chat", "base") else args.format
        own = precision if precision in QUANTIZATIONS and facts.get("engine") not in ELSEWHERE else None
        flags.quantization = own and (args.quantization or own)  # of a model elsewhere: as its engine has it
    return flags


def _loadable(args: argparse.Namespace, facts: dict[str, Any]) -> str:
    """The words by which one of the training run's models is loaded again: its name, or the flag that names its folder.

    Raises BadInputError where the manifest alone does not say where it lies.
    """
    name = str(facts["model"])
    if name.startswith(ENSEMBLE):
        raise BadInputError(f"{show(args.data_dir / args.run)} was made by {name}, which is no model to train on",
                            "name held-out pairs of your own with --held-out-pairs")  # fmt: skip
    for flag in (vars(args).get(flag) for flag in ("model", "generator", "critic")):
        if flag is not None and resolve_model(flag, detect()).name == name:
            return str(flag)
    if "weights_sha256" in facts and not (name in PRESETS and PRESETS[name].is_local):
        raise BadInputError(f"{show(args.data_dir / args.run)} was made by {name}, a folder",
                            "say with --model where it lies")  # fmt: skip
    return name


def _make(
    flags: argparse.Namespace, settings: RunSettings, folder: RunFolder, training: Manifest, engine: Any
) -> None:  # fmt: skip
    """Run or resume the pipeline in `folder` (entered)."""
    print(f"held-out pairs: {settings.max_draws} instructions into {show(folder.path)}", flush=True)
    engines = (engine, engine) if engine is not None else load_engines(flags)
    try:
        for role, speaker in zip(("generator", "critic"), engines, strict=True):
            _check_same_model(role, training.models[role], speaker.describe())
        result = generate(flags, settings, folder, *engines)
    finally:
        if engine is None:
            close_all(*engines)
    refused = {NEAR_TRAINING if why == IN_EVALUATION_SET else why: count for why, count in result.refused.items()}
    tell_summary(flags, settings, folder, replace(result, refused=refused))


def _check_same_model(role: str, then: dict[str, Any], now: dict[str, Any]) -> None:
    for name in SAME_MODEL:
        if name in then and name in now and then[name] != now[name]:
            raise BadInputError(f"held-out pairs: the {role}'s {name} was {then[name]}, now {now[name]}",
                                "name the training run's model with --model")  # fmt: skip


# ---------------------------------------------------------------- what they will take


def held_out_plan(
    args: argparse.Namespace, milestone: Milestone, choice: ModelChoice, hardware: Hardware
) -> tuple[list[PlanPart], list[Need], list[str]]:
    """(parts, disk, lines) of the held-out run on `hardware`, as a generation script's plan reckons its own.

    The training run's manifest says rounds and principles; where there is none yet, the milestone.
    """
    training = earlier(args.data_dir / args.run)
    told = {} if training is None else training.settings
    if _had(args) >= args.held_out:
        return [], [], [in_line("held-out", f"{args.held_out} instructions are done, and are read")]
    flags = _flags(args, milestone, None)
    targeted = told.get("principles", "targeted") == "targeted"
    weighed = len(load_constitution(args.constitution).principles) if targeted else 1
    rounds, critique = int(told.get("rounds", milestone.rounds)), bool(told.get("critique", True))
    work = Workload(args.held_out // 2, rounds, weighed, args.held_out, critique)
    engine, part, lines = generation_lines(flags, choice, hardware, work, trains_after=False)
    download = download_gb_of(flags, choice, engine, part.quantization)
    head = in_line("held-out", f"{args.held_out} instructions, {work.rounds} rounds, {weighed} principles weighed")
    return [part], [Need("held-out generator", download)], [head, in_line("", lines[0][len(in_line("", "")) :])]
