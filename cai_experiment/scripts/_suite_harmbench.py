"""eval_model.py --suite harmbench: its files, both arms' answers, then its classifier or a judge."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_experiment.errors import BadInputError, DiskError, EngineError
from cai_experiment.evaluation.found import ITEMS_FOLDER
from cai_experiment.models.hardware import detect
from cai_experiment.scripts._common import positive_int
from cai_experiment.scripts._judge import identity, is_url, renamed

if TYPE_CHECKING:
    from cai_experiment.evaluation.benchmarks.harmbench_classifier import OfficialClassifier, OfficialPrompt
    from cai_experiment.evaluation.benchmarks.harmbench_load import ClassifierChoice
    from cai_experiment.evaluation.benchmarks.harmbench_rows import Behavior
    from cai_experiment.evaluation.found import Evaluation
    from cai_experiment.evaluation.harmbench import Generated

JUDGE = "judge"  # --classifier judge: the judge of --judge instead
SAID = "harmbench_said.jsonl"  # in ITEMS_FOLDER: the official classifier's words, so that a killed run asks each once
OF_CLASSIFIER = {"--server": "--classifier", "--model": "--classifier-tokenizer",
                 "--server-concurrency": "--judge-concurrency", "--deadline": "--judge-deadline"}  # fmt: skip


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
    group.add_argument("--classifier", metavar="DIR|URL|judge",
                       help="who says whether an answer complies: a folder or an endpoint with HarmBench's official "
                            "classifier, or the judge (default: cais/HarmBench-Llama-2-13b-cls from the hub; without a "
                            "GPU that holds it, or where it cannot be fetched, the judge of --judge)")  # fmt: skip
    group.add_argument("--classifier-tokenizer", metavar="DIR", help="where an endpoint's classifier has its tokenizer")
    group.add_argument("--classifier-prompt", type=Path, metavar="FILE", help="upstream's eval_utils.py")


def read(args: argparse.Namespace) -> Wanted:
    """Everything that can be wrong before the first answer: files, and whether the classifier can be had or answers.

    Raises BadInputError, EngineError and DiskError, one line each.
    """
    from cai_experiment.evaluation.benchmarks import harmbench_rows as rows

    every = rows.behaviors(args.behaviors)
    some = rows.first_by_hash(every, args.limit)
    note = ""
    if len(some) < len(every):
        note = (f"HarmBench: {len(some)} of {len(every)} behaviours (--limit {args.limit}: so many of each functional "
                "category, chosen by a hash of their ids)")  # fmt: skip
    if args.classifier == JUDGE:
        return Wanted(some, None, None, note)
    try:
        return Wanted(some, *_official(args), note)
    except (EngineError, DiskError) as error:
        if args.classifier is not None or args.judge is None:
            raise
        why = f"HarmBench's official classifier cannot be had here, so the judge is asked: {error}".partition("; ")[0]
        print(why, flush=True)
        return Wanted(some, None, None, "; ".join(filter(None, (note, why))))


def _official(args: argparse.Namespace) -> tuple[ClassifierChoice | str, OfficialPrompt]:
    """Where the official classifier is and its prompt; an endpoint is asked itself. Raises as `read` does."""
    from cai_experiment.evaluation.benchmarks.harmbench_classifier import official_prompt
    from cai_experiment.evaluation.benchmarks.harmbench_load import check_classifier

    hardware = detect()
    if hardware.kind == "cpu" and args.classifier is None and args.judge is not None:
        raise EngineError("it takes a GPU")  # 13 billion parameters: hours on a CPU, and a judge is at hand
    prompt = official_prompt(args.classifier_prompt)
    if is_url(args.classifier):
        served = load(args, args.classifier, prompt)
        print(f"classifier: {served.engine.first_line}", flush=True)
        served.close()
        return args.classifier, prompt
    choice = check_classifier(args.classifier, hardware)
    print(choice.line, flush=True)
    return choice, prompt


def run(args: argparse.Namespace, wanted: Wanted, target: Any, folder: Path) -> Evaluation:
    """Both arms' answers, then the word of the official classifier, in the target's place, or of a judge that is fit.

    `target` is a `_target.Target`; `folder` is the run's.
    """
    from cai_experiment.evaluation import harmbench
    from cai_experiment.evaluation.benchmarks.harmbench_classifier import LetteredJudge

    generated = answer(args, wanted, target)
    if wanted.classifier is not None and wanted.prompt is not None:
        if not is_url(args.classifier):
            target.free()
        return by_classifier(args, wanted, generated, folder)
    by = target.judge()
    fit = harmbench.fitness(by)
    print(*fit.alarms, sep="\n", end="\n" if fit.alarms else "", flush=True)
    if fit.alarms:
        return harmbench.unjudged(generated, wanted.note) + fit
    return harmbench.judge(generated, LetteredJudge(by), wanted.note, args.verbosity) + fit


def answer(args: argparse.Namespace, wanted: Wanted, target: Any) -> Generated:
    """The first step: both arms' answers; after it the target may be freed."""
    from cai_experiment.evaluation.arms import BothArms
    from cai_experiment.evaluation.benchmarks.harmbench_rows import safe_prompts
    from cai_experiment.evaluation.harmbench import generate
    from cai_experiment.observe.progress import Progress

    speakers, safe = target.speakers(), safe_prompts()
    with Progress(2 * (len(wanted.behaviors) + len(safe)), "HarmBench answers", args.verbosity) as progress:
        arms = BothArms(speakers.bare(), speakers.model, args.seed, progress, target.remembered())
        return generate(arms, wanted.behaviors, safe)


def by_classifier(args: argparse.Namespace, wanted: Wanted, generated: Generated, folder: Path) -> Evaluation:
    """The second step by the official classifier, whose words are written down as they come."""
    from cai_experiment.evaluation import harmbench
    from cai_experiment.evaluation.arms import Remembered, Remembering

    assert wanted.classifier is not None and wanted.prompt is not None
    official = load(args, wanted.classifier, wanted.prompt)
    try:
        said = Remembered(folder / ITEMS_FOLDER / SAID, identity(official.engine))
        remembering: Any = Remembering(official.engine, said, "classifier")
        official.engine = remembering
        found = harmbench.judge(generated, official, wanted.note, args.verbosity)
        said.journal.close()
        return found
    finally:
        official.close()


def load(args: argparse.Namespace, place: ClassifierChoice | str, prompt: OfficialPrompt) -> OfficialClassifier:
    """The official classifier, in this process or at an endpoint. Errors are in the words of these flags."""
    from cai_experiment.evaluation.benchmarks.harmbench_load import classifier_on_server, load_classifier
    from cai_experiment.judging.outage import Watched

    if not isinstance(place, str):
        return load_classifier(place, prompt, detect())
    options = {"concurrency": args.judge_concurrency, "deadline": args.judge_deadline, "seed": args.seed}
    say = partial(renamed, names=OF_CLASSIFIER)
    try:
        found = classifier_on_server(place, args.classifier_tokenizer, prompt, **options)
    except (BadInputError, EngineError) as error:
        raise type(error)(say(str(error))) from error
    watched: Any = Watched(found.engine, f"--classifier {found.engine.describe()['url']}", say)
    found.engine = watched
    return found
