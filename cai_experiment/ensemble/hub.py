"""Raw rows of data sets on the Hugging Face hub, through `datasets` and its cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cai_experiment.engines.weights import unreachable
from cai_experiment.errors import BadInputError, EngineError, UserError

CONFIGS = {"openai/gsm8k": "main"}  # where a set has several and one is meant
VALIDATION_NAMES = ("validation", "valid", "val", "dev", "eval")


def hub_rows(name: str, split: str, say: Callable[[str], None]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of a split of "org/name" or "org/name:config".

    Where a set has no test split, or one whose answers are kept secret, its validation split is the test, and `say`
    gets a line on it.

    Raises:
        BadInputError: no such set, config or split, or one that this machine may not read.
        EngineError: the hub cannot be reached and the set is not in the cache.
    """
    identity, _, config = name.partition(":")
    splits = _loaded(identity, config or CONFIGS.get(identity))
    validation = next((known for known in VALIDATION_NAMES if known in splits), "validation")
    wanted = validation if split == "validation" else split
    if split == "test" and validation in splits and ("test" not in splits or _is_hidden(splits["test"])):
        wanted = validation
        say(f"{identity} has no test split with answers: its {wanted} split is the test")
    if wanted not in splits:
        raise BadInputError(f"{identity} has no {split} split (there: {', '.join(splits)})",
                            "save the rows that you mean to a file, and name that")  # fmt: skip
    for number, row in enumerate(splits[wanted], 1):
        yield f"{identity} ({wanted}): row {number}", row


def _is_hidden(rows: Any) -> bool:
    """True for a test split whose answers are kept secret: the hub marks each by -1."""
    labels = [name for name in ("label", "answer") if name in rows.column_names]
    return len(rows) > 0 and any(set(rows[:100][name]) == {-1} for name in labels if isinstance(rows[0][name], int))


def _loaded(identity: str, config: str | None) -> Mapping[str, Any]:
    """{split: rows} of a set."""
    import datasets

    try:
        return datasets.load_dataset(identity, config)
    except Exception as error:  # its own errors, the hub's and the network's have no common class
        raise _loading_error(identity, error) from error


def _loading_error(identity: str, error: Exception) -> UserError:
    """The one line for an error of `load_dataset`."""
    file = "or give a local file (.jsonl, .json, .csv, .parquet)"
    if unreachable(error):
        return EngineError(f"data set {identity} is not in the cache, and the hub cannot be reached",
                           f"connect to the internet once, {file}")  # fmt: skip
    first = str(error).strip().split("\n")[0][:200]
    if "gated" in first.lower():
        return BadInputError(f"data set {identity} is gated, and this machine has no access to it",
                             f"accept its terms at huggingface.co/datasets/{identity}, then set HF_TOKEN")  # fmt: skip
    if type(error).__name__ == "DatasetNotFoundError":
        return BadInputError(f"the hub has no data set {identity} that this machine may read",
                             f"check the name (private ones need HF_TOKEN), {file}")  # fmt: skip
    if type(error).__name__ in ("EmptyDatasetError", "DataFilesNotFoundError"):
        return BadInputError(f"data set {identity} holds no data files", "name a set with at least one row")
    if "config" in first.lower():
        return BadInputError(f"data set {identity}: {first}", f"name one as {identity}:CONFIG")
    return EngineError(f"data set {identity} cannot be loaded: {type(error).__name__}: {first}", f"try again, {file}")
