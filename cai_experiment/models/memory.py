"""How much memory a decoder-only transformer needs: weights, quantisation constants, KV cache, LoRA adapters.

All results are in GB of 10^9 bytes. The arithmetic counts every Linear layer of the blocks as quantised; embeddings,
head, norms and biases stay in 16 bit, as bitsandbytes and Unsloth keep them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError

GB = 1e9
# Bytes a weight of a Linear layer takes. NF4 with double quantisation: one 8-bit constant per 64 weights and one
# 32-bit constant per 256 of those (QLoRA, arXiv 2305.14314, section 3). LLM.int8 keeps one float a row, about nothing.
LINEAR_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0, "bf16": 2.0, "fp32": 4.0}
LORA_RANK = 32


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers of a Llama-shaped model (grouped-query attention, gated MLP), named as in config.json."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    tied: bool  # the head shares the embedding's weights
    attention_bias: bool = True  # Qwen2 has biases on q, k and v

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the seven Linear layers of one block: q, k, v, o, gate, up, down."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        mlp = (self.hidden, self.intermediate)
        return ((self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden), mlp, mlp, mlp[::-1])

    @property
    def linear_parameters(self) -> int:
        """Weights of all blocks' Linear layers: what quantisation shrinks and LoRA adapts."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_shapes)

    @property
    def parameters(self) -> int:
        """All parameters, counted once where the head is tied to the embedding."""
        biases = (self.heads + 2 * self.kv_heads) * self.head_size if self.attention_bias else 0
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2)
        return self.linear_parameters + self.layers * (biases + 2 * self.hidden) + self.hidden + embeddings

    @classmethod
    def from_config(cls, folder: Path) -> Architecture:
        """Read a model folder's config.json; BadInputError names the file and what it lacks."""
        path = folder / "config.json"
        try:
            return cls.of(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BadInputError(f"{path} cannot be read: {error}", "name a folder that holds a model") from error
        except KeyError as error:
            raise BadInputError(f"{path} has no {error}, so its memory cannot be counted") from error

    @classmethod
    def of(cls, config: dict[str, Any]) -> Architecture:
        """From the fields of a config.json. KeyError, TypeError or ValueError for one that is missing or no number."""
        heads = int(config["num_attention_heads"])
        return cls(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_size=int(config.get("head_dim") or config["hidden_size"] // heads),
            intermediate=int(config["intermediate_size"]),
            vocab=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            attention_bias=config.get("model_type") == "qwen2" or bool(config.get("attention_bias")),
        )


def weights_gb(numbers: Architecture, quantization: str) -> float:
    """The weights in GB at "4bit" (NF4, double quantised), "8bit", "bf16" or "fp32"."""
    rest = numbers.parameters - numbers.linear_parameters
    rest_bytes = 4 if quantization == "fp32" else 2
    return (numbers.linear_parameters * LINEAR_BYTES[quantization] + rest * rest_bytes) / GB


def kv_bytes_per_token(numbers: Architecture, quantization: str = "bf16") -> int:
    """Bytes of keys and values that one token keeps (256 KiB for Qwen2.5-32B in 16 bit)."""
    return 2 * numbers.layers * numbers.kv_heads * numbers.head_size * (4 if quantization == "fp32" else 2)


def vram_gb(numbers: Architecture, quantization: str, context: int = 4096, batch: int = 1) -> float:
    """GB that generation needs: weights with their quantisation constants, and KV for `batch` rows of `context`."""
    return weights_gb(numbers, quantization) + kv_bytes_per_token(numbers, quantization) * context * batch / GB


def adapter_parameters(numbers: Architecture, rank: int = LORA_RANK) -> int:
    """Weights of a LoRA adapter on every Linear layer of the blocks (268 million for Qwen2.5-32B at rank 32)."""
    return numbers.layers * rank * sum(map(sum, numbers.linear_shapes))
