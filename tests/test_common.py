"""How every script ends: one line on stderr, the house's exit codes; and the flags that are the same everywhere."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cai_experiment.errors import BadInputError, DiskError, EngineError
from cai_experiment.scripts import _common

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (BadInputError("a.yaml: x", "do y"), 2, "a.yaml: x; do y"),
        (DiskError("out: full"), 1, "out: full"),
        (EngineError("no model"), 1, "no model"),
        (OSError(errno.ENOSPC, "", "pairs.jsonl"), 1, "pairs.jsonl: No space left"),
        (OSError(errno.EACCES, "", "data"), 2, "data: Permission denied"),
        (OSError(errno.EROFS, "", "data"), 2, "data: Read-only"),
        (FileNotFoundError(errno.ENOENT, "", "x.txt"), 2, "x.txt: No such file"),
        (ModuleNotFoundError("no", name="trl"), 1, "module trl is missing; bash"),
        (RuntimeError("two\nlines"), 1, "RuntimeError: two lines; the same command with --debug"),
        (KeyboardInterrupt(), 130, "the same command resumes"),
    ],
)
def test_every_failure_is_one_line_and_an_exit_code(error, code: int, words: str, capsys) -> None:
    def main(argv) -> int:
        raise error

    assert _common.run_main(main, []) == code
    out = capsys.readouterr()
    assert words in out.err and out.err.count("\n") == 1 and not out.out
    _common.run_main(main, ["--debug"])
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_signals_end_with_the_houses_exit_codes(number: signal.Signals, code: int) -> None:
    def main(argv) -> int:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        except Exception:  # a library's catch-all must not swallow it
            return 0
        return 1

    child = os.fork()  # a process of its own: once it was signalled, it ends
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup has it ignored, also in this suite
        before = signal.getsignal(number)
        found = _common.run_main(main, [])
        os._exit(found if signal.getsignal(number) is before else 99)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code


STUCK = """
import ctypes, sys, threading, time
from cai_experiment.scripts._common import run_main

def main(argv):
    shard = threading.Thread(target=time.sleep, args=(60,))  # Python joins it at exit
    shard.start()
    print("ready", flush=True)
    if sys.argv[1] == "joins":
        shard.join()
    elif sys.argv[1] == "deaf":  # a lock in C, taken twice: no handler of Python's ever runs
        lock, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
        libc.pthread_mutex_lock(lock)
        libc.pthread_mutex_lock(lock)
    while sys.argv[1] == "swallows":
        try:
            time.sleep(60)
        except KeyboardInterrupt:
            pass
    time.sleep(60)

sys.exit(run_main(main, []))
"""


def test_a_signal_ends_a_process_whose_threads_go_on() -> None:
    """Ten seconds are the promise itself; left to itself, each of these takes a minute. All at once, to save time."""
    cases = [("exits", signal.SIGHUP, 129), ("exits", signal.SIGINT, 130), ("joins", signal.SIGTERM, 143),
             ("swallows", signal.SIGINT, 130), ("deaf", signal.SIGTERM, 143), ("deaf", signal.SIGINT, 130)]  # fmt: skip
    children = [subprocess.Popen([sys.executable, "-c", STUCK, how], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                 stderr=subprocess.PIPE) for how, _, _ in cases]  # fmt: skip
    assert [child.stdout.readline() for child in children if child.stdout] == ["ready\n"] * len(cases)
    began = time.monotonic()
    for child, (_, number, _) in zip(children, cases, strict=True):
        child.send_signal(number)
    said = [child.communicate()[1] for child in children]
    assert time.monotonic() - began < 10
    assert [child.returncode for child in children] == [code for _, _, code in cases]
    assert said == [f"{_common.INTERRUPTED}\n"] * len(cases)


def test_a_forked_workers_signal_is_not_its_parents() -> None:
    """A pool ends its workers by SIGTERM: written to the pipe that they inherit, it would end the parent."""

    def pipe_in_use() -> bool:
        number = signal.set_wakeup_fd(-1)
        signal.set_wakeup_fd(number)
        return number != -1

    def main(argv) -> int:
        worker = os.fork()
        if worker == 0:
            os._exit(pipe_in_use())
        return os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) if pipe_in_use() else 99

    assert _common.run_main(main, []) == 0
    assert not pipe_in_use()


def test_a_hangup_that_nohup_ignores_stays_ignored() -> None:
    def main(argv) -> int:
        os.kill(os.getpid(), signal.SIGHUP)
        return 0

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert _common.run_main(main, []) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_pipe_is_no_traceback() -> None:
    code = "import sys; from cai_experiment.scripts._common import run_main\n"
    code += "sys.exit(run_main(lambda argv: [print('x' * 1000, flush=True) for _ in range(1000)] and 0))"
    command = f'"{sys.executable}" -c "{code}" | head -1'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


@pytest.mark.parametrize("argv", [["--nonsense"], ["--batch-size", "0"], ["-v", "4"], ["--price-per-hour", "-1"]])
def test_bad_flags_are_one_line_and_exit_code_2(argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        _common.base_parser("doc", "single").parse_args(argv)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert argv[0].lstrip("-")[:5] in err and err.count("\n") == 1


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RUNPOD_POD_ID", raising=False)
    parser = _common.base_parser("doc", "single")
    _common.add_generation_flags(parser)
    args = parser.parse_args([])
    assert (args.run, args.seed, args.verbosity, args.format, args.model) == ("single", 0, 2, "auto", None)
    assert (args.principles, args.engine, args.price_per_hour) == ("targeted", "auto", 0.0)
    assert args.constitution.is_file()
    monkeypatch.setenv("RUNPOD_POD_ID", "abc")
    assert _common.base_parser("doc").parse_args([]).price_per_hour == 1.74


def test_hardware_is_for_a_plan_and_brings_its_price(capsys: pytest.CaptureFixture[str]) -> None:
    def plan(*flags: str) -> float:
        return _common.base_parser("doc", "mvp").parse_args(["--plan", *flags]).price_per_hour

    assert plan("--hardware", "a100-80gb") == 1.74
    assert plan("--hardware", "A100-80gb", "--price-per-hour", "0") == 0
    with pytest.raises(BadInputError, match=r"--hardware a100 is unknown; nearest: .*a100-80gb"):
        plan("--hardware", "a100")
    with pytest.raises(SystemExit) as stop:
        _common.base_parser("doc", "mvp").parse_args(["--hardware", "a100-80gb"])
    said = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and "\n" not in said and "--hardware a100-80gb is for --plan alone" in said
