"""One lean forward pass for Qwen2, Llama and their like: a few operations a layer over preallocated keys and values.

`weights_of` reads a transformers model; `LeanPasses` runs it. Both arms of decoding, plain and accelerated, use it.

On a CPU in float32 (`Weights.exact`) a token's hidden state has the same bits whether it is read alone or within a
block, and whatever else is in the batch: accelerated texts are thus the plain ones by construction. Attention is
engines/attention.py's, linear layers are those of linear.py, or rows are filled up to a multiple of ROWS. A draft need
not be exact: `quick`.

Elsewhere there is no such promise. On a GPU a single token's attention is matrix products and a block's is torch's
scaled_dot_product_attention, cuBLAS chooses a kernel by the number of rows, and in bfloat16 the likeliest two
tokens are often equal; quantised layers round by what they read. Last bits then differ between plain and accelerated,
and between batches, and where two tokens are nearly as likely the text may turn there. Both follow the same
distribution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Sequence
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn import functional

from cai_experiment.engines.attention import attend
from cai_experiment.engines.forward import ROWS, VIEW_STEP, round_up
from cai_experiment.ensemble.linear import Apart, Fused, joined, pack_all

KINDS = ("qwen2", "llama", "mistral", "qwen3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # angles do not depend on the text's length


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer. `query_norm` and `key_norm` [D] are Qwen3's."""

    attention_norm: torch.Tensor
    qkv: Fused | Apart
    out: Fused | Apart
    mlp_norm: torch.Tensor
    gate_up: Fused | Apart
    down: Fused | Apart
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Weights:
    """A whole model. `rows`: linear layers get a multiple of so many (1: any number gives a row the same bits)."""

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: Fused | Apart
    eps: float
    heads: int
    kv_heads: int
    width: int
    rows: int
    exact: bool  # rows have the same bits in any number, as far as the layers go: on a CPU, float32, no other kinds
    rotary: Any  # transformers' module: (x, positions [1, L]) -> cos, sin [1, L, D]


_KNOWN: WeakKeyDictionary[torch.nn.Module, Weights | None] = WeakKeyDictionary()


def weights_of(model: Any) -> Weights | None:
    """The weights of a transformers causal language model, read once; None where this pass does not serve it."""
    if model not in _KNOWN:
        weights = _read(model) if _is_served(model) else None
        _KNOWN[model] = weights if weights is not None and _agrees(model, weights) else None
    return _KNOWN[model]


def _is_served(model: Any) -> bool:
    config = model.config
    kinds = getattr(config, "layer_types", None) or ()
    rope = getattr(config, "rope_parameters", None) or {}
    devices = {parameter.device for parameter in model.parameters()}
    return (
        config.model_type in KINDS
        and config.hidden_act == "silu"
        and all(kind == "full_attention" for kind in kinds)
        and (bool(kinds) or not getattr(config, "sliding_window", None))
        and rope.get("rope_type", "default") in STATIC_ROPE
        and len(devices) == 1
        and "meta" not in {device.type for device in devices}
    )


def _read(model: Any) -> Weights:
    decoder, config = model.get_decoder(), model.config
    layers = []
    for layer in decoder.layers:
        attention, mlp = layer.self_attn, layer.mlp
        query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        layers.append(
            Layer(
                layer.input_layernorm.weight.data,
                joined([attention.q_proj, attention.k_proj, attention.v_proj]),
                joined([attention.o_proj]),
                layer.post_attention_layernorm.weight.data,
                joined([mlp.gate_proj, mlp.up_proj]),
                joined([mlp.down_proj]),
                None if query_norm is None else query_norm.weight.data,
                None if key_norm is None else key_norm.weight.data,
            )
        )
    head = joined([model.get_output_embeddings()])
    embedding = model.get_input_embeddings().weight.data
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    linear: list[Fused | Apart] = [head]
    linear += [each for layer in layers for each in (layer.qkv, layer.out, layer.gate_up, layer.down)]
    on_cpu = embedding.device.type == "cpu"
    rows = ROWS if on_cpu and not pack_all(linear) else 1
    exact = on_cpu and all(isinstance(one, Fused) and one.weight.dtype == torch.float32 for one in linear)
    return Weights(
        embedding, tuple(layers), decoder.norm.weight.data, head, config.rms_norm_eps, config.num_attention_heads,
        config.num_key_value_heads, width, rows, exact, decoder.rotary_emb,
    )  # fmt: skip


@torch.inference_mode()
def _agrees(model: Any, weights: Weights) -> bool:
    """Whether a few tokens get the logits that the model itself gives them, within rounding."""
    ids = np.arange(12)[None] % len(weights.embedding)
    plain = model(input_ids=torch.from_numpy(ids).to(weights.embedding.device), use_cache=False).logits[0]
    passes = LeanPasses(weights, len(weights.embedding), 1, ids.shape[1])
    ours = passes.logits(passes([0], ids, np.zeros(1, dtype=np.int64))[0])
    tolerance = 1e-3 if plain.dtype == torch.float32 else 0.05
    return bool((ours - plain).abs().max() <= tolerance * plain.abs().max())


