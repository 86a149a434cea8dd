"""What is known of one model, and what it needs: the type of the rows in preset_table.py. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cai_experiment.models.memory import CONTEXT_GB, Architecture, allowance_gb, vram_gb
from cai_experiment.models.training_memory import training_vram_gb

WEIGHTS_DIR = Path(__file__).resolve().parents[1] / "nano" / "weights"
NANO_DIR = WEIGHTS_DIR / "nano"
ROW = 4096  # tokens of a row, the spec's, where none are named
ANSWER_TOKENS = 500  # the spec's, for an answer
MOST_ROWS = 256  # more at a time is no faster (vLLM's own limit on an A100)
FLASH_HEAD = 256  # FlashAttention-2 has kernels for heads up to this size, in multiples of 8


@dataclass(frozen=True, slots=True)
class TrainingOverrides:
    """Training values that a model needs instead of the spec's, and why."""

    learning_rate: float
    reason: str
    sft_learning_rate: float
    sft_epochs: float
    after_sft: float  # DPO's learning rate after SFT
    sft_reason: str


@dataclass(frozen=True, slots=True)
class ModelPreset:
    """One known model. `numbers` None: they stand in the config.json of the folder (a shipped model's)."""

    key: str
    hub_id: str  # hub id, or the folder of a shipped model
    kind: str  # "base" | "chat"
    numbers: Architecture | None
    context: int  # tokens, config.json's max_position_embeddings
    licence: str
    good_at: str  # in words
    training: TrainingOverrides | None = None
    tags: frozenset[str] = frozenset()  # of TAGS in presets.py: what a recommendation asks for
    revision: str = "main"  # a commit where public sources agree on one
    gated: bool = False  # its page asks for a licence to be accepted, and downloads for a token
    published: int | None = None  # parameters, by its safetensors index: a check of `numbers`
    long_context: str = ""  # how it goes beyond `context`, or what to know of its length
    four_bit: str = ""  # hub id of the same weights in NF4, quantised by Unsloth; "": quantise while loading
    unsloth: bool = True  # Unsloth has a path of its own for the family
    config: Mapping[str, object] = field(default_factory=dict, hash=False)  # more of config.json, for random weights

    @property
    def architecture(self) -> Architecture:
        """The architecture numbers; BadInputError if a shipped model's folder is not there."""
        return self.numbers or Architecture.from_config(Path(self.hub_id))

    @property
    def is_local(self) -> bool:
        """True for a model that ships with the repository."""
        return self.numbers is None

    @property
    def parameters(self) -> int:
        """Parameters, counted from the architecture."""
        return self.architecture.parameters

    @property
    def flash_attention(self) -> bool:
        """True if FlashAttention-2 can serve this model here (it comes with vLLM; transformers uses SDPA without).

        It has no kernels for larger heads; a model with capped scores (Gemma 2) is loaded with plain attention.
        """
        size = self.architecture.head_size
        return size <= FLASH_HEAD and size % 8 == 0 and not self.architecture.capped

    @property
    def max_tokens(self) -> int:
        """New tokens recommended for an answer: the spec's 500, but no more than a quarter of the context.

        Answer, critique and revision, their prompts and worked examples share the context (about four such pieces).
        """
        return min(ANSWER_TOKENS, self.context // 4)

    def vram_gb(
        self, quantization: str = "4bit", length: int | None = None, batch: int = 1, device: str = "cuda"
    ) -> float:
        """GB (10^9 bytes) that generation needs, in "4bit", "8bit", "bf16" (as fp16) or "fp32".

        `length` None: a row of ROW tokens, or the whole context of a model that has a shorter one.
        Weights with quantisation constants, keys and values of `batch` rows of `length` tokens, the activations of a
        pass, and on a GPU ("cuda") CUDA's context.
        """
        numbers = self.architecture
        length = length or min(ROW, self.context or ROW)
        need = vram_gb(numbers, quantization, length, batch) + allowance_gb(numbers, quantization, length, batch)
        return need if device == "cuda" else need - CONTEXT_GB

    def training_vram_gb(self, quantization: str = "4bit", length: int = 1024, pairs: int = 1) -> float:
        """GB that LoRA DPO needs on a GPU (QLoRA in 4 bit): `pairs` pairs a pass, each row `length` tokens."""
        return training_vram_gb(self.architecture, quantization, length, pairs)

    def batch(self, memory_gb: float, quantization: str = "4bit", length: int = 2048, device: str = "cuda") -> int:
        """Rows of `length` tokens to generate at a time with `memory_gb` of its memory: a power of two, 0 if none."""
        return _largest(lambda rows: self.vram_gb(quantization, length, rows, device) <= memory_gb)

    def training_batch(self, memory_gb: float, quantization: str = "4bit", length: int = 1024) -> int:
        """Pairs of DPO to train on at a time with `memory_gb` of GPU memory: a power of two, 0 if none."""
        return _largest(lambda pairs: self.training_vram_gb(quantization, length, pairs) <= memory_gb)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest power of two up to MOST_ROWS that fits; more never fits where less does not."""
    rows = MOST_ROWS
    while rows and not fits(rows):
        rows //= 2
    return rows
