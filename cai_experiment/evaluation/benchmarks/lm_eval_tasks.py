"""Tasks of lm-eval (EleutherAI's harness), base against trained on the same items, with one model in memory.

One PEFT model answers twice, with its adapter switched off and on; the harness builds the same prompts for both (held
by their hashes) and items are paired by task and number. A task counts by acc_norm where it has it, else exact_match,
else acc; of several ways to read an answer (gsm8k) by "flexible-extract", since a lost answer format is no lost skill.

As with published base-model scores no chat template is applied: prompts are the task's own. Models as they are loaded:
4-bit ones, adapters and their dtype; log-probabilities are summed in float32. Each answer is written down as its batch
ends (lm_eval_said.py), and a killed run asks for none twice.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from cai_experiment.engines.common import is_out_of_memory
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.evaluation.benchmarks.lm_eval_said import Asking, Said, quiet
from cai_experiment.evaluation.forgetting import kept_gate, paired
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.preference import evaluating
from cai_experiment.judging.result import Result
from cai_experiment.records.files import show

DEFAULT_TASKS = ("arc_easy", "hellaswag", "gsm8k")
MVP_ITEMS = 200  # a task; all at full
BATCH_ROWS_GPU, BATCH_ROWS_CPU = 32, 8  # 32 rows of 200 tokens over 152,064 words: 4 GB of logits in float32
METRICS = ("acc_norm", "exact_match", "acc")  # the first that a task has
FILTER = "flexible-extract"
FEWSHOT_SEED = 1234  # the harness's own
SHOWN = 1500  # characters of a prompt in the items' file: its end, which is the item itself

# Of an item with Qwen2.5's tokenizer, about: tokens read (over all choices), tokens written; items of the task.
# gsm8k reads five worked solutions first, and a batch goes on to 256 tokens if one of its rows does.
WORK = {"arc_easy": (4 * 35, 0, 2376), "hellaswag": (4 * 95, 0, 10042), "gsm8k": (1000, 120, 1319)}


@dataclass(frozen=True, slots=True)
class TaskSettings:
    """`limit`: items a task, the first ones (None: all). `folder`: task files (YAML) of the user's; a task there may
    name a data file beside it and then needs no network.
    """

    tasks: tuple[str, ...] = DEFAULT_TASKS
    limit: int | None = MVP_ITEMS
    folder: Path | None = None
    batch_rows: int | None = None


class Work(NamedTuple):
    """Tokens that one arm reads and writes, and the tasks of unknown size."""

    read: int
    written: int
    unknown: tuple[str, ...]


def work_of(tasks: Sequence[str], limit: int | None) -> Work:
    """What the tasks take of one arm, without loading them."""
    known = [(WORK[task], min(limit or WORK[task][2], WORK[task][2])) for task in tasks if task in WORK]
    return Work(
        sum(read * items for (read, _, _), items in known),
        sum(written * items for (_, written, _), items in known),
        tuple(task for task in tasks if task not in WORK),
    )


@dataclass(frozen=True, slots=True)
class Tasks:
    """The tasks of `settings` as lm-eval has loaded them, with their data; and why some cannot be run."""

    settings: TaskSettings
    loaded: dict[str, Any] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def load_tasks(settings: TaskSettings) -> Tasks:
    """Load every task and its data set, without any model.

    Raises BadInputError for a folder that is none and for a name that lm-eval does not know; a task whose data cannot
    be had stands in `failed`.
    """
    if settings.folder is not None and not settings.folder.is_dir():
        raise BadInputError(f"{show(settings.folder)} is no folder", "--task-folder takes one of lm-eval's task files")
    with quiet():
        manager = _manager(settings)
    tasks = Tasks(settings)
    for name in settings.tasks:
        if name not in manager.task_index:
            near = ", ".join(get_close_matches(name, manager.all_tasks, 3))
            raise BadInputError(f"lm-eval knows no task {name}", f"near it: {near}" if near else "check --tasks")
    for name in settings.tasks:
        try:
            with quiet():
                tasks.loaded[name] = manager.load([name])
        except Exception as error:  # whatever a task's own code or files raise
            tasks.failed[name] = _why(error)
    return tasks


def run_tasks(
    model: Any, tokenizer: Any, tasks: Tasks, said: Said | None = None, verbosity: int = 1
) -> Evaluation:  # fmt: skip
    """Every task for both arms of a PEFT `model`, of which `said` remembers what it was answered.

    One line begins a task, a bar or lines count the requests of each arm. A task that could not be loaded or run is
    named in a note, and its gate is not passed; the others go on.
    """
    found = Evaluation()
    with quiet():
        harness = _harness(model, tokenizer, tasks.settings)
    arms = _Arms(harness, said or Said(None, ""), tasks.settings.limit, verbosity, Console(file=sys.stdout))
    for name in tasks.settings.tasks:
        why = tasks.failed.get(name)
        if why is None:
            if verbosity:
                print(f"lm-eval {name}: {_items(tasks.settings.limit)}, base and trained", flush=True)
            try:
                with evaluating(model):
                    found += arms.task(name, tasks.loaded[name])
            except Exception as error:  # whatever a task's own code or metrics raise
                why = _why(error)
        if why is not None:
            found.notes.append(f"task {name} was not run: {why}")
            found.gates.append(kept_gate(name, Result(None, 0, None)))
    found.methods["lm_eval"] = f"lm-eval {version()}, no chat template, {_items(tasks.settings.limit)}"
    return found


def _items(limit: int | None) -> str:
    return "all items" if limit is None else f"the first {limit} items"


def version() -> str:
    """lm-eval's."""
    from importlib import metadata

    return metadata.version("lm_eval")


