"""The child process of a training: generate_mvp.py, then train_dpo.py, as a user would type them.

Run: python -m cai_experiment.demo.chain DATA_DIR/RUN/demo.json

SIGTERM, SIGINT and SIGHUP go on to the script at work, which ends resumably; the same call resumes and repeats nothing
that is finished. Each script has a process group of its own, which is emptied when the script has ended; should this
process be killed, the kernel sends the script SIGTERM. Output goes to demo.log and demo.err beside the job.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

from cai_experiment.demo.training_job import ERRORS, OUTPUT, Job, Stage, sign_lock, start_time, take_lock
from cai_experiment.errors import (
    EXIT_CTRL_C,
    EXIT_HANGUP,
    EXIT_NO_GO,
    EXIT_OK,
    EXIT_TERMINATED,
    BadInputError,
    UserError,
)
from cai_experiment.milestones import PACKAGE
from cai_experiment.records.files import read_json, show

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
INTERRUPTED = (EXIT_HANGUP, EXIT_CTRL_C, EXIT_TERMINATED)
LOOK = 0.1  # seconds between two looks at the script
STOP_SECONDS = 30.0  # a script ends 8 s after a signal at the latest; one that hangs is killed then
NICE = 5  # the page comes first where both share the cores
PR_SET_PDEATHSIG = 1
KILLED = "it was killed (perhaps for want of memory)"
TAIL = 4096  # bytes of demo.err in which its last line is looked for


class Chain:
    """Runs a job's scripts. All that is done on a signal is done in the loop of `_run`: the handler only takes note."""

    def __init__(self, job: Job, lock: int) -> None:
        """`lock` is the handle of the lock, which each script inherits."""
        self.job, self.lock = job, lock
        self.signals = 0  # that came
        self.sent = 0  # of those, passed on

    def work(self) -> int:
        """Both scripts in turn, without what is finished; gives the exit code of the last one."""
        job, code = self.job, EXIT_OK
        job.stopping, job.line = False, ""
        if not job.generated:
            code = self._part("generating", "generation", job.generate())
            if code not in (EXIT_OK, EXIT_NO_GO):  # a gate's no-go is no reason not to look
                return code
            job.generated = True
        if self.signals:
            self.end("stopped", "all pairs are made")
            return EXIT_TERMINATED
        code = self._part("training", "training", job.train())
        if code == EXIT_OK:
            self.end("finished", finished_line(job))
        return code

    def _part(self, stage: Stage, part: str, words: Sequence[str]) -> int:
        """Run one script to its end, and write down how it ended."""
        job = self.job
        job.stage = stage
        job.calls[part] = job.calls.get(part, 0) + 1
        job.write()
        began, said = time.monotonic(), _size(job.folder / ERRORS)
        code = self._run(words)
        job.seconds[part] = round(job.seconds.get(part, 0.0) + time.monotonic() - began, 1)
        job.script = None
        if code in (EXIT_OK, EXIT_NO_GO):
            job.write()
        elif self.signals or code in INTERRUPTED:
            self.end("stopped", "everything finished so far is kept")
        else:
            last = KILLED if code == -signal.SIGKILL else last_line(job.folder / ERRORS, said)
            self.end("failed", f"{words[0]}: {last or f'ended with exit code {code}'}")
        return code

    def end(self, stage: Stage, line: str) -> None:
        """Write down how it ended."""
        self.job.stage, self.job.line = stage, line
        self.job.stopping, self.job.script = False, None
        self.job.write()

    def _run(self, words: Sequence[str]) -> int:
        """Start a script, pass signals on, wait for it; gives its exit code, negative for a signal that killed it."""
        if self.signals:
            return EXIT_TERMINATED
        command = [sys.executable, str(PACKAGE / "scripts" / words[0]), *words[1:], "-v", "1"]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"}
        with open(self.job.folder / OUTPUT, "ab") as output, open(self.job.folder / ERRORS, "ab") as errors:
            script = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, cwd=PACKAGE.parent, env=environment,
                process_group=0, pass_fds=[self.lock], preexec_fn=_ended_with(os.getpid()),
            )  # fmt: skip
        self.job.script = (script.pid, start_time(script.pid))
        self.job.write()
        kill_at = float("inf")
        while not _has_ended(script):
            if self.signals > self.sent:
                if not self.sent:
                    kill_at, self.job.stopping = time.monotonic() + STOP_SECONDS, True
                    self.job.write()
                self.sent = self.signals
                script.send_signal(signal.SIGTERM)
            if time.monotonic() > kill_at:
                script.kill()
            time.sleep(LOOK)
        _empty_group(script.pid)
        return script.wait()

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler of all signals that are passed on."""
        self.signals += 1


def _ended_with(parent: int) -> Callable[[], None] | None:
    """What the script's process does before it becomes the script: ask the kernel for SIGTERM when `parent` dies."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)  # loaded before the fork

    def prepare() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:  # it died before it was asked for
            os._exit(EXIT_TERMINATED)

    return prepare


def _has_ended(script: subprocess.Popen[bytes]) -> bool:
    """True once it has ended. It stays unreaped: its id, which is its group's, then still belongs to nobody else."""
    if not hasattr(os, "waitid"):  # macOS
        return script.poll() is not None
    return os.waitid(os.P_PID, script.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _empty_group(group: int) -> None:
    """End what a script that was killed has left behind (the processes of vLLM hold the GPU's memory)."""
    with suppress(ProcessLookupError, PermissionError):  # nobody is left; macOS says so of one that is not reaped
        os.killpg(group, signal.SIGKILL)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def last_line(path: Path, start: int) -> str:
    """The last line with text in what a file holds from byte `start` on; "" if there is none."""
    if not path.exists():
        return ""
    with open(path, "rb") as file:
        file.seek(max(start, _size(path) - TAIL))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def finished_line(job: Job) -> str:
    """What came of a finished training, in one line."""
    record = read_json(job.checkpoints / "final" / "training.json")["result"]
    moved = f"loss {record['loss_before']:.4f} -> {record['loss_after']:.4f}, margin {record['after']['margin']:+.4f}"
    return f"finished: {record['steps']} steps on {record['pairs']} pairs; {moved}; {show(job.checkpoints / 'final')}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run both scripts, skip what is finished, write down how it went; gives the last script's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path, help="the run's demo.json")
    parser.add_argument("--lock", type=int, metavar="FD", help="the handle of the lock that the server took")
    args = parser.parse_args(argv)
    job = Job.read(args.job)
    lock = take_lock(Path(job.data_dir)) if args.lock is None else args.lock
    if lock is None:
        raise BadInputError("another training is running", "wait until it ends")
    chain = Chain(job, lock)
    for number in FORWARDED:
        signal.signal(number, chain.note)
    sign_lock(lock, job.run, os.getpid())
    os.nice(NICE)
    try:
        return chain.work()
    except Exception as error:
        chain.end("failed", " ".join(str(error).split())[:500])
        raise
    finally:
        os.close(lock)  # now, not when the interpreter has ended: a resume may come at once


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(error.exit_code) from None
