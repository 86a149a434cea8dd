"""The work of eval_ensemble.py: questions, experts, every arm's answers, the report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cai_experiment.engines.at_hand import quiet_retries
from cai_experiment.ensemble.arms import Asked, Asking, Known, arms, ask, expert_names
from cai_experiment.ensemble.data import SHIPPED_DATASETS, load_sets
from cai_experiment.ensemble.experts import SHIPPED, canonical
from cai_experiment.ensemble.files import heads_file, read_heads
from cai_experiment.ensemble.layout import Row
from cai_experiment.ensemble.page import PAGE, write
from cai_experiment.ensemble.patterns import letter
from cai_experiment.ensemble.results import Findings, findings, readings
from cai_experiment.errors import BadInputError
from cai_experiment.observe.progress import Progress
from cai_experiment.observe.screen import escaped
from cai_experiment.records.files import show
from cai_experiment.records.manifest import git_revision
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._ensemble_experts import check_experts, check_fresh
from cai_experiment.scripts._ensemble_tables import print_results

if TYPE_CHECKING:
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads

SCRIPT = "python cai_experiment/scripts/"


def run(args: argparse.Namespace) -> None:
    """Everything from the first line to the next command. Raises UserError, one line each."""
    names = _names(args)
    loud = args.verbosity >= 2
    rows = _rows(args, names, print if loud else lambda line: None)
    with RunFolder(args.output_dir, args.fresh) as folder:
        if folder.moved_to is not None:
            print(f"the old evaluation is now {show(folder.moved_to)}")
        model = _load(args)
        for note in model.notes if loud else ():
            print(note)
        rows, too_long = fitting(model, rows)
        asking = Asking(args.mode, args.max_new_tokens, args.temperature, args.random_seed, args.batch_size,
                        args.accelerate, args.only_ensemble)  # fmt: skip
        asked = _ask(model, rows, asking, folder, args.verbosity)
        experts = expert_names(model)
        found = findings(rows, asked, experts, model.tokenizer, _settings(args, model, too_long), args.num_examples)
        write(folder.path, found, not args.no_plots, args.save_examples)
    if args.verbosity >= 3:
        _show_answers(found)
    _report(args, found)


def _names(args: argparse.Namespace) -> Sequence[str]:
    """The experts' names; the first line says which and why. Raises what can be known of them and the heads by now."""
    from cai_experiment.ensemble.model import check_models

    info, _ = read_heads(args.model_weights)  # a damaged file is known before questions are fetched
    names = tuple(map(canonical, args.models)) if args.models else info.models
    why = "--models" if args.models else f"those that {show(args.model_weights)} was trained over"
    said = ", ".join(f"{letter(place)} {name}" for place, name in enumerate(names))
    print(escaped(f"experts: {said} ({why})"), flush=True)
    if args.models:
        check_models(info, names, heads_file(args.model_weights))
    check_experts(names, args.precision, args.device)
    if args.fresh:
        check_fresh(args.output_dir, args.model_weights, names)
    return names


def _rows(args: argparse.Namespace, names: Sequence[str], say: Any) -> list[Row]:
    """The questions of every dataset. "all" means the shipped sets for the shipped experts, else the original's two."""
    every = SHIPPED_DATASETS if set(names) <= set(SHIPPED) else ("gsm8k", "medqa")
    wanted = [one for name in args.datasets for one in (every if name == "all" else [name])]
    with quiet_retries():
        sets = load_sets(wanted, "test", args.sample_size, args.random_seed, prompt_column=args.prompt_column,
                         answer_column=args.answer_column, say=say)  # fmt: skip
    rows = [row for own in sets.values() for row in own]
    say(f"questions: {len(rows):,} ({', '.join(f'{name} {len(own)}' for name, own in sets.items())})")
    return rows


def _load(args: argparse.Namespace) -> MultiModelWithScalarHeads:
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads

    return MultiModelWithScalarHeads.from_pretrained(
        args.models, args.model_weights, precision=args.precision, device=args.device
    )


def fitting(model: MultiModelWithScalarHeads, rows: Sequence[Row]) -> tuple[list[Row], int]:
    """(the questions that leave room for a token in the experts' context, how many do not). Said on the screen.

    Raises BadInputError if none fits.
    """
    kept = [row for row in rows if len(model.encode(row.prompt)) < model.context]
    left = len(rows) - len(kept)
    if left:
        print(f"{left} of {len(rows)} questions have more tokens than the experts can read ({model.context}): left out")
    if not kept:
        raise BadInputError("no question is left", "choose another set with --datasets")
    return kept, left


def _ask(
    model: MultiModelWithScalarHeads, rows: Sequence[Row], asking: Asking, folder: RunFolder, verbosity: int
) -> Asked:
    wanted = arms(model, asking)
    total, kept = len(wanted) * len(rows), Known(folder.journal).count(wanted, rows)
    if kept and verbosity > 1:
        print(f"{kept:,} of {total:,} answers are kept from before")
    with Progress(total, noun="answers", verbosity=verbosity if verbosity > 1 else 0, done=kept) as progress:
        return ask(model, rows, asking, folder.journal, progress.update)


def _settings(args: argparse.Namespace, model: MultiModelWithScalarHeads, too_long: int) -> dict[str, Any]:
    """What a reader must know of how it was asked."""
    given = ("mode", "temperature", "max_new_tokens", "random_seed", "sample_size", "datasets", "accelerate",
             "batch_size")  # fmt: skip
    return {
        **{name: getattr(args, name) for name in given},
        "model_weights": show(args.model_weights),
        "precision": model.experts[0].precision,
        "device": model.device.type,
        "too_long": too_long,
        "notes": list(model.notes),
        "git_revision": git_revision(),
    }


def _show_answers(found: Findings) -> None:
    """Every answer of every arm (-v 3)."""
    for row in found.answers:
        mark = {True: "right", False: "wrong", None: "not read"}[row["right"]]
        head = f"[{row['id']} · {row['arm']} · {mark}: {row['read']}, gold {row['gold']}]"
        print(escaped(f"{head}\n{row['text'].strip()}\n"))


def _report(args: argparse.Namespace, found: Findings) -> None:
    if args.verbosity:
        print_results(found.results)
    for line in readings(found.results):
        print(escaped(line))
    print(f"report: {show(args.output_dir / PAGE)}")
    heads = show(args.model_weights)
    if args.mode == "select" and "mixture" not in found.results["arms"]:
        print(f"next, its other mode (all else is kept): the same command with --mode mixture; or ask it: "
              f"{SCRIPT}answer_generator.py --model_weights {heads} --show-experts")  # fmt: skip
    else:
        print(f"next, ask it: {SCRIPT}answer_generator.py --model_weights {heads} --show-experts")
