"""The flow of milestones 0 to 3: make pairs, guard them (3), train on them (0 and 1), report, say what is next."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.engines.load import ELSEWHERE
from cai_experiment.errors import EXIT_NO_GO, EXIT_OK, BadInputError
from cai_experiment.milestones import MILESTONES, SCRIPTS, Milestone
from cai_experiment.models.choice import ModelChoice
from cai_experiment.models.hardware import detect
from cai_experiment.observe.content_logger import CONTENT_LOG, SUMMARY, ContentLogger
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.records.files import ExampleFile
from cai_experiment.records.manifest import Manifest
from cai_experiment.records.schema import Example
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts import _training
from cai_experiment.scripts._beforehand import finished_report, generation_ended
from cai_experiment.scripts._following import next_command
from cai_experiment.scripts._generation import (
    WITH_TRAINING,
    check_engine_flags,
    close_all,
    generate,
    generation_parser,
    load_engines,
    run_settings,
    tell_summary,
)
from cai_experiment.scripts._guarding import choose_guard, shares
from cai_experiment.scripts._inputs import chosen_model, extension_line, speaks_of_world
from cai_experiment.scripts._judge import THE_CRITIC, check_judge, is_url, load_judge, shown
from cai_experiment.scripts._turns import make_guarded
from cai_experiment.scripts._verbosity import last_word

if TYPE_CHECKING:
    from cai_experiment.engines.guard import GuardChoice
    from cai_experiment.evaluation.found import Evaluation
    from cai_experiment.evaluation.measure import EvaluationSettings
    from cai_experiment.pipeline.guarding import GuardCounts

SHARED_FLAGS = ("run", "data_dir", "checkpoint_dir", "seed", "quantization", "format", "random_weights", "debug",
                "price_per_hour", "verbosity", "constitution", "model", "generator", "critic")  # fmt: skip


def run_milestone(doc: str | None, name: str, argv: Sequence[str] | None) -> int:
    """Everything that a milestone's script does; gives its exit code: 0 go, 3 no-go."""
    args = generation_parser(doc, name).parse_args(argv)
    check_engine_flags(args)
    milestone, settings = MILESTONES[name], run_settings(args, MILESTONES[name])
    constitution = load_constitution(args.constitution)  # a mistake here is named before a model is loaded
    choice = chosen_model(args, detect())
    if args.plan:
        from cai_experiment.scripts._plan import milestone_lines

        print(*milestone_lines(args, milestone, settings), sep="\n")
        return EXIT_OK
    check_judge(args)
    if args.judge and not is_url(args.judge) and name in WITH_TRAINING and detect().kind == "cuda":
        raise BadInputError(
            f"--judge {args.judge} would share the GPU with the model that is trained next",
            f"name an endpoint, or judge afterwards: {SCRIPTS}eval_model.py --milestone {name} --judge {args.judge}",
        )
    path = args.data_dir / args.run
    if args.add:
        print(extension_line(args, settings.pairs), flush=True)
    report = None if args.fresh else finished_report(args, milestone, settings, constitution.sha256)
    if report is None:
        if args.fresh and name in WITH_TRAINING:
            with RunFolder(args.checkpoint_dir / args.run, fresh=True):
                pass  # what was trained on the old pairs is moved aside with them
        with RunFolder(path, args.fresh) as folder:
            report = make_report(args, milestone, settings, folder, choice, constitution.sha256)
    from cai_experiment.evaluation.reporting.screen import print_report

    print_report(report)
    print(f"report: {path / 'report.html'}")
    last_word(args.verbosity, f"{report['verdict']}; report: {path / 'report.html'}")
    return EXIT_OK if report["verdict"] == "go" else EXIT_NO_GO


def make_report(
    args: argparse.Namespace, milestone: Milestone, settings: RunSettings, folder: RunFolder, choice: ModelChoice,
    constitution_sha256: str,
) -> dict[str, Any]:  # fmt: skip
    """Make the pairs, evaluate them, train on them where the milestone does; write the report and give it."""
    from cai_experiment.evaluation.dataset import describe_pairs
    from cai_experiment.evaluation.generation import NO_CRITIQUE
    from cai_experiment.evaluation.measure import EvaluationSettings
    from cai_experiment.evaluation.report import RunFacts, write_report

    engines, counts = make_pairs(args, settings, folder, constitution_sha256)
    manifest = Manifest.read(folder.path / "manifest.json")
    accepted, rejected = (ExampleFile(folder.path / name) for name in ("pairs.jsonl", "rejected.jsonl"))
    started = time.monotonic()
    truth = speaks_of_world(args)
    scope = EvaluationSettings(milestone.name, truth, args.seed, verbosity=args.verbosity)
    evaluation = judged(args, scope, accepted, rejected, settings.pairs, engines)
    if not settings.stages.critique:
        evaluation.notes.append(NO_CRITIQUE)
    loaded = manifest.models["generator"]
    generation = manifest.wall_seconds + time.monotonic() - started
    seconds, guard = {"loading": manifest.loading_seconds, "generation": generation}, None
    if counts is not None:
        seconds["guard"] = manifest.guard["seconds"]
        guard = {"name": manifest.guard["name"], "safe": counts.safe}
    facts = RunFacts(
        milestone, args.run, accepted, rejected,
        settings={name: loaded.get(name) for name in ("model", "engine", "quantization")}
        | {"critic": manifest.models["critic"].get("model"), "judge": args.judge or THE_CRITIC} | settings.recorded(),
        seconds=seconds,
        peak_gpu_gb={"generation": _training.peak_gpu_gb()},
        price_per_hour=args.price_per_hour,
        next_command=next_command(args, milestone, milestone.next_command, loaded.get("engine") in ELSEWHERE),
        dataset=describe_pairs(accepted, rejected, manifest, guard),
    )  # fmt: skip
    report = write_report(folder.path, evaluation, facts)
    if milestone.name in WITH_TRAINING and (accepted or args.random_weights):
        assert engines is not None
        if engines[1] is not engines[0]:
            engines[1].close()  # its memory is training's now
        report = train_on_pairs(args, milestone, folder.path, engines[0], choice, truth)
    elif engines:
        close_all(*engines)
    return report


