"""A training's job on disk: what is asked for, its two commands, how far it came, and the lock of who is at work.

DATA_DIR/RUN/demo.json is written whole by whoever holds DATA_DIR/demo.lock: the server until the child has started,
then the child (chain.py). The lock is the kernel's (flock); the child and its script inherit it, so it is held exactly
as long as one of them lives, however they die, whoever started them. A process id alone would not say that.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shlex
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cai_experiment.constitution.principles import DEFAULT_CONSTITUTION
from cai_experiment.errors import BadInputError
from cai_experiment.milestones import CHECKPOINT_DIR, DATA_DIR, SCRIPTS
from cai_experiment.records.files import read_json, show, write_json, writing_error

JOB, LOCK, OUTPUT, ERRORS = "demo.json", "demo.lock", "demo.log", "demo.err"
PREFIX = "demo-"  # of the demo's runs
GENERATE, TRAIN = "generate_mvp.py", "train_dpo.py"
LOCK_TRIES, LOCK_PAUSE = 10, 0.05  # seconds: a look at the lock holds it for microseconds

Stage = Literal["none", "generating", "training", "finished", "stopped", "failed"]


@dataclass(slots=True)
class Job:
    """One training. Of `stage`, "generating" and "training" are true only while the lock is held.

    `expected` holds seconds as estimated at the start, `seconds` as spent so far, both by "generation" and "training";
    `calls` counts the starts of each. `script` is the process at work, (id, `start_time`).
    """

    run: str
    plan: str
    examples: int
    epochs: int
    generator: str
    critic: str
    data_dir: str
    checkpoint_dir: str
    constitution: str
    seed: int = 0
    machine: str = ""
    begun: float = 0.0  # seconds since 1970
    expected: dict[str, float] = field(default_factory=dict)
    stage: Stage = "generating"
    generated: bool = False  # generate_mvp.py has come to its end
    stopping: bool = False
    line: str = ""
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    script: tuple[int, str] | None = None

    @property
    def folder(self) -> Path:
        """DATA_DIR/RUN."""
        return Path(self.data_dir) / self.run

    @property
    def checkpoints(self) -> Path:
        """CHECKPOINT_DIR/RUN."""
        return Path(self.checkpoint_dir) / self.run

    @classmethod
    def read(cls, path: Path) -> Job:
        """The job in a file; BadInputError if it is missing, damaged, or of a folder that was renamed."""
        row = read_json(path, "start a new training")
        try:
            script = row.pop("script", None)
            job = cls(**row, script=(int(script[0]), str(script[1])) if script else None)
        except (TypeError, ValueError, LookupError):
            raise BadInputError(f"{show(path)} is not a training of this version", "start a new training") from None
        if job.run != path.parent.name:
            raise BadInputError(f"{show(path)} is of the run {job.run}", "start a new training")
        return job

    def write(self) -> None:
        """Write it whole. Raises DiskError or BadInputError."""
        write_json(self.folder / JOB, dataclasses.asdict(self))

    # ------------------------------------------------------------ commands

    def generate(self) -> list[str]:
        """generate_mvp.py's words."""
        same = self.generator == self.critic
        models = ["--model", self.generator] if same else ["--generator", self.generator, "--critic", self.critic]
        own = [] if Path(self.constitution) == DEFAULT_CONSTITUTION else ["--constitution", self.constitution]
        return [GENERATE, "--run", self.run, "--count", str(self.examples), *models, *own, *self._places()]

    def train(self) -> list[str]:
        """train_dpo.py's words."""
        return [TRAIN, "--milestone", "mvp", "--run", self.run, "--epochs", str(self.epochs), "--no-eval",
                "--model", self.generator, *self._places()]  # fmt: skip

    def command(self) -> str:
        """What a user types to go on in a terminal."""
        script, *words = self.train() if self.generated else self.generate()
        return f"{SCRIPTS}{shlex.join([script, *words])}"

    def _places(self) -> list[str]:
        words = [] if Path(self.data_dir) == DATA_DIR else ["--data-dir", self.data_dir]
        words += [] if Path(self.checkpoint_dir) == CHECKPOINT_DIR else ["--checkpoint-dir", self.checkpoint_dir]
        return words + (["--seed", str(self.seed)] if self.seed else [])


# ---------------------------------------------------------------- the lock


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the lock: the run, the child's process id and `start_time`, and when it began (for people)."""

    run: str
    pid: int = 0
    started: str = ""
    since: str = ""


def take_lock(data_dir: Path) -> int | None:
    """The lock's file handle, locked for this process and those that inherit it, or None if another holds it.

    Raises DiskError or BadInputError where the file cannot be made.
    """
    handle = _open(data_dir)
    try:
        for attempt in range(LOCK_TRIES):
            if _locked(handle, fcntl.LOCK_EX):
                return handle
            if attempt < LOCK_TRIES - 1:
                time.sleep(LOCK_PAUSE)
    except OSError as error:  # some network file systems know no locks
        os.close(handle)
        message = f"cannot lock {show(data_dir / LOCK)}: {error.strerror}"
        raise BadInputError(message, "choose a folder on another file system with --data-dir") from None
    os.close(handle)
    return None


def sign_lock(handle: int, run: str, pid: int) -> None:
    """Write into the lock's file who holds it."""
    note = {"run": run, "pid": pid, "started": start_time(pid), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    line = json.dumps(note).encode() + b"\n"
    os.pwrite(handle, line, 0)
    os.ftruncate(handle, len(line))


def last_holder(data_dir: Path) -> tuple[Holder | None, bool]:
    """(who held the lock last, None if nobody did, or its note is being written; whether it is held now)."""
    path = data_dir / LOCK
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None, False
    try:
        held = False
        with suppress(OSError):  # no locks there, so nobody holds one
            held = not _locked(handle, fcntl.LOCK_SH)
        return _note(os.pread(handle, 1000, 0)), held
    finally:
        os.close(handle)


def _open(data_dir: Path) -> int:
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        return os.open(data_dir / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise writing_error(data_dir / LOCK, error) from error


def _locked(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _note(raw: bytes) -> Holder | None:
    try:
        row: dict[str, Any] = json.loads(raw)
        return Holder(str(row["run"]), int(row["pid"]), str(row["started"]), str(row["since"]))
    except (ValueError, KeyError, TypeError):
        return None


# ---------------------------------------------------------------- processes


def start_time(pid: int) -> str:
    """When a process started, as its system counts it; "" if there is none, or it has ended and waits to be reaped.

    Ids are used again: the same id with another start time is another process.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # proc(5): 3 is the state, 22 the start time
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
    done = subprocess.run(["ps", "-o", "lstart=,stat=", "-p", str(pid)], capture_output=True, text=True)  # macOS
    words = done.stdout.split()
    return "" if not words or words[-1].startswith("Z") else " ".join(words[:-1])


def is_alive(pid: int, started: str) -> bool:
    """True if the process that had this id at `started` still runs."""
    return pid > 0 and bool(started) and start_time(pid) == started
