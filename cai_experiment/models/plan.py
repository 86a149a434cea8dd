"""What a run will need before it runs: tokens, memory, hours. Estimates, each from a stated figure; no torch.

Two kinds of figures stand here, and the printed plan (scripts/_plan.py) says so: published or measured ones (a step's
time at batch 1, a CPU core's FLOP/s, the prompts' lengths in Qwen2's tokens), and arithmetic on data sheets (the rest).
"""

from __future__ import annotations

from dataclasses import dataclass

from cai_experiment.models.hardware import Hardware, gpu_speed
from cai_experiment.models.memory import (
    GB,
    LINEAR_BYTES,
    Architecture,
    kv_bytes_per_token,
    training_vram_gb,
    weights_gb,
)
from cai_experiment.models.presets import NANO_DIR, ModelChoice, numbers_of
from cai_experiment.models.serving import LIVE_ROW_TOKENS, tensor_parallel, usable_gb, vllm_rows

ANSWER_TOKENS, CRITIQUE_TOKENS = 250, 100  # about half of what the spec allows (500, 300)
NANO_ANSWER_TOKENS, NANO_CRITIQUE_TOKENS = 60, 30  # the shipped model's world is three sentences an answer
DRAWS_PER_PAIR = 2  # the gate passes about half of the drawn instructions
SHORTLIST = 3  # milestones.SHORTLIST, which stands on this floor and must not be imported
PROMPT_TOKENS = 100  # of a training row
GUARD_TOKENS, GUARD_REPLY = 330, 10  # a guard's own text and the instruction; "unsafe" and a category

# Prompt lengths in Qwen2's tokens, counted over our constitution and examples.
INSTRUCTION_PROMPT, VERDICT_QUESTION, CRITIQUE_REQUEST, REVISION_REQUEST, WORKED_EXAMPLES = 30, 45, 55, 30, 540
KV_BLOCK = 16  # vLLM keeps keys and values in blocks of 16 tokens: half a block is computed anew at each branch

