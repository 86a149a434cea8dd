"""What the notebooks' cells call: installs, runs the scripts with their output in the cell, shows what they wrote.

Runs in the notebook's own Python (Colab's, or a local kernel) with pandas and IPython; the scripts run in the
environment with the pinned packages, as processes of their own, so that a crash never takes the notebook along.
"""

from __future__ import annotations

import contextlib
import html
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

KEEP_EVERY = 60  # seconds between two copies into `keep_in` while a script runs
NO_GO = 3  # a script's exit code: it ran to its end, and a gate says no-go
INTERRUPTED = (129, 130, 143, -2, -15)
# Colab and Jupyter set these for their own Python: the scripts' would look for packages that it has not, and redraw
# progress as in a terminal
FOREIGN = ("MPLBACKEND", "PYTHONPATH", "PYTHONHOME", "FORCE_COLOR", "CLICOLOR_FORCE")

NO_FIGURES = ("similarity_is", "finish_phrase")  # of a summary: whole sentences


class ScriptFailed(RuntimeError):
    """A script ended with an error; its last lines stand above in the cell."""


def gpu_name() -> str:
    """The first NVIDIA GPU, or "" where there is none."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return ""
    found = re.match(r"GPU 0: (.*?) \(UUID", listed)
    return found[1] if found else ""


def on_colab() -> bool:
    """True inside Google Colab."""
    return "google.colab" in sys.modules or Path("/content/sample_data").is_dir()


@dataclass
class Lab:
    """One checkout, the folders of its runs, and a folder that outlives the machine (`keep_in`; None: no copies)."""

    root: Path
    data_dir: Path
    checkpoint_dir: Path
    keep_in: Path | None = None
    python: str = field(default=sys.executable, init=False)

    # ------------------------------------------------------------ packages

    def install(self) -> None:
        """Make .venv by setup_runpod.sh, unless this Python has every pinned package; ScriptFailed if it fails."""
        if self._has_pins():
            print(f"the pinned packages are installed in this Python ({sys.executable}); nothing to do")
            return
        code = self._stream(["bash", str(self.root / "setup_runpod.sh")])
        self.python = str(self.root / ".venv" / "bin" / "python")
        if code:
            raise ScriptFailed(f"setup_runpod.sh ended with exit code {code}; its last lines say what to do")

    def _has_pins(self) -> bool:
        names = ["requirements-cpu.txt"] + (["requirements.txt"] if gpu_name() else [])
        lines = "\n".join((self.root / name).read_text(encoding="utf-8") for name in names)
        pins = re.findall(r"^([\w-]+)==([\w.]+)", lines, re.MULTILINE)
        try:
            return all(version(name).partition("+")[0] == pin for name, pin in pins)
        except PackageNotFoundError:
            return False

    # ------------------------------------------------------------ scripts

    def run(self, command: str, *more: str) -> int:
        """Run `command` (a script of the checkout and its arguments), its output line by line in the cell.

        Gives 0, or 3 for a no-go, which is a result. Raises ScriptFailed for an error and KeyboardInterrupt for the
        stop button. The same command goes on where an interrupted one was.
        """
        script, *arguments = [*shlex.split(command), *more]
        shown = shlex.join([script, *arguments])
        print(f"$ python {shown}", flush=True)
        writes = not script.endswith("/models.py")
        folders = ["--data-dir", str(self.data_dir), "--checkpoint-dir", str(self.checkpoint_dir)] if writes else []
        self.restore()
        try:
            code = self._stream([self.python, str(self.root / script), *arguments, *folders])
        finally:
            self.keep()
        if code == NO_GO:
            print("\nNO-GO (exit code 3): the script ran to its end, and a gate was not met. Its table says which.")
        elif code in INTERRUPTED:
            raise ScriptFailed(f"{script} was interrupted (exit code {code}); run this cell again, and it goes on")
        elif code:
            raise ScriptFailed(f"{script} ended with exit code {code}; its last lines above say what to do")
        return code

    def _stream(self, command: Sequence[str]) -> int:
        """Run `command`, print its lines as they come; gives its exit code. The stop button ends it in good order."""
        environment = {name: value for name, value in os.environ.items() if name not in FOREIGN}
        environment |= {"PYTHONUNBUFFERED": "1", "COLUMNS": "110"}
        process = subprocess.Popen(
            command, cwd=self.root, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
        assert process.stdout is not None
        kept = time.monotonic()
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                if time.monotonic() - kept > KEEP_EVERY:
                    self.keep()
                    kept = time.monotonic()
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)  # the script writes what is finished and ends
            print(*process.stdout, sep="", flush=True)
            process.wait()
            raise
        return process.wait()

    # ------------------------------------------------------------ a copy that outlives the machine

    def keep(self) -> None:
        """Make the copies in `keep_in` of the runs and checkpoints that are here the same as these."""
        for folder, kept in self._kept():
            for run in folder.iterdir() if folder.is_dir() else ():
                _mirror(run, kept / run.name)

    def restore(self) -> None:
        """Bring back from `keep_in` the runs and checkpoints that are not here; what is here is left alone."""
        for folder, kept in self._kept():
            for run in kept.iterdir() if kept.is_dir() else ():
                if not (folder / run.name).exists():
                    _mirror(run, folder / run.name)
                    print(f"brought back from {kept}: {run.name}")

    def _kept(self) -> list[tuple[Path, Path]]:
        if self.keep_in is None:
            return []
        return [(self.data_dir, self.keep_in / "data"), (self.checkpoint_dir, self.keep_in / "checkpoints")]

    # ------------------------------------------------------------ what was written

    def report(self, run: str, height: int = 700) -> Any:
        """A run's report.html in a frame of its own, so that its style and scripts stay away from the notebook's."""
        from IPython.display import HTML

        page = html.escape((self.data_dir / run / "report.html").read_text(encoding="utf-8"))
        # srcdoc, as Colab serves no files of its machine
        frame = f'<iframe title="report of {run}" sandbox="allow-scripts" srcdoc="{page}"'
        return HTML(f'{frame} style="width:100%;height:{height}px;border:1px solid #ccc"></iframe>')

    def gates(self, run: str) -> Any:
        """A run's gates as a table: value, what was asked, 95% interval, n, go or no-go."""
        import pandas

        report = json.loads((self.data_dir / run / "report.json").read_text(encoding="utf-8"))
        columns = ["name", "value", "rule", "threshold", "interval", "n", "passed"]
        table = pandas.DataFrame(report["gates"]).reindex(columns=columns)
        table["passed"] = table["passed"].map({True: "go", False: "no-go"}).fillna("not measured")
        return table.style.format(precision=3, na_rep="–").set_caption(f"{run}: {report['verdict']}").hide(axis="index")

    def pairs(self, run: str) -> Any:
        """A run's pairs as a pandas table, one row a pair, long texts in full."""
        import pandas

        lines = (self.data_dir / run / "pairs.jsonl").read_text(encoding="utf-8").splitlines()
        columns = ["instruction", "initial_answer", "principle", "critique", "revised_answer"]
        return pandas.DataFrame([json.loads(line) for line in lines]).reindex(columns=columns)

    def summaries(self, run: str) -> Any:
        """The figures of a run's finished sessions as a pandas table, one column a session ("tokens.written" a row)."""
        import pandas

        files = sorted((self.data_dir / run).rglob("summary.json"))
        columns = {}
        for file in files:
            summary = json.loads(file.read_text(encoding="utf-8"))
            columns[str(file.parent.relative_to(self.data_dir / run))] = _figures(summary)
        return pandas.DataFrame(columns)

    def conversation(self, run: str) -> str:
        """Everything that was said in a run's sessions, one after the other; control codes are shown, not obeyed."""
        if str(self.root) not in sys.path:
            sys.path.append(str(self.root))
        from cai_experiment.observe.screen import escaped

        files = sorted((self.data_dir / run).rglob("conversation.md"))
        return "\n\n".join(escaped(file.read_text(encoding="utf-8", errors="replace")) for file in files)


