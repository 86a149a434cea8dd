"""What every script that makes pairs shares: its flags, its settings, loading the models, running the pipeline."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.broad_grid import BROAD
from cai_experiment.constitution.grid import HOUSEHOLD
from cai_experiment.constitution.principles import load_constitution
from cai_experiment.errors import BadInputError
from cai_experiment.milestones import MAX_TOKENS_ANSWER, MAX_TOKENS_CRITIQUE, Milestone
from cai_experiment.models.choice import is_ensemble
from cai_experiment.models.hardware import detect
from cai_experiment.models.roles import configuration
from cai_experiment.observe.content_logger import CONTENT_LOG, SUMMARY, ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.gate import CANNOT_SKIP, REASONS, GateSettings
from cai_experiment.pipeline.runner import replay_pipeline, run_pipeline
from cai_experiment.pipeline.settings import RunResult, RunSettings
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.pipeline.work_list import IN_EVALUATION_SET
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._common import add_generation_flags, base_parser, positive_int
from cai_experiment.scripts._ensemble import make_ensemble
from cai_experiment.scripts._inputs import (
    chosen_model,
    earlier,
    evaluation_sets,
    mix_of,
    named,
    rows_of,
    speaks_of_world,
    target,
)
from cai_experiment.scripts._judge import add_judge_flags

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings

WITH_TRAINING = ("single", "batch")  # milestones whose script trains as well
GUARDED = "full"  # the milestone whose pairs a guard reads unless it is told not to


def generation_parser(doc: str | None, milestone: str, plans: bool = True) -> argparse.ArgumentParser:
    """The flags of a script that makes pairs, the gate's thresholds among them; `plans`: and those of --plan."""
    parser = base_parser(doc, milestone, plans)
    add_generation_flags(parser)
    _add_gate_flags(parser)
    group = parser.add_argument_group("guard")
    group.add_argument("--guard", metavar="MODEL|auto", default="auto" if milestone == GUARDED else None,
                       help="a second model that reads question and chosen answer; unsafe pairs are rejected "
                            f"(default: {'auto' if milestone == GUARDED else 'none'})")  # fmt: skip
    group.add_argument("--no-guard", dest="guard", action="store_const", const=None, help="recorded in the manifest")
    add_judge_flags(parser, "the critic")
    parser.add_argument_group("two models").add_argument(
        "--roles", metavar="NAME", help="--generator and --critic in one: single, dual or conservative"
    )
    parser.set_defaults(trains_after=milestone in WITH_TRAINING)
    return parser


def _add_gate_flags(parser: argparse.ArgumentParser) -> None:
    defaults, group = GateSettings(), parser.add_argument_group("gate")

    def add(flag: str, kind: Any, default: float, metavar: str, help: str) -> None:
        group.add_argument(flag, type=kind, default=default, metavar=metavar, help=f"{help} (default: {default:g})")

    add("--max-similarity", float, defaults.max_similarity, "SHARE",
        "of words in the same order; above it a revision is near-identical")  # fmt: skip
    add("--min-length-ratio", float, defaults.min_length_ratio, "RATIO",
        "characters of the revision over those of the first answer")  # fmt: skip
    add("--max-length-ratio", float, defaults.max_length_ratio, "RATIO", "as --min-length-ratio")
    add("--max-refusal-words", int, defaults.max_refusal_words, "N",
        "a refusal with more words goes on to help, and may pass")  # fmt: skip
    add("--min-judge-margin", float, defaults.min_judge_margin, "NATS",
        "of log-odds; a weaker verdict counts as undecided")  # fmt: skip
    add(
        "--max-tokens-answer", positive_int, MAX_TOKENS_ANSWER, "N", "an answer or revision that takes more is too long"
    )
    add("--max-tokens-critique", positive_int, MAX_TOKENS_CRITIQUE, "N", "a critique that takes more is too long")
    group.add_argument(
        "--skip-gate",
        action="append",
        default=[],
        metavar="REASON",
        choices=sorted(set(REASONS) - CANNOT_SKIP),
        help=f"do not reject for this reason (repeatable): {', '.join(sorted(set(REASONS) - CANNOT_SKIP))}",
    )
    group.add_argument(
        "--match-lengths",
        action="store_true",
        help="leave out up to 10 of every 50 pairs, so that chosen and rejected are of equal length on average",
    )


