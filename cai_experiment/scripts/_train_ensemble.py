"""The work of train_ensemble.py: rows, experts, their states, the training of the heads, its summary."""

from __future__ import annotations

import argparse
import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.engines.at_hand import quiet_retries
from cai_experiment.ensemble.clock import Watch
from cai_experiment.ensemble.data import HUB_DATASETS, SHIPPED_DATASETS, Row, balanced, load_sets, split_rows
from cai_experiment.ensemble.encoding import EncodedRow, encode_rows, sha256_of, text_sha256
from cai_experiment.ensemble.experts import SHIPPED, canonical, default_models, default_precision
from cai_experiment.ensemble.patterns import letter
from cai_experiment.ensemble.train_log import check_reporter
from cai_experiment.errors import BadInputError
from cai_experiment.observe.progress import Progress
from cai_experiment.observe.screen import escaped
from cai_experiment.records.files import read_json, show, write_json
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._ensemble_experts import check_experts
from cai_experiment.scripts._train_ensemble_words import closing, print_summary, size
from cai_experiment.scripts._verbosity import last_word

if TYPE_CHECKING:
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads
    from cai_experiment.ensemble.states import Source

SUMMARY = "summary.json"
STATES = "states"
MUCH = 0.6  # of the tokens that count: from there on one data set rules the loss
# decide the heads, beside the rows and the experts' weights
DECISIVE = ("num_epochs", "batch_size", "learning_rate", "warmup_steps", "entropy_weight", "head_hidden_dim",
            "head_dropout", "seed", "train_on_prompt", "max_length")  # fmt: skip

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done: the experts' names, the rows of each data set to train on and held out."""

    names: tuple[str, ...]
    training: list[Row]
    held_out: list[Row]
    said: dict[str, Any]  # what a finished run is known by, before a model is loaded


def run(args: argparse.Namespace) -> None:
    """Everything from the first line to the next command. Raises UserError, one line each."""
    check_reporter(args.report_to)
    say: Say = (lambda line: print(escaped(line), flush=True)) if args.verbosity >= 2 else (lambda line: None)
    names, reason = (args.models, "--models") if args.models else default_models(args.device)
    names = tuple(map(canonical, names))
    said = ", ".join(f"{letter(place)} {name}" for place, name in enumerate(names))
    print(escaped(f"experts: {said} ({reason})"), flush=True)
    if not args.plan:  # which says itself what is lacking
        check_experts(names, args.precision, args.device)
    if args.plan:
        from cai_experiment.scripts._train_ensemble_plan import lines

        print(*lines(args, work_of(args, names, say)), sep="\n")
        return
    with RunFolder(args.output_dir, args.fresh) as folder:
        _take_states_back(folder, say)
        work = work_of(args, names, say)
        summary = _finished(folder.path, work)
        if summary is None:
            summary = train(args, work, folder.path, say)
        else:
            say("this training is finished; its summary again (--fresh trains anew)")
    summary["heads"] = show(args.output_dir / summary["heads_file"])  # as seen from here
    if args.verbosity:
        print_summary(summary)
    for line in closing(summary, args):
        print(escaped(line))
    last_word(args.verbosity, f"heads: {summary['heads']}")


# ---------------------------------------------------------------- what is to be done


def work_of(args: argparse.Namespace, names: tuple[str, ...], say: Say) -> Work:
    """Read the rows, balance them, hold a share of each data set out."""
    datasets = args.datasets or (SHIPPED_DATASETS if set(names) <= set(SHIPPED) else HUB_DATASETS)
    with quiet_retries():
        sets = load_sets(datasets, "train", args.max_rows, args.seed, prompt_column=args.prompt_column,
                         answer_column=args.answer_column, say=say)  # fmt: skip
    parts = [split_rows(rows, args.validation_share, args.seed) for rows in balanced(sets, args.seed, say).values()]
    training, held_out = ([row for part in parts for row in part[side]] for side in (0, 1))
    say(f"rows: {len(training):,} to train on, {len(held_out):,} held out ({', '.join(sets)})")
    precision = args.precision or default_precision(names, args.device)  # the flag left out is not another setting
    said = {**{name: getattr(args, name) for name in DECISIVE}, "precision": precision, "models": list(names),
            "rows_sha256": text_sha256([*training, *held_out])}  # fmt: skip
    return Work(names, training, held_out, said)


def _finished(folder: Path, work: Work) -> dict[str, Any] | None:
    """The summary of a training that came to its end with these settings; BadInputError if it had others."""
    from cai_experiment.ensemble.files import read_heads
    from cai_experiment.ensemble.train import check_same

    path = folder / SUMMARY
    if not path.exists():
        return None
    summary = read_json(path)
    check_same(summary["said"], work.said, folder)
    try:
        epoch = read_heads(folder / summary["heads_file"])[0].facts.get("epoch")
    except BadInputError:  # gone or damaged: the last checkpoint holds them too
        return None
    return summary if epoch == summary["best_epoch"] else None


def _take_states_back(folder: RunFolder, say: Say) -> None:
    """After --fresh: the states, named after what they depend on, stay valid, so they are taken back.

    If an earlier call was killed between the two renames, they lie in the newest DIR.<time>.
    """
    if not folder.fresh:
        return
    older = sorted(folder.path.parent.glob(f"{glob.escape(folder.path.name)}.2*"), key=lambda one: one.name)
    moved = folder.moved_to or (older[-1] if older else None)
    if moved and (moved / STATES).exists() and not (folder.path / STATES).exists():
        (moved / STATES).rename(folder.path / STATES)
    if folder.moved_to:
        say(f"the old training is now {show(folder.moved_to)}; the states that were computed for it stay in use")


