"""What a run will need before it runs: memory, tokens, hours and dollars. Estimates, each from a stated figure."""

from __future__ import annotations

from dataclasses import dataclass

from cai_experiment.models.hardware import Hardware, gpu_speed
from cai_experiment.models.memory import GB, Architecture, kv_bytes_per_token, training_vram_gb, weights_gb
from cai_experiment.models.presets import NANO_DIR, ModelChoice, numbers_of

ANSWER_TOKENS, CRITIQUE_TOKENS = 250, 100  # about half of what the spec allows (500, 300)
NANO_ANSWER_TOKENS, NANO_CRITIQUE_TOKENS = 60, 30  # the shipped model's world is three sentences an answer
DRAWS_PER_PAIR = 2  # the gate passes about half of the drawn instructions
PROMPT_TOKENS = 100  # of a training row
ROW_TOKENS = 1536  # KV of one example's whole conversation
START_HOURS = {"cuda": 10 / 60, "mps": 1 / 120, "cpu": 1 / 120}  # 20 GB download and load; imports on a CPU

# Published for bf16 Qwen-32B on one A100: 17.5 tokens/s at batch 1 (transformers), 832 in many rows (vLLM): so about
# 48 rows keep the GPU at one step per 57 ms. Steps scale with memory bandwidth over 16-bit weight bytes.
A100_STEPS, A100_BANDWIDTH, A100_MODEL_BYTES, GPU_ROWS = 17.5, 2039.0, 65.5e9, 48
TRAINING_EFFICIENCY = 0.4  # of the data sheet's FLOP/s
CPU_FLOPS_PER_CORE = 3.7e10  # from 1,400 tokens/s of 27M parameters in batches on two cores
CPU_TOKENS_LIMIT = 2000.0  # a tiny model is bound by Python, not by arithmetic
DPO_FLOPS = 8  # a parameter and token: policy forward, backward, recomputation, reference forward


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of one run: pairs made, critique rounds each, and pairs that DPO sees (steps times batch)."""

    pairs: int
    rounds: int
    trained_pairs: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The estimate. GB are 10^9 bytes; `hours` and `dollars` are None where no speed of this GPU is known."""

    weights_gb: float
    rows_at_once: int
    training_gb: float
    have_gb: float
    generated_tokens: int
    trained_tokens: int
    hours: float | None
    dollars: float | None

    @property
    def fits(self) -> bool:
        """True if weights and training fit the memory at hand."""
        return max(self.weights_gb, self.training_gb) <= self.have_gb

    def lines(self) -> list[str]:
        """The plan for the terminal."""
        time = "unknown for this GPU: run 10 pairs and multiply"
        if self.hours is not None and self.dollars is not None:
            time = f"about {self.hours:.1f} hours" if self.hours >= 1 else f"about {60 * self.hours:.0f} minutes"
            time += f", ${self.dollars:.2f}"
        return [
            f"memory      weights {self.weights_gb:.1f} GB, training {self.training_gb:.1f} GB, "
            f"of {self.have_gb:g} GB: {'fits' if self.fits else 'DOES NOT FIT'}; {self.rows_at_once} rows at a time",
            f"tokens      {self.generated_tokens:,} generated, {self.trained_tokens:,} trained on",
            f"time, cost  {time} (an estimate, evaluation apart)",
        ]


def plan(choice: ModelChoice, hardware: Hardware, quantization: str, work: Workload, price: float) -> Plan:
    """Estimate a run of `work` with the chosen model; `price` in dollars an hour. BadInputError: see numbers_of."""
    numbers = numbers_of(choice)
    have = hardware.vram_gb if hardware.kind == "cuda" else hardware.ram_gb
    weights = weights_gb(numbers, quantization)
    row = kv_bytes_per_token(numbers, quantization) * ROW_TOKENS / GB
    rows = max(1, min(GPU_ROWS, int((have - weights) / row), work.pairs * DRAWS_PER_PAIR))
    is_nano = choice.path_or_id == str(NANO_DIR)
    answer, critique = (NANO_ANSWER_TOKENS, NANO_CRITIQUE_TOKENS) if is_nano else (ANSWER_TOKENS, CRITIQUE_TOKENS)
    generated = work.pairs * DRAWS_PER_PAIR * (answer + work.rounds * (critique + answer))
    trained = work.trained_pairs * 2 * (PROMPT_TOKENS + answer)
    speeds = tokens_per_second(numbers, hardware, rows)
    hours = None
    if speeds is not None:
        hours = START_HOURS[hardware.kind] + (generated / speeds[0] + trained / speeds[1]) / 3600
    dollars = None if hours is None else hours * price
    return Plan(weights, rows, training_vram_gb(numbers, quantization), have, generated, trained, hours, dollars)


def tokens_per_second(numbers: Architecture, hardware: Hardware, rows: int) -> tuple[float, float] | None:
    """(generated, trained) tokens a second with `rows` rows at a time, or None for a GPU without known speed."""
    if hardware.kind == "cuda":
        speed = gpu_speed(hardware.gpu_name)
        if speed is None:
            return None
        bandwidth, teraflops = speed
        steps = A100_STEPS * (bandwidth / A100_BANDWIDTH) * A100_MODEL_BYTES / (2 * numbers.parameters)
        return rows * steps, TRAINING_EFFICIENCY * teraflops * 1e12 / (DPO_FLOPS * numbers.parameters)
    flops = CPU_FLOPS_PER_CORE * hardware.cores
    return min(flops / (2 * numbers.parameters), CPU_TOKENS_LIMIT), flops / (DPO_FLOPS * numbers.parameters)
