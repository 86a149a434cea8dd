"""Questions and answers for the ensemble: hub sets, local files, the shipped world's own sets."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from cai_experiment.ensemble.layout import Columns, Row, prompt_of, row_of
from cai_experiment.ensemble.tables import SUFFIXES, file_of, raw_rows
from cai_experiment.errors import BadInputError
from cai_experiment.records.files import show

__all__ = ["HUB_DATASETS", "SHIPPED_DATASETS", "SPLITS", "Row", "balanced", "load_rows", "load_sets", "prompt_of",
           "split_rows"]  # fmt: skip

HUB_DATASETS = ("cola13/gsm8k_formatted", "cola13/medqa_formatted", "cola13/boolq_formatted")
SHIPPED_DATASETS = ("general", "medical", "mathematical", "two")
OFFICIAL = {"gsm8k": "openai/gsm8k", "medqa": "GBaker/MedQA-USMLE-4-options", "boolq": "google/boolq"}
SPLITS = ("train", "validation", "test")
SHIPPED_COUNTS = {"train": 1200, "validation": 150, "test": 200}  # drawn where no limit is given
PLAIN_STEMS = ("train", "test", "validation", "valid", "dev", "data")  # such a file is named after its folder

Item = TypeVar("Item")


def load_rows(
    name: str,
    split: str = "train",
    limit: int | None = None,
    seed: int = 42,
    *,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """The rows of a data set in their order; with `limit`, a sample by `seed` (a smaller limit gives a part of it).

    `name` is a shipped set, "gsm8k", "medqa" or "boolq" (their public hub sets), a local file, a folder with one file
    for each split, or a hub id ("org/name" or "org/name:config"). A local file has no splits: each is the whole file
    (part it by `split_rows`). Where a hub set has no test split, its validation split is the test. `say` gets one line
    on such things.

    Raises:
        BadInputError: an unknown name or split, a missing file, a malformed line (file and line), a set without rows,
            columns named for a shipped set.
        EngineError: the hub cannot be reached and the set is not in its cache.
    """
    if split not in SPLITS:
        raise BadInputError(f"unknown split {split!r}", f"use one of {', '.join(SPLITS)}")
    if limit is not None and limit < 1:
        raise BadInputError(f"{name}: a sample of {limit} rows is none", "ask for at least one")
    if name in SHIPPED_DATASETS:
        if prompt_column is not None or answer_column is not None:
            raise BadInputError(f"{name} is a shipped set, whose columns are known",
                                "leave out --prompt_column and --answer_column, or name a file or hub set")  # fmt: skip
        return _shipped(name, split, limit, seed)
    rows = _all_rows(name, split, Columns(prompt_column, answer_column), say)
    if not rows:
        raise BadInputError(f"{name} ({split}) holds no rows", "name a set with at least one")
    _say_of_texts(name, rows, say)
    return sample(rows, limit, seed)


def load_sets(names: Sequence[str], split: str = "train", limit: int | None = None, seed: int = 42,
              **more: Any) -> dict[str, list[Row]]:  # fmt: skip
    """`load_rows` of several sets, by name. Raises BadInputError for a name given twice, besides."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadInputError(f"{twice[0]} is named twice", "name every data set once")
    return {name: load_rows(name, split, limit, seed, **more) for name in names}


def sample(rows: Sequence[Item], limit: int | None, seed: int) -> list[Item]:
    """`limit` of the rows by `seed`, in their order; all of them where there are no more."""
    if limit is None or limit >= len(rows):
        return list(rows)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[index] for index in sorted(order[:limit])]


def balanced(sets: Mapping[str, Sequence[Row]], seed: int,
             say: Callable[[str], None] = lambda line: None) -> dict[str, list[Row]]:  # fmt: skip
    """The sets at the smallest one's size, each sampled by `seed`; `say` gets a line for each that lost rows."""
    size = min(map(len, sets.values()), default=0)
    for name, rows in sets.items():
        if len(rows) > size:
            say(f"{name}: {size:,} of {len(rows):,} rows are used, as many as the smallest set has")
    return {name: sample(rows, size, seed) for name, rows in sets.items()}


def split_rows(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rows to train on, rows to validate with): `share` of the rows by `seed`, at least one on either side.

    Rows with the same prompt stay together, so that none is validated on a question that was trained on. Raises
    BadInputError for a share that is not between 0 and 1, or fewer than two prompts.
    """
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    if not 0 < share < 1:
        raise BadInputError(f"a validation share of {share:g} is none", "use a number between 0 and 1")
    if len(prompts) < 2:
        raise BadInputError(f"{len(prompts)} question cannot be split for validation", "give at least two")
    count = min(max(1, round(share * len(prompts))), len(prompts) - 1)
    held = set(sample(prompts, count, seed))
    return [row for row in rows if row.prompt not in held], [row for row in rows if row.prompt in held]


# ---------------------------------------------------------------- where rows come from


def _all_rows(name: str, split: str, columns: Columns, say: Callable[[str], None]) -> list[Row]:
    path = Path(name).expanduser()
    if path.is_dir() and name not in OFFICIAL:
        path = file_of(path, split)
    if path.is_file():
        return _rows(raw_rows(path), _name_of(path), path.stem, columns)
    if name not in OFFICIAL and (path.suffix.lower() in SUFFIXES or name.startswith((".", "/", "~"))):
        raise BadInputError(f"no file {show(path)}", "check the path")
    if name not in OFFICIAL and name.count("/") != 1:
        known = ", ".join((*SHIPPED_DATASETS, *OFFICIAL))
        raise BadInputError(f"unknown data set {name!r}",
                            f"use one of {known}, a file ({', '.join(SUFFIXES)}) or a hub id")  # fmt: skip
    from cai_experiment.ensemble.hub import hub_rows

    named = name.split(":")[0]
    dataset = next((known for known, hub in OFFICIAL.items() if named in (known, hub)), named.split("/")[-1])
    return _rows(hub_rows(OFFICIAL.get(name, name), split, say), dataset, split, columns)


def _rows(raw: Iterable[tuple[str, Mapping[str, Any]]], dataset: str, part: str, columns: Columns) -> list[Row]:
    return [row_of(row, place, dataset, f"{part}-{number:05d}", columns) for number, (place, row) in enumerate(raw, 1)]


def _name_of(path: Path) -> str:
    """What a file's rows are named after: a public set that it or its folder is called after, else the file."""
    stem, folder = path.stem, path.absolute().parent.name
    for known in OFFICIAL:
        if known in re.split(r"[\W_]+", f"{stem} {folder}".lower()):
            return known
    return folder if stem.lower() in PLAIN_STEMS else stem


def _shipped(name: str, split: str, limit: int | None, seed: int) -> list[Row]:
    from cai_experiment.ensemble.shipped import world

    raw = world.rows(name, split, SHIPPED_COUNTS[split] if limit is None else limit, seed)
    return _rows(((f"{name}: row {number}", row) for number, row in enumerate(raw, 1)), name, split, Columns())


def _say_of_texts(name: str, rows: Sequence[Row], say: Callable[[str], None]) -> None:
    """A line where answers cannot be graded: nobody should find out from an accuracy of 0."""
    texts = sum(row.task == "text" for row in rows)
    if texts:
        say(f"{name}: {texts:,} of {len(rows):,} answers are neither a number, a letter nor yes or no: "
            "they can be trained on, and are right only word for word")  # fmt: skip
