"""From a name, or from none, to a model: preset, folder or hub id, else what the machine allows. No torch."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cai_experiment.errors import BadInputError
from cai_experiment.models.ensembles import (
    ENSEMBLE,
    RANDOM,
    all_known,
    folder_of,
    place_of,
    read_heads,
    refused,
    together,
)
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import Architecture
from cai_experiment.models.presets import PRESETS, ModelPreset, get_model_preset, nearest_names
from cai_experiment.models.recommend import need_gb, recommend

VARIABLES = ("CAI_MODEL", "AGI_MODEL_NAME")  # the first goes before the second, which the first notebooks set
BIG_GPU_GB = 70  # from here on the default is the product's target, Qwen2.5-32B


@dataclass(frozen=True, slots=True)
class ModelChoice:
    """What will be loaded and why. `kind` None: the engine looks for a chat template."""

    name: str
    path_or_id: str
    preset: ModelPreset | None
    kind: str | None
    reason: str


def resolve_model(name: str | None, hardware: Hardware, said: str = "--model", ensembles: bool = False) -> ModelChoice:
    """The model that `name` (preset, alias, folder or hub id) means; without a name, that of CAI_MODEL, else that of
    AGI_MODEL_NAME, else the one that the hardware allows. The reason says which it was, an error what named it: `said`,
    a flag, or "" for a name in a call or without a flag.

    `ensembles`: the caller serves "ensemble:FOLDER" as well (models/ensembles.py); others are refused it in a line.

    Raises BadInputError for a folder without config.json and for a name that is nothing of these.
    """
    if name is not None:
        return _named(name, f"{said} {name}".strip(), ensembles)
    variable, value = named_by_variable()
    if not value:
        return _default_choice(hardware)
    choice, other = _named(value, f"{variable}={value}", ensembles), os.environ.get(VARIABLES[1], "").strip()
    if variable == VARIABLES[0] and other not in ("", value):
        return replace(choice, reason=f"{choice.reason}, which goes before {VARIABLES[1]}={other}")
    return choice


def named_by_variable() -> tuple[str, str]:
    """(the variable, what it names) of the first of VARIABLES that is set and not empty; ("", "") if none is."""
    for variable in VARIABLES:
        if value := os.environ.get(variable, "").strip():
            return variable, value
    return "", ""


def _named(name: str, said: str, ensembles: bool = False) -> ModelChoice:
    """The model that `name` means; `said` names the flag or the variable that it comes from."""
    if name.startswith(ENSEMBLE):
        return _from_heads(name, said, ensembles)
    with suppress(BadInputError):  # a folder of a preset's name does not hide the preset
        return _from_preset(get_model_preset(name), said)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return _from_folder(folder, said)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return ModelChoice(name, name, None, None, said)
    if "/" in name or folder.is_file():
        raise BadInputError(f"{said}: no such folder", "give a model's folder, a hub id org/name or a preset")
    raise BadInputError(f"{said}: unknown preset; {nearest_names(name)}", "a hub id has the form org/name")


def _from_preset(preset: ModelPreset, reason: str) -> ModelChoice:
    return ModelChoice(preset.key, preset.hub_id, preset, preset.kind, reason)


def _from_folder(folder: Path, said: str) -> ModelChoice:
    """A local model; a shipped model's own folder is its preset."""
    shipped = next((p for p in PRESETS.values() if p.is_local and folder.resolve() == Path(p.hub_id)), None)
    if shipped is not None:
        return _from_preset(shipped, said)
    if (folder / "config.json").is_file():
        return ModelChoice(folder.resolve().name, str(folder.resolve()), None, None, said)
    if (folder / "adapter_config.json").is_file():
        raise BadInputError(f"{said}: holds a LoRA adapter, not a model", "give the model it was trained on")
    raise BadInputError(f"{said}: the folder holds no config.json", "give a folder that holds a model")


def _from_heads(name: str, said: str, served: bool) -> ModelChoice:
    """An ensemble, by the folder of its heads; BadInputError where none is served."""
    place = folder_of(name, said).resolve()
    models = read_heads(place).models
    if not served:
        raise refused(said, place_of(models[0]))
    return ModelChoice(f"{ENSEMBLE}{place.name}", f"{ENSEMBLE}{place}", None, None, said)


def is_ensemble(choice: ModelChoice) -> bool:
    """True for `ensemble:FOLDER`, whose `path_or_id` is that with the whole path."""
    return choice.path_or_id.startswith(ENSEMBLE)


def members_of(choice: ModelChoice) -> list[ModelChoice]:
    """The experts of an ensemble, in their order; one of random weights is named "random:<preset>".

    Raises BadInputError for one that is not there any more.
    """
    names = read_heads(Path(choice.path_or_id.removeprefix(ENSEMBLE))).models
    return [_expert(name, f"expert {name} of {choice.name}") for name in names]


def _expert(name: str, said: str) -> ModelChoice:
    """An expert by its name; it may be a LoRA adapter's folder (ensemble/adapters.py)."""
    if (Path(name) / "adapter_config.json").is_file():
        return ModelChoice(Path(name).name, name, None, None, said)
    found = _named(place_of(name), said)
    return replace(found, name=name) if name.startswith(RANDOM) else found


def experts_numbers(choice: ModelChoice, fetch: bool) -> list[Architecture | None]:
    """The architectures of an ensemble's experts; None for one that nothing is known of. `fetch`: ask the hub then."""
    found = [_numbers_here(member) for member in members_of(choice)]
    known = all_known(found, read_heads(Path(choice.path_or_id.removeprefix(ENSEMBLE))).hidden_sizes)
    if not fetch:
        return known
    return [one or numbers_of(member) for one, member in zip(known, members_of(choice), strict=True)]


def _numbers_here(choice: ModelChoice) -> Architecture | None:
    if choice.preset is not None or (Path(choice.path_or_id) / "config.json").is_file():
        return numbers_of(choice)
    return None


def _default_choice(hardware: Hardware) -> ModelChoice:
    """The house rule: 70 GB of CUDA memory or more, the 32B base; less, what one would train there; no GPU, nano."""
    if hardware.kind == "cuda" and hardware.vram_gb >= BIG_GPU_GB:
        has = f"{hardware.gpu_name} has {hardware.vram_gb:g} GB"
        return _from_preset(PRESETS["qwen2.5-32b"], f"{has}, and 70 GB or more runs the project's target")
    found = recommend(hardware, for_training=True)
    return _from_preset(found.preset, found.reason)


def qlora_need_gb(preset: ModelPreset) -> float:
    """GB for 4-bit LoRA DPO of one pair at a time, rows of 1,024 tokens (500-token answers leave half of it free)."""
    return need_gb(preset, "4bit", for_training=True)


def numbers_of(choice: ModelChoice) -> Architecture:
    """The chosen model's architecture; of a hub id config.json alone is fetched (raises as `architecture_of`).

    Of an ensemble the one model that takes as much as all its experts.
    """
    if is_ensemble(choice):
        return together([one for one in experts_numbers(choice, fetch=True) if one is not None])
    if choice.preset is not None:
        return choice.preset.architecture
    if not Path(choice.path_or_id).is_dir():
        from cai_experiment.models.configs import architecture_of

        return architecture_of(choice.path_or_id)
    return Architecture.from_config(Path(choice.path_or_id))
