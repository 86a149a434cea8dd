"""The setting that a figure holds for: what was measured, on what machine, with which versions."""

from __future__ import annotations

import argparse
import platform
from collections.abc import Mapping
from pathlib import Path

from cai_experiment.models.hardware import detect
from cai_experiment.records.manifest import git_revision, library_versions

# What is taken from an engine's `describe()`.
ENGINE = ("model", "revision", "weights_sha256", "weights_from", "random_seed", "engine", "dtype", "quantization",
          "layout", "slots")  # fmt: skip


def setting_of(args: argparse.Namespace, rows: int, engine: Mapping[str, object] | None = None) -> dict[str, object]:
    """The setting of one run of bench.py. `engine`: the `describe()` of what spoke, None where nothing did."""
    hardware = detect()
    flags = ("suite", "repeats", "threads", "seed", "principles")
    setting: dict[str, object] = {"rows": rows, **{name: getattr(args, name) for name in flags}}
    setting |= {name: engine[name] for name in ENGINE if engine and engine.get(name) is not None}
    return setting | {
        "git_revision": git_revision(), "versions": library_versions(), "processor": processor(),
        "cores": hardware.cores, "ram_gb": hardware.ram_gb, "card": hardware.gpu_name,
    }  # fmt: skip


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
