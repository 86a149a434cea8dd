"""Presets and machines as tables for a terminal. rich is imported where a table is made; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cai_experiment.models.presets import TAGS, ModelPreset
from cai_experiment.models.profiles import HARDWARE_ALIASES, Hardware
from cai_experiment.models.recommend import TRAINED_TOKENS

if TYPE_CHECKING:
    from rich.table import Table

PIPED_WIDTH = 100  # columns where no terminal says how wide it is
MOST_WIDTH = 120  # wider tables are harder to read


def show(table: Table, width: int | None = None) -> None:
    """Print a table, as wide as the terminal up to 120 columns, or `width` at most."""
    from rich.console import Console

    console = Console(highlight=False)
    here = console.width if console.is_terminal else PIPED_WIDTH
    Console(highlight=False, width=min(width or MOST_WIDTH, here)).print(table)


def plain_table(title: str, columns: Sequence[str], right: Sequence[str] = (), folds: Sequence[str] = ()) -> Table:
    """An empty table; `right` columns hold numbers, `folds` break at blanks where the terminal is narrow."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name not in folds)
    return table


def preset_table(presets: Sequence[ModelPreset], with_hub_id: bool = False) -> Table:
    """Sizes, context, licence, GB for generation by quantisation and for QLoRA DPO, and what a preset is good at."""
    title = f"GB: generation, a row of 4,096 tokens; QLoRA DPO, rows of {TRAINED_TOKENS:,}; of 10^9 bytes"
    numbers = ("params", "context", "fp16", "8-bit", "4-bit", "DPO")
    columns = ("preset", *(["hub id"] if with_hub_id else []), "kind", *numbers, "licence", "good at")
    table = plain_table(title, columns, numbers, ("good at", "licence", "hub id"))
    for one in presets:
        sizes = [f"{one.vram_gb(kept):.1f}" for kept in ("bf16", "8bit", "4bit")]
        place = ["ships with the lab" if one.is_local else one.hub_id] if with_hub_id else []
        table.add_row(one.key, *place, one.kind, in_short(one.parameters), f"{one.context // 1024}k", *sizes,
                      f"{one.training_vram_gb():.1f}", one.licence + (" gated" if one.gated else ""),
                      good_at(one))  # fmt: skip
    return table


def good_at(preset: ModelPreset) -> str:
    """Its tags in a fixed order; "instructions", which every chat model takes, only where there is nothing else."""
    found = [tag for tag in TAGS if tag in preset.tags and tag != "instructions"]
    return ", ".join(found) or "instructions"


def hardware_table(machines: Sequence[Hardware]) -> Table:
    """Memory, what a profile recommends for generation and for training, compute type, earlier names."""
    title = "GB: nominal, as on the box. generate, train: the precision recommended; $/h: list prices"
    columns = ("profile", "GPU", "GB", "RAM", "generate", "train", "compute", "$/h", "also")
    table = plain_table(title, columns, ("GB", "RAM", "$/h"), ("GPU", "also"))
    for one in machines:
        also = ", ".join(old for old, new in HARDWARE_ALIASES.items() if new == one.name and _differs(old, new))
        price = f"{one.dollars_per_hour:.2f}" if one.dollars_per_hour else "-"
        memory = f"{one.vram_gb:g}" if one.kind == "cuda" else "-"
        table.add_row(one.name, one.gpu_name.replace("NVIDIA ", "") or "none", memory, f"{one.ram_gb:g}",
                      one.quantization, one.training_quantization, one.compute, price, also)  # fmt: skip
    return table


def in_short(parameters: int) -> str:
    """ "7.6B", "494M", "3.2M"."""
    if parameters >= 9.95e8:
        return f"{parameters / 1e9:.1f}B"
    return f"{parameters / 1e6:.0f}M" if parameters >= 1e7 else f"{parameters / 1e6:.1f}M"


def _differs(old: str, new: str) -> bool:
    return old.replace("-", "_") != new
