"""One run in one tier: start, supervise, end all that it started, remove its folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

from cai_experiment.errors import EngineError
from cai_experiment.investigations.sandbox import accounts
from cai_experiment.investigations.sandbox.channel import MOST_BYTES, Channel, Functions
from cai_experiment.investigations.sandbox.limits import Limits, Outcome
from cai_experiment.investigations.sandbox.supervise import Supervisor, reason_of
from cai_experiment.investigations.sandbox.tiers import STARTS, Start, interpreter_for
from cai_experiment.investigations.sandbox.watch import MOST_FILES, files_in_memory, files_mb, memory_mb

KEEPER = Path(__file__).with_name("keeper.py").read_text(encoding="utf-8")
OWN_PROCESSES = 4  # the keeper, bwrap's two, the interpreter
MB = 1_000_000


def run_once(tier: str, limits: Limits, functions: Functions, code: str) -> Outcome:
    """Run code in a tier. Raises EngineError where the sandbox itself does not start; never for what the code does."""
    (asks, ask), (hear, hears), (lifeline, hold) = os.pipe(), os.pipe(), os.pipe()
    job = os.memfd_create("job")
    ends, own = {job, ask, hear, lifeline}, [asks, hears, hold]  # the run's, this process's
    start = None
    try:
        start = STARTS[tier](limits, (job, ask, hear))
        ends |= set(start.pass_fds)
        _write(job, _job(limits, functions, code, start))
        return _supervised(tier, limits, functions, start, lifeline, ends, own)
    except OSError as error:
        raise EngineError(f"sandbox {tier}: {error}") from error
    finally:
        for descriptor in (*ends, *own):
            with suppress(OSError):
                os.close(descriptor)
        if start is not None and start.folder is not None:
            _remove(start.folder)


def _remove(folder: Path) -> None:
    """Remove a run's folder. By rm, which walks any depth: shutil.rmtree recurses, and code may nest thousands."""
    if not accounts.is_root():  # folders that the code closed to its own uid
        subprocess.run(["chmod", "-R", "u+rwX", "--", str(folder)], check=False, stderr=subprocess.DEVNULL)
    subprocess.run(["rm", "-rf", "--", str(folder)], check=False)


def _supervised(
    tier: str, limits: Limits, functions: Functions, start: Start, lifeline: int, ends: set[int], own: list[int]
) -> Outcome:
    """Start and supervise; the descriptors in `ends` and `own` are closed, and taken out, as they are handed on."""
    began = time.monotonic()
    channel = Channel(functions)  # opens a pipe, which may fail: before there is a process to end
    with ExitStack() as undo:
        undo.callback(channel.wait)
        process = subprocess.Popen(
            _keeper_command(start, lifeline, ends), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, cwd="/", env={}, pass_fds=tuple(ends), start_new_session=True,
        )  # fmt: skip
        undo.pop_all()
    while ends:
        os.close(ends.pop())
    asks, hears, hold = own
    own.clear()
    look = partial(_beyond, limits, start, process.pid)
    supervisor = Supervisor(process, asks, hears, channel, limits, look)
    try:
        supervisor.run()
    finally:
        try:
            _end(start, process, hold)
        finally:
            supervisor.close()
    return _outcome(tier, limits, start, supervisor, time.monotonic() - began)


def _keeper_command(start: Start, lifeline: int, ends: set[int]) -> list[str]:
    order = {
        "command": start.command, "environment": start.environment, "cwd": start.cwd, "user": start.user,
        "uid": start.uid, "folder": str(start.folder or ""), "parent": os.getpid(), "lifeline": lifeline,
        "descriptors": sorted(ends - {lifeline}),
    }  # fmt: skip
    return [sys.executable, "-I", "-S", "-c", KEEPER, json.dumps(order)]


def _outcome(tier: str, limits: Limits, start: Start, supervisor: Supervisor, seconds: float) -> Outcome:
    code = supervisor.process.returncode
    code = 128 - code if code < 0 else code
    out, errors = (printed.text(limits.output_chars) for printed in (supervisor.out, supervisor.err))
    if not supervisor.started and not supervisor.stopped:
        raise OSError(f"did not start (exit code {code}): {errors.strip() or 'no message'}")
    stopped = reason_of(supervisor.stopped, code, errors, seconds, limits)
    truncated = any(printed.total > len(text.encode("utf-8", "replace")) and len(text) == limits.output_chars
                    for printed, text in ((supervisor.out, out), (supervisor.err, errors)))  # fmt: skip
    python = interpreter_for(tier)
    for place, name in ((str(start.folder or start.box), "."), (python.library, "python"), (python.prefix, "python")):
        errors = errors.replace(place, name)  # a traceback names the library, not the machine
    return Outcome(out, errors, None if supervisor.stopped else code, stopped, round(seconds, 3), truncated)


def _job(limits: Limits, functions: Functions, code: str, start: Start) -> bytes:
    """What child.py is told. Surrogates in code, which no file holds, are an error of the code: they are replaced."""
    processes = limits.processes + OWN_PROCESSES
    if start.uid is None and not start.box:  # the kernel counts all processes of the user's own uid
        processes += accounts.count_threads(os.getuid())
    bounds = {
        "AS": limits.memory_mb * MB, "CPU": limits.cpu_seconds, "NPROC": processes, "FSIZE": limits.file_mb * MB,
        "NOFILE": 64, "CORE": 0,
    }  # fmt: skip
    job = {"code": code, "limits": bounds, "functions": list(functions), "most": MOST_BYTES, "packages": start.packages}
    return json.dumps(job).encode("ascii")


def _write(descriptor: int, data: bytes) -> None:
    with open(descriptor, "wb", closefd=False) as stream:
        stream.write(data)
    os.lseek(descriptor, 0, os.SEEK_SET)


def _beyond(limits: Limits, start: Start, keeper: int) -> str:
    """The limit that the run's processes exceed together."""
    members = start.members(keeper)
    if memory_mb(members) > limits.memory_mb:
        return "memory"
    if start.folder is not None and files_mb(start.folder, members, limits.file_mb) > limits.folder_mb:
        return "files"
    return "files" if start.box and files_in_memory(start.box, members) > MOST_FILES else ""


def _end(start: Start, process: subprocess.Popen[bytes], hold: int) -> None:
    """Have the keeper end all of the run, then make sure of it. Each step is taken whatever becomes of the others."""
    with ExitStack() as last:  # from the bottom up
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                last.callback(stream.close)
        last.callback(_make_sure, start, process)
        last.callback(os.close, hold)
        with suppress(OSError):  # the keeper may have ended
            os.write(hold, b".")


def _make_sure(start: Start, keeper: subprocess.Popen[bytes]) -> None:
    """Wait for the keeper, and kill what it has left: as root all of the uid, else what still descends from it."""
    try:
        keeper.wait(accounts.PATIENCE)
    except subprocess.TimeoutExpired:
        inside = start.members(keeper.pid)
        for process in (keeper.pid, *inside):
            with suppress(OSError):
                os.kill(process, signal.SIGKILL)
        keeper.wait()
        accounts.wait_for(inside)
    finally:
        if start.uid is not None:
            accounts.kill_all_of(start.uid)
