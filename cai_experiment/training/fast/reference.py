"""The reference's log-probabilities: computed once, before training, and kept for later runs on the same pairs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cai_experiment.training import processes
from cai_experiment.training.checkpoints import disk_errors
from cai_experiment.training.data import TokenPair
from cai_experiment.training.fast.packing import Packed, pack

if TYPE_CHECKING:
    from cai_experiment.training.fast.policy import Policy
    from cai_experiment.training.fast_dpo import PairSet

FOLDER = "reference"  # beside the runs' folders
LAYOUT = 2  # of the packed passes; raise it when their arithmetic changes


def reference_key(base: str, adapter: str, rows: Sequence[TokenPair], arithmetic: str) -> str:
    """What the log-probabilities depend on, as a hash: base revision, adapter, token ids, dtype and attention.

    The token ids stand for data, layout and tokenizer at once. `base` is a revision or the hash of a folder's files: no
    weights are read for it.
    """
    digest = hashlib.sha256(json.dumps([LAYOUT, base, adapter, arithmetic]).encode())
    for row in rows:
        digest.update(json.dumps([row.prompt_ids, row.chosen_ids, row.rejected_ids]).encode())
    return digest.hexdigest()[:32]


class Reference:
    """The reference of a training: the model without its adapter, or, with `fresh` False, with the one it starts from.

    It must be asked before the first step: until then policy and reference are the same weights. `was_read` says
    whether any log-probabilities came from `folder`.
    """

    def __init__(self, policy: Policy, folder: Path, fresh: bool) -> None:
        self.policy, self.folder, self.fresh = policy, folder, fresh
        self.was_read = False

    def of(self, pairs: PairSet, passes: Iterable[list[list[int]]], key: str) -> torch.Tensor:
        """(n, 2) float64 on the CPU: sums of log-probabilities of chosen and rejected. No key, nothing kept."""
        place = self.folder / f"{key}.safetensors"
        found = _read(place) if key else None
        if all(processes.of_all(found is not None)) and found is not None:
            self.was_read = True
            return found
        found = self._compute(pairs, [part for group in passes for part in group])
        if key and processes.is_first():
            _write(place, found)
        processes.wait()
        return found

    @torch.no_grad()
    def logps(self, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """(chosen, rejected) of a pass; within `policy.ready()`."""
        with self.policy.model.disable_adapter() if self.fresh else nullcontext():
            return self.policy.answer_logps(packed)

    def _compute(self, pairs: PairSet, passes: list[list[int]]) -> torch.Tensor:
        out = torch.empty(len(pairs.rows), 2, dtype=torch.float64)
        mine = passes[processes.rank() :: processes.count()]
        self.policy.model.eval()
        with self.policy.ready(), self.policy.autocast():
            for part in mine:
                packed = pack([pairs.trees[row] for row in part], self.policy.fill).to(self.policy.device)
                out[part] = torch.stack(self.logps(packed), 1).cpu()
        rows = [row for part in mine for row in part]
        for theirs, logps in processes.of_all((rows, out[rows])):
            out[theirs] = logps
        return out


def _read(place: Path) -> torch.Tensor | None:
    """The stored log-probabilities; None if there are none, or if the file is not whole."""
    from safetensors import SafetensorError, safe_open

    if not place.exists():
        return None
    try:
        with safe_open(place, framework="pt") as file:
            found = file.get_tensor("logps")
            return found if (file.metadata() or {}).get("sha256") == _sha256(found) else None
    except (SafetensorError, OSError):
        return None


def _write(place: Path, logps: torch.Tensor) -> None:
    from safetensors.torch import save_file

    with disk_errors(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        aside = place.with_name(f"{place.name}.{os.getpid()}")
        save_file({"logps": logps}, aside, metadata={"sha256": _sha256(logps)})
        os.replace(aside, place)


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
