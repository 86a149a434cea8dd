"""eval_model.py --suite harmbench: its files, both arms' answers, then its classifier or a judge."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from cai_experiment.evaluation.found import ITEMS_FOLDER
from cai_experiment.models.hardware import detect
from cai_experiment.records.files import make_folder
from cai_experiment.scripts._common import positive_int
from cai_experiment.scripts._judge import is_url

if TYPE_CHECKING:
    from cai_experiment.evaluation.arms import Remembered, Speakers
    from cai_experiment.evaluation.benchmarks.harmbench_classifier import OfficialClassifier, OfficialPrompt
    from cai_experiment.evaluation.benchmarks.harmbench_load import ClassifierChoice
    from cai_experiment.evaluation.benchmarks.harmbench_rows import Behavior
    from cai_experiment.evaluation.found import Evaluation
    from cai_experiment.evaluation.harmbench import Generated
    from cai_experiment.judging.judge import Judge


JUDGEMENTS = "harmbench_judgements.jsonl"  # in ITEMS_FOLDER: what was said, so that a killed run asks each once


class Wanted(NamedTuple):
    """What is asked, and the official classifier if it is to judge: where (a choice, or a URL), and its prompt."""

    behaviors: tuple[Behavior, ...]
    classifier: ClassifierChoice | str | None
    prompt: OfficialPrompt | None
    note: str


def add_flags(parser: argparse.ArgumentParser) -> None:
    """HarmBench's own flags; --judge is eval_model.py's."""
    group = parser.add_argument_group("HarmBench (default: its own csv and prompt, fetched at a pinned revision)")
    group.add_argument("--behaviors", type=Path, metavar="FILE", help="its behaviours (.csv)")
    group.add_argument("--limit", type=positive_int, metavar="N", help="N of each functional category, by a hash")
    group.add_argument("--classifier", metavar="DIR|URL",
                       help="its official classifier: a folder, or an endpoint that serves it (default: from the hub; "
                            "with --judge and without this, the judge says it)")  # fmt: skip
    group.add_argument("--classifier-tokenizer", metavar="DIR", help="where an endpoint's classifier has its tokenizer")
    group.add_argument("--classifier-prompt", type=Path, metavar="FILE", help="upstream's eval_utils.py")


def read(args: argparse.Namespace) -> Wanted:
    """Everything that can be wrong before the first answer: files, and whether the classifier can be had.

    Raises BadInputError, EngineError and DiskError, one line each.
    """
    from cai_experiment.evaluation.benchmarks import harmbench_classifier as classifier
    from cai_experiment.evaluation.benchmarks import harmbench_rows as rows
    from cai_experiment.evaluation.benchmarks.harmbench_load import check_classifier

    every = rows.behaviors(args.behaviors)
    some = rows.first_by_hash(every, args.limit)
    note = ""
    if len(some) < len(every):
        note = (f"HarmBench: {len(some)} of {len(every)} behaviours (--limit {args.limit}: so many of each functional "
                "category, chosen by a hash of their ids)")  # fmt: skip
    if args.judge is not None and args.classifier is None:
        return Wanted(some, None, None, note)
    prompt = classifier.official_prompt(args.classifier_prompt)
    if is_url(args.classifier):
        return Wanted(some, args.classifier, prompt, note)
    choice = check_classifier(args.classifier, detect())
    print(choice.line, flush=True)
    return Wanted(some, choice, prompt, note)


def answer(args: argparse.Namespace, wanted: Wanted, speakers: Speakers, remembered: Remembered | None) -> Generated:
    """The first step: both arms' answers; after it the target may be freed."""
    from cai_experiment.evaluation.arms import BothArms
    from cai_experiment.evaluation.benchmarks.harmbench_rows import safe_prompts
    from cai_experiment.evaluation.harmbench import generate
    from cai_experiment.observe.progress import Progress

    safe = safe_prompts()
    with Progress(2 * (len(wanted.behaviors) + len(safe)), "HarmBench answers", args.verbosity) as progress:
        arms = BothArms(speakers.bare(), speakers.model, args.seed, progress, remembered)
        return generate(arms, wanted.behaviors, safe)


def run(
    args: argparse.Namespace, speakers: Callable[[], Speakers], remembered: Callable[[], Remembered | None],
    judge: Callable[[], Judge], folder: Path, free: Callable[[], None],
) -> Evaluation:  # fmt: skip
    """Both steps. `speakers` loads the target and `free` gives its memory back; `judge` is asked for only with --judge
    and without --classifier, frees the target itself where it must, and is closed by the caller. `folder` is the run's.
    """
    from cai_experiment.evaluation import harmbench
    from cai_experiment.evaluation.benchmarks.harmbench_classifier import Keeping, LetteredJudge

    wanted = read(args)
    generated = answer(args, wanted, speakers(), remembered())
    said = folder / ITEMS_FOLDER / JUDGEMENTS
    make_folder(said.parent)
    if wanted.classifier is None:
        by = judge()
        found = harmbench.judge(generated, Keeping(LetteredJudge(by), said, by.engine), wanted.note)
        return found + harmbench.fitness(by)
    if not is_url(args.classifier):
        free()
    official = load(args, wanted)
    try:
        return harmbench.judge(generated, Keeping(official, said, official.engine), wanted.note)
    finally:
        official.close()


def load(args: argparse.Namespace, wanted: Wanted) -> OfficialClassifier:
    """The official classifier, in this process or at an endpoint."""
    from cai_experiment.evaluation.benchmarks.harmbench_load import classifier_on_server, load_classifier

    assert wanted.prompt is not None and wanted.classifier is not None
    if isinstance(wanted.classifier, str):
        options = {"concurrency": args.judge_concurrency, "deadline": args.judge_deadline, "seed": args.seed}
        return classifier_on_server(wanted.classifier, args.classifier_tokenizer, wanted.prompt, **options)
    return load_classifier(wanted.classifier, wanted.prompt, detect())
