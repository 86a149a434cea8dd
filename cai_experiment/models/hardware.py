"""The machine at hand, as `nvidia-smi` and /proc tell it. The profiles are in profiles.py; imports no torch."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path

from cai_experiment.models.presets import get_model_preset
from cai_experiment.models.profiles import (
    HARDWARE_ALIASES,
    PROFILES,
    ROOMY_GB,
    Hardware,
    get_hardware_profile,
    gpu_speed,
    known_gpu,
    profile,
)
from cai_experiment.models.recommend import (
    list_available_models,
    print_model_comparison,
    recommend_model_for_hardware,
)
from cai_experiment.models.room import CGROUPS

__all__ = [
    "HARDWARE_ALIASES", "POD_HF_HOME", "POD_WORKSPACE", "PROFILES", "Hardware", "detect", "driver_cuda_version",
    "driver_problem", "get_hardware_profile", "get_model_preset", "gpu_speed", "list_available_models", "on_pod",
    "print_model_comparison", "profile", "recommend_model_for_hardware",
]  # fmt: skip

# The GPU build of torch 2.13.0 on PyPI brings CUDA 13.0.3, whose runtime needs driver branch 580 or later.
CUDA_NEEDED = (13, 0)
DRIVER_NEEDED = 580
POD_WORKSPACE = Path("/workspace")
POD_HF_HOME = POD_WORKSPACE / "huggingface"


def detect() -> Hardware:
    """The machine at hand: CUDA by nvidia-smi (respecting CUDA_VISIBLE_DEVICES), else Apple silicon, else CPU.

    A GPU of a profile has its nominal memory and is recommended what the profile is, so that both give one answer.
    """
    ram, cores = _ram_gb(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu = _nvidia_gpu()
    if gpu is not None:
        name, vram, count = gpu
        known = known_gpu(name, vram)
        vram, kept = (known.vram_gb, known.quantization) if known else (vram, "bf16" if vram >= ROOMY_GB else "4bit")
        return Hardware("this machine", "cuda", name, vram, kept, ram, cores, driver_cuda_version(), count)
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return Hardware("this machine", "mps", "Apple silicon", ram, "bf16", ram, cores)
    return Hardware("this machine", "cpu", "", 0, "fp32", ram, cores)


@lru_cache  # a call takes a second on some pods
def _nvidia_smi(*arguments: str) -> str:
    """Output of nvidia-smi, "" where it is absent or fails (a container without a GPU often has the program)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _nvidia_gpu() -> tuple[str, float, int] | None:
    """(name, GiB) of the GPU that CUDA would use first and how many like it CUDA sees, or None."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and visible.strip() in ("", "-1"):
        return None
    rows = _nvidia_smi("--query-gpu=name,memory.total", "--format=csv,noheader,nounits").strip().splitlines()
    if not rows:
        return None
    asked = [place.strip() for place in visible.split(",")] if visible else [str(i) for i in range(len(rows))]
    seen = [rows[int(place)] for place in asked if place.isdigit() and int(place) < len(rows)] or rows[:1]
    name, _, mebibytes = seen[0].rpartition(",")
    known = mebibytes.strip().isdigit()  # "[N/A]" on GPUs that share the machine's memory
    return name.strip(), round(int(mebibytes) / 1024, 1) if known else 0.0, seen.count(seen[0])


def driver_cuda_version() -> str:
    """The newest CUDA version that the installed driver serves, such as "13.0"; "" if nvidia-smi does not say."""
    found = re.search(r"CUDA(?: UMD)? Version\s*:\s*(\d+\.\d+)", _nvidia_smi())
    return found.group(1) if found else ""


def driver_problem() -> str:
    """Why this machine's NVIDIA driver cannot run the pinned torch, in one line; "" if it can or there is no GPU."""
    needed = ".".join(map(str, CUDA_NEEDED))
    remedy = f"rent a pod with CUDA {needed} or newer (RunPod: filter by CUDA version)"
    cuda = driver_cuda_version()
    if cuda:
        if tuple(int(part) for part in cuda.split(".")) >= CUDA_NEEDED:
            return ""
        return f"the NVIDIA driver serves CUDA {cuda} at most, torch 2.13.0 is built for {needed}; {remedy}"
    driver = _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader").strip().splitlines()
    if driver and driver[0].split(".")[0].isdigit() and int(driver[0].split(".")[0]) < DRIVER_NEEDED:
        return f"the NVIDIA driver is {driver[0]}, torch 2.13.0 needs {DRIVER_NEEDED} or newer; {remedy}"
    return ""


def on_pod() -> bool:
    """True on a RunPod pod, which sets RUNPOD_POD_ID."""
    return bool(os.environ.get("RUNPOD_POD_ID"))


def _ram_gb() -> float:
    """RAM of this machine in GiB, or the container's limit (of either version of cgroups) where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit, *_ in CGROUPS:
        if Path(limit).is_file() and (text := Path(limit).read_text().strip()).isdigit():
            total = min(total, int(text))
    return round(total / 2**30, 1)
