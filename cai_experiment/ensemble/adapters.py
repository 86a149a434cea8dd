"""Experts that are published as a LoRA adapter: found by adapter_config.json, put onto the model that it names.

The original's medical expert is one: Arthur-77/QWEN2.5-1.5B-medical-finetuned holds an adapter (rank 64, alpha 16, four
projections) for Qwen/Qwen2.5-1.5B-Instruct and no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.engines.weights import loading_error, safetensors_problem, weights_hash
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


def adapter_of(place: str, weights: bool = True) -> Adapter | None:
    """The adapter in a folder or of a hub id; None for a whole model, and for what the hub does not have.

    As in transformers, adapter_config.json decides; where the cache does not say, the hub is asked. `weights` False:
    that small file is all that is downloaded and looked at. Raises BadInputError for an adapter that lacks its weights
    or does not name its model, EngineError or DiskError if it cannot be downloaded.
    """
    folder = Path(place).expanduser()
    found = (folder if (folder / CONFIG).is_file() else None) if folder.is_dir() else _on_hub(place, weights)
    if found is None:
        return None
    base = str(read_json(found / CONFIG, "copy the adapter again").get("base_model_name_or_path") or "")
    if not base:
        raise BadInputError(f"{show(found / CONFIG)} does not name the model it was trained on", "name a whole model")
    if weights and (problem := safetensors_problem(found / TENSORS)):
        raise BadInputError(f"{show(found / TENSORS)} {problem}", "copy or download the adapter again")
    # QLoRA's adapters name the weights in 4 bit that they were trained over; a preset knows those they were made from
    return Adapter(found, next((p.hub_id for p in PRESETS.values() if p.four_bit.lower() == base.lower()), base))


def _on_hub(hub_id: str, weights: bool) -> Path | None:
    """The cache's folder of a hub id's adapter, downloaded if need be; None if it has none, or is unreachable."""
    commit = commit_of(hub_id, "main")
    snapshot = cache_folder(hub_id) / "snapshots" / commit
    if commit and (snapshot / CONFIG).is_file():
        if not weights or (snapshot / TENSORS).is_file():
            return snapshot
    elif commit and (snapshot / "config.json").is_file():
        return None
    try:
        configs.ask(hub_id)
    except EngineError:  # unreachable: the load itself says so
        return None
    except BadInputError:  # no config.json, as an adapter alone has it, or no such model
        pass
    file = _download(hub_id, CONFIG)
    if file is not None and weights:
        _download(hub_id, TENSORS)
    return None if file is None else file.parent


def _download(hub_id: str, name: str) -> Path | None:
    """A file of a hub id in the cache; None if the hub has no such file or model: whoever needs it says so."""
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(hub_id, name, cache_dir=hub_cache()))
    except (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        # the subclasses of the first two: the network is down, access is denied
        if isinstance(error, (errors.LocalEntryNotFoundError, errors.GatedRepoError)):
            raise loading_error(hub_id, error) from error
        return None
    except Exception as error:  # the disk's, the network's and the hub's have no common class
        raise loading_error(hub_id, error) from error


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
