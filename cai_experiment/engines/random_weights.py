"""A preset's true architecture with random weights, so that every code path can be run without a download.

With 4-bit NF4 the model is made layer by layer on its device: no host memory for 65 GB of weights is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.prompts import BASE_END
from cai_experiment.errors import EngineError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

    from cai_experiment.models.presets import ModelPreset

HEAD_SIZED = ("qwen3", "gemma", "gemma2", "gemma3_text")  # families whose config.json names the heads' size
ROPE = frozenset({  # fields of `rope_parameters`
    "rope_type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "partial_rotary_factor",
})  # fmt: skip
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def random_model(
    preset: ModelPreset, dtype: Any, device: str, seed: int, quantization: BitsAndBytesConfig | None
) -> Any:
    """The transformers model of the preset's family with its numbers; `quantization` is 4-bit or None.

    Weights are normal with standard deviation 0.02, norms scale by 1, biases are 0, drawn by `seed` on `device`.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):  # buffers, such as rotary frequencies, are computed, not drawn
        attention = {"attn_implementation": "eager"} if preset.architecture.capped else {}  # SDPA knows no cap
        model = AutoModelForCausalLM.from_config(config_of(preset), dtype=dtype, **attention)
    quantizer = None if quantization is None else _quantized(model, quantization, device)
    torch.manual_seed(seed)
    for module in list(model.modules()):
        _materialise(module, dtype, device)
    model.tie_weights()
    if quantizer is not None:
        quantizer.postprocess_model(model)
    model.generation_config.eos_token_id = model.config.eos_token_id
    return model.eval()


def config_of(preset: ModelPreset) -> Any:
    """The transformers config of a preset's numbers, of the class of its `model_type`; without special tokens."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = preset.architecture.model_type
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise EngineError(f"--random-weights {preset.key}: transformers has no causal language model of kind {kind!r}")
    no_tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if preset.is_local:
        config = AutoConfig.from_pretrained(preset.hub_id, local_files_only=True, **no_tokens)
        config.name_or_path = ""  # random weights come from nowhere
        return config
    fields = _gpt2_fields(preset) if kind == "gpt2" else _fields(preset)
    config = AutoConfig.for_model(kind, **fields, **no_tokens)
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]]
    return config


def _fields(preset: ModelPreset) -> dict[str, Any]:
    numbers = preset.architecture
    rope = {name: value for name, value in preset.config.items() if name in ROPE}
    fields: dict[str, Any] = {
        "vocab_size": numbers.vocab,
        "hidden_size": numbers.hidden,
        "intermediate_size": numbers.intermediate,
        "num_hidden_layers": numbers.layers,
        "num_attention_heads": numbers.heads,
        "num_key_value_heads": numbers.kv_heads,
        "max_position_embeddings": preset.context,
        "tie_word_embeddings": numbers.tied,
        **{name: value for name, value in preset.config.items() if name not in ROPE},
    }
    if numbers.model_type in HEAD_SIZED or numbers.head_size * numbers.heads != numbers.hidden:
        fields["head_dim"] = numbers.head_size
    theta = 1_000_000.0 if numbers.model_type in ("qwen2", "qwen3") else 10_000.0
    if numbers.model_type != "gemma3_text":  # which has one rotary embedding for each kind of layer, as its class says
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": theta, **rope}
    return fields


def _gpt2_fields(preset: ModelPreset) -> dict[str, Any]:
    numbers = preset.architecture
    return {
        "vocab_size": numbers.vocab, "n_embd": numbers.hidden, "n_inner": numbers.intermediate,
        "n_layer": numbers.layers, "n_head": numbers.heads, "n_positions": numbers.positions,
    }  # fmt: skip


def _quantized(model: Any, quantization: BitsAndBytesConfig, device: str) -> Any:
    """Put 4-bit linear layers in place of the blocks' own by transformers' quantizer, as `from_pretrained` does.

    The quantizer stays on the model: Trainer, PEFT and TRL ask it whether a quantised model may be trained.
    """
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model, device_map={"": device})
    model.hf_quantizer = quantizer
    return quantizer


def _materialise(module: Any, dtype: Any, device: str) -> None:
    """Give one module (without its children) its parameters and buffers; a 4-bit layer is quantised at once."""
    import torch

    scale = 0.0 if "Gemma" in type(module).__name__ else 1.0  # Gemma's norms multiply by 1 + weight
    for name, empty in list(module.named_parameters(recurse=False)):
        shape = empty.shape
        if empty.dim() == 1:
            value = torch.full(shape, 0.0 if name == "bias" else scale, dtype=dtype, device=device)
        else:
            value = torch.empty(shape, dtype=dtype, device=device).normal_(std=0.02)
        setattr(module, name, _parameter(empty, value, device))
    for name, buffer in list(module.named_buffers(recurse=False)):
        module._buffers[name] = buffer.to(device)


def _parameter(empty: Any, value: Any, device: str) -> Any:
    """`value` as the kind of parameter that `empty` was; Params4bit quantises when it moves to its device."""
    import torch

    if type(empty).__name__ != "Params4bit":
        return torch.nn.Parameter(value)
    import bitsandbytes

    kept = {k: v for k, v in empty.__dict__.items() if k in ("compress_statistics", "quant_type", "quant_storage")}
    quantised: Any = bitsandbytes.nn.Params4bit(value, requires_grad=False, **kept)
    return quantised.to(device)


def tokenizer_for(preset: ModelPreset, folder: str | None) -> Any:
    """The tokenizer in `folder` (or the shipped model's own), else one token per byte, with ChatML's marks."""
    from transformers import AutoTokenizer

    own = preset.hub_id if Path(preset.hub_id).is_dir() else None
    if folder or own:
        return AutoTokenizer.from_pretrained(folder or own, local_files_only=True)
    return byte_tokenizer("<|im_end|>" if preset.kind == "chat" else BASE_END)


def byte_tokenizer(eos_token: str) -> Any:
    """One token per byte and the marks of ChatML: reads and writes any text, knows no words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=eos_token,
        pad_token=BASE_END,
        additional_special_tokens=["<|im_start|>", "<|im_end|>", BASE_END],
    )
    fast.chat_template = CHATML
    return fast
