"""States on disk, in shards that are whole or absent: computed in the first epoch, read in all others.

A folder of the cache is named after what its states depend on: the experts' weights and precision, the rows' tokens,
which of them count. Another run with the same ones uses it too, whatever its learning rate; a killed run resumes after
its last whole shard. Rows are sorted by length before they are cut into shards, so that passes hold little padding.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cai_experiment.engines.weights import safetensors_problem
from cai_experiment.ensemble.encoding import EncodedRow, sha256_of
from cai_experiment.ensemble.states import StateComputer, States
from cai_experiment.errors import DiskError
from cai_experiment.models.disk import free_gb
from cai_experiment.records.files import make_folder, show, write_atomic, writing_error

if TYPE_CHECKING:
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads

SHARD_BYTES = 128 * 2**20  # a kill costs a shard's work: some seconds of three 1.5B experts on an A100
SHARDS = 32  # of a small cache: a kill costs a 32nd of the work
SPARE_GB = 0.1  # left free for heads, checkpoints and the log
HALF, SINGLE = 2, 4  # bytes
LEFT_SECONDS = 3600  # a shard is written in seconds
RESIDENT_SHARE = 0.5  # of the GPU's free memory that states may take, so that steps need not read from the disk


def bytes_of(places: int, hidden_sizes: Sequence[int]) -> int:
    """Bytes that the states of so many places need."""
    return places * sum(HALF * size + SINGLE for size in hidden_sizes)


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: these rows' states one after the other, row number by row number."""

    path: Path
    rows: tuple[int, ...]


