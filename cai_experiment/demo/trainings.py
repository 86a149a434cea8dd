"""The Training tab's logic: start, stop, resume, and what a training says of itself. All state is on disk.

A training is a process of its own (chain.py), which a page's reload and the server's end leave alone; whoever looks at
the same data folder finds it again by its lock and its job (training_job.py).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from cai_experiment.demo.settings import DemoSettings
from cai_experiment.demo.training_job import (
    ERRORS,
    JOB,
    OUTPUT,
    PREFIX,
    Job,
    is_alive,
    last_holder,
    sign_lock,
    take_lock,
)
from cai_experiment.demo.training_state import AT_WORK, TrainingState, state_of
from cai_experiment.demo.training_time import Estimate, estimate, jobs, machine
from cai_experiment.demo.training_view import TrainingView, logs_of, new_entries
from cai_experiment.errors import BadInputError, UserError
from cai_experiment.milestones import PACKAGE
from cai_experiment.models.roles import ROLES, SHIPPED
from cai_experiment.observe.content_logger import shown_at
from cai_experiment.observe.progress import duration
from cai_experiment.records.files import writing_error

PLANS: dict[str, tuple[int, int]] = {"quick": (20, 2), "standard": (50, 5)}  # examples, epochs
SHIPPED_NAMES = ("nano", "nano-b")
TITLES = {"quick": "Quick Demo", "standard": "Standard"}
MOST_EXAMPLES, MOST_EPOCHS = 5000, 20
FOLLOW_SECONDS = 1.0
__all__ = ["PLANS", "TrainingState", "Trainings", "label"]


class HasModels(Protocol):
    """What a training asks of demo.models.Models. It may also have `loaded(role)`, the name of a role's model."""

    def make_room(self) -> None:
        """Free the GPU for the training."""
        ...

    def come_back(self) -> None:
        """Load again what made room, now that the training has ended."""
        ...