class LeanPasses:
    """Passes over one expert's weights; see `passes.Passes`."""

    def __init__(self, weights: Weights, vocabulary: int, rows: int, length: int) -> None:
        """`rows` texts of at most `length` tokens, what is drafted in vain included."""
        self.weights, self.vocabulary, self.exact = weights, vocabulary, weights.exact
        self.device, dtype = weights.embedding.device, weights.embedding.dtype
        length = round_up(length, VIEW_STEP)
        shape = (2, rows, weights.kv_heads, length, weights.width)
        self.cache = [torch.zeros(shape, dtype=dtype, device=self.device) for _ in weights.layers]
        cos, sin = weights.rotary(weights.embedding, torch.arange(length, device=self.device)[None])
        sign = torch.ones(weights.width, device=self.device, dtype=dtype)
        sign[: weights.width // 2] = -1  # rotate_half: the halves change places, the first one's sign turns
        self.cos, self.sin = cos[0].to(dtype), sin[0].to(dtype) * sign  # [length, D]

    @torch.inference_mode()
    def __call__(self, rows: Sequence[int], ids: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        """See `Passes`."""
        weights, (count, steps) = self.weights, ids.shape
        places = np.asarray(starts)[:, None] + np.arange(steps)
        where, columns = self._tensor(np.repeat(rows, steps)), self._tensor(places.ravel())
        cos, sin = self.cos[columns].unsqueeze(1), self.sin[columns].unsqueeze(1)
        view = round_up(int(places[:, -1].max()) + 1, VIEW_STEP)
        mask = self._mask(places, view)
        slots = _as_slice(rows)
        taken = slots if slots is not None else self._tensor(np.asarray(rows))
        x = weights.embedding[self._tensor(ids.ravel())]
        x = functional.pad(x, (0, 0, 0, -len(x) % weights.rows))
        total = count * steps
        for layer, cache in zip(weights.layers, self.cache, strict=True):
            qkv = layer.qkv(self._norm(x, layer.attention_norm))[:total]
            query, fresh = self._rotated(layer, qkv, cos, sin)
            cache[:, where, :, columns] = fresh
            keys, values = cache[:, taken, :, :view]
            out = attend(query.unflatten(0, (count, steps)), keys, values, mask, None).reshape(total, -1)
            x = x + layer.out(functional.pad(out, (0, 0, 0, len(x) - total)))
            x = x + layer.down(self._gated(layer.gate_up(self._norm(x, layer.mlp_norm))))
        return self._norm(x, weights.norm)[:total].unflatten(0, (count, steps))

    @torch.inference_mode()
    def quick(self, row: int, token: int, place: int) -> torch.Tensor:
        """The hidden state [1, H] after one token of one row, in the fastest way: its last bits may differ."""
        weights, end = self.weights, place + 1
        cos, sin = self.cos[place], self.sin[place]
        x = weights.embedding[token : token + 1]
        for layer, cache in zip(weights.layers, self.cache, strict=True):
            query, fresh = self._rotated(layer, layer.qkv.quick(self._norm(x, layer.attention_norm)), cos, sin)
            own = cache[:, row]
            own[:, :, place] = fresh[0]
            keys, values = own[:, None, :, :end]
            grouped = query.view(1, weights.kv_heads, -1, weights.width)  # heads that share keys, as rows
            out = functional.scaled_dot_product_attention(grouped, keys, values, scale=1.0)
            x = x + layer.out.quick(out.view(1, -1))
            x = x + layer.down.quick(self._gated(layer.gate_up.quick(self._norm(x, layer.mlp_norm))))
        return self._norm(x, weights.norm)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Passes`."""
        count = len(hidden)
        return self.weights.head(functional.pad(hidden, (0, 0, 0, -count % self.weights.rows)))[
            :count, : self.vocabulary
        ]

    @torch.inference_mode()
    def quick_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, H] -> [1, V], in the fastest way."""
        return self.weights.head.quick(hidden)[:, : self.vocabulary]

    def _rotated(
        self, layer: Layer, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [n, H, D], scaled, and fresh keys and values [n, 2, Hkv, D]."""
        weights = self.weights
        rows = qkv.view(len(qkv), -1, weights.width)
        both = rows[:, : weights.heads + weights.kv_heads]
        if layer.query_norm is not None and layer.key_norm is not None:
            query = self._norm(both[:, : weights.heads], layer.query_norm)
            both = torch.cat((query, self._norm(both[:, weights.heads :], layer.key_norm)), dim=1)
        half = weights.width // 2
        both = torch.addcmul(both * cos, torch.cat((both[..., half:], both[..., :half]), dim=-1), sin)
        fresh = torch.stack((both[:, weights.heads :], rows[:, -weights.kv_heads :]), dim=1)
        return both[:, : weights.heads] * weights.width**-0.5, fresh

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(x, weight.shape, weight, self.weights.eps)

    @staticmethod
    def _gated(both: torch.Tensor) -> torch.Tensor:
        gate, up = both.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)

    def _mask(self, places: np.ndarray, view: int) -> torch.Tensor:
        """Additive: 0 up to each token's place [R, T], minus infinity beyond; [R, 1, T, 1, view]."""
        unseen = torch.arange(view, device=self.device) > self._tensor(places)[:, None, :, None, None]
        mask = torch.zeros(unseen.shape, dtype=self.weights.embedding.dtype, device=self.device)
        return mask.masked_fill_(unseen, float("-inf"))

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(self.device)


def _as_slice(rows: Sequence[int]) -> slice | None:
    """Neighbouring rows, whose keys need not be copied; None for others."""
    first, count = rows[0], len(rows)
    return slice(first, first + count) if list(rows) == list(range(first, first + count)) else None
