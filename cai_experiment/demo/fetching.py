"""Fetching a model that is not at hand: download_models.py in a process of its own, watched by its files' size."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import IO

from cai_experiment.engines.placing import Placed
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.milestones import PACKAGE
from cai_experiment.models import configs
from cai_experiment.models.disk import downloaded_gb
from cai_experiment.models.memory import weights_gb
from cai_experiment.models.serving import files_for, known_numbers

SCRIPT = PACKAGE / "scripts" / "download_models.py"
LOOK = 0.5  # seconds between two looks at the files
SEEN = "Qwen/Qwen2-1.5B-Instruct"  # a small question to the hub: is there a network?


def network() -> bool:
    """True if the hub answers. Takes a moment without a network, seconds at most with a slow one."""
    try:
        configs.ask(SEEN)
    except BadInputError:  # it answered, though not with that model
        return True
    except Exception:  # whatever keeps it from answering: this is a question, not a download
        return False
    return True


class Fetch:
    """One download, which `stop` may end from another thread. The same download goes on where it stopped."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self, placed: Placed, say: Callable[[str], None]) -> None:
        """Fetch the files of `placed`, saying how far it is. Raises EngineError, the script's own line, if it fails."""
        plan = placed.plan
        place = plan.choice.path_or_id
        files, precision = files_for(plan.choice, plan.engine, plan.quantization)
        numbers = _total(placed, precision)
        small = ["--quantization", "4bit"] if files != place else []
        with tempfile.TemporaryFile() as told:
            self._start([sys.executable, str(SCRIPT), place, *small], told)
            code = None
            while code is None:
                say(f"fetching {files}: {downloaded_gb(files):.2f}{numbers} GB")
                code = self._look()
            if code == 0:
                return
            told.seek(0)
            lines = told.read().decode(errors="replace").strip().splitlines()
        if self._stopped:
            raise EngineError(f"{files}: the download was stopped", "load it again to go on")
        raise EngineError(lines[-1] if lines else f"{files}: the download ended with exit code {code}")

    def _start(self, command: list[str], told: IO[bytes]) -> None:
        quiet = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=told,
                                         env=quiet)  # fmt: skip
        if self._stopped:
            self._process.terminate()

    def _look(self) -> int | None:
        assert self._process is not None
        try:
            return self._process.wait(LOOK)
        except subprocess.TimeoutExpired:
            return None

    def stop(self) -> None:
        """End the download; what has come is kept."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()


def _total(placed: Placed, precision: str) -> str:
    """ " of 3.1", or "" of a model whose size is not known before it is here."""
    try:
        numbers = known_numbers(placed.plan.choice)
    except BadInputError:
        return ""
    kind = "4bit" if precision == "4bit" else "bf16"  # what lies on the hub
    return "" if numbers is None else f" of {weights_gb(numbers, kind):.1f}"
