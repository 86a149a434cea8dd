"""How much memory a decoder-only transformer needs: weights, quantisation constants, KV cache, LoRA adapters.

All results are in GB of 10^9 bytes. What bitsandbytes quantises are the blocks' Linear layers (GPT-2's Conv1D as well);
embeddings, an untied head, norms and biases stay in 16 bit, and so do experts, which transformers 5 keeps in one tensor
a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError, UserError
from cai_experiment.models.families import COUNTED, TRAITS, Uncounted, experts_of, normal_fields

GB = 1e9
# Bytes a weight of a Linear layer takes. NF4 with double quantisation: one 8-bit constant per 64 weights and one
# 32-bit constant per 256 of those (QLoRA, arXiv 2305.14314, section 3). LLM.int8 keeps one float a row, about nothing.
LINEAR_BYTES = {"4bit": 0.5 + 1 / 64 + 4 / (64 * 256), "8bit": 1.0, "bf16": 2.0, "fp32": 4.0}
LORA_RANK = 32
CONTEXT_GB = 0.5  # CUDA's own, on a card, with the kernels of torch and bitsandbytes
PASS_TOKENS = 8192  # of prompts that an engine reads at once, at most


@dataclass(frozen=True, slots=True)
class Architecture:
    """The numbers of a decoder-only model, named as in config.json; what has a default is as in Qwen2."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocab: int
    tied: bool  # the head shares the embedding's weights
    attention_bias: bool = True  # on q, k and v
    output_bias: bool = False  # on attention's output
    mlp_bias: bool = False
    head_bias: bool = False
    gated: bool = True  # the feed-forward has gate, up and down; else up and down
    fused: bool = False  # q, k and v are one layer; gate and up too
    norms: int = 2  # of the hidden size, in a layer
    norm_bias: bool = False  # LayerNorm has one
    qk_norm: str = ""  # "head": one of a head's size for q and one for k; "all": of all heads' sizes
    positions: int = 0  # learned ones
    experts: int = 0  # of a mixture: feed-forwards of width `intermediate` in each layer, and a router
    capped: bool = False  # scores and logits pass a tanh (Gemma 2)
    model_type: str = "qwen2"

    @property
    def linear_shapes(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of one block's Linear layers: of Qwen2 q, k, v, o, gate, up, down."""
        q, kv, hidden = self.heads * self.head_size, self.kv_heads * self.head_size, self.hidden
        ups = 2 if self.gated else 1
        if self.fused:
            attention: tuple[tuple[int, int], ...] = ((hidden, q + 2 * kv), (q, hidden))
            mlp: tuple[tuple[int, int], ...] = ((hidden, ups * self.intermediate),)
        else:
            attention = ((hidden, q), (hidden, kv), (hidden, kv), (q, hidden))
            mlp = ((hidden, self.intermediate),) * ups
        return attention if self.experts else (*attention, *mlp, (self.intermediate, hidden))

    @property
    def linear_parameters(self) -> int:
        """Weights of all blocks' Linear layers: what quantisation shrinks and LoRA adapts."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear_shapes)

    @property
    def parameters(self) -> int:
        """All parameters, counted once where the head is tied to the embedding."""
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2) + self.positions * self.hidden
        norm = self.hidden * (2 if self.norm_bias else 1)
        head = self.vocab if self.head_bias else 0
        return self.linear_parameters + self.layers * self._small(norm) + norm + embeddings + head

    @property
    def about(self) -> str:
        """Why these numbers are no more than about right, in words to print beside a figure; "" if they are exact."""
        return "" if self.model_type in COUNTED else f"about, reckoned as Llama ({self.model_type or 'no model_type'})"

    def _small(self, norm: int) -> int:
        """A layer's parameters outside Linear weights: biases, norms (of `norm` each), experts and their router."""
        q, kv = self.heads * self.head_size, self.kv_heads * self.head_size
        biases = (q + 2 * kv) * self.attention_bias + self.hidden * self.output_bias
        biases += (self.intermediate * (2 if self.gated else 1) + self.hidden) * self.mlp_bias
        sizes = {"": 0, "head": 2 * self.head_size, "all": q + kv}
        experts = self.experts * (3 * self.hidden * self.intermediate + self.hidden)
        return biases + self.norms * norm + sizes[self.qk_norm] + experts

    @classmethod
    def from_config(cls, folder: Path) -> Architecture:
        """Read a model folder's config.json; BadInputError names the file and what it lacks."""
        path = folder / "config.json"
        return cls.read(lambda: json.loads(path.read_text(encoding="utf-8")), str(path))

    @classmethod
    def read(cls, config: Callable[[], dict[str, Any]], name: str) -> Architecture:
        """`of` what `config` gives; what is wrong with it becomes a BadInputError that begins with `name`."""
        try:
            return cls.of(config())
        except UserError:
            raise
        except Uncounted as error:
            raise BadInputError(f"{name}: {error}", "name a dense decoder model") from error
        except KeyError as error:
            raise BadInputError(f"{name} has no {error}, so its memory cannot be counted") from error
        except (OSError, ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise BadInputError(f"{name} cannot be read: {error}", "name a folder that holds a model") from error

    @classmethod
    def of(cls, config: dict[str, Any]) -> Architecture:
        """From the fields of a config.json, whose family is told by its `model_type` (see `families` and `about`).

        KeyError, TypeError or ValueError for one that is missing or no number, Uncounted for another shape of model.
        """
        fields = normal_fields(config)
        heads = int(fields["num_attention_heads"])  # type: ignore[call-overload]
        experts, width = experts_of(fields)
        traits: dict[str, Any] = {"attention_bias": bool(fields.get("attention_bias"))}
        traits["output_bias"] = traits["attention_bias"]
        traits["mlp_bias"] = bool(fields.get("mlp_bias"))
        kind = str(fields["model_type"])
        numbers: dict[str, Any] = fields
        return cls(
            layers=int(numbers["num_hidden_layers"]),
            hidden=int(numbers["hidden_size"]),
            heads=heads,
            kv_heads=int(numbers.get("num_key_value_heads") or heads),
            head_size=int(numbers.get("head_dim") or numbers["hidden_size"] // heads),
            intermediate=width or int(numbers["intermediate_size"]),
            vocab=int(numbers["vocab_size"]),
            tied=bool(numbers.get("tie_word_embeddings", False)),
            positions=int(numbers["max_position_embeddings"]) if kind == "gpt2" else 0,
            experts=experts,
            model_type=kind,
            **{**traits, **TRAITS.get(kind, {})},
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


def allowance_gb(numbers: Architecture, quantization: str, context: int = 4096, batch: int = 1) -> float:
    """GB that generation on a GPU needs beside weights and KV: CUDA's context, a pass, logits, one unpacked layer.

    Of a pass there are at once the residual stream in and out, its norm and q, k and v (about 6 hidden sizes) or the
    feed-forward (3 of its widths); of each row the last logits in 16 and in 32 bits. bitsandbytes unpacks a 4-bit layer
    for a pass of prompts; of LLM.int8 it keeps the inputs in 8 bit as well, which is within that. Capped scores
    (Gemma 2, which is loaded eager) are held for all of a row's tokens, and their softmax in 32 bits.
    """
    item = 4 if quantization == "fp32" else 2
    tokens = min(PASS_TOKENS, context * batch)
    one_pass = tokens * item * max(6 * numbers.hidden, 2 * numbers.hidden + 3 * numbers.intermediate)
    largest = max(inputs * outputs for inputs, outputs in numbers.linear_shapes)
    unpacked = largest * item if quantization == "4bit" else 0
    scores = numbers.heads * tokens * min(context, tokens) * (item + 4) if numbers.capped else 0
    return CONTEXT_GB + (one_pass + scores + batch * numbers.vocab * (item + 4) + unpacked) / GB


def adapter_parameters(numbers: Architecture, rank: int = LORA_RANK) -> int:
    """Weights of a LoRA adapter on every Linear layer of the blocks (268 million for Qwen2.5-32B at rank 32)."""
    return numbers.layers * rank * sum(map(sum, numbers.linear_shapes))
