"""The models that this lab knows by a short name, and how a name is looked up. The rows: preset_table.py. No torch."""

from __future__ import annotations

import difflib

from cai_experiment.errors import BadInputError
from cai_experiment.models.preset import NANO_DIR, ModelPreset, TrainingOverrides
from cai_experiment.models.preset_table import QWEN25, TABLE

__all__ = [
    "ALIASES", "LADDER", "NANO_DIR", "PRESETS", "TAGS", "ModelPreset", "TrainingOverrides", "get_model_preset",
    "nearest_names",
]  # fmt: skip

PRESETS: dict[str, ModelPreset] = {preset.key: preset for preset in TABLE}
TAGS = (  # what a preset may be said to be good at
    "instructions", "critique", "reasoning", "math", "coding", "fine-tuning", "long-context", "rehearsal",
)  # fmt: skip
# From these a machine chooses where no model is named: one family with one licence page, none gated, as tested.
LADDER = tuple(preset.key for preset in QWEN25[:6])

# other name -> key: the explicit names of what a short key means, and names that users type
ALIASES: dict[str, str] = {
    **{f"qwen2.5-{size}-instruct": f"qwen2.5-{size}" for size in ("0.5b", "1.5b", "3b", "7b", "14b")},
    "qwen2.5-32b-base": "qwen2.5-32b",
    "qwen2-1.5b": "qwen2-1.5b-instruct",
    "qwen2.5-math-1.5b-base": "qwen2.5-math-1.5b",
    "qwen3-4b-instruct-2507": "qwen3-4b",
    "phi-2-base": "phi-2",
    "phi-3.5-mini-instruct": "phi-3.5-mini",
    "phi-4-mini-instruct": "phi-4-mini",
    "llama-3.2-1b-instruct": "llama-3.2-1b",
    "llama-3.2-3b-instruct": "llama-3.2-3b",
    "llama-3.1-8b-instruct": "llama-3.1-8b",
    "mistral-7b-instruct": "mistral-7b",
    "deepseek-coder-6.7b-instruct": "deepseek-coder-6.7b",
    "gemma-2-2b-it": "gemma-2-2b",
    "gemma-2b-it": "gemma-2b",
    "gemma-3-1b-it": "gemma-3-1b",
}


def get_model_preset(key: str) -> ModelPreset:
    """The preset that `key` means: a key, an alias or a hub id of the table, in any case of letters.

    Raises BadInputError with the nearest names; there is no default.
    """
    name = key.strip().lower()
    name = ALIASES.get(name, name)
    if name in PRESETS:
        return PRESETS[name]
    by_id = next((preset for preset in TABLE if preset.hub_id.lower() == name), None)
    if by_id is None:
        raise BadInputError(f"{key} is no preset; {nearest_names(key)}", "python cai_experiment/scripts/models.py")
    return by_id


def nearest_names(name: str) -> str:
    """The keys and aliases that look like `name`, or all keys if none does."""
    near = difflib.get_close_matches(name.lower(), [*PRESETS, *ALIASES], n=3, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else f"known: {', '.join(PRESETS)}"
