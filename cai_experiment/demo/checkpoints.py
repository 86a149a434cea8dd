"""The trained adapters that lie in the checkpoint folder: which can be spoken with, what is wrong with the others."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path

from cai_experiment.demo.settings import DemoSettings
from cai_experiment.errors import BadInputError, UserError
from cai_experiment.milestones import MILESTONES
from cai_experiment.records.files import read_json
from cai_experiment.training import checkpoints as stored
from cai_experiment.training import sft
from cai_experiment.training.export.source import choose_base, find_source

_STEP = re.compile(r"checkpoint-(\d+)")
_whole: dict[Path, tuple[object, str]] = {}  # adapter -> (its files as they were read, what was wrong with it)
_reading = threading.Lock()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An adapter. `base` is what loads the model that it was trained on; `step` None: the end of the training."""

    run: str
    path: Path
    label: str  # as the page lists it; one of its kind
    base: str
    step: int | None
    milestone: str  # "" where the run does not tell

    @property
    def name(self) -> str:
        """The run and the adapter's folder in it: "mvp/checkpoint-40"."""
        return self.label.rpartition(" (")[0]


def list_checkpoints(settings: DemoSettings) -> list[Checkpoint]:
    """Every adapter that verifies, the newest run first; in a run the end of the training, then later steps first."""
    return _read(settings)[0]


def problems(settings: DemoSettings) -> list[str]:
    """A line for each adapter that `list_checkpoints` leaves out: which, and what is wrong with it."""
    return _read(settings)[1]


def find_checkpoint(settings: DemoSettings, label: str) -> Checkpoint:
    """The adapter of that label. Raises BadInputError if it is not (or no longer) there, or damaged."""
    found, wrong = _read(settings)
    for one in found:
        if one.label == label:
            return one
    name = label.rpartition(" (")[0] or label
    reason = next((line for line in wrong if line.startswith(f"{name}:")), f"{name}: no such checkpoint")
    raise BadInputError(reason, "choose another one")


# ---------------------------------------------------------------- looking


def _read(settings: DemoSettings) -> tuple[list[Checkpoint], list[str]]:
    """(what can be spoken with, lines about what cannot)."""
    found: list[Checkpoint] = []
    wrong: list[str] = []
    if not settings.checkpoint_dir.is_dir():
        return found, wrong
    runs = [(_adapters(folder), folder) for folder in settings.checkpoint_dir.iterdir() if folder.is_dir()]
    for adapters, folder in sorted(runs, key=lambda run: (-_newest(run[0]), run[1].name)):
        for path in adapters:
            try:
                found.append(_checkpoint(settings, folder, path))
            except UserError as error:
                if path.is_dir():  # a training may have deleted an old step in the meantime
                    wrong.append(f"{folder.name}/{path.relative_to(folder).as_posix()}: {error}")
    return found, wrong


def _adapters(folder: Path) -> list[Path]:
    """A run's folders of adapters: DPO's end, its steps from the last, then SFT's; whole or not."""
    found: list[Path] = []
    for place in (folder, folder / sft.FOLDER):
        steps = [path for path in place.glob("checkpoint-*") if _STEP.fullmatch(path.name) and path.is_dir()]
        found += [place / "final"] if (place / "final").is_dir() else []
        found += sorted(steps, key=stored.step_of, reverse=True)
    return found


def _newest(adapters: list[Path]) -> float:
    """When the newest adapter of a run was written, in seconds since 1970; 0 of a run without one."""
    times = [0.0]
    for path in adapters:
        try:
            times.append(path.stat().st_mtime)
        except OSError:  # deleted in the meantime
            continue
    return max(times)


def _checkpoint(settings: DemoSettings, folder: Path, path: Path) -> Checkpoint:
    """Raises BadInputError for an adapter that is damaged, or whose base is not to be had under its name."""
    if reason := _damage(path):
        raise BadInputError(f"damaged: {reason}")
    place = path.relative_to(folder).as_posix()
    choice = choose_base(find_source(folder, place), None)
    base = choice.path_or_id if choice.preset is None else choice.name
    step = None if path.name == "final" else stored.step_of(path)
    label = f"{folder.name}/{place} ({choice.name})"
    return Checkpoint(folder.name, path, label, base, step, _milestone(settings, folder.name))


def _damage(path: Path) -> str:
    """What is wrong with an adapter's files, or "". They are hashed once, and again when one has changed."""
    try:
        state = tuple(sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in path.iterdir()))
    except OSError as error:
        return error.strerror or str(error)
    with _reading:
        before, reason = _whole.get(path, (None, ""))
        if before != state:
            reason = ""
            try:
                stored.verify(path, stored.ADAPTER_FILES)
            except (stored.Damaged, OSError) as error:
                reason = str(error)
            _whole[path] = (state, reason)
    return reason


def _milestone(settings: DemoSettings, run: str) -> str:
    """A run is named after its milestone, or its report says it."""
    if run in MILESTONES:
        return run
    report = settings.data_dir / run / "report.json"
    try:
        told = read_json(report).get("milestone") if report.is_file() else ""
    except UserError:
        return ""
    return str(told) if told in MILESTONES else ""


