"""What SFT, DPO and evaluation will take: tokens by backend, FLOPs, hours, memory; what helps where it does not fit.

No torch. Speeds are shares of the card's data sheet (`TRAINING_EFFICIENCY`), not measurements: the plan says so.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from cai_experiment.models.choice import ModelChoice, numbers_of, resolve_model
from cai_experiment.models.hardware import Hardware, gpu_speed
from cai_experiment.models.memory import GB, LORA_RANK, Architecture
from cai_experiment.models.plan import (
    CPU_FLOPS_PER_CORE,
    PROMPT_TOKENS,
    TRAINING_EFFICIENCY,
    Part,
    memory_gb,
    rows_of,
    start_hours,
    tokens_per_second,
)
from cai_experiment.models.presets import LADDER, PRESETS
from cai_experiment.models.recommend import LENGTHS
from cai_experiment.models.training_memory import (
    CPU_SHARE,
    GPU_SHARE,
    Arithmetic,
    Parts,
    Pass,
    TrainingMemory,
    decide,
)
from cai_experiment.models.workload import WORKED_EXAMPLES, answer_tokens

CONTEXT_BYTES = 0.5e9  # CUDA's own, on a card
MEASURED_PAIRS = 200  # training.settings.MEASURED_PAIRS: measured before and after
USUAL_LENGTH = 1024  # tokens of a training row: a usual one's upper end
SUMS, SUM_TOKENS = 400, 30  # evaluation.measure.SUMS; of an answer to one, where 64 are allowed
JUDGED_ORDERS = 2


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a pair: its prompt, both answers, and what these begin with alike."""

    prompt: int
    chosen: int
    rejected: int
    shared: int = 0

    @property
    def row(self) -> int:
        """Tokens of the longer row."""
        return self.prompt + max(self.chosen, self.rejected)

    @property
    def tree(self) -> int:
        """Tokens that fast DPO computes (training.fast.packing.Tree.tokens)."""
        return self.prompt + self.chosen + self.rejected - self.shared - 2


