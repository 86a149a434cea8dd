"""What a run will need before it runs: memory and hours for its tokens. Estimates, each from a stated figure; no torch.

Two kinds of figures stand here, and the printed plan (scripts/_plan.py) says so: published or measured ones (a step's
time at batch 1, a CPU core's FLOP/s), and arithmetic on data sheets (the rest).
"""

from __future__ import annotations

from dataclasses import dataclass

from cai_experiment.models.choice import ModelChoice, numbers_of
from cai_experiment.models.hardware import Hardware, gpu_speed
from cai_experiment.models.memory import (
    GB,
    LINEAR_BYTES,
    Architecture,
    kv_bytes_per_token,
    weights_gb,
)
from cai_experiment.models.serving import LIVE_ROW_TOKENS, known_numbers, tensor_parallel, usable_gb, vllm_rows
from cai_experiment.models.workload import BATCH, Tokens, Workload

PROMPT_TOKENS = 100  # of a training row
GUARD_TOKENS, GUARD_REPLY = 330, 10  # a guard's own text and the instruction; "unsafe" and a category

# Published for bf16 Qwen-32B on one A100: 17.5 tokens/s at batch 1 (transformers), that is 57 ms to read 65.5 GB, and
# 832 tokens/s in many rows (vLLM). A step takes as long as reading weights and live keys and values at that rate.
READ_SHARE = 0.56  # of the data sheet's bandwidth: 65.5e9 * 17.5 / 2039e9
READING_EFFICIENCY = 0.5  # of the data sheet's FLOP/s, while prompts are read
TRAINING_EFFICIENCY = 0.4  # the same while training: assumed, not measured
FULL_SLOTS = 0.95  # slots at work on average, where they are refilled
# The same of a batch of `generate`, full of prompts alike, whose rows all wait for the longest: 0.41 where lengths are
# spread exponentially, 0.51 where their logarithms are spread by 0.5. By simulation over the stages of 400 examples.
FULL_BATCHES = 0.45
# at most (engines.hf on a GPU, engines.generate, ensemble.decode)
SLOTS = {"hf": 256, "unsloth": BATCH, "generate": BATCH, "ensemble": BATCH}
HF_COLUMNS = 2049 * 9 // 8  # engines.hf: every slot is as long as the longest row, and eight of them have a scratch row
HF_WORK_GB = 4.0  # of a pass
CPU_SLOTS = 192  # of engines.hf at most, in a quarter of the memory
CPU_FLOPS_PER_CORE = 3.7e10  # from 1,400 tokens/s of 27M parameters in batches on two cores
CPU_TOKENS_LIMIT = 2000.0  # a tiny model is bound by Python, not by arithmetic
PAIRS_COMPARED, FASTER_FLAGS = 1000, "--engine hf --quantization 4bit"
START_HOURS = {"cuda": 5 / 60, "mps": 1 / 120, "cpu": 1 / 120}  # imports, loading, compiling
DOWNLOAD_GB_PER_HOUR = 0.1 * 3600  # 65 GB in 11 minutes


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of a run needs. GB are 10^9 bytes; `hours` is None where no speed of this GPU is known.

    `actors` of them work at the same time, each in its own process with its own start, on `machines` machines that are
    paid for as long as it takes, with all their GPUs.
    """

    engine: str
    quantization: str
    weights_gb: float
    memory_gb: float  # weights and what cannot be done without
    have_gb: float
    rows: int  # at a time, of each actor
    written: int
    read: int
    hours: float | None
    actors: int = 1
    machines: int = 1

    @property
    def fits(self) -> bool:
        """True if it fits the memory at hand."""
        return self.memory_gb <= self.have_gb

    @property
    def machine_hours(self) -> float | None:
        """Hours of a machine that are paid for."""
        return None if self.hours is None else self.hours * self.machines


def generation(
    choice: ModelChoice, hardware: Hardware, engine: str, quantization: str, work: Workload,
    download_gb: float = 0.0, batch_size: int | None = None, actors: int = 1, machines: int = 1,
) -> Part:  # fmt: skip
    """Making the pairs: a start, then reading and writing one after the other (engines overlap them a little).

    `hardware` is what one actor sees. Raises BadInputError (see numbers_of). `batch_size` None: the engine's own.
    """
    numbers, tokens = numbers_of(choice), Tokens.of(choice, work)
    weights, have = weights_gb(numbers, quantization), memory_gb(numbers, hardware, engine)
    rows = batch_size or _rows(engine, numbers, hardware, weights, quantization)
    rows = max(1, min(rows, work.rows // actors))
    least = weights + LIVE_ROW_TOKENS * kv_bytes_per_token(numbers, quantization) / GB
    read = tokens.read_by(engine)
    hours = _hours(numbers, hardware, quantization, engine, rows, tokens.written / actors, read / actors, download_gb)
    return Part(engine, quantization, weights, least, have, rows, tokens.written, read, hours, actors, machines)


def guarding(numbers: Architecture, hardware: Hardware, pairs: int, answer: int, download_gb: float = 0.0) -> Part:
    """The guard's pass over `pairs` answers of `answer` tokens: a start, reading, a short reply each."""
    engine, quantization = ("vllm", "bf16") if hardware.kind == "cuda" else ("hf", "fp32")
    weights, have = weights_gb(numbers, quantization), memory_gb(numbers, hardware, engine)
    rows = _rows(engine, numbers, hardware, weights, quantization)
    read, written = pairs * (GUARD_TOKENS + answer), pairs * GUARD_REPLY
    hours = _hours(numbers, hardware, quantization, engine, rows, written, read, download_gb)
    return Part(engine, quantization, weights, weights, have, rows, written, read, hours)


