"""What every script shares: the flags that are the same everywhere, and `run_main`, which ends a script properly.

Nothing heavy is imported here. A script runs from any folder and from a bare checkout, because it begins with

    if not __package__:  # run as a file: import from this checkout, whatever the current folder
        sys.path[0] = str(Path(__file__).resolve().parents[2])

(which also takes the scripts' own folder off the path: a script's name must not shadow a library's).
"""

from __future__ import annotations

import argparse
import errno
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from cai_experiment.errors import (
    EXIT_BAD_INPUT,
    EXIT_CTRL_C,
    EXIT_FAILURE,
    EXIT_HANGUP,
    EXIT_TERMINATED,
    UserError,
)
from cai_experiment.milestones import CHECKPOINT_DIR, DATA_DIR, PACKAGE, POD_DOLLARS_PER_HOUR
from cai_experiment.scripts._verbosity import add_verbosity, silenced

ROOT = PACKAGE.parent
QUANTIZATIONS = ("4bit", "8bit", "bf16", "fp32")
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)
WRONG_PATH = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def _use_project_python() -> None:
    """Start again under .venv's Python if the system's runs a script: `python cai_experiment/scripts/x.py` then works.

    An activated environment, ours or another, is left alone.
    """
    project = ROOT / ".venv" / "bin" / "python"
    in_environment = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ
    is_script = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent
    if is_script and not in_environment and project.is_file():
        os.execv(project, [str(project), *sys.argv])


_use_project_python()  # here, before a script's other imports miss what only .venv has