# ---------------------------------------------------------------- one task


class _Arms(NamedTuple):
    """Both arms of one model in the harness."""

    harness: Any
    said: Said
    limit: int | None
    verbosity: int
    console: Console

    def task(self, name: str, loaded: Mapping[str, Any]) -> Evaluation:
        """One task, base and trained, item by item."""
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        with self.harness.model.disable_adapter():
            base = self.samples(name, "base", loaded)
        trained = self.samples(name, "trained", loaded)
        rows = [_row(f"{task}/{number}", one, trained[task, number]) for (task, number), one in base.items()]
        figures = [[row[arm] for row in rows] for arm in ("base", "trained")]
        if all(value in (0.0, 1.0) for arm in figures for value in arm):
            for row in rows:
                row["base"], row["trained"] = bool(row["base"]), bool(row["trained"])
        return paired(name, [row["base"] for row in rows], [row["trained"] for row in rows], rows)

    def samples(self, name: str, arm: str, loaded: Mapping[str, Any]) -> dict[tuple[str, int], Mapping[str, Any]]:
        """The harness's log of every item by (task, number); few-shot examples are drawn alike each time.

        Out of memory, the batch is halved and goes on; EngineError if it does not hold one row.
        """
        from lm_eval.evaluator import evaluate

        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        asking = Asking(self.harness, self.said, name, arm, self.verbosity, self.console)
        try:
            with quiet():
                logged = evaluate(asking, loaded, limit=self.limit, bootstrap_iters=0, log_samples=True)["samples"]
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logged = None
        if logged is None:  # outside the handler, whose traceback keeps tensors alive
            _halve(self.harness)
            return self.samples(name, arm, loaded)
        return {(task, one["doc_id"]): one for task, samples in logged.items() for one in _chosen(samples)}


def _halve(harness: Any) -> None:
    import torch

    if harness.batch_size_per_gpu == 1:
        raise EngineError("out of memory with one row at a time", "use --quantization 4bit or a smaller --model")
    harness.batch_size_per_gpu //= 2
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _chosen(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each item the one reading of its answer that counts."""
    filters = [one["filter"] for one in samples]
    wanted = FILTER if FILTER in filters else filters[0]
    return [one for one in samples if one["filter"] == wanted]


def _row(id: str, base: Mapping[str, Any], trained: Mapping[str, Any]) -> dict[str, Any]:
    """One item of both arms. Raises ValueError if they were not asked the same, or no metric of the task is known."""
    if (base["doc_hash"], base["prompt_hash"]) != (trained["doc_hash"], trained["prompt_hash"]):
        raise ValueError(f"item {id} was not asked alike of both arms")
    metric = next((name for name in METRICS if name in base["metrics"]), None)
    if metric is None:
        raise ValueError(f"it reports {', '.join(base['metrics'])}, none of {', '.join(METRICS)}")
    return {
        "id": id,
        "instruction": str(base["arguments"][0][0])[-SHOWN:],
        "base": float(base[metric]),
        "trained": float(trained[metric]),
        "metric": metric,
        "target": str(base["target"]),
        "base_text": _said(base),
        "trained_text": _said(trained),
    }


def _said(one: Mapping[str, Any]) -> str:
    """What was written, or the choice that was likeliest (by the whole of its log-probability)."""
    first = one["resps"][0][0]
    if isinstance(first, str):
        return first
    likelihoods = [responses[0][0] for responses in one["resps"]]
    return str(one["arguments"][likelihoods.index(max(likelihoods))][1]).strip()


# ---------------------------------------------------------------- the harness


def _manager(settings: TaskSettings) -> Any:
    """The index of tasks; the harness's own 14,000 are read only if the folder lacks one that is asked for."""
    from lm_eval.tasks import TaskManager

    if settings.folder is not None:
        own = TaskManager(include_path=str(settings.folder), include_defaults=False)
        if set(settings.tasks) <= set(own.all_tasks):
            return own
    return TaskManager(include_path=None if settings.folder is None else str(settings.folder))


def _harness(model: Any, tokenizer: Any, settings: TaskSettings) -> Any:
    """The harness's wrapper of the model in memory. The tokenizer is copied: it may be given a padding token."""
    from lm_eval.models.huggingface import HFLM

    usual = BATCH_ROWS_CPU if model.device.type == "cpu" else BATCH_ROWS_GPU
    with evaluating(model):  # it switches to evaluation for good
        return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=settings.batch_rows or usual,
                    softmax_dtype="float32")  # fmt: skip


def _why(error: Exception) -> str:
    """Why a task cannot be loaded or run, in a line."""
    if isinstance(error, ConnectionError):
        return ("its data set is not here, and Hugging Face's hub cannot be reached; --task-folder DIR takes task "
                "files with data_files of your own")  # fmt: skip
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
