"""What models.py reckons: what a preset comes to on a machine, and every fact of its --json."""

from __future__ import annotations

from typing import Any, NamedTuple

from cai_experiment.errors import UserError
from cai_experiment.models.choice import named_by_variable, resolve_model
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.plan import rows_of
from cai_experiment.models.preset import ModelPreset
from cai_experiment.models.recommend import (
    QUANTIZATIONS,
    ROW_TOKENS,
    TRAINED_TOKENS,
    precisions,
    recommend,
    room_gb,
    training_length,
)
from cai_experiment.models.room import free_ram_gb

HERE = "this machine"  # hardware.detect's name
SYSTEM_GB = 2.0  # of a machine's RAM, that the system and Python with torch take


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
    trained_tokens: int  # of the rows of `training_need`
    too_long: bool  # rows of the length that was asked for are longer than the context: no figure holds

    @property
    def generates(self) -> bool:
        """One row fits."""
        return not self.too_long and self.need <= self.have

    @property
    def trains(self) -> bool:
        """One pair fits."""
        return not self.too_long and self.training_need <= self.have


def have_gb(hardware: Hardware) -> float:
    """GB that a model may take: `room_gb`; on a CPU what is free now, elsewhere what the system leaves free."""
    room = room_gb(hardware)
    if hardware.kind != "cpu":
        return room
    return min(room, free_ram_gb()) if hardware.name == HERE else max(0.0, room - SYSTEM_GB)


def fit(preset: ModelPreset, hardware: Hardware, quantization: str | None, length: int | None) -> Fit:
    """By the plan's arithmetic: one row of `length` tokens to generate, one pair of such rows to train.

    Without `length` rows of ROW_TOKENS to generate, and to train the longest of LENGTHS that fit.
    """
    have, kind, context = have_gb(hardware), hardware.kind, preset.context or (length or 10**9)
    row, tries = min(length or ROW_TOKENS, context), (quantization,) if quantization else precisions(hardware)
    kept = next((one for one in tries if preset.vram_gb(one, row, device=kind) <= have), tries[-1])
    need, trained = preset.vram_gb(kept, row, device=kind), hardware.training_quantization
    rows = rows_of("hf", preset.architecture, hardware, kept)
    rows = min(rows, preset.batch(have, kept, row, kind)) if need <= have else 0
    pair = min(length or training_length(preset, trained, have) or TRAINED_TOKENS, context)
    return Fit(preset, kept, need, have, rows, trained, preset.training_vram_gb(trained, pair),
               preset.training_batch(have, trained, pair), pair, (length or 0) > context)  # fmt: skip


def named_line(hardware: Hardware) -> str:
    """What CAI_MODEL or AGI_MODEL_NAME names, which scripts take before what a machine recommends; "" if unset."""
    value = named_by_variable()[1]
    if not value:
        return ""
    try:
        choice = resolve_model(None, hardware)
    except UserError as error:
        return f"scripts stop where no --model is given: {error}"
    same = "" if choice.name == value else f" ({choice.name})"
    return f"{choice.reason}{same} is set: scripts take it where no --model is given"


# ---------------------------------------------------------------- JSON


def facts(preset: ModelPreset) -> dict[str, Any]:
    """One preset for --json; `hub_id` is null for a model that ships with the lab."""
    return {
        "key": preset.key, "hub_id": None if preset.is_local else preset.hub_id, "revision": preset.revision,
        "kind": preset.kind, "parameters": preset.parameters, "about": preset.architecture.about,
        "context": preset.context, "licence": preset.licence, "gated": preset.gated, "good_at": sorted(preset.tags),
        "generation_gb": {kept: round(preset.vram_gb(kept), 2) for kept in QUANTIZATIONS},
        "training_gb": {kept: round(preset.training_vram_gb(kept), 2) for kept in QUANTIZATIONS},
    }  # fmt: skip


def fit_facts(one: Fit) -> dict[str, Any]:
    """One line of --fit for --json; no GB for rows beyond the context."""
    return {
        "key": one.preset.key, "about": one.preset.architecture.about, "context": one.preset.context,
        "quantization": one.quantization, "generation_gb": None if one.too_long else round(one.need, 2),
        "have_gb": round(one.have, 2), "generates": one.generates, "rows": 0 if one.too_long else one.rows,
        "training_quantization": one.training, "training_gb": None if one.too_long else round(one.training_need, 2),
        "training_tokens": one.trained_tokens, "trains": one.trains, "pairs": 0 if one.too_long else one.pairs,
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
