"""train_log.jsonl, and TensorBoard or Weights & Biases beside it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.records.files import write_atomic, write_jsonl
from cai_experiment.records.store import Journal

TRAIN_LOG = "train_log.jsonl"
REPORTERS = ("none", "tensorboard", "wandb")
PROJECT = "token-ensemble"  # in Weights & Biases
WANDB_ID = "wandb_id.txt"  # in the folder, so that --fresh begins another run of W&B


def check_reporter(name: str) -> None:
    """Raise BadInputError if the package of `--report_to` is not installed."""
    if name != "none" and find_spec(name) is None:
        message = f"--report_to {name}: the package {name} is not installed"
        raise BadInputError(message, f"install it with pip install {name}, or leave the flag out")


class TrainLog:
    """Rows of a training, by step: {"event": "step" | "epoch", "step", ...}. Close it at the end."""

    def __init__(self, folder: Path, report_to: str = "none", step: int = 0, config: Mapping[str, Any] = {}) -> None:
        """Resumes at `step`: rows of later steps, which are done again, are cut. `config` is what W&B shows."""
        check_reporter(report_to)
        self.journal = Journal(folder / TRAIN_LOG)
        rows = self.journal.rows()
        kept = [row for row in rows if row["step"] <= step]
        if len(kept) < len(rows):
            write_jsonl(folder / TRAIN_LOG, kept)
        self._board: Any = None
        self._run: Any = None
        if report_to == "tensorboard":
            self._board = _tensorboard(folder, step)
        elif report_to == "wandb":
            self._run = _wandb(folder, config)

    def write(self, event: str, step: int, **values: Any) -> None:
        """Append a row; numbers go to TensorBoard or W&B too, nested ones under "outer/inner"."""
        self.journal.append({"event": event, "step": step, **values})
        numbers = _numbers(values, "held_out/" if event == "epoch" else "train/")
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(numbers, step=step)

    def close(self) -> None:
        """Flush everything."""
        self.journal.close()
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()


def _tensorboard(folder: Path, step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)


def _wandb(folder: Path, config: Mapping[str, Any]) -> Any:
    """A run of Weights & Biases, the same one after an interruption; EngineError in one line if it cannot start."""
    import wandb  # type: ignore[import-not-found,unused-ignore]

    mark = folder / WANDB_ID
    if not mark.exists():
        write_atomic(mark, [uuid4().hex[:12].encode()])
    try:
        return wandb.init(project=PROJECT, name=folder.resolve().name, id=mark.read_text(), resume="allow",
                          dir=str(folder), config=dict(config))  # fmt: skip
    except Exception as error:  # its own kinds: no key, no network
        reason = " ".join(str(error).split())[:200]
        step = "run wandb login, set WANDB_MODE=offline, or use --report_to tensorboard"
        raise EngineError(f"--report_to wandb: {reason}", step) from error


def _numbers(values: Mapping[str, Any], before: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{before}{name}/")
        elif isinstance(value, (list, tuple)):
            found |= _numbers({str(place): item for place, item in enumerate(value)}, f"{before}{name}/")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            found[f"{before}{name}"] = float(value)
    return found
