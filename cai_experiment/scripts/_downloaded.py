"""What download_models.py says of the cache: which milestone loads which files, what lies there, is it whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cai_experiment.engines.load import revision_of
from cai_experiment.models.choice import ModelChoice
from cai_experiment.models.disk import free_gb, hub_cache
from cai_experiment.models.downloads import WEIGHTS, Found, cache_folder, holds_weights, look
from cai_experiment.models.memory import weights_gb
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.tables import columns, plain_table, show
from cai_experiment.scripts._download import Wanted, chosen, sibling_of, wanted

WITH_HUB_ID = 108  # columns of a terminal from which the list shows where a model lies on the hub


def which_files(names: Sequence[str], quantization: str | None) -> str:
    """The first line: which files the milestones load on a GPU, and which of them this command fetches; "" if it does
    not matter, as no model has files quantised beforehand."""
    presets = [choice.preset for choice in (chosen(name) for name in names) if choice.preset]
    presets = [preset for preset in presets if not preset.is_local]
    if not any(preset.four_bit for preset in presets):
        return ""
    whole = sum(weights_gb(preset.architecture, "bf16") for preset in presets)
    small = sum(weights_gb(preset.architecture, "4bit" if preset.four_bit else "bf16") for preset in presets)
    first, then = ("these", "no --quantization") if quantization == "4bit" else ("--quantization 4bit", "these")
    return (f"on a GPU milestones 0 and 1 load 4-bit files ({small:.1f} GB: {first}), "
            f"2 and 3 also 16-bit ones ({whole:.1f} GB: {then})")  # fmt: skip


# ---------------------------------------------------------------- --list


def print_list(names: Sequence[str]) -> None:
    """A table of presets (or of the models named): size on the hub and what lies in the cache, in 16 and in 4 bit."""
    title = "GB (10^9 bytes) of 16-bit files and of those quantised to 4 bit beforehand, and what of them is here"
    ids = ["on the hub"] if columns() >= WITH_HUB_ID else []
    table = plain_table(title, ("model", *ids, "GB", "here", "4-bit", "4-bit here"), ("GB", "4-bit"), ids)
    for name in names or PRESETS:
        choice = chosen(name)
        if Path(choice.path_or_id).is_dir():
            table.add_row(choice.name, *([""] if ids else []), "", "at hand", "", "")
        else:
            table.add_row(choice.name, *([choice.path_or_id] if ids else []), *_of_own(choice), *_of_sibling(choice))
    show(table)
    print(f"cache: {hub_cache()}, {free_gb(hub_cache()):.0f} GB free")


def _of_own(choice: ModelChoice) -> tuple[str, str]:
    size = f"{weights_gb(choice.preset.architecture, 'bf16'):.1f}" if choice.preset else "?"
    found = look(choice.path_or_id, revision_of(choice))
    if found.commit and not holds_weights(choice.path_or_id, found.commit):
        return size, "tokenizer"
    return size, _here(found)


def _of_sibling(choice: ModelChoice) -> tuple[str, str]:
    sibling = sibling_of(choice)
    if sibling is None or choice.preset is None:
        return "", ""
    return f"{weights_gb(choice.preset.architecture, '4bit'):.1f}", _here(look(sibling.hub_id, sibling.revision))


def _here(found: Found) -> str:
    return f"whole, {found.gb:.1f} GB" if found.whole else f"NOT whole, {found.gb:.2f} GB" if found.gb else "-"


# ---------------------------------------------------------------- --verify


def verify(names: Sequence[str], quantization: str | None) -> bool:
    """Check each model (without names: each known one of which something is here); one line each, problems on stderr.

    Without a precision both its files and those quantised beforehand, where something of them is here. True if all is
    whole.
    """
    if quantization is not None:
        every = [one for name in names or _known() for one in wanted(name, quantization)]
    else:
        every = [one for name in names or _known() for one in _both(name, bool(names))]
    if not names:
        every = [one for one in every if cache_folder(one.hub_id).is_dir()]
        print(f"{len(every)} repositories of known models in {hub_cache()}", flush=True)
    return all([_verified(one) for one in every])


def _known() -> list[str]:
    return [key for key, preset in PRESETS.items() if not preset.is_local]


def _both(name: str, named: bool) -> list[Wanted]:
    """A model's own repository and its sibling's, those of which something is here; `named`: else its own."""
    choice = chosen(name)
    every = [one for one in (*wanted(name, None), sibling_of(choice)) if one is not None]
    if not every[0].hub_id:
        return every[:1]
    here = [one for one in every if cache_folder(one.hub_id).is_dir()]
    if len(here) == 2 and not holds_weights(here[0].hub_id, look(here[0].hub_id, here[0].revision).commit):
        here[0] = replace(here[0], weights=False)  # what a load in 4 bit takes from there
    return here or (every[:1] if named else [])


def _verified(one: Wanted) -> bool:
    if not one.hub_id:
        return _at_hand(one)
    found = look(one.hub_id, one.revision, hashes=True, weights=one.weights)
    if found.whole:
        what = "" if one.weights else "its tokenizer alone, "
        print(f"{one.hub_id}: {what}whole, {found.gb:.2f} GB, commit {found.commit}", flush=True)
        return True
    for problem in found.problems:
        print(f"{one.hub_id}: {problem}; {one.repair}", file=sys.stderr, flush=True)
    if not found.problems:
        print(f"{one.hub_id}: not downloaded; {one.fetch}", file=sys.stderr, flush=True)
    return False


def _at_hand(one: Wanted) -> bool:
    """Of a folder the hub has no hashes; a shipped model's weights are held against their own header."""
    preset = PRESETS.get(one.name)
    if preset is None or not preset.is_local:
        print(f"{one.name}: a folder, of which the hub has no hashes", flush=True)
        return True
    files = list(Path(preset.hub_id).glob(f"*{WEIGHTS}"))
    whole = bool(files) and all(_opens(path) for path in files)
    told = "ships with the lab: whole" if whole else "ships with the lab, and its weights are not whole; clone it again"
    print(f"{one.name}: {told}", file=None if whole else sys.stderr, flush=True)
    return whole


def _opens(path: Path) -> bool:
    """True if the file is as long as its header says."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"):
            return True
    except (SafetensorError, OSError):
        return False