class Trainings:
    """The trainings below one data folder, one at a time, whoever started it. Safe for threads."""

    def __init__(
        self, settings: DemoSettings, models: HasModels, say: Callable[[str], None] | None = None
    ) -> None:
        """`say` is given what `verbosity` shows of the content log of a training that is started here (default: it is
        printed)."""
        self.settings, self.models = settings, models
        self.verbosity = settings.verbosity
        self._say = say or _print
        self._made_room: dict[str, str] = {}  # role -> the model that made room for the last training
        self._data = settings.data_dir.expanduser().absolute()
        self._checkpoints = settings.checkpoint_dir.expanduser().absolute()
        self._lock = threading.Lock()  # of the view
        self._view: tuple[str, TrainingView] | None = None

    def label(self, name: str) -> str:
        """A plan's name with its estimated time for the model at hand: "Quick Demo (2 epochs, 20 examples, ~1 min)"."""
        examples, epochs = PLANS[name]
        found = self._estimate(*self._models(None, None), examples, epochs)
        return label(name, found.seconds if found else None)

    def start(
        self, examples: float, epochs: float, name: str = "custom", generator: str | None = None,
        critic: str | None = None,
    ) -> str:  # fmt: skip
        """Start a training of a new run, and say so in one line. Without names the models loaded in the demo work.

        Raises BadInputError for a number out of bounds, or while a training is running, which it names; DiskError.
        """
        examples = _whole(examples, "examples", MOST_EXAMPLES)
        epochs = _whole(epochs, "epochs", MOST_EPOCHS)
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", name):
            raise BadInputError(f"the name {name!r} is not made of small letters, digits and -", "e.g. custom")
        speaks, judges = self._models(generator, critic)
        found = self._estimate(speaks, judges, examples, epochs)
        lock = self._locked()
        try:
            job = Job(
                self._new_run(name), name, examples, epochs, speaks, judges, str(self._data), str(self._checkpoints),
                str(self.settings.constitution.absolute()), self.settings.seed, machine(), expected=_expected(found),
            )  # fmt: skip
            self._launch(job, lock)
        finally:
            os.close(lock)  # the child has its own
        about = f", about {duration(found.seconds)}" if found else ""
        size = f"{examples} examples, {epochs} epoch{'s' * (epochs > 1)}"
        return f"{job.run} has begun: {size}{about}; {_who(speaks, judges)}"

    def stop(self) -> str:
        """Ask the running training to stop; returns at once, `state()` tells when it has. It can be resumed."""
        holder, held = last_holder(self._data)
        if not held or holder is None:
            raise BadInputError("no training is running", "start one, or resume one that was stopped")
        script: tuple[int, str] | None = None
        with suppress(UserError):  # its folder was moved away: the process is stopped all the same
            job = Job.read(self._data / holder.run / JOB)
            if job.stopping:
                return f"{job.run} is stopping already"
            script = job.script
        for pid, started in ((holder.pid, holder.started), script or (0, "")):
            if is_alive(pid, started):
                os.kill(pid, signal.SIGTERM)
                return f"{holder.run} is stopping: it ends within seconds, and can be resumed"
        raise BadInputError(f"{holder.run} is just starting or ending", "try again in a moment")

    def resume(self, run: str) -> str:
        """Go on with a stopped or failed run where it stopped. Raises BadInputError if there is nothing to resume."""
        known = {job.run: job for job in jobs(self._data)}
        if run not in known:
            raise BadInputError(f"{run!r} is no training of the demo", "choose one of the list")
        lock = self._locked()
        try:
            job = Job.read(self._data / run / JOB)  # as it stands now that nobody else writes it
            if job.stage == "finished":
                raise BadInputError(f"{run} is finished", "start a new training")
            self._launch(job, lock)
        finally:
            os.close(lock)
        return f"{run} goes on: {'training' if job.generated else 'making pairs'}"

    def who(self) -> str:
        """Which model a training that is started now would train, and which would judge: one line."""
        return _who(*self._models(None, None))

    def running(self) -> str:
        """The run that is at work now, whoever started it, or ""; a GPU is its own until it has ended."""
        holder, held = last_holder(self._data)
        return (holder.run if holder else "one that has just begun") if held else ""

    def runs_to_resume(self) -> list[str]:
        """Runs of the demo that were stopped or failed, newest first."""
        running = self.running()  # or it has just written how it ended, and can be resumed
        return [job.run for job in jobs(self._data)
                if job.stage != "finished" and not (job.run == running and job.stage in AT_WORK)]  # fmt: skip

    def state(self, verbosity: int | None = None) -> TrainingState:
        """The running training, else the last one; cheap enough for every page to ask each second.

        `verbosity` rules `log_html` (default: that of this server).
        """
        with self._lock:
            holder, held = last_holder(self._data)
            if holder is None:
                return TrainingState()
            try:
                job = Job.read(self._data / holder.run / JOB)
            except UserError:  # it was moved away
                gone = f"{holder.run} is at work, but its folder is gone: stop it, and start anew"
                return TrainingState(holder.run, "generating", line=gone, can_stop=True) if held else TrainingState()
            view = self._view_of(job)
            view.refresh()
            return state_of(job, view, held, self.verbosity if verbosity is None else verbosity)

    # ------------------------------------------------------------ parts of the above

    def _models(self, generator: str | None, critic: str | None) -> tuple[str, str]:
        """(generator, critic): as named, else what is loaded in the demo, else the model that it was started with."""
        loaded = self._made_room | self._loaded()
        speaks = generator or loaded.get("generation") or self.settings.model or SHIPPED
        judges = critic or generator or loaded.get("evaluation") or speaks
        if critic is None and (speaks in SHIPPED_NAMES) != (judges in SHIPPED_NAMES):
            judges = speaks  # the shipped models know their written world alone
        return _absolute(speaks), _absolute(judges)

    def _loaded(self) -> dict[str, str]:
        ask = getattr(self.models, "loaded", lambda role: None)
        return {role: name for role in ROLES if (name := ask(role))}

    def _estimate(self, generator: str, critic: str, examples: int, epochs: int) -> Estimate | None:
        return estimate(self._data, generator, critic, examples, epochs)

    def _locked(self) -> int:
        """The lock; BadInputError names the training that holds it."""
        lock = take_lock(self._data)
        if lock is None:
            holder, _ = last_holder(self._data)
            who = f"{holder.run}, since {holder.since}" if holder else "one that has just begun"
            raise BadInputError(f"a training is running on this machine: {who}", "wait until it ends, or stop it")
        return lock

    def _new_run(self, name: str) -> str:
        """Make the folder of the next free name: demo-quick, demo-quick-2, ..."""
        count = 1
        while True:
            run = f"{PREFIX}{name}" + (f"-{count}" if count > 1 else "")
            count += 1
            if (self._checkpoints / run).exists():
                continue
            try:
                (self._data / run).mkdir(parents=True)
            except FileExistsError:
                continue
            except OSError as error:
                raise writing_error(self._data / run, error) from error
            return run

    def _launch(self, job: Job, lock: int) -> None:
        """Write the job and start the child, which takes the lock over; then whoever asks finds it."""
        job.stage, job.stopping, job.line = "training" if job.generated else "generating", False, ""
        job.script = None
        job.begun = job.begun or time.time()
        try:
            job.write()
            sign_lock(lock, job.run, 0)
            self._made_room |= self._loaded()
            self.models.make_room()
            child = _spawn(job, lock)
        except BaseException as error:
            job.stage, job.line = "failed", " ".join(str(error).split())
            self._bring_back()
            job.write()
            raise
        sign_lock(lock, job.run, child.pid)
        threading.Thread(target=self._follow, args=(job, child), daemon=True, name=job.run).start()

    def _follow(self, job: Job, child: subprocess.Popen[bytes]) -> None:
        """Print the content log as it grows, until the child has ended; it is reaped then."""
        logs = logs_of(job.folder, job.checkpoints, from_now_on=True)
        ended = False
        while not ended:
            with suppress(subprocess.TimeoutExpired):
                child.wait(FOLLOW_SECONDS)
                ended = True
            for entry in new_entries(logs):
                if (text := shown_at(entry, self.verbosity)) is not None:
                    self._say(text)
        self._bring_back()

    def _bring_back(self) -> None:
        """Load the models again as soon as nobody holds the machine: a killed child's script may need a while."""

        def wait() -> None:
            while self.running():
                time.sleep(FOLLOW_SECONDS)
            self._made_room = {}
            self.models.come_back()

        threading.Thread(target=wait, daemon=True, name="models come back").start()

    def watch(self) -> None:
        """At the start of a server: if a training of an earlier one is at work, load the models when it has ended."""
        if self.running():
            self._bring_back()

    def _view_of(self, job: Job) -> TrainingView:
        if self._view is None or self._view[0] != job.run:
            self._view = (job.run, TrainingView(job.folder, job.checkpoints))
        return self._view[1]