# Published for bf16 Qwen-32B on one A100: 17.5 tokens/s at batch 1 (transformers), that is 57 ms to read 65.5 GB, and
# 832 tokens/s in many rows (vLLM). A step takes as long as reading weights and live keys and values at that rate.
READ_SHARE = 0.56  # of the data sheet's bandwidth: 65.5e9 * 17.5 / 2039e9
READING_EFFICIENCY = 0.5  # of the data sheet's FLOP/s, while prompts are read
TRAINING_EFFICIENCY = 0.4
FULL_SLOTS, FULL_BATCHES = 0.95, 0.55  # rows at work on average: refilled slots; batches that wait for the longest
SLOTS = {"hf": 256, "unsloth": 16, "generate": 16}  # at most (engines.hf on a GPU, engines.generate)
HF_COLUMNS, HF_WORK_GB = 2049, 4.0  # engines.hf: every slot is as long as the longest row, beside a pass's work
CPU_SLOTS = 128  # of engines.hf at most, in a quarter of the memory
CPU_FLOPS_PER_CORE = 3.7e10  # from 1,400 tokens/s of 27M parameters in batches on two cores
CPU_TOKENS_LIMIT = 2000.0  # a tiny model is bound by Python, not by arithmetic
DPO_FLOPS = 8  # a parameter and token: policy forward, backward, recomputation, reference forward
START_HOURS = {"cuda": 5 / 60, "mps": 1 / 120, "cpu": 1 / 120}  # imports, loading, compiling
DOWNLOAD_GB_PER_HOUR = 0.1 * 3600  # 65 GB in 11 minutes


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of a generation: pairs made, critique rounds each.

    `weighed`: the principles that the critic weighs before the first critique, 15 when they are targeted, 1 at random.
    `drawn`: the instructions, where it is known how many there are (a file's).
    """

    pairs: int
    rounds: int
    weighed: int = 15
    drawn: int | None = None

    @property
    def rows(self) -> int:
        """Instructions that go through the chain."""
        return self.pairs * DRAWS_PER_PAIR if self.drawn is None else self.drawn


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a generation: `written` by the model; `read` of its `prompts` by an engine that reads none twice.

    `again_spoken` and `again_verdicts` are what an engine without prefix reuse reads beyond that. The instructions that
    the model writes are not counted (some 30 to 100 tokens each, beside 950 of an example).
    """

    written: int
    read: int
    again_spoken: int
    again_verdicts: int
    prompts: int

    @classmethod
    def of(cls, choice: ModelChoice, work: Workload) -> Tokens:
        """Count them for `work` with the chosen model; two rounds mean two critiques and two revisions."""
        answer, critique = answer_tokens(choice), NANO_CRITIQUE_TOKENS if _is_nano(choice) else CRITIQUE_TOKENS
        rounds, rows = work.rounds, work.rows
        written = answer + rounds * (critique + answer)
        weighed = [max(work.weighed - r, 1) for r in range(rounds)]
        verdicts = sum(w + min(w, SHORTLIST) + 4 for w in weighed)  # meaningful? and better? in both orders
        turns = INSTRUCTION_PROMPT + rounds * (CRITIQUE_REQUEST + REVISION_REQUEST)
        before = (0 if choice.kind == "chat" else WORKED_EXAMPLES) + (written + turns) // 2  # tokens before a prompt
        spoken = 1 + 2 * rounds
        return cls(
            rows * written, rows * (turns + verdicts * VERDICT_QUESTION), rows * spoken * before,
            rows * verdicts * before, rows * (spoken + verdicts),
        )  # fmt: skip

    @property
    def sent(self) -> int:
        """Tokens of all prompts, each whole: what a server is sent, and bills if it caches no prefixes."""
        return self.read + self.again_spoken + self.again_verdicts

    def read_by(self, engine: str) -> int:
        """Prompt tokens that an engine computes; Unsloth's reads the stem of a group of verdicts once."""
        if engine == "vllm":
            return self.read + self.prompts * KV_BLOCK // 2
        if engine == "unsloth":
            return self.read + self.again_spoken + self.again_verdicts // SLOTS["unsloth"]
        return self.sent if engine == "generate" else self.read


@dataclass(frozen=True, slots=True)
class Part:
    """What one part of a run needs. GB are 10^9 bytes; `hours` is None where no speed of this GPU is known.

    `gpus` of them work at the same time, each in its own process with its own start.
    """

    engine: str
    quantization: str
    weights_gb: float
    memory_gb: float  # weights and what cannot be done without
    have_gb: float
    rows: int  # at a time, on each GPU
    written: int
    read: int
    hours: float | None
    gpus: int = 1

    @property
    def fits(self) -> bool:
        """True if it fits the memory at hand."""
        return self.memory_gb <= self.have_gb

    @property
    def gpu_hours(self) -> float | None:
        """Hours that are paid for."""
        return None if self.hours is None else self.hours * self.gpus


def generation(
    choice: ModelChoice, hardware: Hardware, engine: str, quantization: str, work: Workload,
    download_gb: float = 0.0, batch_size: int | None = None, actors: int = 1,
) -> Part:  # fmt: skip
    """Making the pairs: a start, then reading and writing one after the other (engines overlap them a little).

    Raises BadInputError (see numbers_of). `batch_size` None: what the engine takes by itself.
    """
    numbers, tokens = numbers_of(choice), Tokens.of(choice, work)
    weights, have = weights_gb(numbers, quantization), memory_gb(numbers, hardware, engine)
    rows = batch_size or _rows(engine, numbers, hardware, weights, quantization)
    rows = max(1, min(rows, work.rows // actors))
    least = weights + LIVE_ROW_TOKENS * kv_bytes_per_token(numbers, quantization) / GB
    read = tokens.read_by(engine)
    hours = _hours(numbers, hardware, quantization, engine, rows, tokens.written / actors, read / actors, download_gb)
    return Part(engine, quantization, weights, least, have, rows, tokens.written, read, hours, actors)


def guarding(numbers: Architecture, hardware: Hardware, pairs: int, answer: int, download_gb: float = 0.0) -> Part:
    """The guard's pass over `pairs` answers of `answer` tokens: a start, reading, a short reply each."""
    engine, quantization = ("vllm", "bf16") if hardware.kind == "cuda" else ("hf", "fp32")
    weights, have = weights_gb(numbers, quantization), memory_gb(numbers, hardware, engine)
    rows = _rows(engine, numbers, hardware, weights, quantization)
    read, written = pairs * (GUARD_TOKENS + answer), pairs * GUARD_REPLY
    hours = _hours(numbers, hardware, quantization, engine, rows, written, read, download_gb)
    return Part(engine, quantization, weights, weights, have, rows, written, read, hours)


def training(
    choice: ModelChoice, hardware: Hardware, quantization: str, pairs: int, length: int, pairs_at_once: int = 1,
    download_gb: float = 0.0, loaded: bool = False,
) -> Part:  # fmt: skip
    """DPO over `pairs` pairs (steps times batch). `length`: tokens of a row, for the memory. `loaded`: no start."""
    numbers = numbers_of(choice)
    have = memory_gb(numbers, hardware, "")
    weights = weights_gb(numbers, quantization)
    tokens = pairs * 2 * (PROMPT_TOKENS + answer_tokens(choice))
    speeds = tokens_per_second(numbers, hardware, 1, quantization, "")
    start = 0.0 if loaded else start_hours(hardware, download_gb)
    hours = None if speeds is None else start + tokens / speeds[2] / 3600
    need = training_vram_gb(numbers, quantization, length, pairs_at_once)
    engine = "unsloth" if (hardware.kind, quantization) == ("cuda", "4bit") else "peft"
    return Part(engine, quantization, weights, need, have, 2 * pairs_at_once, 0, tokens, hours)


def pairs_seen(pairs: int, steps: int, batch: int) -> int:
    """Pairs that `steps` steps of `batch` pairs see of a file of `pairs`: an epoch's last step takes what is left."""
    return round(steps * pairs / -(-pairs // batch))


def answer_tokens(choice: ModelChoice) -> int:
    """Tokens of an answer, on average."""
    return NANO_ANSWER_TOKENS if _is_nano(choice) else ANSWER_TOKENS


def start_hours(hardware: Hardware, download_gb: float) -> float:
    """Hours until the first token: the download, imports, loading."""
    return START_HOURS[hardware.kind] + download_gb / DOWNLOAD_GB_PER_HOUR


def memory_gb(numbers: Architecture, hardware: Hardware, engine: str) -> float:
    """Memory that an engine (or training, "") may use, as `Part.have_gb`."""
    if engine == "vllm":
        return usable_gb(numbers, hardware)
    return hardware.vram_gb if hardware.kind == "cuda" else hardware.ram_gb


def _is_nano(choice: ModelChoice) -> bool:
    return choice.path_or_id == str(NANO_DIR)


def _rows(engine: str, numbers: Architecture, hardware: Hardware, weights: float, quantization: str) -> int:
    """Rows that an engine keeps at work at once."""
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
) -> tuple[float, float, float] | None:
    """(written, read, trained) tokens a second with `rows` rows at a time, or None for a GPU without known speed."""
    flops = 2 * numbers.parameters
    if hardware.kind != "cuda":
        have = CPU_FLOPS_PER_CORE * hardware.cores
        return min(have / flops, CPU_TOKENS_LIMIT), have / flops, have / (DPO_FLOPS * numbers.parameters)
    speed = gpu_speed(hardware.gpu_name)
    if speed is None:
        return None
    gpus = tensor_parallel(numbers, hardware.gpus) if engine == "vllm" else 1
    bandwidth, peak = speed[0] * 1e9 * gpus, speed[1] * 1e12 * gpus
    moved = step_gb(numbers, quantization, rows) * GB
    full = FULL_BATCHES if engine in ("unsloth", "generate") else FULL_SLOTS
    written = full * rows * READ_SHARE * bandwidth / moved
    read = READING_EFFICIENCY * peak / flops
    return written, read, TRAINING_EFFICIENCY * speed[1] * 1e12 / (DPO_FLOPS * numbers.parameters)


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
