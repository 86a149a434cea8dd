"""Whether a model's files lie in the cache, and if not, whether the hub can be asked: known before anything is loaded.

transformers asks the hub for each file, five times each with waits between, before it says that there is no network.
One question beforehand costs a second at most where there is one, and gives one line where there is none.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cai_experiment.engines.weights import check_folder, not_at_hand, safetensors_problem, weight_files
from cai_experiment.errors import BadInputError, DiskError, EngineError, UserError
from cai_experiment.models import configs
from cai_experiment.models.choice import ModelChoice, is_ensemble, members_of
from cai_experiment.models.downloads import cache_folder, commit_of
from cai_experiment.models.ensembles import RANDOM
from cai_experiment.models.serving import disk_refusal, files_for

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings, Plan

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_files(plan: Plan, settings: LoadSettings) -> bool:
    """True if all files are here, so that nothing is asked of the hub. Raises what would keep a load from beginning.

    BadInputError: a damaged folder, no such model. EngineError: not here, and the hub cannot be reached. DiskError: the
    disk does not hold the download.
    """
    if settings.random_weights is not None or plan.engine == "server":
        return False
    if is_ensemble(plan.choice):
        return _check_experts(plan)
    with settings.naming():
        return _check_files(plan, plan.choice.path_or_id)


def _check_files(plan: Plan, place: str) -> bool:
    if Path(place).is_dir():
        check_folder(Path(place))
        return True
    files, precision = files_for(plan.choice, plan.engine, plan.quantization)
    if plan.engine != "vllm" and (refusal := disk_refusal(plan.choice, precision)):
        step = "make room, set HF_HOME to a larger disk, or take a smaller --model"
        raise DiskError(f"--model {plan.choice.name}: {refusal}", step)
    if files == place:
        wanted = {(place, revision_of(plan.choice)): whole_in_cache(place, revision_of(plan.choice))}
    else:
        wanted = {(files, "main"): whole_in_cache(files, "main", tokenizer=plan.engine == "unsloth")}
        if plan.engine != "unsloth":  # which takes the tokenizer from there too
            wanted[place, revision_of(plan.choice)] = whole_in_cache(place, revision_of(plan.choice), weights=False)
    lacking = [one for one, here in wanted.items() if not here]
    if lacking:
        ask_hub(plan.choice.name, *lacking[0])
    return not lacking


def _check_experts(plan: Plan) -> bool:
    """`check_files` of an ensemble's experts, but for those that may be adapters, which their loading looks for."""
    with in_words_of("expert"):
        experts = [one for one in members_of(plan.choice) if not one.name.startswith(RANDOM)]
        whole = [one for one in experts if one.preset or (Path(one.path_or_id) / "config.json").is_file()]
        here = [_check_files(replace(plan, choice=one, engine="hf"), one.path_or_id) for one in whole]
        return all(here) and len(whole) == len(experts)


def revision_of(choice: ModelChoice) -> str:
    """The commit or branch of a preset's files on the hub that this lab has pinned; "main" of any other model."""
    preset = choice.preset
    return preset.revision if preset is not None and choice.path_or_id == preset.hub_id else "main"


def whole_in_cache(hub_id: str, revision: str, weights: bool = True, tokenizer: bool = True) -> bool:
    """True if the cache holds the config of that revision, the `weights` and a `tokenizer`, and no piece of a file.

    Nothing need be asked of the hub then. A branch means the commit that it meant when it was last fetched.
    """
    folder, commit = cache_folder(hub_id), commit_of(hub_id, revision)
    snapshot = folder / "snapshots" / commit
    if not commit or not (snapshot / "config.json").is_file():
        return False
    if tokenizer and not any((snapshot / name).is_file() for name in TOKENIZERS):
        return False
    return not weights or (not any((folder / "blobs").glob("*.incomplete")) and _weights_are_whole(snapshot))


def _weights_are_whole(snapshot: Path) -> bool:
    try:
        files = weight_files(snapshot)
    except UserError:
        return False
    return bool(files) and not any(safetensors_problem(file) for file in files)


def ask_hub(name: str, hub_id: str, revision: str) -> None:
    """Ask the hub for one small file of a model; raises the one line that a load would fail with.

    BadInputError: no such model or revision, or one that this machine has no access to. EngineError: the hub cannot be
    reached, or must not be (HF_HUB_OFFLINE).
    """
    try:
        configs.ask(hub_id, revision)
    except EngineError as error:
        raise not_at_hand(name) from error
    except BadInputError as error:  # it names the hub id alone
        raise BadInputError(f"--model {error}") from error


@contextmanager
def quiet_retries() -> Iterator[None]:
    """Without huggingface_hub's lines about requests that it repeats: what comes of them is said in one."""
    logger = logging.getLogger("huggingface_hub.utils._http")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


# ---------------------------------------------------------------- what the user wrote


@contextmanager
def in_words_of(said: str, named: bool = True) -> Iterator[None]:
    """Errors from within speak of `said`, which named the model, where they would speak of --model.

    `said` is a flag, "--roles dual:" or "" (a call from Python); `named` False: no model was named.
    """
    try:
        yield
    except UserError as error:
        error.args = (reworded(str(error), said, named), *error.args[1:])
        raise


def reworded(line: str, said: str, named: bool = True) -> str:
    """A line that says --model, in the words of `said` (see `in_words_of`)."""
    flag = said if re.fullmatch(r"--[a-z-]+", said) else "model"
    start = f"{said} " if said and named else ""
    return re.sub(r"--model(?![\w-])", flag, re.sub(r"\A--model (?=\S)", lambda found: start, line))
