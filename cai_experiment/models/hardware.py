"""The machine at hand, and profiles of machines that users rent. Reads nvidia-smi and /proc; imports no torch.

`vram_gb` and `ram_gb` are nominal, as on the box (an "80 GB" A100 has 81,920 MiB, written 80). What a model needs is
counted in 10^9 bytes, so a comparison keeps 7% in reserve for the CUDA context and fragmentation.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from cai_experiment.errors import BadInputError

# The GPU build of torch 2.13.0 on PyPI brings CUDA 13.0.3, whose runtime needs driver branch 580 or later.
CUDA_NEEDED = (13, 0)
DRIVER_NEEDED = 580
POD_WORKSPACE = Path("/workspace")
POD_HF_HOME = POD_WORKSPACE / "huggingface"


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine; `quantization` is what it recommends. Only vLLM uses more than one of its `gpus`, all alike."""

    name: str  # a key of PROFILES, or "this machine"
    kind: str  # "cuda" | "mps" | "cpu"
    gpu_name: str  # "" without a GPU
    vram_gb: float  # nominal GiB; 0 without a GPU
    quantization: str  # "4bit" | "8bit" | "bf16" | "fp32"
    ram_gb: float
    cores: int
    cuda_version: str = ""  # the newest CUDA that the driver serves, "" if unknown
    gpus: int = 1
    dollars_per_hour: float | None = None  # list price of one GPU, where it is known
    price_from: str = ""  # whose list, and when it was read: prices change by the month


SPEC_PRICE = "the spec's price of a RunPod A100 SXM"
RUNPOD = "RunPod Secure Cloud's list price"  # by copies of its price page, which itself could not be read from here

# Machines to plan with; RAM and cores are a usual pod's, memory is nvidia-smi's. 4-bit although 65 GB of bf16 would fit
# into 80: QLoRA training and generation then share one load of the weights.
PROFILES: dict[str, Hardware] = {
    h.name: h
    for h in (
        Hardware("a100-80gb", "cuda", "NVIDIA A100-SXM4-80GB", 80, "4bit", ram_gb=117, cores=16,
                 dollars_per_hour=1.74, price_from=SPEC_PRICE),
        Hardware("a100-40gb", "cuda", "NVIDIA A100-SXM4-40GB", 40, "4bit", ram_gb=200, cores=30,
                 dollars_per_hour=1.99, price_from="Lambda's list price, 2026-11"),
        Hardware("h100-80gb", "cuda", "NVIDIA H100 80GB HBM3", 79.6, "4bit", ram_gb=125, cores=16,
                 dollars_per_hour=3.99, price_from=f"{RUNPOD}, 2026-11"),
        Hardware("h200", "cuda", "NVIDIA H200", 140.4, "4bit", ram_gb=188, cores=16,
                 dollars_per_hour=4.59, price_from=f"{RUNPOD}, 2026-10"),
        Hardware("l40s", "cuda", "NVIDIA L40S", 45, "4bit", ram_gb=94, cores=16,
                 dollars_per_hour=0.86, price_from=f"{RUNPOD}, 2025-08"),
        Hardware("rtx-4090", "cuda", "NVIDIA GeForce RTX 4090", 24, "4bit", ram_gb=32, cores=8,
                 dollars_per_hour=0.69, price_from=f"{RUNPOD}, 2025"),
        Hardware("rtx-3090", "cuda", "NVIDIA GeForce RTX 3090", 24, "4bit", ram_gb=32, cores=8,
                 dollars_per_hour=0.43, price_from=f"{RUNPOD}, 2025"),
        Hardware("l4-24gb", "cuda", "NVIDIA L4", 22.5, "4bit", ram_gb=32, cores=8,
                 dollars_per_hour=0.43, price_from=f"{RUNPOD}, 2025"),
        Hardware("t4-16gb", "cuda", "Tesla T4", 15, "4bit", ram_gb=13, cores=2),
        Hardware("cpu", "cpu", "", 0, "fp32", ram_gb=16, cores=2),  # bf16 is 4 to 5 times slower on most CPUs
    )
}  # fmt: skip
PROFILES["runpod_a100_80gb"] = replace(PROFILES["a100-80gb"], name="runpod_a100_80gb")  # its name in the first plans

# GPU name (a regular expression; the first that fits) -> (memory bandwidth in GB/s, dense bf16 or fp16 TFLOP/s), from
# the makers' data sheets; for estimates
GPU_SPEED: dict[str, tuple[float, float]] = {
    r"A100-\w+-40GB": (1555, 312),
    "A100": (2039, 312),
    "H100 PCIe": (2000, 756),
    "H100": (3350, 989),
    "H200": (4800, 989),
    "T4": (320, 65),
    "L4": (300, 121),
    "L40S": (864, 362),
    "RTX 4090": (1008, 165),
    "RTX 3090": (936, 71),
}


def profile(name: str) -> Hardware:
    """The machine that `name` means, a key of PROFILES; BadInputError names the known ones."""
    found = PROFILES.get(name.lower())
    if found is None:
        raise BadInputError(f"--hardware {name} is unknown", f"use one of {', '.join(PROFILES)}")
    return found


def gpu_speed(gpu_name: str) -> tuple[float, float] | None:
    """(bandwidth in GB/s, TFLOP/s) of a GPU by its name, or None where no data sheet figure is at hand."""
    for part, speed in GPU_SPEED.items():
        if re.search(rf"\b{part}\b", gpu_name):
            return speed
    return None


def detect() -> Hardware:
    """The machine at hand: CUDA by nvidia-smi (respecting CUDA_VISIBLE_DEVICES), else Apple silicon, else CPU."""
    ram, cores = _ram_gb(), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    gpu = _nvidia_gpu()
    if gpu is not None:
        name, vram, count = gpu
        return Hardware("this machine", "cuda", name, vram, "4bit", ram, cores, driver_cuda_version(), count)
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
    """RAM of this machine in GiB, or the container's limit where that is lower."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        total = min(total, int(text))
    return round(total / 2**30, 1)
