"""What scripts that train share: settings from the flags, loading the model, the milestone's evaluation and report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError, UserError
from cai_experiment.milestones import MILESTONES, SCRIPTS, Milestone
from cai_experiment.models.choice import ModelChoice
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.presets import PRESETS
from cai_experiment.observe.content_logger import CONTENT_LOG, ContentLogger
from cai_experiment.records.files import read_examples
from cai_experiment.records.schema import Example
from cai_experiment.scripts._following import next_command
from cai_experiment.scripts._sft import WarmStart, is_alone
from cai_experiment.scripts._training_work import SPEC_LENGTH, backend_of, model_words, with_length
from cai_experiment.training import processes
from cai_experiment.training.data import Pair, read_pairs
from cai_experiment.training.plumbing import is_plumbing, label, plumbing_pairs
from cai_experiment.training.settings import (
    SPEC_LEARNING_RATE,
    DPOSettings,
    TrainResult,
    adapter_sha256,
    check_flags,
    steps_for,
)

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings

WITHOUT_ANSWERS = ("single", "batch")  # too little training for held-out answers to say anything
ANSWERED_FOR_THE_LOG = 3  # instructions
AFTER_TRAINING = {  # the milestones themselves name what follows generation
    name: f"{SCRIPTS}eval_model.py --milestone {name}" for name in ("mvp", "full")
}


def training_settings(
    args: argparse.Namespace, pairs: Sequence[Pair], in_file: int, choice: ModelChoice, hardware: Hardware,
    held_out: Sequence[Pair] = (),
) -> DPOSettings:  # fmt: skip
    """Settings from the flags, the milestone (or the file's size) and the model's preset; says what was inherited.

    While it trains, `held_out` is measured, and the first of its instructions are answered (see `sample_prompts`).
    """
    if args.max_cost is not None and not args.price_per_hour:
        raise BadInputError("--max-cost needs a price", "add --price-per-hour")
    steps = {"steps": args.steps, "epochs": args.epochs}
    if args.steps is None and args.epochs is None:
        steps = steps_for(None if args.pairs else MILESTONES[args.milestone], in_file)
    preset = PRESETS.get(args.random_weights) if args.random_weights else choice.preset
    rate, override = args.learning_rate, preset.training if preset else None
    if rate is None and preset is not None and override is not None and not is_alone(args):
        rate = override.after_sft if args.sft_first else override.learning_rate
        print(f"learning rate {rate:g} from the preset {preset.key}: {override.reason}")
    settings = DPOSettings(
        tuple(pairs), args.checkpoint_dir / args.run, **steps, learning_rate=rate or SPEC_LEARNING_RATE,
        beta=args.beta, lora_r=args.lora_r, lora_alpha=args.lora_alpha, effective_batch=args.effective_batch,
        loss=args.loss, nll_weight=args.nll_weight, backend=args.backend, token_budget=args.token_budget,
        save_every=args.save_every, keep=args.keep, eval_every=args.eval_every, early_stop=args.early_stop,
        sample_every=args.sample_every, batch_size=args.batch_size, max_length=args.max_length or SPEC_LENGTH,
        seed=args.seed, model_name=model_words(args, choice, hardware), started=args.started,
        max_hours=args.max_hours, max_cost=args.max_cost, price_per_hour=args.price_per_hour,
        report_to=args.report_to, resume=args.resume, held_out=tuple(held_out),
        sample_prompts=sample_prompts(pairs, held_out),
    )  # fmt: skip
    if args.backend == "unsloth" and hardware.kind != "cuda":
        raise BadInputError("--backend unsloth needs an NVIDIA GPU", "use --backend fast, or trl")
    several = processes.count() > 1 and not args.plan
    if several and backend_of(args, choice, hardware, args.quantization or hardware.training_quantization) == "unsloth":
        raise processes.only_one("--backend unsloth")
    check_flags(settings)  # before a model is loaded for them
    if args.max_length is not None:
        return settings
    settings, why = with_length(args, settings, choice, hardware)
    print(why, end="\n" if why else "", flush=True)
    return settings


def sample_prompts(pairs: Sequence[Pair], held_out: Sequence[Pair]) -> tuple[str, ...]:
    """Instructions to answer while training: held-out ones, or the first that is trained on where none are held out."""
    alone = [pair.instruction for pair in pairs if len(pair.turns) == 1][:1]
    return tuple(pair.instruction for pair in held_out if len(pair.turns) == 1)[:16] or tuple(alone)


def load_settings(args: argparse.Namespace) -> LoadSettings:
    """How the model that is trained and evaluated is loaded."""
    from cai_experiment.engines.load import MAX_LENGTH, LoadSettings

    engine = {"auto": "auto", "unsloth": "unsloth"}.get(args.backend, "hf")
    longest = max(MAX_LENGTH, args.max_length or 0)  # a shorter one drops pairs, and does not shorten what is generated
    return LoadSettings(
        model=args.model, layout=args.format, engine=engine, quantization=args.quantization, seed=args.seed,
        random_weights=args.random_weights, max_length=longest,
    )  # fmt: skip


def say_model(args: argparse.Namespace, hardware: Hardware) -> None:
    """Print a script's first line: model, engine, quantisation and why; nothing is loaded for it."""
    from cai_experiment.engines.load import make_plan

    print(make_plan(load_settings(args), hardware).first_line, flush=True)


def load_for_training(args: argparse.Namespace) -> Any:
    """The engine whose model is trained and evaluated."""
    from cai_experiment.engines.load import load_engine

    return load_engine(load_settings(args))


def base_of(engine: Any) -> str:
    """Which weights an engine holds, by revision, hash of the files' ends or seed; "" if that is not known."""
    facts = engine.describe()
    names = ("weights_sha256", "revision", "random_seed")
    known = {name: facts[name] for name in names if facts.get(name) is not None}
    return json.dumps({"model": facts["model"], **known, "quantization": facts["quantization"]}) if known else ""


def own_pairs(args: argparse.Namespace, milestone: Milestone, folder: Path) -> Sequence[Pair]:
    """The pairs that a milestone made; with random weights, which make none that pass, fixed ones, and says so."""
    path = folder / "pairs.jsonl"
    if args.random_weights is None or (path.exists() and read_examples(path)):
        return read_pairs(path)
    pairs = plumbing_pairs(milestone.pairs)
    print(label(pairs), flush=True)
    return pairs


def peak_gpu_gb() -> dict[str, float] | None:
    """This process's peak of GPU memory since the last call, in GB, as torch counts it; None where it used none."""
    torch = sys.modules.get("torch")  # an engine in another process may have left it unimported here
    if torch is None or not torch.cuda.is_available() or not torch.cuda.max_memory_allocated():
        return None
    found = {"allocated": torch.cuda.max_memory_allocated() / 1e9, "reserved": torch.cuda.max_memory_reserved() / 1e9}
    torch.cuda.reset_peak_memory_stats()
    return found


def seconds_of_training(trained: TrainResult, this_call: float) -> float:
    """Wall seconds of training: this call's, loading included, and the steps of the calls before it."""
    return this_call + sum(row["seconds"] for row in trained.history if row["step"] <= trained.resumed_from)


def evaluate_and_report(
    args: argparse.Namespace, milestone: Milestone, settings: DPOSettings, held_out: Sequence[Pair],
    trained: TrainResult, engine: Any, truth: bool, training_seconds: float, warm: WarmStart | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate the trained model on this milestone's terms; writes report.json and report.html, gives the report.

    `warm` is the SFT that came first, if any: answers before are the base model's, implicit rewards DPO's own.
    """
    from cai_experiment.evaluation.measure import HELD_OUT, EvaluationSettings, evaluate_training
    from cai_experiment.evaluation.report import RunFacts, write_report

    started, peak = time.monotonic(), peak_gpu_gb()
    folder = args.data_dir / args.run
    accepted, rejected = (_examples(folder / name) for name in ("pairs.jsonl", "rejected.jsonl"))
    answers = 0 if milestone.name in WITHOUT_ANSWERS else HELD_OUT
    pairs = (*settings.pairs, *(warm.pairs if warm else ()))
    evaluation = evaluate_training(
        EvaluationSettings(milestone.name, truth, args.seed, held_out=answers, verbosity=args.verbosity),
        trained, engine.tokenizer, engine.renderer, pairs, held_out,
        unused_instructions=[example.instruction for example in rejected or beside_pairs(args)],
        engine_over=type(engine).from_model, reference=settings.start_adapter,
        also_trained_on=[row.turns[-1].text for row in warm.settings.pairs] if warm else (),
    )  # fmt: skip
    _add_notes(evaluation, pairs, trained, warm)
    tell_evaluation(args, milestone, evaluation, trained, engine, settings)
    loaded = engine.describe()
    facts = RunFacts(
        milestone, args.run, accepted, rejected,
        settings={name: loaded.get(name) for name in ("model", "engine", "quantization")}
        | (warm.described() if warm and warm.alone else settings.identity())
        | (warm.described() if warm else {}),
        seconds={"training": training_seconds, "evaluation": time.monotonic() - started},
        peak_gpu_gb={"training": peak},
        price_per_hour=args.price_per_hour,
        next_command=next_command(args, milestone, AFTER_TRAINING.get(milestone.name, milestone.next_command)),
        history=trained.history, adapter=adapter_sha256(trained.adapter_dir),
    )  # fmt: skip
    return write_report(folder, evaluation, facts)


def tell_evaluation(
    args: argparse.Namespace, milestone: Milestone, evaluation: Any, trained: TrainResult, engine: Any,
    settings: DPOSettings,
) -> None:  # fmt: skip
    """What was read, base against trained, into the run's content log. Where the evaluation asks for no answers, some
    training instructions are answered for the log alone: people look before they read.
    """
    from cai_experiment.evaluation.answers import harm_of_some
    from cai_experiment.evaluation.arms import Speakers
    from cai_experiment.evaluation.content import tell

    if milestone.name in WITHOUT_ANSWERS:
        speakers = Speakers(trained.model, engine.tokenizer, engine.renderer, type(engine).from_model)
        asked = dict.fromkeys(pair.instruction for pair in settings.pairs if len(pair.turns) == 1)
        evaluation = harm_of_some(speakers, list(asked)[:ANSWERED_FOR_THE_LOG], args.seed)
    with ContentLogger(args.verbosity, args.data_dir / args.run / CONTENT_LOG) as log:
        tell(log, evaluation)


def _add_notes(evaluation: Any, pairs: Sequence[Pair], trained: TrainResult, warm: WarmStart | None) -> None:
    """What training has to say in the report: alarms, what SFT did, pairs that were dropped."""
    evaluation.notes += trained.alarms
    if is_plumbing(pairs):
        evaluation.notes.insert(0, label(pairs))
    if warm is not None:
        evaluation.notes += [warm.note, *(warm.alarms if warm.result is not trained else ())]
        evaluation.metrics |= warm.metrics()
    if trained.dropped and trained is not (warm and warm.result):
        evaluation.notes.append(f"{len(trained.dropped)} overlong pairs were dropped, not cut")


def beside_pairs(args: argparse.Namespace) -> list[Example]:
    """Rejected examples of the run that made --pairs, whose instructions nobody has trained on; none if unreadable."""
    pairs = vars(args).get("pairs")
    if pairs is None:
        return []
    try:
        return _examples(pairs.parent / "rejected.jsonl")
    except UserError as error:  # another project's file of that name: training is done, its report is not lost for it
        print(f"no further instructions to evaluate on: {error}")
        return []


def _examples(path: Path) -> list[Example]:
    """The examples of this project's own file; none if the pairs came from elsewhere."""
    return read_examples(path) if path.exists() else []
