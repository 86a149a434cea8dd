"""What a run will need before it runs: memory, tokens, hours and dollars. Estimates, each from a stated figure.

Two kinds of figures stand here, and the printed plan says so: published or measured ones (a step's time at batch 1, a
CPU core's FLOP/s, the prompts' lengths in Qwen2's tokens), and arithmetic on data sheets (everything else).
"""

from __future__ import annotations

from dataclasses import dataclass

from cai_experiment.milestones import SHORTLIST
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
from cai_experiment.models.serving import LIVE_ROW_TOKENS, usable_gb, vllm_rows

ANSWER_TOKENS, CRITIQUE_TOKENS = 250, 100  # about half of what the spec allows (500, 300)
NANO_ANSWER_TOKENS, NANO_CRITIQUE_TOKENS = 60, 30  # the shipped model's world is three sentences an answer
DRAWS_PER_PAIR = 2  # the gate passes about half of the drawn instructions
PROMPT_TOKENS = 100  # of a training row
START_HOURS = {"cuda": 10 / 60, "mps": 1 / 120, "cpu": 1 / 120}  # 20 GB download and load; imports on a CPU

# Prompt lengths in Qwen2's tokens, counted over our constitution and examples.
INSTRUCTION_PROMPT, VERDICT_QUESTION, CRITIQUE_REQUEST, REVISION_REQUEST, WORKED_EXAMPLES = 30, 45, 55, 30, 540
KV_BLOCK = 16  # vLLM keeps keys and values in blocks of 16 tokens: half a block is computed anew at each branch

# Published for bf16 Qwen-32B on one A100: 17.5 tokens/s at batch 1 (transformers), that is 57 ms to read 65.5 GB, and
# 832 tokens/s in many rows (vLLM). A step takes as long as reading weights and live keys and values at that rate.
READ_SHARE = 0.56  # of the data sheet's bandwidth: 65.5e9 * 17.5 / 2039e9
READING_EFFICIENCY = 0.5  # of the data sheet's FLOP/s, while prompts are read
TRAINING_EFFICIENCY = 0.4
FULL_SLOTS, FULL_BATCHES = 0.95, 0.55  # rows at work on average: refilled slots; batches that wait for the longest
SLOTS = {"hf": 16, "unsloth": 16, "generate": 16}  # on a GPU (engines.hf, engines.generate)
CPU_FLOPS_PER_CORE = 3.7e10  # from 1,400 tokens/s of 27M parameters in batches on two cores
CPU_TOKENS_LIMIT = 2000.0  # a tiny model is bound by Python, not by arithmetic
DPO_FLOPS = 8  # a parameter and token: policy forward, backward, recomputation, reference forward


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of one run: pairs made, critique rounds each, pairs that DPO sees (steps times batch).

    `weighed`: the principles that the critic weighs before the first critique, 15 when they are targeted, 1 at random.
    """

    pairs: int
    rounds: int
    trained_pairs: int
    weighed: int = 15


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a run: `written` by the model; `read` of its `prompts` by an engine that computes none twice.

    `again_spoken` and `again_verdicts` are what an engine without prefix reuse reads beyond that.
    """

    written: int
    read: int
    again_spoken: int
    again_verdicts: int
    prompts: int

    @classmethod
    def of(cls, choice: ModelChoice, work: Workload) -> Tokens:
        """Count them for `work` with the chosen model; two rounds mean two critiques and two revisions."""
        nano = choice.path_or_id == str(NANO_DIR)
        answer, critique = (NANO_ANSWER_TOKENS, NANO_CRITIQUE_TOKENS) if nano else (ANSWER_TOKENS, CRITIQUE_TOKENS)
        rounds, rows = work.rounds, work.pairs * DRAWS_PER_PAIR
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

    def read_by(self, engine: str) -> int:
        """Prompt tokens that an engine computes; Unsloth's reads the stem of a group of verdicts once."""
        if engine == "vllm":
            return self.read + self.prompts * KV_BLOCK // 2
        if engine == "unsloth":
            return self.read + self.again_spoken + self.again_verdicts // SLOTS["unsloth"]
        return self.read + (self.again_spoken + self.again_verdicts if engine == "generate" else 0)


@dataclass(frozen=True, slots=True)
class Plan:
    """The estimate. GB are 10^9 bytes; `hours` and `dollars` are None where no speed of this GPU is known."""

    engine: str
    weights_gb: float
    rows_at_once: int
    training_gb: float
    have_gb: float
    generated_tokens: int
    read_tokens: int
    trained_tokens: int
    hours: float | None
    dollars: float | None

    @property
    def fits(self) -> bool:
        """True if weights and training fit the memory at hand."""
        return max(self.weights_gb, self.training_gb) <= self.have_gb

    @property
    def time(self) -> str:
        """Hours and dollars in words."""
        if self.hours is None:
            return "unknown for this GPU: run 10 pairs and multiply"
        return in_words(self.hours, self.dollars)

    def lines(self) -> list[str]:
        """The plan for the terminal."""
        training = f", training {self.training_gb:.1f} GB" if self.trained_tokens else ""
        return [
            f"memory      weights {self.weights_gb:.1f} GB{training}, "
            f"of {self.have_gb:g} GB: {'fits' if self.fits else 'DOES NOT FIT'}; {self.rows_at_once} rows at a time",
            f"tokens      {self.generated_tokens:,} generated, {self.read_tokens:,} read, "
            f"{self.trained_tokens:,} trained on",
            f"time, cost  {self.time} (an estimate, evaluation apart)",
        ]