def _figures(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary.json as a column: values of one level down under "name.part", lists and explanations left out."""
    found: dict[str, Any] = {}
    for name, value in summary.items():
        if isinstance(value, dict):
            found |= {f"{name}.{part}": inner for part, inner in value.items()}
        elif name not in NO_FIGURES:
            found[name] = value
    return {name: value for name, value in found.items() if not isinstance(value, dict | list)}


def _mirror(source: Path, target: Path) -> None:
    """Copy what differs in size or is newer, then remove what `source` has no more; locks are left out."""
    for file in sorted(source.rglob("*")):
        place = target / file.relative_to(source)
        if file.name == "run.lock" or file.suffix == ".tmp" or not file.is_file():
            continue
        with contextlib.suppress(FileNotFoundError):  # replaced or cleared away while we looked
            new, old = file.stat(), place.stat() if place.is_file() else None
            if old is None or old.st_size != new.st_size or old.st_mtime + 1 < new.st_mtime:
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, place)
    for place in target.rglob("*"):
        if place.is_file() and not (source / place.relative_to(target)).exists():
            place.unlink()


def run_name(what: str, model: str, command: str = "") -> str:
    """A run's folder for `what` with `model`: another model or style is another run, as settings must not change."""
    parts = [what, model.rsplit("/", 1)[-1].lower()]
    if "research-driven" in command:
        parts.append("research-driven")
    if "--compare" in command:
        parts = [what, "comparison"]
    return re.sub(r"[^\w.-]+", "-", "-".join(parts))
