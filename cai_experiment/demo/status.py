"""What the page says of the models: status lines, the box Dual Model System Status, which names it offers. No torch."""

from __future__ import annotations

from typing import Any

from cai_experiment.demo.markup import Html, card, joined, notice, table
from cai_experiment.engines.at_hand import whole_in_cache
from cai_experiment.engines.load import NAMES
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.roles import ROLES
from cai_experiment.models.tables import in_short

HEADS = ("role", "model", "parameters", "precision", "device", "memory")


def title(name: str) -> str:
    """A model's name as a heading: hub ids in small letters begin with a capital ("phi-2": "Phi-2")."""
    shipped = name in PRESETS and PRESETS[name].is_local
    if shipped or not name.islower():
        return name
    return name.replace("gpt", "GPT", 1) if name.startswith("gpt") else name[:1].upper() + name[1:]


def loaded_line(role: str, name: str) -> str:
    """ "✓ Evaluation model loaded: Qwen2-1.5B-Instruct"."""
    return f"✓ {role.capitalize()} model loaded: {title(name)}"


def loaded_lines(role: str, info: dict[str, Any]) -> str:
    """`loaded_line` and, on the next line, the details; `info` is MultiModelManager's `get_status_info`."""
    known = info[f"{role}_model"]
    if known is None:  # another session has unloaded it by now
        return f"✗ the {role} model was unloaded meanwhile"
    size = f"{in_short(known['parameters'])} parameters, {known['memory_gb']:.2f} GB"
    shared = ", shared by both roles" if info["shared"] else ""
    note = f" ({known['note']})" if known["note"] else ""
    details = f"{size}, {NAMES[known['quantization']]} on {known['device']}{shared}{note}"
    return f"{loaded_line(role, known['name'])}\n{details}"


def status_box(info: dict[str, Any]) -> Html:
    """The box: a line for each role, a table of what is loaded, the total memory. No `info`: nothing is loaded."""
    loaded = [(role, known) for role in ROLES if (known := info.get(f"{role}_model"))]
    lines = [
        notice(loaded_line(role, dict(loaded)[role]["name"]), "ok") if role in dict(loaded)
        else notice(f"{role.capitalize()} model: not loaded", "note")
        for role in ROLES
    ]  # fmt: skip
    rows = [
        (role, title(known["name"]), in_short(known["parameters"]), NAMES[known["quantization"]], known["device"],
         f"{known['memory_gb']:.2f} GB")
        for role, known in loaded
    ]  # fmt: skip
    parts = [*lines, *([table(HEADS, rows)] if rows else []), notice(_total(info), "note")]
    return card("Dual Model System Status", joined(*parts))


def _total(info: dict[str, Any]) -> str:
    total = f"Total memory: {info.get('total_memory_gb', 0):.2f} GB"
    if not info:
        return total
    free = f"{info['free_ram_gb']:.1f} GB of RAM free"
    if info["device"] == "cuda":
        free = f"{info['free_gpu_gb']:.1f} GB of GPU memory and {free}"
    return f"{total}{' (one load in both roles)' if info['shared'] else ''}; {free}"


# ---------------------------------------------------------------- names to offer


def offered() -> list[str]:
    """Every preset, those that need no download first."""
    here = [key for key, preset in PRESETS.items() if preset.is_local or at_hand(key)]
    return [*here, *(key for key in PRESETS if key not in here)]


def at_hand(key: str) -> bool:
    """True if a preset's own files, or its sibling's in 4 bit, lie whole in the download cache."""
    preset = PRESETS[key]
    if whole_in_cache(preset.hub_id, preset.revision):
        return True
    return bool(preset.four_bit) and whole_in_cache(preset.four_bit, "main", tokenizer=False)
