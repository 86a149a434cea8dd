"""Profiles of machines that users rent or own, and what each is recommended for. Data with reasons; no torch.

`vram_gb` and `ram_gb` are nominal, as on the box (an "80 GB" A100 has 81,920 MiB, written 80). What a model needs is
counted in 10^9 bytes, so a comparison keeps 7% in reserve for the CUDA context and fragmentation.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

from cai_experiment.errors import BadInputError

TRAINING = {"cuda": "4bit", "mps": "bf16", "cpu": "fp32"}  # bf16 is 4 to 5 times slower on most CPUs
# GPUs older than Ampere compute no bfloat16: Volta (V100), Turing (T4, RTX 20, GTX 16, RTX 4000 to 8000), Pascal
NO_BFLOAT16 = r"\b(Tesla [TPVKM]\d|T4|V100|P100|P40|TITAN|GeForce RTX 20\d\d|GTX|Quadro RTX)"


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine. Only vLLM uses more than one of its `gpus`, all alike.

    `quantization` is what the profile recommends for generation alone. What a script takes where --quantization is
    not given is `training_quantization`, since one load serves generation and training.
    """

    name: str  # a key of PROFILES, or "this machine"
    kind: str  # "cuda" | "mps" | "cpu"
    gpu_name: str  # "" without a GPU
    vram_gb: float  # nominal GiB; 0 without a GPU
    quantization: str  # "4bit" | "8bit" | "bf16" (or float16, see `compute`) | "fp32"
    ram_gb: float
    cores: int
    cuda_version: str = ""  # the newest CUDA that the driver serves, "" if unknown
    gpus: int = 1
    dollars_per_hour: float | None = None  # list price of one GPU, where it is known
    price_from: str = ""  # whose list, and when it was read: prices change by the month

    @property
    def training_quantization(self) -> str:
        """What trains here, and so what scripts load: QLoRA's 4 bit on CUDA, bf16 on Apple silicon, fp32 on a CPU."""
        return TRAINING[self.kind]

    @property
    def compute(self) -> str:
        """The type that 4-, 8- and 16-bit weights are computed in: "bfloat16"; "float16" on GPUs older than Ampere,
        such as a T4, which only emulate bfloat16; "float32" on a CPU."""
        if self.kind == "cpu":
            return "float32"
        return "float16" if re.search(NO_BFLOAT16, self.gpu_name) else "bfloat16"

    @property
    def memory_gb(self) -> float:
        """The memory that models lie in: the GPU's, else the machine's."""
        return self.vram_gb if self.kind == "cuda" else self.ram_gb


SPEC_PRICE = "the spec's price of a RunPod A100 SXM"
RUNPOD = "RunPod Secure Cloud's list price"  # by copies of its price page, which itself could not be read from here

# RAM and cores are a usual pod's or Colab's. In 16 bit where the recommended model leaves room for rows beside it.
_MACHINES = (
    Hardware("colab_free_t4", "cuda", "Tesla T4", 15, "4bit", ram_gb=13, cores=2),
    Hardware("colab_pro_t4", "cuda", "Tesla T4", 15, "8bit", ram_gb=13, cores=2),
    Hardware("colab_pro_plus_a100", "cuda", "NVIDIA A100-SXM4-40GB", 40, "bf16", ram_gb=83, cores=12),
    Hardware("l4_ada", "cuda", "NVIDIA L4", 22, "8bit", ram_gb=32, cores=8,  # 23,034 MiB, of which CUDA takes its own
             dollars_per_hour=0.43, price_from=f"{RUNPOD}, 2025"),
    Hardware("local_4090", "cuda", "NVIDIA GeForce RTX 4090", 24, "bf16", ram_gb=32, cores=8,
             dollars_per_hour=0.69, price_from=f"{RUNPOD}, 2025"),
    Hardware("local_3090", "cuda", "NVIDIA GeForce RTX 3090", 24, "8bit", ram_gb=32, cores=8,
             dollars_per_hour=0.43, price_from=f"{RUNPOD}, 2025"),
    Hardware("runpod_a100_80gb", "cuda", "NVIDIA A100-SXM4-80GB", 80, "bf16", ram_gb=117, cores=16,
             dollars_per_hour=1.74, price_from=SPEC_PRICE),
    Hardware("h100_80gb", "cuda", "NVIDIA H100 80GB HBM3", 79.6, "bf16", ram_gb=125, cores=16,
             dollars_per_hour=3.99, price_from=f"{RUNPOD}, 2026-11"),
    Hardware("h200_141gb", "cuda", "NVIDIA H200", 140.4, "bf16", ram_gb=188, cores=16,
             dollars_per_hour=4.59, price_from=f"{RUNPOD}, 2026-10"),
    Hardware("l40s", "cuda", "NVIDIA L40S", 45, "bf16", ram_gb=94, cores=16,
             dollars_per_hour=0.86, price_from=f"{RUNPOD}, 2025-08"),
    Hardware("apple_silicon", "mps", "Apple silicon", 16, "bf16", ram_gb=16, cores=8),  # GPU and CPU share the memory
    Hardware("cpu", "cpu", "", 0, "fp32", ram_gb=16, cores=2),
)  # fmt: skip