def run_settings(args: argparse.Namespace, milestone: Milestone) -> RunSettings:
    """The settings that the flags ask for; reads the instruction files, if there are any.

    With `--instructions` every row is used once, or the first `--count` rows.
    """
    pairs, max_draws = target(args, milestone)
    mix, mix_name = mix_of(args)
    instructions, name = None, ""
    if args.instructions is not None:
        rows, name = rows_of(args.instructions, args.field)
        asked = pairs if args.count or args.add else len(rows)
        instructions = rows[:asked]
        pairs, max_draws = min(pairs, len(instructions)), len(instructions)
    return RunSettings(
        pairs=pairs,
        max_draws=max_draws,
        stages=StageSettings(
            args.rounds or milestone.rounds, args.principles, args.seed,
            max_tokens_answer=args.max_tokens_answer, max_tokens_critique=args.max_tokens_critique,
            critique=args.critique,
        ),
        gate=GateSettings(
            args.max_similarity, args.min_length_ratio, args.max_length_ratio, args.max_refusal_words,
            args.min_judge_margin, tuple(sorted(set(args.skip_gate))),
        ),
        instructions=instructions,
        instructions_name=name,
        mix=mix,
        mix_name=mix_name,
        grid=HOUSEHOLD if speaks_of_world(args) else BROAD,
        evaluation_sets=evaluation_sets(args),
        allow_evaluation_sets=args.allow_evaluation_sets,
        match_lengths=args.match_lengths,
        guard=args.guard or "",
        seed=args.seed,
        price_per_hour=args.price_per_hour,
    )  # fmt: skip


def load_settings(args: argparse.Namespace, model: str | None, said: str = "--model") -> LoadSettings:
    """How to load `model` (None: what the hardware allows), which `said` named."""
    from cai_experiment.engines.load import LoadSettings

    return LoadSettings(
        model=model, layout=args.format, quantization=args.quantization, batch_size=args.batch_size,
        engine="server" if args.server and args.engine == "auto" else args.engine, seed=args.seed,
        random_weights=args.random_weights, trains_after=args.trains_after,
        server_url=args.server, server_concurrency=args.server_concurrency, deadline=args.deadline, said=said,
        ensemble=make_ensemble,
    )  # fmt: skip


def check_engine_flags(args: argparse.Namespace) -> None:
    """Raise for engine flags that do not go together, before anything is loaded; puts --roles into the two names."""
    if args.roles is not None:
        _name_both(args)
    if args.engine == "server" and not args.server:
        raise BadInputError("--engine server needs an endpoint", "add --server http://127.0.0.1:8000/v1")
    if args.server and args.engine not in ("auto", "server"):
        raise BadInputError(f"--server and --engine {args.engine} do not go together", "leave one of them out")
    if args.server and args.trains_after:
        raise BadInputError("--server: this milestone trains the model that it loads", "use generate_mvp.py")
    if args.ray is None:
        return
    if args.trains_after:
        raise BadInputError("--ray: this milestone trains the model that it loads", "use generate_mvp.py")
    if any(is_ensemble(chosen_model(args, detect(), critic)) for critic in (False, True)):
        raise BadInputError("--ray serves no ensemble", "leave --ray out, or name one model")
    from cai_experiment.pipeline.distributed import check_address

    if not args.plan:  # which may be of another machine's cluster
        check_address(args.ray)


def _name_both(args: argparse.Namespace) -> None:
    """--generator and --critic as the configuration says."""
    for flag in ("model", "generator", "critic", "server", "random_weights"):
        if vars(args)[flag] is not None:
            raise BadInputError(f"--roles {args.roles} names both models, and so does --{flag.replace('_', '-')}",
                                "leave one of them out")  # fmt: skip
    chosen = configuration(args.roles)
    args.generator, args.critic = chosen.generation, chosen.evaluation


def load_engines(args: argparse.Namespace) -> tuple[Any, Any]:
    """(generator, critic), one engine for both unless the flags name two models; prints each one's first line."""
    first, second = named(args)
    settings = load_settings(args, *first)
    other = None if first.model == second.model else load_settings(args, *second)
    generator: Any
    critic: Any
    if args.ray is not None:
        from cai_experiment.pipeline.distributed import ray_engines

        generator, critic = ray_engines(args.ray, settings, other, args.ray_actors)
        print(generator.first_line, *([] if other is None else [f"critic: {critic.first_line}"]), sep="\n", flush=True)
    else:
        generator, critic = _load_here(settings, other)
    if first is second and args.generator is not None and args.roles is None:
        print("critic: the generator itself; --critic names another", flush=True)
    if not getattr(critic, "can_weigh", True):  # before the first token, not at the first verdict
        raise BadInputError(
            f"--server {args.server} gives no log-probabilities, and verdicts need them",
            "name a --critic there that gives them, or serve with vLLM, SGLang or llama.cpp",
        )
    _note_contexts(args, generator, critic)
    return generator, critic