def judged(
    args: argparse.Namespace, scope: EvaluationSettings, accepted: Sequence[Example], rejected: Sequence[Example],
    wanted: int, engines: tuple[Any, Any] | None,
) -> Evaluation:  # fmt: skip
    """What a judge says of the pairs: the critic that sat with them, or the one of --judge, which must be fit for it.

    A local one is loaded in the models' place where they are needed no more.
    """
    from cai_experiment.evaluation.gates import fit_gate
    from cai_experiment.evaluation.measure import evaluate_generation
    from cai_experiment.evaluation.verdicts import fitness_of
    from cai_experiment.judging.judge import Judge

    if args.judge is None:
        critic = Judge(engines[1], f"{shown(str(engines[1].describe().get('model')))}, the critic") if engines else None
        return evaluate_generation(scope, accepted, rejected, wanted, critic)
    if engines and scope.milestone not in WITH_TRAINING and not is_url(args.judge):
        close_all(*engines)
    judge = load_judge(args)
    try:
        principles = load_constitution(args.constitution).principles
        found = evaluate_generation(scope, accepted, rejected, wanted, judge, principles)
        found += fitness_of(judge, scope.truth, args.seed)
    finally:
        judge.engine.close()
    found.gates.append(fit_gate(found.metrics, "generation"))
    return found


def make_pairs(
    args: argparse.Namespace, settings: RunSettings, folder: RunFolder, constitution_sha256: str
) -> tuple[tuple[Any, Any] | None, GuardCounts | None]:
    """Generate; with a guard, make up for the pairs that it turns down until enough pass both.

    Gives the engines that are still open (the guard needs the generator's memory, so with a guard there are none,
    unless it is the generator itself), and what the guard said of the pairs that passed the gate.
    """
    guard, models = choose_guard(args, folder.path), _Models(args, folder)
    try:
        if guard is None:
            models.make(settings)
            return models.engines, None
        made = generation_ended(args, settings, constitution_sha256)  # stopped while it was guarded
        counts = make_guarded(args, settings, folder, guard, models, made)
        return models.engines, counts
    except BaseException:
        models.close()  # a signal must not leave a model's process behind
        raise


class _Models:
    """Generator and critic: loaded for the first pairs, and anew after they made room for a guard."""

    def __init__(self, args: argparse.Namespace, folder: RunFolder) -> None:
        self.args, self.folder = args, folder
        self.engines: tuple[Any, Any] | None = None

    def make(self, settings: RunSettings) -> None:
        """Run or resume the pipeline; prints what came of it."""
        began = time.monotonic()
        self.engines = self.engines or load_engines(self.args)
        loading = time.monotonic() - began
        try:
            result = generate(self.args, settings, self.folder, *self.engines)
        finally:
            if not isinstance(sys.exception(), BadInputError):  # which leaves the folder as it was
                note_loading(self.folder.path / "manifest.json", loading, self.args.price_per_hour)
        tell_summary(self.args, settings, self.folder, result)

    def leave(self, guard: GuardChoice) -> Any | None:
        """Close the engines, but for the shipped model's where it is the guard; gives that."""
        if self.engines and shares(guard, self.engines[0]):
            return self.engines[0]
        self.close()
        return None

    def close(self) -> None:
        """Close what is open."""
        if self.engines:
            close_all(*self.engines)
        self.engines = None


def note_loading(place: Path, seconds: float, price_per_hour: float) -> None:
    """Put the time that downloading and loading took into a run's manifest, and its cost."""
    if place.exists():
        Manifest.read(place).after_loading(seconds, price_per_hour).write(place)


def train_on_pairs(
    args: argparse.Namespace, milestone: Milestone, folder: Path, engine: Any, choice: ModelChoice, truth: bool
) -> dict[str, Any]:
    """DPO on the run's own pairs with the model that made them; adds the training part to the report and gives it."""
    from cai_experiment.scripts import train_dpo
    from cai_experiment.training import dpo

    flags = train_dpo.parser().parse_args(["--milestone", milestone.name])
    for name in SHARED_FLAGS:
        setattr(flags, name, getattr(args, name))
    hardware = detect()
    facts = engine.describe()
    if facts.get("engine") == "hf" and str(facts.get("device")).startswith("cuda"):
        flags.backend = "trl"  # as auto decides it later: the rows that fit depend on it
    pairs, started = _training.own_pairs(args, milestone, folder), time.monotonic()
    settings = _training.training_settings(flags, pairs, len(pairs), choice, hardware)
    with RunFolder(settings.output_dir):
        settings = replace(settings, base=_training.base_of(engine))
        model, tokenizer = engine.release_for_training()
        with ContentLogger(args.verbosity, settings.output_dir / CONTENT_LOG) as content:
            trained = dpo.train(settings, model, tokenizer, engine.renderer, content=content)
            content.log_stage(SUMMARY, "\n".join(dpo.summary(trained)))
        seconds = _training.seconds_of_training(trained, time.monotonic() - started)
        report = _training.evaluate_and_report(flags, milestone, settings, [], trained, engine, truth, seconds)
        (settings.output_dir / train_dpo.EVALUATED).touch()
    return report
