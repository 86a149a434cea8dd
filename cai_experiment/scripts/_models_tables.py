"""The tables and facts of models.py: one model's memory, what fits a machine and by how much it misses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from cai_experiment.models.hardware import Hardware
from cai_experiment.models.plan import rows_of
from cai_experiment.models.preset import ModelPreset
from cai_experiment.models.recommend import QUANTIZATIONS, ROW_TOKENS, TRAINED_TOKENS, recommend, room_gb
from cai_experiment.models.tables import good_at, in_short, plain_table

if TYPE_CHECKING:
    from rich.table import Table

SHAPES = ((1024, 1), (4096, 1), (2048, 8), (2048, 32), (16_384, 1), (32_768, 1))  # (tokens of a row, rows)
TRAINED = ((1024, 1), (1024, 4), (2048, 1), (4096, 1))
SMALLER = ("bf16", "8bit", "4bit")  # what is tried in turn where the machine's own precision does not fit


class Fit(NamedTuple):
    """What one preset comes to on one machine; GB of 10^9 bytes."""

    preset: ModelPreset
    quantization: str  # the machine's, or the next smaller that fits
    need: float
    have: float
    rows: int  # that hf generates at a time; 0 where it does not fit
    training: str  # precision
    training_need: float  # of one pair a pass
    pairs: int  # a pass, at most


def fit(preset: ModelPreset, hardware: Hardware, quantization: str | None, length: int | None) -> Fit:
    """By the plan's arithmetic: one row of `length` tokens to generate, one pair of such rows to train."""
    have, numbers = room_gb(hardware), preset.architecture
    own, row = quantization or hardware.quantization, min(length or ROW_TOKENS, preset.context or ROW_TOKENS)
    tries = [own, *(SMALLER[SMALLER.index(own) + 1 :] if hardware.kind == "cuda" and own in SMALLER else ())]
    tries = tries if quantization is None else [own]
    kept = next((one for one in tries if preset.vram_gb(one, row) <= have), tries[-1])
    need, trained = preset.vram_gb(kept, row), hardware.training_quantization
    rows = min(rows_of("hf", numbers, hardware, kept), preset.batch(have, kept, row)) if need <= have else 0
    pair = min(length or TRAINED_TOKENS, preset.context or TRAINED_TOKENS)
    return Fit(preset, kept, need, have, rows, trained, preset.training_vram_gb(trained, pair),
               preset.training_batch(have, trained, pair))  # fmt: skip


def fit_table(found: Sequence[Fit], hardware: Hardware, length: int | None) -> Table:
    """One line a preset: does it generate, does it train, with which batch, by how much does it miss."""
    where = hardware.gpu_name or f"{hardware.cores} CPU cores"
    rows = f"{length:,}" if length else f"{ROW_TOKENS:,} (training {TRAINED_TOKENS:,})"
    what = "QLoRA DPO" if hardware.kind == "cuda" else f"LoRA DPO in {hardware.training_quantization}"
    title = f"{where}, {room_gb(hardware):.3g} GB to use; rows of {rows} tokens"
    numbers = ("GB", "rows", "DPO GB", "pairs")
    table = plain_table(f"{title}\nGB: one row, or one pair for {what}; rows, pairs: at a time, at most",
                        ("preset", "in", "GB", "rows", "generates", "DPO GB", "pairs", "trains"), numbers)  # fmt: skip
    for one in found:
        table.add_row(one.preset.key, one.quantization, f"{one.need:.1f}", str(one.rows or "-"),
                      verdict(one.need, one.have), f"{one.training_need:.1f}", str(one.pairs or "-"),
                      verdict(one.training_need, one.have))  # fmt: skip
    return table


def verdict(need: float, have: float) -> str:
    """ "yes", or by how many GB it misses."""
    return "yes" if need <= have else f"no: {need - have:.1f} short"


def details(preset: ModelPreset) -> list[str]:
    """All fields of one preset, a line each."""
    numbers = preset.architecture
    shape = (
        f"{numbers.layers} layers, hidden {numbers.hidden:,}, {numbers.heads} heads, {numbers.kv_heads} KV heads "
        f"of {numbers.head_size}, feed-forward {numbers.intermediate:,}, vocabulary {numbers.vocab:,}"
    )
    licence = preset.licence + (", gated: accept it on its page and set HF_TOKEN" if preset.gated else "")
    context = f"{preset.context:,} tokens" if preset.context else "not said"
    lines = [("model", f"{preset.key}: {preset.hub_id}, revision {preset.revision}"),
             ("kind", preset.kind), ("size", f"{preset.parameters:,} parameters ({in_short(preset.parameters)})"),
             ("shape", shape), ("context", f"{context}; beyond: {preset.long_context or 'not known'}"),
             ("licence", licence), ("good at", f"{preset.good_at} ({good_at(preset)})"),
             ("attention", "FlashAttention-2 can serve it" if preset.flash_attention else "no FlashAttention-2"),
             ("4-bit file", preset.four_bit or "none: quantised while loading"),
             ("answers", f"{preset.max_tokens} new tokens recommended")]  # fmt: skip
    if preset.training is not None:
        lines.append(("training", f"learning rate {preset.training.learning_rate:g}: {preset.training.reason}"))
    return [f"{name:<12}{text}" for name, text in lines]


