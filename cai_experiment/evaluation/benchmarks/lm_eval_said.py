"""What the models of a run answered lm-eval's harness: written down as each batch ends, and not asked for again.

The harness has a cache of its own (CachingLM), in an SQLite file, which network volumes lock badly; its hook, which is
called for each answer, writes to a journal of the run here.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cai_experiment.observe.progress import Progress
from cai_experiment.records.files import make_folder
from cai_experiment.records.store import Journal

FILE = "lm_eval_said.jsonl"
ASKED = ("loglikelihood", "loglikelihood_rolling", "generate_until")  # what a harness asks of a model


class Said:
    """Answers by request. `whose` names what they depend on beside arm and request: weights, adapter, lm-eval."""

    def __init__(self, path: Path | None, whose: str) -> None:
        """Read what `path` holds; None remembers nothing. Raises BadInputError or DiskError for a file that is none."""
        self.journal: Journal | None = None
        self.whose, self.found = whose, dict[str, Any]()
        if path is not None:
            make_folder(path.parent)
            self.journal = Journal(path)
            self.found = {row["key"]: _as_given(row["answer"]) for row in self.journal.rows()}

    def key(self, arm: str, kind: str, request: Sequence[Any]) -> str:
        """One request of `kind` (of ASKED) to one arm: a hash of all that its answer depends on."""
        said = json.dumps([self.whose, arm, kind, *request], sort_keys=True, default=repr)
        return hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def keep(self, key: str, answer: Any) -> None:
        """Write an answer down, the first time that it is told."""
        if key not in self.found:
            self.found[key] = answer
            if self.journal is not None:
                self.journal.append({"key": key, "answer": answer})

    def close(self) -> None:
        """fsync and close the file."""
        if self.journal is not None:
            self.journal.close()


def _as_given(answer: Any) -> Any:
    """An answer as the harness's model gives it: a pair (log-probability, greedy), a number or a text."""
    return tuple(answer) if isinstance(answer, list) else answer


class Asking:
    """One arm of a harness's model, which is asked only what nobody remembers; a bar or lines count its requests.

    It stands in for the model, as the harness's own CachingLM does, and is its hook too.
    """

    def __init__(self, harness: Any, said: Said, task: str, arm: str, verbosity: int, console: Console) -> None:
        """`console` is where the bar goes, whatever has become of standard output by then."""
        self.harness, self.said, self.task, self.arm = harness, said, task, arm
        self.verbosity, self.console = verbosity, console
        self.progress: Progress | None = None
        harness.set_cache_hook(self)

    def __getattr__(self, name: str) -> Any:
        """The harness's own, but for what asks the model."""
        found = getattr(self.harness, name)
        return partial(self._ask, name, found) if name in ASKED else found

    def add_partial(self, kind: str, request: Sequence[Any], answer: Any) -> None:
        """The harness has an answer."""
        self.said.keep(self.said.key(self.arm, kind, request), answer)
        if self.progress is not None:
            self.progress.update(self.progress.done + 1)

    def _ask(self, kind: str, ask: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        if any(_sampled(request.args) for request in requests):  # the same request may be asked for several answers
            return ask(requests)
        keys = [self.said.key(self.arm, kind, request.args) for request in requests]
        missing = [request for request, key in zip(requests, keys, strict=True) if key not in self.said.found]
        noun, known = f"requests of {self.task}, {self.arm}", len(requests) - len(missing)
        with Progress(len(requests), noun, self.verbosity, done=known, console=self.console) as progress, quiet():
            self.progress = progress
            for request, answer in zip(missing, ask(missing) if missing else [], strict=True):
                self.said.keep(self.said.key(self.arm, kind, request.args), answer)
            self.progress = None
            progress.update(len(requests))
        return [self.said.found[key] for key in keys]


def _sampled(request: Sequence[Any]) -> bool:
    return any(isinstance(part, dict) and part.get("do_sample") for part in request)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within it the harness and what it loads data with neither log nor draw bars."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