# ---------------------------------------------------------------- flags


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage block; checks --hardware and fills in the price."""

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's; without --price-per-hour the price is that of --hardware, else of this machine."""
        parsed = super().parse_args(args, namespace)
        card = vars(parsed).get("hardware")
        if card is not None and not vars(parsed).get("plan", True):  # models.py, which runs nothing, has no --plan
            self.error(f"--hardware {card} is for --plan alone; a run takes the machine that it is on: add --plan")
        if vars(parsed).get("price_per_hour", 0.0) is None:
            parsed.price_per_hour = default_price(card)
        return parsed

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_BAD_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def positive_int(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def separated(text: str) -> tuple[str, ...]:
    """argparse type: names between commas, each once."""
    found = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not found:
        raise argparse.ArgumentTypeError("holds no name")
    return found


def positive(text: str) -> float:
    """argparse type: a number greater than 0."""
    return _number(text, float(text) > 0, "greater than 0")


def not_negative(text: str) -> float:
    """argparse type: a number of 0 or more."""
    return _number(text, float(text) >= 0, "0 or more")


def dollars(text: str) -> float:
    """argparse type: an amount of money, 0 or more."""
    return _number(text, float(text) >= 0, "an amount")


def _number(text: str, fits: bool, what: str) -> float:
    if not fits or not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return float(text)


def plain_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with --debug and -v alone, for a script that works on no run; `doc` is the script's docstring."""
    parser = _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    add_verbosity(parser)
    return parser


def seconds(text: str) -> float:
    """argparse type: a length of time above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def base_parser(doc: str | None, milestone: str | None = None, plans: bool = True) -> argparse.ArgumentParser:
    """A parser with the flags of every script that works on a run; `milestone` is the default of --run.

    `plans`: the script has a --plan to show.
    """
    parser = plain_parser(doc)
    files = parser.add_argument_group("files")
    files.add_argument("--run", metavar="NAME", default=milestone, help=f"this run's folder (default: {milestone})")
    files.add_argument("--data-dir", type=Path, default=DATA_DIR, help="where runs are kept: DATA_DIR/NAME")
    files.add_argument("--checkpoint-dir", type=Path, default=CHECKPOINT_DIR, help="adapters: CHECKPOINT_DIR/NAME")
    files.add_argument("--constitution", type=Path, default=ROOT / "constitution.yaml", metavar="FILE")
    files.add_argument("--fresh", action="store_true", help="start anew; the old folder is moved to NAME.<time>")
    model = parser.add_argument_group("model")
    model.add_argument("--model", help="preset, hub id or folder (default: CAI_MODEL, else what the hardware allows)")
    model.add_argument("--quantization", choices=QUANTIZATIONS, help="default: 4bit on CUDA, fp32 on a CPU")
    model.add_argument("--format", choices=("auto", "chat", "base"), default="auto", help="prompt layout")
    model.add_argument("--batch-size", type=positive_int, metavar="N",
                       help="rows at a time (default: on a GPU what fits, on a CPU 32)")  # fmt: skip
    model.add_argument("--random-weights", metavar="PRESET", help="its architecture, random weights: a test run")
    run = parser.add_argument_group("run")
    run.add_argument("--seed", type=int, default=0)
    if plans:
        run.add_argument("--plan", action="store_true", help="show memory, tokens, hours and dollars; run nothing")
        run.add_argument("--hardware", metavar="NAME",
                         help="with --plan: plan for this machine, one that models.py --hardware lists")  # fmt: skip
    run.add_argument("--price-per-hour", type=dollars, metavar="DOLLARS",
                     help=f"of one machine, all its GPUs (default: {POD_DOLLARS_PER_HOUR} a GPU on a pod, that of "
                          "--hardware, else 0)")  # fmt: skip
    return parser


def add_generation_flags(parser: argparse.ArgumentParser) -> None:
    """The further flags of every script that makes pairs."""
    group = parser.add_argument_group("generation")
    group.add_argument("--count", type=positive_int, metavar="N", help="pairs to reach (default: the milestone's)")
    group.add_argument("--add", type=positive_int, metavar="N",
                       help="extend a finished run by N pairs (the same --add again only shows it)")  # fmt: skip
    group.add_argument("--rounds", type=positive_int, metavar="N", help="critique and revision rounds a pair")
    group.add_argument("--principles", choices=("targeted", "random"), default="targeted",
                       help="the most violated principle by the critic's verdicts, or one by the seed")
    group.add_argument("--no-critique", dest="critique", action="store_false",
                       help="an ablation: revise directly from the principle, without a critique")
    group.add_argument("--generator", metavar="MODEL", help="answers and revises (default: --model)")
    group.add_argument("--critic", metavar="MODEL", help="critiques and judges (default: --model, else --generator)")
    group = parser.add_argument_group("instructions (default: written by the model)")
    group.add_argument("--instructions", type=Path, metavar="FILE", help="use these (.txt .jsonl .json .csv) once each")
    group.add_argument("--field", help="the field of FILE that holds the instruction")
    group.add_argument("--mix", metavar="self:0.5,FILE:0.3,FILE:0.2",
                       help="written by the model and from files, by shares")
    group.add_argument("--exclude", type=Path, action="append", default=[], metavar="FILE",
                       help="an evaluation set: what stands in it, or near it, is refused (repeatable)")
    group.add_argument("--allow-evaluation-sets", action="store_true",
                       help="also use what stands in HarmBench or MT-Bench; these then measure nothing (recorded)")
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=("auto", "hf", "vllm", "unsloth", "server", "generate"), default="auto",
                       help="auto prints which and why")
    group.add_argument("--server", metavar="URL", help="an OpenAI-compatible endpoint; its key: CAI_API_KEY")
    group.add_argument("--server-concurrency", type=positive_int, default=64, metavar="N",
                       help="requests at a time, at most")
    group.add_argument("--deadline", type=seconds, default=600.0, metavar="SECONDS",
                       help="for one row on a server, its retries and waits included; of a vLLM or Ray actor that "
                            "answers nothing, until it is started again (default: %(default)g)")  # fmt: skip
    group.add_argument("--ray", metavar="ADDRESS|local",
                       help="actors of a Ray cluster, one engine each (docs/SCALING.md)")
    group.add_argument("--ray-actors", type=positive_int, metavar="N", help="(default: what is free)")


def default_price(card: str | None) -> float:
    """Dollars an hour of one machine: the list price of the --hardware `card`; on a RunPod pod the spec's for each of
    its GPUs, at work or not; else 0 (your own machine). Raises BadInputError for an unknown card.
    """
    from cai_experiment.models.hardware import detect, on_pod, profile

    if card is not None:
        return profile(card).dollars_per_hour or 0.0
    return POD_DOLLARS_PER_HOUR * detect().gpus if on_pod() else 0.0


# ---------------------------------------------------------------- ending properly


EXIT_CODES: dict[int, int] = {signal.SIGTERM: EXIT_TERMINATED, signal.SIGHUP: EXIT_HANGUP, signal.SIGINT: EXIT_CTRL_C}
INTERRUPTED = "interrupted; everything finished so far is kept; the same command resumes"
SECONDS_TO_END = 8.0  # of the 10 that a signal may take


class Signalled(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived. A KeyboardInterrupt, so that no library's `except Exception` swallows it."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


class _Signals:
    """Within it, SIGTERM and SIGHUP raise Signalled; a hang-up that nohup ignores stays ignored.

    From the first signal on (Ctrl-C is one) the process has SECONDS_TO_END, its exit included: a download's threads are
    waited for by their pool and again by Python, for minutes. Journal and checkpoints are whole at any instant. The
    watch hears of a signal by Python's wake-up pipe, since the main thread may be within a library's C code.
    """

    def __init__(self) -> None:
        self.said = False  # the line of an interrupted run

    def __enter__(self) -> None:
        handlers: dict[int, Any] = {number: signal.getsignal(number) for number in EXIT_CODES}
        caught = [number for number in EXIT_CODES if number != signal.SIGINT and handlers[number] != signal.SIG_IGN]
        self._before = {number: handlers[number] for number in caught}
        for number in caught:
            signal.signal(number, self._interrupt)
        self._heard, self._tell = os.pipe()
        os.set_blocking(self._tell, False)
        self._wakeup = signal.set_wakeup_fd(self._tell, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()

    def __exit__(self, *raised: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._tell)  # ends the watch, unless there was a signal
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        raise Signalled(EXIT_CODES[number])

    def _watch(self) -> None:
        with open(self._heard, "rb", buffering=0) as pipe:
            codes = (EXIT_CODES.get(byte[0]) for byte in iter(lambda: pipe.read(1), b""))
            code = next(filter(None, codes), None)
        if code is None:
            return
        time.sleep(SECONDS_TO_END)
        try:
            if not self.said:
                os.write(2, f"{INTERRUPTED}\n".encode())  # sys.stderr may be locked by a thread that hangs
        finally:
            os._exit(code)


os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a worker's signal is none of its parent's


def run_main(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and return its exit code; every failure becomes one line on stderr and the house's exit code.

    With --debug the traceback is printed too. Also sets HF_HOME to the pod's volume, before a library reads it.
    """
    given = sys.argv[1:] if argv is None else argv
    debug = "--debug" in given
    signals = _Signals()
    _keep_downloads_on_the_volume()
    try:
        with signals, silenced(given):
            return main(argv)
    except KeyboardInterrupt as stop:
        signals.said = True
        return _end(INTERRUPTED, getattr(stop, "exit_code", EXIT_CTRL_C), debug)
    except BrokenPipeError:  # `script | head`: the reader has gone, so nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_FAILURE
    except Exception as error:
        line, code = explain(error)
        return _end(line, code, debug)


def explain(error: Exception) -> tuple[str, int]:
    """(one line that names place, value and next command, exit code) for an error that reached the top of a script."""
    if isinstance(error, UserError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError):
        return f"module {error.name} is missing; bash {ROOT}/setup_runpod.sh, then use .venv/bin/python", EXIT_FAILURE
    if isinstance(error, OSError) and error.errno is not None:
        place, why = error.filename or "a file", os.strerror(error.errno)
        if error.errno in FULL_DISK:
            return f"{place}: {why}; nothing written is lost: make room, then the same command resumes", EXIT_FAILURE
        if error.errno in NO_PERMISSION:
            return f"{place}: {why}; give this user permission, or choose another place", EXIT_BAD_INPUT
        if error.errno in WRONG_PATH:
            return f"{place}: {why}; check the path", EXIT_BAD_INPUT
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}; the same command with --debug shows where", EXIT_FAILURE


def _end(line: str, code: int, debug: bool) -> int:
    """Print the line (and the traceback if asked for) on stderr, which a dropped SSH line may have closed."""
    try:
        if debug:
            traceback.print_exc()
        print(line.replace("\n", " "), file=sys.stderr, flush=True)
    except OSError:
        pass
    return code


def _keep_downloads_on_the_volume() -> None:
    """On a pod, let Hugging Face download to /workspace, which outlives the container."""
    from cai_experiment.models.hardware import POD_HF_HOME, POD_WORKSPACE, on_pod

    if on_pod() and POD_WORKSPACE.is_dir():
        os.environ.setdefault("HF_HOME", str(POD_HF_HOME))