def _who(generator: str, critic: str) -> str:
    return f"{generator} answers and is trained, {'it' if critic == generator else critic} judges"


def label(name: str, seconds: float | None = None) -> str:
    """A plan's label; `seconds` is the estimate, None leaves it out."""
    examples, epochs = PLANS[name]
    about = "" if seconds is None else f", ~{_about(seconds)}"
    return f"{TITLES[name]} ({epochs} epochs, {examples} examples{about})"


def _about(seconds: float) -> str:
    """Whole minutes, above 90 of them hours."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes} min" if minutes <= 90 else f"{seconds / 3600:.0f} hours"


def _whole(value: float | None, what: str, most: int) -> int:
    """A whole number from 1 to `most`, as a page's field gives it; BadInputError for anything else."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1 and 1 <= value <= most:
        return int(value)
    raise BadInputError(f"{what}: {value!r} is not a whole number from 1 to {most:,}", "correct it")


def _absolute(model: str) -> str:
    """A folder's whole path, since the child works elsewhere; any other name as it is."""
    return str(Path(model).expanduser().absolute()) if os.sep in model and Path(model).expanduser().is_dir() else model


def _expected(found: Estimate | None) -> dict[str, float]:
    if found is None:
        return {}
    return {"generation": found.generation, "training": found.training, "tokens": found.tokens}


def _spawn(job: Job, lock: int) -> subprocess.Popen[bytes]:
    """Start the child in a session of its own: what ends the server, or its terminal, leaves it alone."""
    command = [sys.executable, "-m", "cai_experiment.demo.chain", str(job.folder / JOB), "--lock", str(lock)]
    with open(job.folder / OUTPUT, "ab") as output, open(job.folder / ERRORS, "ab") as errors:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, pass_fds=[lock],
                                cwd=PACKAGE.parent, start_new_session=True)  # fmt: skip


def _print(text: str) -> None:
    """Print what the terminal's encoding knows, and the rest as escapes."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
