"""How the families of decoder-only models differ from the plain Llama shape, by config.json's `model_type`. No torch.

Read off transformers 5.17's modeling files; tests/test_presets.py builds every family there and compares the counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Fields of memory.Architecture that config.json does not say, by model_type, where they differ from the Llama shape:
# no biases but those that config.json asks for, a gated feed-forward, two RMSNorms a layer.
TRAITS: dict[str, Mapping[str, object]] = {
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": "head"},
    "qwen3_moe": {"qk_norm": "head"},
    "phi": {
        "attention_bias": True, "output_bias": True, "mlp_bias": True, "head_bias": True, "gated": False, "norms": 1,
        "norm_bias": True,
    },
    "phi3": {"fused": True},
    "gemma2": {"norms": 4, "capped": True},
    "gemma3_text": {"norms": 4, "qk_norm": "head"},
    "gpt2": {
        "attention_bias": True, "output_bias": True, "mlp_bias": True, "gated": False, "fused": True,
        "norm_bias": True,
    },
    "olmo2": {"qk_norm": "all"},
    "olmo3": {"qk_norm": "all"},
    "exaone4": {"qk_norm": "head"},
    "hunyuan_v1_dense": {"qk_norm": "head"},
    "gpt_neox": {"mlp_bias": True, "gated": False, "fused": True, "norm_bias": True},
    "starcoder2": {"gated": False, "norm_bias": True},
    "nemotron": {"gated": False, "norm_bias": True},
    "arcee": {"gated": False},
}  # fmt: skip
LLAMA_SHAPED = (
    "llama", "mistral", "ministral", "ministral3", "mixtral", "gemma", "smollm3", "granite", "helium", "cwm",
)  # fmt: skip
COUNTED = frozenset({*TRAITS, *LLAMA_SHAPED})  # other kinds are reckoned as Llama, which gives no more than "about"

# What a config.json leaves out where it is the family's default.
DEFAULTS: dict[str, Mapping[str, object]] = {
    "gemma": {"tie_word_embeddings": True, "head_dim": 256},
    "gemma2": {"tie_word_embeddings": True, "head_dim": 256},
    "gemma3_text": {
        "tie_word_embeddings": True, "head_dim": 256, "vocab_size": 262_208, "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "gpt2": {"tie_word_embeddings": True},
    "smollm3": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 128},
    "gpt_neox": {"attention_bias": True},
    "starcoder2": {"tie_word_embeddings": True, "use_bias": True, "num_key_value_heads": 2},
}  # fmt: skip

GPT2_NAMES = {  # config.json's names in GPT-2 -> everybody else's
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
}
MIXTURES = ("mixtral", "qwen3_moe")  # those whose every layer is experts alone; others mix or share
ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that keep keys and values
# (what a field of config.json is named in a model that cannot be reckoned as Llama, what such a model is)
OTHER_SHAPES = (
    (r"mamba|ssm_|linear_(num|attn|conv)|hybrid|lru_width|rwkv|attn_layer_|conv_L_", "layers that are no attention"),
    (r"kv_lora_rank", "keys and values that are compressed (latent attention)"),
    (r"per_layer_input", "embeddings in every layer"),
    (r"type_vocab_size|is_encoder_decoder", "an encoder"),
)


class Uncounted(ValueError):
    """A model whose memory this arithmetic does not count; the text says why."""


def normal_fields(config: Mapping[str, object]) -> dict[str, object]:
    """The fields of a config.json under Llama's names, of the language model alone, with the family's defaults.

    Raises Uncounted for a mixture of experts that is not of MIXTURES, for an encoder, and for a model whose layers are
    not all attention that keeps keys and values of its own.
    """
    text = config.get("text_config")
    fields = dict(text) if isinstance(text, Mapping) else dict(config)
    kind = str(fields.get("model_type") or config.get("model_type") or "")
    if kind == "gpt2":
        fields = {GPT2_NAMES.get(name, name): value for name, value in fields.items()}
        fields["intermediate_size"] = fields.get("intermediate_size") or 4 * _number(fields, "hidden_size")
    fields = {**DEFAULTS.get(kind, {}), **fields, "model_type": kind}
    if kind == "starcoder2":
        fields |= {"attention_bias": fields["use_bias"], "mlp_bias": fields["use_bias"]}
    experts = next((name for name in fields if "experts" in name and fields[name]), "")
    if experts and not (kind in MIXTURES and not fields.get("mlp_only_layers")):
        raise Uncounted(f"a mixture of experts ({kind}), whose memory is counted for {', '.join(MIXTURES)} alone")
    if kind not in COUNTED:
        _refuse_other_shapes(fields, kind)
    return fields


def _refuse_other_shapes(fields: Mapping[str, object], kind: str) -> None:
    """Uncounted for what would be far from the figures of a Llama of these numbers."""
    layers, models = fields.get("layer_types"), fields.get("architectures")
    found = next((what for pattern, what in OTHER_SHAPES
                  if any(value and re.search(pattern, name) for name, value in fields.items())), "")  # fmt: skip
    if isinstance(layers, list) and not set(map(str, layers)) <= ATTENTIONS:
        found = OTHER_SHAPES[0][1]
    if isinstance(models, list) and any(str(name).endswith(("MaskedLM", "ForPreTraining")) for name in models):
        found = found or OTHER_SHAPES[-1][1]
    if found:
        raise Uncounted(f"a model with {found} ({kind}), whose memory this project does not count")


def experts_of(fields: Mapping[str, object]) -> tuple[int, int]:
    """(experts a layer, the width of one); (0, 0) in a dense model. Both names of their number are in use."""
    if fields["model_type"] not in MIXTURES:
        return 0, 0
    name = "num_local_experts" if "num_local_experts" in fields else "num_experts"
    width = "intermediate_size" if fields["model_type"] == "mixtral" else "moe_intermediate_size"
    return _number(fields, name), _number(fields, width)


def _number(fields: Mapping[str, object], name: str) -> int:
    return int(str(fields[name]))
