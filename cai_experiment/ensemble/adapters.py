"""Experts that are published as a LoRA adapter: found by adapter_config.json, put onto the model that it names.

The original's medical expert is one: Arthur-77/QWEN2.5-1.5B-medical-finetuned holds an adapter (rank 64, alpha 16, four
projections) for Qwen/Qwen2.5-1.5B-Instruct and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.engines.weights import safetensors_problem, weights_hash
from cai_experiment.errors import BadInputError, EngineError, UserError
from cai_experiment.models import configs
from cai_experiment.models.disk import hub_cache
from cai_experiment.models.downloads import cache_folder, commit_of
from cai_experiment.models.presets import PRESETS
from cai_experiment.records.files import read_json, show

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
MERGED = ("bf16", "fp32")  # in 4 and 8 bit the sum would be rounded: there the adapter stays beside the weights


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter in a folder, and the name of the model that it was trained on."""

    folder: Path
    base: str

    @property
    def weights(self) -> str:
        """SHA-256 of its weights."""
        return weights_hash(self.folder)


def adapter_of(place: str, fetch: bool = True) -> Adapter | None:
    """The adapter in a folder or of a hub id; None for a whole model, and for what cannot be asked for.

    As in transformers, adapter_config.json decides. `fetch`: ask the hub, where the cache does not say, and download
    the adapter. Raises BadInputError for one that lacks its weights or does not name its model.
    """
    folder = Path(place).expanduser()
    found = (folder if (folder / CONFIG).is_file() else None) if folder.is_dir() else _on_hub(place, fetch)
    if found is None:
        return None
    base = str(read_json(found / CONFIG, "copy the adapter again").get("base_model_name_or_path") or "")
    if not base:
        raise BadInputError(f"{show(found / CONFIG)} does not name the model it was trained on", "name a whole model")
    if problem := safetensors_problem(found / TENSORS):
        raise BadInputError(f"{show(found / TENSORS)} {problem}", "copy or download the adapter again")
    # QLoRA's adapters name the weights in 4 bit that they were trained over; a preset knows those they were made from
    return Adapter(found, next((p.hub_id for p in PRESETS.values() if p.four_bit.lower() == base.lower()), base))


def _on_hub(hub_id: str, fetch: bool) -> Path | None:
    """The cache's folder of a hub id's adapter, downloaded if need be; None if it has none or cannot be asked."""
    commit = commit_of(hub_id, "main")
    snapshot = cache_folder(hub_id) / "snapshots" / commit
    if commit and (snapshot / CONFIG).is_file() and (snapshot / TENSORS).is_file():
        return snapshot
    if (commit and (snapshot / "config.json").is_file()) or not fetch:
        return None
    try:
        configs.ask(hub_id)
    except EngineError:  # unreachable: the load itself says so
        return None
    except BadInputError:  # no config.json, as an adapter alone has it, or no such model
        pass
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(hub_id, CONFIG, cache_dir=hub_cache())
        hf_hub_download(hub_id, TENSORS, cache_dir=hub_cache())
    except Exception:  # there is none, or access is denied: the load of the whole model says which
        return None
    return Path(file).parent


def put_on(model: Any, adapter: Adapter, precision: str, name: str) -> Any:
    """The model with the adapter's weights: added to its own in bf16 and fp32, beside them in 4bit and 8bit.

    Raises EngineError if they do not fit it.
    """
    from peft import PeftModel

    try:
        wrapped: Any = PeftModel.from_pretrained(model, str(adapter.folder))
        return (wrapped.merge_and_unload() if precision in MERGED else wrapped.get_base_model()).eval()
    except (UserError, MemoryError):
        raise
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise EngineError(f"{name}: the adapter does not fit {adapter.base}: {why}", "name another model") from error
