"""The flags that name a judge, and loading it: a model in this process, or any OpenAI-compatible server."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError, UserError
from cai_experiment.models.ensembles import ENSEMBLE
from cai_experiment.scripts._common import positive_int, seconds
from cai_experiment.scripts._ensemble import make_ensemble

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings
    from cai_experiment.judging.judge import Judge

THE_CRITIC = "the critic"  # in the report's settings, where no other judge is named
OF_SERVER = {"--server": "--judge", "--model": "--judge-model", "--format": "--judge-format",
             "--server-concurrency": "--judge-concurrency", "--deadline": "--judge-deadline"}  # fmt: skip
OF_MODEL = {"--model": "--judge", "--format": "--judge-format", "--engine": "--judge-engine"}
IDENTITY = ("model", "url", "revision", "weights_sha256", "random_seed", "quantization", "layout", "max_length")


def add_judge_flags(parser: argparse.ArgumentParser, default: str = "the base model") -> None:
    """--judge and what goes with it; `default` is who judges without it."""
    group = parser.add_argument_group(f"judge (default: {default})")
    group.add_argument("--judge", metavar="MODEL|URL",
                       help="preset, hub id, folder, or OpenAI-compatible endpoint (its key: CAI_API_KEY)")  # fmt: skip
    group.add_argument("--judge-model", metavar="NAME", help="where the endpoint serves several")
    group.add_argument("--judge-format", choices=("auto", "chat", "base"), default="auto", help="prompt layout")
    group.add_argument("--judge-engine", choices=("auto", "hf", "vllm", "unsloth", "generate"), default="auto",
                       help="of a MODEL")  # fmt: skip
    group.add_argument("--judge-concurrency", type=positive_int, default=64, metavar="N",
                       help="requests to the endpoint at a time, at most (default: %(default)s)")  # fmt: skip
    group.add_argument("--judge-deadline", type=seconds, default=600.0, metavar="SECONDS",
                       help="for one answer of the endpoint, retries and waits included; then it counts as failed "
                            "(default: %(default)g)")  # fmt: skip


def is_url(name: str | None) -> bool:
    """True if --judge names an endpoint, which needs no memory here."""
    return name is not None and re.match(r"https?://", name.strip(), re.IGNORECASE) is not None


def load_judge(args: argparse.Namespace, max_length: int | None = None) -> Judge:
    """The judge that the flags of `add_judge_flags` name (not None); prints its first line and its method.

    `max_length` is the context that its questions take, if more than usual. `judge.engine.close()` gives its memory
    back. Raises BadInputError or EngineError, one line each, in the words of these flags.
    """
    from cai_experiment.engines.load import load_engine
    from cai_experiment.judging.judge import Judge
    from cai_experiment.judging.outage import Watched

    if args.judge_model is not None and not is_url(args.judge):
        raise BadInputError("--judge-model names a model of an endpoint", "give --judge http://HOST:PORT/v1")
    say = partial(renamed, names=OF_SERVER if is_url(args.judge) else OF_MODEL)
    try:
        loaded = load_engine(judge_settings(args, max_length))
    except UserError as error:
        raise type(error)(say(str(error))) from error
    engine: Any = Watched(loaded, f"--judge {loaded.describe().get('url') or shown(args.judge)}", say)
    judge = Judge(engine, shown(str(engine.describe().get("model") or args.judge)))
    print(say(f"judge: {engine.first_line} | {judge.method}"), flush=True)
    return judge


def check_judge(args: argparse.Namespace) -> None:
    """Raise for a --judge that names no model, before anything is asked of the target; an endpoint is asked itself."""
    from cai_experiment.engines.load import make_plan
    from cai_experiment.models.hardware import detect

    if args.judge is None or is_url(args.judge):
        return
    try:
        make_plan(judge_settings(args), detect())
    except UserError as error:
        raise type(error)(renamed(str(error), OF_MODEL)) from error


def judge_settings(args: argparse.Namespace, max_length: int | None = None) -> LoadSettings:
    """How to load it."""
    from cai_experiment.engines.load import LoadSettings

    if is_url(args.judge):
        return LoadSettings(
            args.judge_model, args.judge_format, engine="server", seed=args.seed, trains_after=False,
            server_url=args.judge, server_concurrency=args.judge_concurrency, deadline=args.judge_deadline,
            max_length=max_length,
        )  # fmt: skip
    return LoadSettings(
        args.judge, args.judge_format, engine=args.judge_engine, seed=args.seed, trains_after=False,
        batch_size=args.batch_size, max_length=max_length, ensemble=make_ensemble,
    )  # fmt: skip


def shown(name: str) -> str:
    """A model's name for a report: of a folder its last part, which says nothing of this machine."""
    kind = ENSEMBLE if name.startswith(ENSEMBLE) else ""
    place = Path(name.removeprefix(kind))
    return f"{kind}{place.name}" if place.is_absolute() else name


def identity(engine: Any) -> str:
    """The model that speaks through an engine, as JSON: what another one said is never taken for its word.

    Of `engine.describe()` only what its words depend on: its slots and free memory are others in every call.
    """
    facts = engine.describe()
    return json.dumps({name: str(facts[name]) for name in IDENTITY if facts.get(name) is not None})


def renamed(line: str, names: Mapping[str, str]) -> str:
    """An engine's line with this script's flags."""
    return re.sub(r"--[a-z][a-z-]*", lambda flag: names.get(flag[0], flag[0]), line)
