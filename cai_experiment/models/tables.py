"""Presets and machines as tables for a terminal. rich is imported where a table is made; no torch."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cai_experiment.models.presets import TAGS, ModelPreset
from cai_experiment.models.profiles import HARDWARE_ALIASES, Hardware
from cai_experiment.models.recommend import TRAINED_TOKENS

if TYPE_CHECKING:
    from rich.table import Table

MOST_WIDTH = 120  # wider tables are harder to read; also the width of a pipe
ORDER = ("fine-tuning", "critique", "reasoning", "math", "coding", "long-context", "rehearsal")  # of tags
WITH_TAGS, WITH_HUB_ID = 98, 118  # columns from which a table of presets has more than figures


def columns() -> int:
    """Columns of the terminal, or those that COLUMNS names, up to 120; 120 in a pipe."""
    return min(shutil.get_terminal_size((MOST_WIDTH, 24)).columns, MOST_WIDTH)


def show(table: Table, width: int | None = None) -> None:
    """Print a table, as wide as `columns`, or `width`."""
    from rich.console import Console

    Console(highlight=False, width=width or columns()).print(table)


def plain_table(title: str, names: Sequence[str], right: Sequence[str] = (), folds: Sequence[str] = ()) -> Table:
    """An empty table; `right` columns hold numbers, `folds` break at blanks where the terminal is narrow."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name not in folds)
    return table


def preset_table(presets: Sequence[ModelPreset], width: int) -> Table:
    """Sizes, context, licence, GB for generation by quantisation and for QLoRA DPO; in a wide terminal what a preset
    is good at, and its name on the hub."""
    title = f"GB: generation, a row of 4,096 tokens; QLoRA DPO, rows of {TRAINED_TOKENS:,}; of 10^9 bytes"
    numbers = ("size", "tokens", "fp16", "8-bit", "4-bit", "DPO")
    tags, ids = width >= WITH_TAGS, width >= WITH_HUB_ID
    names = ("preset", *(["on the hub"] if ids else []), "kind", *numbers, "licence", *(["good at"] if tags else []))
    table = plain_table(title, names, numbers, ("good at",))
    for one in presets:
        sizes = [f"{one.vram_gb(kept):.1f}" for kept in ("bf16", "8bit", "4bit")]
        place = [("ships with the lab" if one.is_local else one.hub_id.partition("/")[2])] if ids else []
        table.add_row(one.key, *place, one.kind, in_short(one.parameters), f"{one.context // 1024}k", *sizes,
                      f"{one.training_vram_gb():.1f}", one.licence + (" gated" if one.gated else ""),
                      *([good_at(one, 2)] if tags else []))  # fmt: skip
    return table


def good_at(preset: ModelPreset, most: int = len(TAGS)) -> str:
    """Its first `most` tags; "instructions", which every chat model takes, only where there is nothing else."""
    found = [tag for tag in ORDER if tag in preset.tags]
    return ", ".join(found[:most]) or "instructions"


def hardware_table(machines: Sequence[Hardware], width: int) -> Table:
    """Memory, what a profile recommends for generation and for training, compute type, earlier names."""
    title = "GB: nominal. generate, train: the precision recommended. $/h: list prices"
    names = (
        "profile",
        "GPU",
        "GB",
        "RAM",
        "generate",
        "train",
        "compute",
        "$/h",
        *(["also"] if width >= WITH_TAGS else []),
    )
    table = plain_table(title, names, ("GB", "RAM", "$/h"), ("GPU", "also"))
    for one in machines:
        also = ", ".join(old for old, new in HARDWARE_ALIASES.items() if new == one.name and _differs(old, new))
        price = f"{one.dollars_per_hour:.2f}" if one.dollars_per_hour else "-"
        memory = f"{one.vram_gb:g}" if one.kind == "cuda" else "-"
        gpu = one.gpu_name.removeprefix("NVIDIA ").removeprefix("GeForce ") or "none"
        table.add_row(one.name, gpu, memory, f"{one.ram_gb:g}",
                      one.quantization, one.training_quantization, one.compute, price,
                      *([also] if width >= WITH_TAGS else []))  # fmt: skip
    return table


def in_short(parameters: int) -> str:
    """ "7.6B", "494M", "3.2M"."""
    if parameters >= 9.95e8:
        return f"{parameters / 1e9:.1f}B"
    return f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"{parameters / 1e6:.1f}M"


def _differs(old: str, new: str) -> bool:
    return old.replace("-", "_") != new