# The names of earlier plans -> the same machine today.
HARDWARE_ALIASES = {
    "a100-80gb": "runpod_a100_80gb",
    "a100-40gb": "colab_pro_plus_a100",
    "h100-80gb": "h100_80gb",
    "h200": "h200_141gb",
    "rtx-4090": "local_4090",
    "rtx-3090": "local_3090",
    "l4-24gb": "l4_ada",
    "t4-16gb": "colab_free_t4",
}

PROFILES: dict[str, Hardware] = {machine.name: machine for machine in _MACHINES}
# A rented A100 of 40 GB has a price, Colab's has none.
RENTED_A100 = replace(PROFILES["colab_pro_plus_a100"], name="a100-40gb", ram_gb=200, cores=30, dollars_per_hour=1.99,
                      price_from="Lambda's list price, 2026-11")  # fmt: skip
PROFILES |= {old: PROFILES[new] for old, new in HARDWARE_ALIASES.items()} | {"a100-40gb": RENTED_A100}

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


def machines() -> list[Hardware]:
    """Every profile once, without the earlier names."""
    return list(_MACHINES)


SAME_MEMORY = 0.05  # drivers and ECC report a few percent less of the same card
ROOMY_GB = 40  # where no profile says: from here on 16 bit leaves a 14B room for rows


def known_gpu(gpu_name: str, vram_gb: float) -> Hardware | None:
    """The first profile with a GPU of this name and about this memory; None if there is none."""
    same = (one for one in _MACHINES if one.kind == "cuda" and one.gpu_name == gpu_name)
    return next((one for one in same if abs(vram_gb / one.vram_gb - 1) <= SAME_MEMORY), None)


def get_hardware_profile(key: str, flag: str = "") -> Hardware:
    """The machine that `key` means: a key or earlier name, in any case of letters, with - or _.

    Raises BadInputError with the nearest names; there is no default. `flag` stands before the key in the message.
    """
    known = {_plain(name): machine for name, machine in PROFILES.items()}
    found = known.get(_plain(key))
    if found is None:
        holding = [name for name in known if _plain(key) in name.split("_")]  # "t4" names a part of several
        near = dict.fromkeys([*holding, *difflib.get_close_matches(_plain(key), known, n=4, cutoff=0.4)])
        names = [next(name for name in PROFILES if _plain(name) == one) for one in near]
        said = f"nearest: {', '.join(names)}" if names else f"known: {', '.join(PROFILES)}"
        raise BadInputError(f"{flag}{key} is unknown; {said}", "models.py --hardware lists all")
    return found


def profile(name: str) -> Hardware:
    """The machine that --hardware names; BadInputError as `get_hardware_profile`."""
    return get_hardware_profile(name, "--hardware ")


def _plain(name: str) -> str:
    return name.strip().lower().replace("-", "_")


def gpu_speed(gpu_name: str) -> tuple[float, float] | None:
    """(bandwidth in GB/s, TFLOP/s) of a GPU by its name, or None where no data sheet figure is at hand."""
    for part, speed in GPU_SPEED.items():
        if re.search(rf"\b{part}\b", gpu_name):
            return speed
    return None