def _note_contexts(args: argparse.Namespace, *engines: Any) -> None:
    """Say before the first token which model's context is too short for the longest chain."""
    from cai_experiment.engines.context_note import context_note

    for engine in {id(engine): engine for engine in engines}.values():
        if (renderer := getattr(engine, "renderer", None)) is not None and args.critique:
            name = str(engine.describe().get("model"))
            if line := context_note(name, renderer, args.max_tokens_answer, args.max_tokens_critique):
                print(line, flush=True)


def _load_here(settings: LoadSettings, other: LoadSettings | None) -> tuple[Any, Any]:
    """Load one or two models in this process; says what it will be before minutes of loading, and what it became."""
    from cai_experiment.engines.load import load_engine, make_plan

    if other is not None:
        from cai_experiment.engines.pair import load_pair

        return load_pair(settings, other, lambda line: print(line, flush=True))
    plan = make_plan(settings, detect())
    if plan.engine != "server":  # which asks the server what it serves
        print(plan.first_line, flush=True)
    engine = load_engine(settings)
    if engine.first_line != plan.first_line:
        print(engine.first_line, flush=True)
    return engine, engine


def generate(
    args: argparse.Namespace, settings: RunSettings, folder: RunFolder, generator: Any, critic: Any
) -> RunResult:
    """Run or resume the pipeline in `folder` (entered), with the content log and the bar."""
    constitution = load_constitution(args.constitution)
    before = earlier(folder.path)
    whole = settings.whole_list
    noun = "pairs" if not whole else "instructions" if settings.every_draw else "rows"
    total = settings.max_draws if whole else settings.pairs + settings.spare
    done, seconds = 0, 0.0
    if before is not None:
        done = before.counts.get("accepted", 0) + (before.counts.get("rejected", 0) if whole else 0)
        seconds = before.wall_seconds
    with (
        ContentLogger(args.verbosity, folder.path / CONTENT_LOG) as logger,
        Progress(total, noun, args.verbosity, args.price_per_hour, min(done, total), seconds) as progress,
    ):
        return run_pipeline(settings, folder, generator, critic, constitution, logger, progress)


def tell_summary(args: argparse.Namespace, settings: RunSettings, folder: RunFolder, result: RunResult) -> None:
    """What came of a run, into its content log and onto the screen."""
    with ContentLogger(args.verbosity, folder.path / CONTENT_LOG) as logger:
        logger.log_stage(SUMMARY, "\n".join(summary(result, settings)))


def write_anew(args: argparse.Namespace, settings: RunSettings, folder: RunFolder) -> RunResult:
    """Write the files of a run in `folder` (entered) from its journal, where the guard's verdicts stand by now."""
    constitution = load_constitution(args.constitution)
    with ContentLogger(args.verbosity, folder.path / CONTENT_LOG) as logger, Progress(1, verbosity=0) as silent:
        return replay_pipeline(settings, folder, constitution, logger, silent)


def summary(result: RunResult, settings: RunSettings) -> list[str]:
    """Lines for the terminal: how many instructions it took, and what was refused and why."""
    what = "rows of the file" if settings.instructions is not None else "instructions"
    lines = [f"{result.accepted} of {result.drawn} {what} gave a pair that passed the gate"]
    if not settings.whole_list and not result.complete:
        lines.append(f"stopped at {result.drawn} instructions ({result.candidates} written) without reaching "
                     f"{settings.pairs} pairs")  # fmt: skip
    for name, drawn in result.ran_out.items():
        lines.append(f"{name} ran out after {drawn} instructions; the other sources took its share")
    for title, counts in (("rejected", result.reasons), ("instructions refused", result.refused)):
        if counts:
            lines.append(f"{title}: " + ", ".join(f"{reason} {count}" for reason, count in counts.items()))
    if settings.instructions is not None and IN_EVALUATION_SET in result.refused:
        lines.append(
            "no row of an evaluation set is trained on (--allow-evaluation-sets: HarmBench's and MT-Bench's are)"
        )
    return lines


def close_all(*engines: Any) -> None:
    """Close each engine once."""
    for engine in {id(engine): engine for engine in engines}.values():
        engine.close()