def plan(
    choice: ModelChoice, hardware: Hardware, quantization: str, work: Workload, price: float, engine: str | None = None
) -> Plan:
    """Estimate a run of `work` with the chosen model; `price` in dollars an hour. BadInputError: see numbers_of.

    `engine` None: Unsloth for 4 bit on CUDA, else the transformers engine.
    """
    numbers = numbers_of(choice)
    engine = engine or ("unsloth" if (hardware.kind, quantization) == ("cuda", "4bit") else "hf")
    have = hardware.vram_gb if hardware.kind == "cuda" else hardware.ram_gb
    have = usable_gb(numbers, hardware) if engine == "vllm" else have
    weights = weights_gb(numbers, quantization)
    rows = min(_rows(engine, numbers, hardware, weights, quantization), max(1, work.pairs * DRAWS_PER_PAIR))
    tokens = Tokens.of(choice, work)
    answer = NANO_ANSWER_TOKENS if choice.path_or_id == str(NANO_DIR) else ANSWER_TOKENS
    trained = work.trained_pairs * 2 * (PROMPT_TOKENS + answer)
    training = training_vram_gb(numbers, quantization) if trained else 0.0
    hours = _hours(numbers, hardware, quantization, engine, rows, tokens, trained)
    dollars = None if hours is None else hours * price
    read = tokens.read_by(engine)
    return Plan(engine, weights, rows, training, have, tokens.written, read, trained, hours, dollars)


def _rows(engine: str, numbers: Architecture, hardware: Hardware, weights: float, quantization: str) -> int:
    """Rows that an engine keeps at work at once."""
    if engine == "vllm":
        return vllm_rows(numbers, hardware, weights)
    have = hardware.vram_gb if hardware.kind == "cuda" else hardware.ram_gb
    row = kv_bytes_per_token(numbers, quantization) * 2 * LIVE_ROW_TOKENS / GB
    return max(1, min(SLOTS[engine] if hardware.kind == "cuda" else 32, int((have - weights) / row)))


def _hours(
    numbers: Architecture, hardware: Hardware, quantization: str, engine: str, rows: int, tokens: Tokens, trained: int
) -> float | None:
    """Start, reading and writing one after the other (engines overlap them a little), and training."""
    speeds = tokens_per_second(numbers, hardware, rows, quantization, engine)
    if speeds is None:
        return None
    written, read, trained_on = speeds
    seconds = tokens.written / written + tokens.read_by(engine) / read + trained / trained_on
    return START_HOURS[hardware.kind] + seconds / 3600


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
    gpus = hardware.gpus if engine == "vllm" else 1
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


def generation_lines(choice: ModelChoice, hardware: Hardware, work: Workload, price: float) -> list[str]:
    """The plan of making `work.pairs` pairs, engine by engine, with the floor beside it. BadInputError: numbers_of."""
    tokens = Tokens.of(choice, work)
    where = f"{hardware.gpu_name}, {hardware.vram_gb:g} GB" if hardware.gpu_name else f"{hardware.cores} CPU cores"
    many = f"{hardware.gpus} x " if hardware.gpus > 1 else ""
    lines = [
        f"hardware    {many}{where}",
        f"tokens      {work.pairs:,} pairs from about {work.pairs * DRAWS_PER_PAIR:,} instructions: "
        f"{tokens.written:,} written, {tokens.read:,} read if none is read twice ({work.weighed} principles weighed)",
    ]
    arms = [("hf", "fp32")] if hardware.kind != "cuda" else [("vllm", "bf16"), ("unsloth", "4bit"), ("hf", "4bit")]
    for engine, quantization in arms:
        one = plan(choice, hardware, quantization, work, price, engine)
        head = f"{engine:11} {quantization}, {one.weights_gb:.1f} GB of weights"
        fits = one.weights_gb < one.have_gb
        rest = f", {one.rows_at_once} rows at a time, {one.read_tokens:,} read: {one.time}" if fits else " DO NOT FIT"
        lines.append(head + rest)
    floor = floor_hours(choice, hardware, work)
    if floor is not None:
        lines.append(f"floor       {in_words(floor, floor * price)}: all tokens at the data sheet's FLOP/s")
    source = "arithmetic on data sheets and one published step time, not measured here: bench.py measures"
    return [*lines, f"{'':12}{source}"]


def in_words(hours: float, dollars: float | None) -> str:
    """ "about 1.5 hours, $2.61"."""
    time = f"about {hours:.1f} hours" if hours >= 1 else f"about {60 * hours:.0f} minutes"
    return time if dollars is None else f"{time}, ${dollars:.2f}"