# ---------------------------------------------------------------- doing it


def train(args: argparse.Namespace, work: Work, folder: Path, say: Say) -> dict[str, Any]:
    """Load, compute what states are missing, train the heads; gives the summary, which is on disk then."""
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads
    from cai_experiment.ensemble.schedule import settings_named
    from cai_experiment.ensemble.train import HeadTrainer

    model = MultiModelWithScalarHeads.from_pretrained(
        work.names, None, precision=work.said["precision"], device=args.device, head_hidden_dim=args.head_hidden_dim,
        head_dropout=args.head_dropout, tokenizer=args.tokenizer, seed=args.seed,
    )  # fmt: skip
    say(f"loaded: {model.experts[0].precision} on {model.device}, {model.vocabulary:,} tokens in common")
    rows, training = encoded(args, work, model, say)
    watch = Watch()
    source, computed = states_of(args, model, rows, folder, say)
    took = watch.passed() if computed else None
    weights = [[expert.weights, expert.precision] for expert in model.experts]
    identity = {**work.said, "weights": weights, "tokens_sha256": sha256_of(rows)}
    trainer = HeadTrainer(model, source, rows, training, folder, settings_named(**vars(args)), identity, say)
    result = trainer.run(took)
    summary = {
        "heads_file": result.saved.name, "best_epoch": result.best_epoch,
        "steps": result.steps, "experts": [expert.name for expert in model.experts], "held_out": result.held_out,
        "history": result.history, "rows": training, "held_out_rows": len(rows) - training,
        "device": str(model.device), "said": work.said,
    }  # fmt: skip
    write_json(folder / SUMMARY, summary)
    return summary


def encoded(
    args: argparse.Namespace, work: Work, model: MultiModelWithScalarHeads, say: Say
) -> tuple[list[EncodedRow], int]:
    """(the rows as tokens, how many of them are to train on: the first ones)."""
    longest = min(args.max_length, model.context)
    training, left = encode_rows(work.training, model.tokenizer, longest, args.train_on_prompt)
    held_out, also_left = encode_rows(work.held_out, model.tokenizer, longest, args.train_on_prompt)
    if dropped := len(left) + len(also_left):
        whole = len(work.training) + len(work.held_out)
        say(f"{dropped:,} of {whole:,} rows have more than {longest:,} tokens and are left out (--max_length)")
    if not training or not held_out:
        raise BadInputError("no row is left to train on or to hold out", "give a longer --max_length, or more rows")
    counted = sum(row.counted for row in (*training, *held_out))
    tokens = sum(len(row.ids) for row in (*training, *held_out))
    say(f"tokens: {tokens:,}, of which {counted:,} count ({'all' if args.train_on_prompt else 'answers'})")
    say(_weights_of_sets([*training, *held_out]))
    return [*training, *held_out], len(training)


def _weights_of_sets(rows: Sequence[EncodedRow]) -> str:
    """Each data set's share of the tokens that count: the loss is a mean over tokens, so long answers weigh more."""
    counted: dict[str, int] = {}
    for row in rows:
        counted[row.dataset] = counted.get(row.dataset, 0) + row.counted
    shares = {name: number / max(sum(counted.values()), 1) for name, number in counted.items()}
    line = f"share of the tokens that count: {', '.join(f'{name} {part:.0%}' for name, part in shares.items())}"
    most = max(shares, key=shares.__getitem__)
    if len(shares) > 1 and shares[most] > MUCH:
        line += f"; warning: the heads learn {most} for the most part (its texts are the longest)"
    return line


def states_of(
    args: argparse.Namespace, model: MultiModelWithScalarHeads, rows: Sequence[EncodedRow], folder: Path, say: Say
) -> tuple[Source, bool]:
    """(where states are read, whether any had to be computed for it now)."""
    from cai_experiment.ensemble.state_cache import StateCache
    from cai_experiment.ensemble.states import DirectStates

    if args.no_cache:
        return DirectStates(model, rows), False
    weights = [[expert.weights, expert.precision, str(expert.model.dtype)] for expert in model.experts]
    cache = StateCache(args.cache_dir or folder / STATES, model, rows, weights)
    missing = cache.missing(say)
    if missing:
        cache.check_room(missing)
        _fill(args, cache, missing, say)
    else:
        say(f"states: {size(cache.bytes)} at {show(cache.folder)}, all there")
    cache.open()
    return cache, bool(missing)


def _fill(args: argparse.Namespace, cache: Any, missing: Sequence[int], say: Say) -> None:
    kept = len(cache.rows) - sum(len(cache.shards[number].rows) for number in missing)
    say(f"states: {size(cache.bytes)} at {show(cache.folder)}, {kept:,} of {len(cache.rows):,} rows are there")
    others = [file for file in cache.folder.parent.glob("*/shard-*") if file.parent != cache.folder]
    if others:
        say(f"{size(sum(file.stat().st_size for file in others))} beside it are states of other rows or experts, "
            "which this run does not read: delete what you no longer need")  # fmt: skip
    level = args.verbosity if args.verbosity > 1 else 0
    with Progress(len(cache.rows), "rows", level, args.price_per_hour or 0.0, done=kept) as progress:
        total = [kept, 0]

        def done(rows: int, tokens: int) -> None:
            total[0] += rows
            total[1] += tokens
            progress.update(*total)

        cache.fill(missing, done)