def memory_table(preset: ModelPreset) -> Table:
    """GB for generation by row length and rows, and for LoRA DPO."""
    table = plain_table("GB of 10^9 bytes on a GPU", ("work", "tokens", "rows", *QUANTIZATIONS),
                        ("tokens", "rows", *QUANTIZATIONS))  # fmt: skip
    for tokens, rows in SHAPES:
        if not preset.context or tokens <= preset.context:
            cells = [f"{preset.vram_gb(kept, tokens, rows):.1f}" for kept in QUANTIZATIONS]
            table.add_row("generation", f"{tokens:,}", str(rows), *cells)
    for tokens, pairs in TRAINED:
        if not preset.context or tokens <= preset.context:
            cells = [f"{preset.training_vram_gb(kept, tokens, pairs):.1f}" for kept in QUANTIZATIONS]
            table.add_row("LoRA DPO, pairs", f"{tokens:,}", str(pairs), *cells)
    return table


def places_table(preset: ModelPreset, machines: Sequence[Hardware]) -> Table:
    """On which machines it generates and trains."""
    table = plain_table("where it fits", ("machine", "GB", "in", "generates", "rows", "trains", "pairs"),
                        ("GB", "rows", "pairs"))  # fmt: skip
    for hardware in machines:
        one = fit(preset, hardware, None, None)
        table.add_row(hardware.name, f"{one.have:.3g}", one.quantization, verdict(one.need, one.have),
                      str(one.rows or "-"), verdict(one.training_need, one.have), str(one.pairs or "-"))  # fmt: skip
    return table


def recommendation_lines(hardware: Hardware, name: str | None) -> list[str]:
    """What the machine should take for generation and for training, why, and the next command."""
    where = name or "this machine"
    generation, training = recommend(hardware), recommend(hardware, for_training=True)
    plan = f" --plan --hardware {name}" if name else " --plan"
    return [f"to generate on {where}: {generation.preset.key} | {generation.reason}",
            f"to train on {where}: {training.preset.key} | {training.reason}",
            f"next: python cai_experiment/scripts/test_single.py --model {training.preset.key}{plan}"]  # fmt: skip


# ---------------------------------------------------------------- JSON


def facts(preset: ModelPreset) -> dict[str, Any]:
    """One preset for --json."""
    return {
        "key": preset.key, "hub_id": preset.hub_id, "revision": preset.revision, "kind": preset.kind,
        "parameters": preset.parameters, "context": preset.context, "licence": preset.licence, "gated": preset.gated,
        "good_at": sorted(preset.tags), "generation_gb": {kept: round(preset.vram_gb(kept), 2)
                                                          for kept in QUANTIZATIONS},
        "training_gb": {kept: round(preset.training_vram_gb(kept), 2) for kept in QUANTIZATIONS},
    }  # fmt: skip


def fit_facts(one: Fit) -> dict[str, Any]:
    """One line of --fit for --json."""
    return {
        "key": one.preset.key, "quantization": one.quantization, "generation_gb": round(one.need, 2),
        "have_gb": round(one.have, 2), "generates": one.need <= one.have, "rows": one.rows,
        "training_quantization": one.training, "training_gb": round(one.training_need, 2),
        "trains": one.training_need <= one.have, "pairs": one.pairs,
    }  # fmt: skip


def machine_facts(one: Hardware) -> dict[str, Any]:
    """One machine for --json."""
    return {"key": one.name, "kind": one.kind, "gpu": one.gpu_name, "vram_gb": one.vram_gb, "ram_gb": one.ram_gb,
            "quantization": one.quantization, "training_quantization": one.training_quantization,
            "compute": one.compute, "dollars_per_hour": one.dollars_per_hour}  # fmt: skip


def recommended(hardware: Hardware) -> dict[str, dict[str, str]]:
    """What to generate and to train with, and why, for --json."""
    found = {"generation": recommend(hardware), "training": recommend(hardware, for_training=True)}
    return {work: {"key": one.preset.key, "reason": one.reason} for work, one in found.items()}