def pairs_seen(pairs: int, steps: int, batch: int) -> int:
    """Pairs that `steps` steps of `batch` pairs see of a file of `pairs`: an epoch's last step takes what is left."""
    return round(steps * pairs / -(-pairs // batch))


def start_hours(hardware: Hardware, download_gb: float) -> float:
    """Hours until the first token: the download, imports, loading."""
    return START_HOURS[hardware.kind] + download_gb / DOWNLOAD_GB_PER_HOUR


def memory_gb(numbers: Architecture, hardware: Hardware, engine: str) -> float:
    """Memory that an engine (or training, "") may use, as `Part.have_gb`."""
    if engine == "vllm":
        return usable_gb(numbers, hardware)
    return hardware.vram_gb if hardware.kind == "cuda" else hardware.ram_gb


def rows_of(engine: str, numbers: Architecture, hardware: Hardware, quantization: str) -> int:
    """Rows that an engine keeps at work at once."""
    return _rows(engine, numbers, hardware, weights_gb(numbers, quantization), quantization)


def _rows(engine: str, numbers: Architecture, hardware: Hardware, weights: float, quantization: str) -> int:
    if engine == "vllm":
        return vllm_rows(numbers, hardware, weights)
    room, columns, most = memory_gb(numbers, hardware, engine) - weights, 2 * LIVE_ROW_TOKENS, SLOTS[engine]
    if engine == "hf":
        columns = HF_COLUMNS
        room -= HF_WORK_GB
        if hardware.kind != "cuda":
            room, most = hardware.ram_gb / 4, CPU_SLOTS
    return max(1, min(most, int(room * GB / (kv_bytes_per_token(numbers, quantization) * columns))))


def _hours(
    numbers: Architecture, hardware: Hardware, quantization: str, engine: str, rows: int, written: float, read: float,
    download_gb: float,
) -> float | None:  # fmt: skip
    speeds = tokens_per_second(numbers, hardware, rows, quantization, engine)
    if speeds is None:
        return None
    return start_hours(hardware, download_gb) + (written / speeds[0] + read / speeds[1]) / 3600


def tokens_per_second(
    numbers: Architecture, hardware: Hardware, rows: int, quantization: str, engine: str
) -> tuple[float, float] | None:
    """(written, read) tokens a second with `rows` rows at a time, or None for a GPU without known speed."""
    flops = 2 * numbers.parameters
    if hardware.kind != "cuda":
        have = CPU_FLOPS_PER_CORE * hardware.cores
        return min(have / flops, CPU_TOKENS_LIMIT), have / flops
    speed = gpu_speed(hardware.gpu_name)
    if speed is None:
        return None
    gpus = tensor_parallel(numbers, hardware.gpus) if engine == "vllm" else 1
    bandwidth, peak = speed[0] * 1e9 * gpus, speed[1] * 1e12 * gpus
    moved = step_gb(numbers, quantization, rows) * GB
    full = FULL_BATCHES if engine in ("unsloth", "generate") else FULL_SLOTS
    written = max(1.0, full * rows) * READ_SHARE * bandwidth / moved
    read = READING_EFFICIENCY * peak / flops
    return written, read


def step_gb(numbers: Architecture, quantization: str, rows: int) -> float:
    """GB that one step of `rows` rows moves: weights, live keys and values.

    In 4 or 8 bit, with more than one row, also the 16-bit copy of each layer that bitsandbytes writes and reads back.
    """
    copied = quantization in ("4bit", "8bit") and rows > 1
    copies = 2 * numbers.linear_parameters * LINEAR_BYTES["bf16"] if copied else 0
    kept = rows * LIVE_ROW_TOKENS * kv_bytes_per_token(numbers, quantization)
    return weights_gb(numbers, quantization) + (copies + kept) / GB


def floor_hours(choice: ModelChoice, hardware: Hardware, work: Workload) -> float | None:
    """Hours if every token went through at the data sheet's FLOP/s and no prompt token were computed twice."""
    speed = gpu_speed(hardware.gpu_name) if hardware.kind == "cuda" else None
    if speed is None:
        return None
    tokens = Tokens.of(choice, work)
    flops = 2 * numbers_of(choice).parameters * (tokens.written + tokens.read)
    return flops / (speed[1] * 1e12 * hardware.gpus) / 3600


def of_both(choice: ModelChoice, hardware: Hardware) -> str:
    """Hours of Unsloth and of hf in 4 bit for the same pairs, where hf is faster, and the flags of hf; else ""."""
    if known_numbers(choice) is None:
        return ""
    work = Workload(PAIRS_COMPARED, 2)
    slow, fast = (generation(choice, hardware, engine, "4bit", work) for engine in ("unsloth", "hf"))
    if slow.hours is None or fast.hours is None or slow.hours <= fast.hours or not fast.fits:
        return ""
    return (f"by --plan about {slow.hours:.1f} hours for {PAIRS_COMPARED:,} pairs, {fast.hours:.1f} with "
            f"{FASTER_FLAGS}")  # fmt: skip


def in_words(hours: float | None, dollars: float | None) -> str:
    """ "about 1.5 hours, $2.61"; no dollars where there is no price."""
    if hours is None:
        return "time unknown for this GPU: run 10 pairs and multiply"
    time = f"about {hours:.1f} hours" if hours >= 1 else f"about {_minutes(hours)}"
    if not dollars:
        return time
    return f"{time}, ${dollars:.2f}" if dollars >= 0.01 else f"{time}, under $0.01"


def _minutes(hours: float) -> str:
    minutes = max(1, round(60 * hours))
    return f"{minutes} minute{'s' if minutes > 1 else ''}"
