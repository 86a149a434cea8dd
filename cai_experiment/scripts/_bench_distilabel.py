"""The distilabel arm: its own environment, made once in a cache folder, and the chain run in it."""

from __future__ import annotations

import json
import sys
import sysconfig
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.scripts._bench_process import run_child

VERSION = "1.5.3"
CHAIN = Path(__file__).with_name("_bench_distilabel_chain.py")
SECONDS = 3600  # of one run, loading included


@dataclass
class Distilabel:
    """Runs of distilabel over `rows` rows. The environment is made at the first one.

    With one process the whole chain is one task, which has all the threads; with two each half of the chain is a task
    in a process of its own, which works beside the other with half of the threads.
    """

    cache: Path
    model: str
    rows: int
    threads: int
    stages: StageSettings
    processes: int
    dtype: str = "float32"  # that of the other arms' weights

    def tokens_per_second(self) -> float:
        """Useful tokens a second of one run, loading excluded. RuntimeError says why there is no figure."""
        python = self._environment()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            settings = {
                "rows": self.rows, "seed": self.stages.seed, "principles": self.stages.principles, "model": self.model,
                "cache": str(folder / "cache"), "times": str(folder / "times"), "result": str(folder / "result.json"),
                "processes": self.processes, "dtype": self.dtype,
            }  # fmt: skip
            (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
            env = {"OMP_NUM_THREADS": str(max(1, self.threads // self.processes)), "HF_HUB_OFFLINE": "1"}
            run_child([str(python), str(CHAIN), str(folder / "settings.json")], env, "distilabel failed", SECONDS)
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        return self.speed(result)

    def speed(self, result: Mapping[str, Any]) -> float:
        """Useful tokens a second of a run's result; RuntimeError if it did not do the work of the other arms."""
        if result["rows"] != self.rows:
            raise RuntimeError(f"distilabel gave back {result['rows']} of {self.rows} rows")
        if result["dtypes"] != [self.dtype]:
            raise RuntimeError(f"distilabel computed in {', '.join(result['dtypes'])}, the other arms in {self.dtype}")
        return result["tokens"] / result["seconds"]

    def _environment(self) -> Path:
        """Its Python. It sees this environment's torch and transformers behind distilabel's own packages."""
        folder = self.cache / f"distilabel-{VERSION}"
        python = folder / "bin" / "python"
        if not (folder / ".installed").exists():
            venv = [sys.executable, "-m", "venv", "--clear", str(folder)]
            run_child(venv, {}, "no environment for distilabel", SECONDS)
            places = sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})
            Path(places["purelib"], "ours.pth").write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
            install = [str(python), "-m", "pip", "install", "-q", f"distilabel=={VERSION}"]
            run_child(install, {}, f"distilabel=={VERSION} cannot be installed", SECONDS)
            (folder / ".installed").touch()
        return python