class StateCache:
    """The states of `rows` under `model`, below `folder`. `fill` computes what is missing; then `states` reads."""

    def __init__(
        self, folder: Path, model: MultiModelWithScalarHeads, rows: Sequence[EncodedRow], identity: Any
    ) -> None:
        """`identity`: what says which weights the experts have and how they compute, as JSON can hold it."""
        self.model, self.rows = model, rows
        self.hidden_sizes = [expert.hidden_size for expert in model.experts]
        self.bytes = bytes_of(sum(row.counted for row in rows), self.hidden_sizes)
        self.facts = {"experts": identity, "vocabulary": model.vocabulary, "rows": len(rows),
                      "tokens_sha256": sha256_of(rows), "bytes": self.bytes}  # fmt: skip
        self.key = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
        self.folder = folder / self.key[:16]
        self.shards = self._cut()
        self._place: dict[int, tuple[int, int]] = {}  # row number -> (shard, first place in it)
        for number, shard in enumerate(self.shards):
            lengths = [rows[row].counted for row in shard.rows]
            starts = accumulate(lengths, initial=0)
            self._place |= {row: (number, start) for row, start in zip(shard.rows, starts, strict=False)}
        self._open: dict[int, dict[str, torch.Tensor]] = {}

    def _cut(self) -> list[Shard]:
        """Rows, the longest first (what does not fit into memory shows at once), in shards of like size."""
        order = sorted(range(len(self.rows)), key=lambda row: (-len(self.rows[row].ids), row))
        most = min(SHARD_BYTES, max(self.bytes // SHARDS, 1))
        parts: list[list[int]] = [[]]
        filled = 0
        for row in order:
            if filled >= most:
                parts.append([])
                filled = 0
            parts[-1].append(row)
            filled += bytes_of(self.rows[row].counted, self.hidden_sizes)
        return [Shard(self.folder / f"shard-{n:04}.safetensors", tuple(part)) for n, part in enumerate(parts)]

    # ------------------------------------------------------------ writing

    def missing(self, say: Callable[[str], None] = print) -> list[int]:
        """Numbers of the shards that are not there. One that is there and damaged counts as missing, and is named."""
        found = []
        for number, shard in enumerate(self.shards):
            if not shard.path.exists():
                found.append(number)
            elif problem := self._problem(shard):
                say(f"{show(shard.path)} {problem}: computed again")
                found.append(number)
        return found

    def _problem(self, shard: Shard) -> str:
        """Why a shard cannot be used, as the end of a sentence, or "". Bytes are not hashed: that costs an epoch."""
        if problem := safetensors_problem(shard.path):
            return problem
        from safetensors import safe_open

        with safe_open(shard.path, "pt") as file:
            same = (file.metadata() or {}).get("key") == self.key
        return "" if same else "holds other states"

    def check_room(self, missing: Sequence[int]) -> None:
        """Raise DiskError before anything is computed if the missing shards do not fit on the disk."""
        rows = [row for number in missing for row in self.shards[number].rows]
        need = bytes_of(sum(self.rows[row].counted for row in rows), self.hidden_sizes) / 1e9
        free = free_gb(self.folder)
        if need + SPARE_GB > free:
            message = f"{show(self.folder)}: the experts' states need {need:.2f} GB more, {free:.2f} GB are free"
            raise DiskError(message, "make room, name another disk with --cache_dir, or compute them anew in every "
                                     "epoch with --no_cache")  # fmt: skip

    def fill(self, missing: Sequence[int], done: Callable[[int, int], None] = lambda rows, tokens: None) -> None:
        """Compute and write the missing shards; `done(rows, tokens)` hears how many were added after each pass.

        Raises DiskError (whole shards stay, and are not computed again) and EngineError.
        """
        if not missing:
            return
        make_folder(self.folder)
        self._tidy()
        self._put(self.folder / "about.json", json.dumps(self.facts, indent=2).encode())
        computer = StateComputer(self.model)
        for number in missing:
            self._write(self.shards[number], computer, done)

    def _write(self, shard: Shard, computer: StateComputer, done: Callable[[int, int], None]) -> None:
        from safetensors.torch import save

        parts: list[States] = []
        for some in computer.passes([self.rows[row] for row in shard.rows]):
            found = computer.states(some)
            parts.append(States([h.cpu() for h in found.hidden], found.log_p.cpu(), found.places))
            done(len(some), sum(len(row.ids) for row in some))
        tensors = {
            f"hidden.{m}": torch.cat([part.hidden[m] for part in parts]) for m in range(len(self.hidden_sizes))
        }
        tensors["log_p"] = torch.cat([part.log_p for part in parts])
        self._put(shard.path, save(tensors, {"key": self.key}))

    def _put(self, path: Path, data: bytes) -> None:
        """Whole or absent, under a name of this process beside: with one --cache_dir, two may write the same shard."""
        aside = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}")
        write_atomic(aside, [data])
        try:
            os.replace(aside, path)
        except OSError as error:
            raise writing_error(path, error) from error

    def _tidy(self) -> None:
        """Delete what killed processes left half written; what another one writes now is younger than LEFT_SECONDS."""
        for file in [*self.folder.glob("*.safetensors.*"), *self.folder.glob("about.json.*")]:
            with suppress(FileNotFoundError):  # another process was quicker
                if time.time() - file.lstat().st_mtime > LEFT_SECONDS:
                    file.unlink()

    # ------------------------------------------------------------ reading

    def open(self) -> None:
        """Map all shards; on a GPU with room for them, take them there. Call it when no shard is missing."""
        from safetensors.torch import load_file

        device = torch.device(self.model.device)
        resident = device.type == "cuda" and self.bytes < RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
        place = str(device) if resident else "cpu"
        self._open = {number: load_file(shard.path, place) for number, shard in enumerate(self.shards)}

    def states(self, rows: Sequence[int]) -> States:
        """See states.Source."""
        device, names = self.model.device, [f"hidden.{m}" for m in range(len(self.hidden_sizes))]
        found: dict[str, list[torch.Tensor]] = {name: [] for name in [*names, "log_p"]}
        for row in rows:
            shard, start = self._place[row]
            tensors = self._open[shard]
            for name, parts in found.items():
                parts.append(tensors[name].narrow(0, start, self.rows[row].counted))
        joined = {name: torch.cat(parts).to(device, non_blocking=True) for name, parts in found.items()}
        places = tuple(self.rows[row].counted for row in rows)
        return States([joined[name] for name in names], joined["log_p"], places)
