"""The tables and lines of models.py: one model's memory, what fits a machine and by how much it misses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cai_experiment.models.hardware import Hardware
from cai_experiment.models.preset import WEIGHTS_DIR, ModelPreset
from cai_experiment.models.recommend import LENGTHS, QUANTIZATIONS, ROW_TOKENS, recommend
from cai_experiment.models.tables import broken, good_at, in_short, plain_table
from cai_experiment.scripts._models_fit import HERE, Fit, have_gb, named_line

if TYPE_CHECKING:
    from rich.table import Table

SHAPES = ((1024, 1), (4096, 1), (2048, 8), (2048, 32), (16_384, 1), (32_768, 1))  # (tokens of a row, rows)
TRAINED = ((1024, 1), (1024, 4), (2048, 1), (4096, 1))
ROWS, PAIRS = (1, 8, 32), (1, 4)  # with a --length
NAMES = 12  # columns of the names of a model's facts


def fit_table(found: Sequence[Fit], hardware: Hardware, length: int | None) -> Table:
    """One line a preset: does it generate, does it train, with which batch, by how much does it miss."""
    where = hardware.gpu_name or f"{hardware.cores} CPU cores"
    free = "free now" if hardware.kind == "cpu" and hardware.name == HERE else "to use"
    rows = f"rows of {length:,} tokens" if length else f"rows of {ROW_TOKENS:,} tokens to generate"
    what = "QLoRA DPO" if hardware.kind == "cuda" else f"LoRA DPO in {hardware.training_quantization}"
    about = f"\n{found[0].preset.key}: {found[0].preset.architecture.about}" if _about(found[0].preset) else ""
    names = ("preset", "in", "GB", "rows", "generates", "DPO", "pairs", "trains")
    table = plain_table(
        f"{where}, {have_gb(hardware):.3g} GB {free}; {rows}\n"
        f"GB: one row, or one pair for {what}; rows, pairs: at a time, at most\n"
        f"trains: in rows of so many tokens{'' if length else f', up to {LENGTHS[0]:,}'}{about}",
        names, ("GB", "rows", "DPO", "pairs"), ("generates", "trains"))  # fmt: skip
    for one in found:
        need, trained = ("-", "-") if one.too_long else (_gb(one.need), _gb(one.training_need))
        table.add_row(one.preset.key, one.quantization, need, _count(one.rows, one), generates(one), trained,
                      _count(one.pairs, one), trains(one))  # fmt: skip
    return table


def generates(one: Fit) -> str:
    """ "yes", or by how many GB one row misses, or the context that it is longer than."""
    if one.too_long:
        return f"no: context {one.preset.context:,}"
    return "yes" if one.generates else _short(one.need - one.have)


def trains(one: Fit) -> str:
    """As `generates`, with the tokens of the rows: "yes: 2,048"."""
    if one.too_long:
        return "no"
    return f"yes: {one.trained_tokens:,}" if one.trains else _short(one.training_need - one.have)


def _short(gb: float) -> str:
    return f"no: {_gb(gb)} short"


def _gb(gb: float) -> str:
    return f"{gb:.1f}" if gb < 99.95 else f"{gb:.0f}"


def _count(number: int, one: Fit) -> str:
    return str(number) if number and not one.too_long else "-"


def _about(preset: ModelPreset) -> str:
    """What stands beside figures that are not exact."""
    return f"; {preset.architecture.about}" if preset.architecture.about else ""


def details(preset: ModelPreset) -> list[str]:
    """All fields of one preset, a line each."""
    numbers = preset.architecture
    shape = (
        f"{numbers.layers} layers, hidden {numbers.hidden:,}, {numbers.heads} heads, {numbers.kv_heads} KV heads "
        f"of {numbers.head_size}, feed-forward {numbers.intermediate:,}, vocabulary {numbers.vocab:,}"
    )
    licence = preset.licence + (", gated: accept it on its page and set HF_TOKEN" if preset.gated else "")
    context = f"{preset.context:,} tokens" if preset.context else "not said"
    size = f"{preset.parameters:,} parameters ({in_short(preset.parameters)})"
    if numbers.about:
        kind = numbers.model_type or "its model_type"
        size = f"about {in_short(preset.parameters)}, reckoned as Llama: {kind} is no family that is counted exactly"
    place = f"{preset.hub_id}, revision {preset.revision}"
    if preset.is_local:
        place = f"ships with the lab (cai_experiment/{WEIGHTS_DIR.parent.name}/{WEIGHTS_DIR.name}/{preset.key})"
    lines = [("model", f"{preset.key}: {place}"), ("kind", preset.kind), ("size", size),
             ("shape", shape), ("context", f"{context}; beyond: {preset.long_context or 'not known'}"),
             ("licence", licence), ("good at", preset.good_at + (f" ({good_at(preset)})" if preset.tags else "")),
             ("attention", "FlashAttention-2 can serve it" if preset.flash_attention else "no FlashAttention-2"),
             ("4-bit file", preset.four_bit or "none: quantised while loading"),
             ("answers", f"{preset.max_tokens} new tokens recommended")]  # fmt: skip
    if preset.training is not None:
        lines.append(("training", f"learning rate {preset.training.learning_rate:g}: {preset.training.reason}"))
    return [f"{name:<{NAMES}}{text}" for name, text in lines]


def memory_table(preset: ModelPreset, length: int | None) -> Table:
    """GB for generation by row length and rows, and for LoRA DPO; with `length` for rows of that length alone."""
    table = plain_table(f"GB of 10^9 bytes on a GPU{_about(preset)}", ("work", "tokens", "rows", *QUANTIZATIONS),
                        ("tokens", "rows", *QUANTIZATIONS))  # fmt: skip
    shapes = [(length, rows) for rows in ROWS] if length else SHAPES
    trained = [(length, pairs) for pairs in PAIRS] if length else TRAINED
    for work, each, need in (("generation", shapes, preset.vram_gb),
                             ("LoRA DPO, pairs", trained, preset.training_vram_gb)):  # fmt: skip
        for tokens, rows in each:
            if not preset.context or tokens <= preset.context:
                cells = [f"{need(kept, tokens, rows):.1f}" for kept in QUANTIZATIONS]
                table.add_row(work, f"{tokens:,}", str(rows), *cells)
    return table


def places_table(preset: ModelPreset, found: Sequence[tuple[Hardware, Fit]], length: int | None) -> Table:
    """On which machines it generates and trains."""
    rows = f"{length:,} tokens" if length else f"{ROW_TOKENS:,} tokens to generate, up to {LENGTHS[0]:,} to train"
    names = ("machine", "GB", "in", "generates", "rows", "trains", "pairs")
    table = plain_table(f"where it fits, with rows of {rows}{_about(preset)}", names, ("GB", "rows", "pairs"))
    for hardware, one in found:
        table.add_row(hardware.name, f"{one.have:.3g}", one.quantization, generates(one), _count(one.rows, one),
                      trains(one), _count(one.pairs, one))  # fmt: skip
    return table


def recommendation_lines(hardware: Hardware, name: str | None) -> list[str]:
    """What the machine should take for generation and for training, why, what a variable names, the next command."""
    where, plan = name or HERE, f" --plan --hardware {name}" if name else " --plan"
    generation, training = recommend(hardware), recommend(hardware, for_training=True)
    lines = [f"to generate on {where}: {generation.preset.key} | {generation.reason}",
             f"to train on {where}: {training.preset.key} | {training.reason}", named_line(hardware)]  # fmt: skip
    next_line = f"next: python cai_experiment/scripts/test_single.py --model {training.preset.key}{plan}"
    return [*(broken(line) for line in lines if line), next_line]