@dataclass(frozen=True, slots=True)
class TrainingWork:
    """A training to be planned. `lengths`: of its pairs, where they are known; `seen`: pairs over all steps; `at_once`:
    TRL's and Unsloth's pairs a pass; `token_budget`: fast DPO's tokens a pass, None by the memory; `measured`: held-out
    pairs that are measured while training, each as often as it is. Of `is_sft` a pair is one row, without a reference.
    """

    choice: ModelChoice
    hardware: Hardware
    backend: str
    quantization: str
    pairs: int
    seen: int
    max_length: int
    at_once: int = 1
    token_budget: int | None = None
    rank: int = LORA_RANK
    lengths: tuple[Lengths, ...] = ()
    measured: int = 0
    is_sft: bool = False

    @property
    def numbers(self) -> Architecture:
        """The model's; BadInputError: see `numbers_of`."""
        return numbers_of(self.choice)

    @property
    def memory(self) -> TrainingMemory:
        """The formula for this model, backend and precision."""
        form = Arithmetic.of(self.backend, self.quantization, self.hardware.kind, self.numbers)
        return TrainingMemory(self.numbers, self.backend, form, self.rank)

    @property
    def longest(self) -> Lengths:
        """The longest pair that is trained on; where none is known, one whose rows both are as long as they may be."""
        known = [one for one in self.lengths if one.row <= self.max_length]
        if known:
            return max(known, key=lambda one: one.tree if self.backend == "fast" else one.row)
        return self._pair_of(self.max_length)

    def usual(self) -> TrainingWork:
        """The same with rows of USUAL_LENGTH at most."""
        return replace(self, max_length=min(self.max_length, USUAL_LENGTH))

    def _pair_of(self, row: int) -> Lengths:
        prompt = min(PROMPT_TOKENS, row // 2)
        return self._like(prompt, row - prompt)

    def _like(self, prompt: int, answer: int) -> Lengths:
        """A pair of which nothing but these numbers of tokens is known; SFT's two sides are the same."""
        return Lengths(prompt, answer, answer, answer if self.is_sft else 0)

    @property
    def rows_a_pair(self) -> int:
        """Rows that are computed of a pair where none are packed."""
        return 1 if self.is_sft else 2

    # ------------------------------------------------------------ memory

    def fullest_pass(self) -> tuple[Pass, int]:
        """(the pass that needs the most, how many layers are computed again)."""
        longest, memory = self.longest, self.memory
        if self.backend == "fast":
            found = decide(memory, self._free(memory), longest.tree, self.hardware.kind, self.token_budget)
            tokens = max(found.tokens, longest.tree)
            return Pass.packed(tokens, longest.tree), found.recomputed_layers
        again = self.numbers.layers if self.hardware.kind == "cuda" else 0
        rows = self.rows_a_pair * self.at_once
        return Pass(rows * longest.row, rows, longest.row, rows * longest.row), again

    def parts(self) -> Parts:
        """Bytes at the fullest moment."""
        return self.memory.parts(*self.fullest_pass())

    def _free(self, memory: TrainingMemory) -> float:
        """As training.fast.budget sees it once the model is loaded."""
        if self.hardware.kind == "cuda":
            loaded = memory.fixed().loaded
            return GPU_SHARE * (self.hardware.vram_gb * 2**30 - CONTEXT_BYTES - loaded)
        return CPU_SHARE * self.hardware.ram_gb * 2**30

    @property
    def fits(self) -> bool:
        """True if the fullest moment fits the memory at hand."""
        return self.parts().total / GB <= memory_gb(self.numbers, self.hardware, "")

    # ------------------------------------------------------------ time

    def tokens_a_pair(self) -> float:
        """What the backend computes for a pair, on average: a tree, or rows as long as the longest of a pass."""
        known = [one for one in self.lengths if one.row <= self.max_length]
        answer = answer_tokens(self.choice)
        known = known or [self._like(PROMPT_TOKENS, answer)]
        if self.backend == "fast":
            return sum(one.tree for one in known) / len(known)
        rows = [one.row for one in known]
        random.Random(0).shuffle(rows)
        passes = [rows[i : i + self.at_once] for i in range(0, len(rows), self.at_once)]
        return self.rows_a_pair * sum(max(one) * len(one) for one in passes) / len(rows)

    @property
    def tokens(self) -> int:
        """Tokens computed over all steps."""
        return round(self.seen * self.tokens_a_pair())

    def flops_a_token(self) -> float:
        """In parameters: 2 forward, 2 backward, 2 for the share of layers computed again, 2 of a DPO step's reference.

        Where no lengths are known, layers are computed again as rows of USUAL_LENGTH ask for.
        """
        again = (self if self.lengths else self.usual()).fullest_pass()[1] / self.numbers.layers
        return 4 + 2 * again + (0 if self.backend == "fast" or self.is_sft else 2)

    def flops(self) -> float:
        """Of all steps, of a reference that is computed once, and of measuring before, after and on the way."""
        forward = 2.0 if self.backend == "fast" or self.is_sft else 4.0
        once = self.pairs * 2.0 if self.backend == "fast" and not self.is_sft else 0.0
        measured = (2 * min(self.pairs, MEASURED_PAIRS) + self.measured) * forward
        return self.numbers.parameters * self.tokens_a_pair() * (self.seen * self.flops_a_token() + once + measured)

    def limit(self) -> float | None:
        """FLOP/s of the data sheet (of a CPU: as measured), None for a GPU that is not known."""
        if self.hardware.kind != "cuda":
            return CPU_FLOPS_PER_CORE * self.hardware.cores
        speed = gpu_speed(self.hardware.gpu_name)
        return None if speed is None else speed[1] * 1e12

    def hours(self) -> float | None:
        """Without loading."""
        limit = self.limit()
        share = TRAINING_EFFICIENCY if self.hardware.kind == "cuda" else 1.0
        return None if limit is None else self.flops() / (share * limit) / 3600

    def part(self, download_gb: float = 0.0, loaded: bool = False) -> Part:
        """As a part of a plan; `loaded`: the model lies in memory already."""
        hours, parts = self.hours(), self.parts()
        start = 0.0 if loaded else start_hours(self.hardware, download_gb)
        have = memory_gb(self.numbers, self.hardware, "")
        weights = (parts.weights + parts.constants) / GB
        return Part(self.backend, self.quantization, weights, parts.total / GB, have, 2 * self.at_once, 0, self.tokens,
                    None if hours is None else start + hours)  # fmt: skip

    # ------------------------------------------------------------ what helps

    def remedies(self) -> list[str]:
        """Where it does not fit: the changes that each alone make it fit, with their GB."""
        return [f"{flag} ({work.parts().total / GB:.1f} GB)" for flag, work in self._changes() if work.fits]

    def _changes(self) -> Iterator[tuple[str, TrainingWork]]:
        shorter = [length for length in (*LENGTHS[1:], 768, 512) if length < self.longest.row]
        tried = [(length, replace(self, max_length=length, lengths=())) for length in shorter]
        yield from [(f"--max-length {length}", work) for length, work in tried if work.fits][:1]
        if self.token_budget:
            yield "no --token-budget", replace(self, token_budget=None)
        if self.backend != "fast" and self.at_once > 1:
            yield "--batch-size 1", replace(self, at_once=1)
        if self.quantization != "4bit" and self.hardware.kind == "cuda":
            yield "--quantization 4bit", replace(self, quantization="4bit")
        if self.backend != "fast" and self.quantization == "4bit":
            yield "--backend fast", replace(self, backend="fast")
        known = [PRESETS[key] for key in ("nano", *LADDER)]
        smaller = [p for p in known if p.architecture.parameters < self.numbers.parameters]
        for preset in sorted(smaller, key=lambda p: -p.architecture.parameters):
            work = replace(self, choice=resolve_model(preset.key, self.hardware))
            if work.fits:
                yield f"--model {preset.key}", work
                return


def row_length(work: TrainingWork) -> tuple[int, str]:
    """(the tokens of a row that --max-length is where it is not given, why it is not the spec's 4,096 or "").

    The largest of LENGTHS whose fullest pass fits, whatever pairs there are; the least of them where none does.
    `work.max_length` is the model's context. A GPU that does not tell its memory keeps the first.
    """
    numbers, hardware = work.numbers, work.hardware
    have = memory_gb(numbers, hardware, "")
    tried = [replace(work, max_length=min(length, work.max_length), lengths=()) for length in LENGTHS]
    if not have or tried[0].fits:
        return LENGTHS[0], ""
    found = next((length for length, one in zip(LENGTHS, tried, strict=True) if one.fits), None)
    needs = f"{tried[0].max_length:,} needs {tried[0].parts().total / GB:.1f} GB of {have:g}"
    if found is None:
        return LENGTHS[-1], f"{needs}, and this one {tried[-1].parts().total / GB:.1f}: it does not fit"
    return found, f"{needs}; longer pairs are left out and counted"


def evaluation(
    choice: ModelChoice, hardware: Hardware, engine: str, quantization: str, questions: int, scored: int
) -> Part:
    """train_dpo.py's own evaluation, in training's load.

    Base and trained model answer `questions` held-out instructions and SUMS sums, the base judges the answers in both
    orders, and both score `scored` held-out pairs.
    """
    numbers, answer = numbers_of(choice), answer_tokens(choice)
    written = 2 * (questions * answer + SUMS * SUM_TOKENS)
    judged = JUDGED_ORDERS * questions * (2 * answer + PROMPT_TOKENS + WORKED_EXAMPLES)
    read = 2 * (questions + SUMS) * PROMPT_TOKENS + judged + 4 * scored * (PROMPT_TOKENS + answer)
    rows = min(rows_of(engine, numbers, hardware, quantization), questions + SUMS)
    speeds = tokens_per_second(numbers, hardware, rows, quantization, engine)
    hours = None if speeds is None else (written / speeds[0] + read / speeds[1]) / 3600
    return Part(engine, quantization, 0.0, 0.0, memory_gb(numbers, hardware, ""), rows, written, read, hours)
