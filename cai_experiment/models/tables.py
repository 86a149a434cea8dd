"""Presets and machines as tables for a terminal. rich is imported where a table is made; no torch."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cai_experiment.models.preset import ROW
from cai_experiment.models.presets import TAGS, ModelPreset
from cai_experiment.models.profiles import HARDWARE_ALIASES, Hardware
from cai_experiment.models.recommend import TRAINED_TOKENS

if TYPE_CHECKING:
    from rich.table import Table

MOST_WIDTH = 120  # wider tables are harder to read; also the width of a pipe
ORDER = ("fine-tuning", "critique", "reasoning", "math", "coding", "long-context", "rehearsal")  # of tags
WITH_TAGS = 98  # columns from which a table has more than figures
LINE = 100  # of a line below a table, at most


def columns() -> int:
    """Columns of the terminal, or those that COLUMNS names, up to 120; 120 in a pipe."""
    return min(shutil.get_terminal_size((MOST_WIDTH, 24)).columns, MOST_WIDTH)


def show(table: Table, width: int | None = None) -> None:
    """Print a table, as wide as `columns`, or `width`; its title as plain lines above (rich would break it where the
    table ends)."""
    from rich.console import Console

    width = width or columns()
    title, table.title = str(table.title or ""), None
    for line in title.splitlines():
        print(textwrap.fill(line, width))
    Console(highlight=False, width=width).print(table)


def broken(text: str, width: int | None = None, indent: int = 2) -> str:
    """A line as several of `width` columns at most (default: the terminal's, up to 100), broken at " | " and blanks."""
    width = width or min(columns(), LINE)
    if len(text) <= width:
        return text
    wrapper = textwrap.TextWrapper(
        width, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )
    first, *rest = text.split(" | ")
    return "\n".join((wrapper.fill(first), *(wrapper.fill(" " * indent + part) for part in rest)))


def plain_table(title: str, names: Sequence[str], right: Sequence[str] = (), folds: Sequence[str] = ()) -> Table:
    """An empty table; `right` columns hold numbers, `folds` break at blanks where the terminal is narrow."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name not in folds)
    return table


def preset_table(presets: Sequence[ModelPreset], width: int) -> Table:
    """Sizes, context, licence, GB for generation by quantisation and for QLoRA DPO, a line each; in a wide terminal as
    much of what a preset is good at as there is room for."""
    title = f"GB of 10^9 bytes: generation, a row of {ROW:,} tokens or the context; DPO, {TRAINED_TOKENS:,}"
    numbers = ("size", "tokens", "fp16", "8-bit", "4-bit", "DPO")
    names = ("preset", "kind", *numbers, "licence")
    rows = [(one.key, one.kind, in_short(one.parameters), f"{one.context // 1024}k",
             *(f"{one.vram_gb(kept):.1f}" for kept in ("bf16", "8bit", "4bit")),
             f"{one.training_vram_gb():.1f}", one.licence + (" gated" if one.gated else ""))
            for one in presets]  # fmt: skip
    taken = sum(1 + max(map(len, column)) for column in zip(names, *rows, strict=True)) + 1
    tags = width >= WITH_TAGS
    table = plain_table(title, (*names, *(["good at"] if tags else [])), numbers)
    for one, row in zip(presets, rows, strict=True):
        table.add_row(*row, *([_fitting(one, width - taken)] if tags else []))
    return table


def _fitting(preset: ModelPreset, room: int) -> str:
    """As many of its tags as fit `room` columns, one at least."""
    most = next((n for n in range(len(TAGS), 1, -1) if len(good_at(preset, n)) <= room), 1)
    return good_at(preset, most)


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
