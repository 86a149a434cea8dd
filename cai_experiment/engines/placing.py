"""Where a model goes before it is loaded: the GPU, else the CPU (saying by how much it missed), else nowhere.

Arithmetic of models/roles.py against what is free now.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cai_experiment.engines.load import NAMES, LoadSettings, Plan, make_plan
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.models.disk import folder_gb
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import Architecture
from cai_experiment.models.roles import need_gb, smaller_preset
from cai_experiment.models.room import free_ram_gb
from cai_experiment.models.serving import known_numbers

ON_CPU = ("fp32", "bf16")  # the second is slower, and half as large


@dataclass(frozen=True, slots=True)
class Free:
    """GB (10^9 bytes) that are free now; `gpu` 0 without CUDA."""

    gpu: float
    ram: float

    def with_more(self, device: str, gb: float) -> Free:
        """What would be free if `gb` on that device were let go of."""
        return Free(self.gpu + gb, self.ram) if device == "cuda" else Free(self.gpu, self.ram + gb)

    def at(self, device: str) -> float:
        """GB free for a model on that device; Apple silicon shares the RAM."""
        return self.gpu if device == "cuda" else self.ram


def free_now(kind: str) -> Free:
    """What this machine has free now; on CUDA what torch keeps for itself counts as free."""
    if kind != "cuda":
        return Free(0.0, free_ram_gb())
    import torch

    if not torch.cuda.is_available():
        return Free(0.0, free_ram_gb())
    torch.cuda.empty_cache()
    return Free(torch.cuda.mem_get_info()[0] / 1e9, free_ram_gb())


@dataclass(frozen=True, slots=True)
class Placed:
    """Settings and plan with the device settled. `note` says why it is not where it was wanted, or ""."""

    settings: LoadSettings
    plan: Plan
    need: float | None  # GB; None where the size is not known beforehand
    note: str = ""


def place(settings: LoadSettings, plan: Plan, free: Free, hardware: Hardware) -> Placed:
    """Settle where `plan` is loaded. Raises EngineError, offering a smaller preset, if it fits nowhere."""
    with settings.naming():
        return _place(settings, plan, free, hardware)


def _place(settings: LoadSettings, plan: Plan, free: Free, hardware: Hardware) -> Placed:
    numbers = _numbers(plan)
    if numbers is None:
        return _of_unknown_size(settings, plan, free)
    need, have = need_gb(numbers, plan.quantization, plan.device), free.at(plan.device)
    if need <= have:
        return Placed(settings, plan, need)
    missed = f"{need:.1f} GB needed in {NAMES[plan.quantization]}, {have:.1f} free: {need - have:.1f} too little"
    asked = settings.quantization
    for precision in (asked,) if asked in (*ON_CPU, "4bit") else ON_CPU:
        need = need_gb(numbers, precision, "cpu")
        if (precision, "cpu") != (plan.quantization, plan.device) and need <= free.ram:
            where = "on the CPU" if plan.device != "cpu" else f"in {NAMES[precision]}"
            note = f"{where}, since {'the GPU' if plan.device == 'cuda' else 'memory'} does not hold it ({missed})"
            return _moved(settings, precision, need, note, hardware)
    least = need_gb(numbers, asked if asked in (*ON_CPU, "4bit") else "bf16", "cpu")
    ram = f"; RAM: {least:.1f} GB needed, {free.ram:.1f} free" if plan.device == "cuda" else ""
    smaller = smaller_preset(numbers, _places(plan, free), settings.trains_after)
    step = f"take --model {smaller.key}, which fits" if smaller else "free memory, no preset is small enough"
    raise EngineError(f"--model {plan.choice.name} does not fit ({plan.device}: {missed}{ram})", step)


def _moved(settings: LoadSettings, precision: str, need: float, note: str, hardware: Hardware) -> Placed:
    moved = replace(settings, device="cpu", quantization=precision)
    return Placed(moved, make_plan(moved, hardware), need, note)


def _places(plan: Plan, free: Free) -> dict[str, tuple[str, float]]:
    found = {"cpu": ("fp32", free.ram)}
    return found if plan.device == "cpu" else {plan.device: (plan.quantization, free.at(plan.device)), **found}


def _numbers(plan: Plan) -> Architecture | None:
    try:
        return known_numbers(plan.choice)
    except BadInputError:  # a folder of an unknown family
        return None


def _of_unknown_size(settings: LoadSettings, plan: Plan, free: Free) -> Placed:
    """By the size of its files where they are at hand; else it is tried."""
    folder = Path(plan.choice.path_or_id)
    size = folder_gb(folder) if folder.is_dir() else 0.0
    if size > free.at(plan.device):
        raise EngineError(f"--model {plan.choice.name}: {size:.1f} GB of files, {free.at(plan.device):.1f} GB free on "
                          f"{plan.device}", "take a smaller --model")  # fmt: skip
    note = "" if size else "its size is not known before it is downloaded: it is tried"
    return Placed(settings, plan, size or None, note)


# ---------------------------------------------------------------- after loading


def tensors_gb(model: Any) -> float:
    """GB of all tensors of a model, each storage once, the constants of 4-bit weights among them."""
    storages: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        for part in (tensor, *_constants(getattr(tensor, "quant_state", None)), getattr(tensor, "SCB", None)):
            if part is not None and part.device.type != "meta":
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / 1e9


def _constants(state: Any) -> list[Any]:
    """The tensors of bitsandbytes' QuantState, nested once where the constants are quantised too."""
    if state is None:
        return []
    own = [getattr(state, name, None) for name in ("absmax", "code", "offset")]
    return [tensor for tensor in own if hasattr(tensor, "untyped_storage")] + _constants(getattr(state, "state2", None))


def slots_of(share: float, model: Any, device: str) -> int | None:
    """Rows for one of two engines on one GPU; None elsewhere, where the engine's own rule is modest."""
    if device != "cuda":
        return None
    from cai_experiment.engines.common import core_of
    from cai_experiment.engines.hf import MOST_SLOTS_CUDA, WORK_BYTES, slots_that_fit
    from cai_experiment.engines.load import MAX_LENGTH

    core = core_of(model)
    free = (free_now("cuda").gpu * 1e9 - 2 * WORK_BYTES) * share  # each has its own pass
    return slots_that_fit(free, core.config.get_text_config(), core.dtype.itemsize, MAX_LENGTH, MOST_SLOTS_CUDA)


def allocated_gb(device: str) -> float:
    """GB that torch's allocator holds on CUDA; 0 elsewhere."""
    if device != "cuda":  # without torch, whose import takes seconds
        return 0.0
    import torch

    return torch.cuda.memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
