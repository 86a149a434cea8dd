"""The distilabel arm: its own environment, made once in a cache folder, and the chain run in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cai_experiment.pipeline.stages import StageSettings

VERSION = "1.5.3"
CHAIN = Path(__file__).with_name("_bench_distilabel_chain.py")
SECONDS = 3600  # of one run, loading included


@dataclass
class Distilabel:
    """Runs of distilabel over `rows` rows. The environment is made at the first one."""

    cache: Path
    model: str
    rows: int
    threads: int
    stages: StageSettings

    def tokens_per_second(self) -> float:
        """Useful tokens a second of one run, loading excluded. RuntimeError says why there is no figure."""
        python = self._environment()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            settings = {
                "rows": self.rows, "seed": self.stages.seed, "principles": self.stages.principles, "model": self.model,
                "cache": str(folder / "cache"), "times": str(folder / "times"), "result": str(folder / "result.json"),
            }  # fmt: skip
            (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
            # its two halves run side by side, each in its own process: together they get the threads that we have
            env = {"OMP_NUM_THREADS": str(max(1, self.threads // 2)), "HF_HUB_OFFLINE": "1"}
            self._run([str(python), str(CHAIN), str(folder / "settings.json")], env, "distilabel failed")
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        if result["rows"] != self.rows:
            raise RuntimeError(f"distilabel gave back {result['rows']} of {self.rows} rows")
        return result["tokens"] / result["seconds"]

    def _environment(self) -> Path:
        """Its Python. It sees this environment's torch and transformers behind distilabel's own packages."""
        folder = self.cache / f"distilabel-{VERSION}"
        python = folder / "bin" / "python"
        if not (folder / ".installed").exists():
            self._run([sys.executable, "-m", "venv", "--clear", str(folder)], {}, "no environment for distilabel")
            places = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
            Path(places["purelib"], "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
            install = [str(python), "-m", "pip", "install", "-q", f"distilabel=={VERSION}"]
            self._run(install, {}, f"distilabel=={VERSION} cannot be installed")
            (folder / ".installed").touch()
        return python

    def _run(self, command: list[str], env: dict[str, str], problem: str) -> None:
        """Run a command in a session of its own, whose every process ends with it, however it ends."""
        try:
            process = subprocess.Popen(command, env=os.environ | env, stdout=subprocess.DEVNULL,
                                       stderr=subprocess.PIPE, text=True, start_new_session=True)  # fmt: skip
        except OSError as error:
            raise RuntimeError(f"{problem}: {error}") from error
        try:
            _, said = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{problem}: no end within {SECONDS} s") from None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if process.returncode:
            last = [line for line in said.splitlines() if line.strip()][-1:]
            raise RuntimeError(f"{problem}: {''.join(last)[:200]}")
