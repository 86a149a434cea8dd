"""On which device, in which precision and with which attention weights are loaded, in the libraries' own words."""

from __future__ import annotations

import os
from typing import Any

from cai_experiment.errors import EngineError
from cai_experiment.models.hardware import detect
from cai_experiment.models.serving import sharded


def device_of(kind: str) -> str:
    """torch's name of "cuda", "mps" or "cpu"; EngineError for a GPU that is not there or not usable by this torch."""
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        if detect().kind != "cuda":
            raise EngineError("there is no GPU here", "leave --device out")
        raise EngineError("this machine has a GPU, but this torch cannot use it", "bash setup_runpod.sh")
    own = os.environ.get("LOCAL_RANK", "0")  # set by accelerate launch: a GPU for each process
    return f"cuda:{own}" if kind == "cuda" else kind


def dtype_of(quantization: str, device: str, trains_after: bool) -> Any:
    """The type to compute in: bfloat16, but float32 in fp32 and on a CPU, where bfloat16 is four to five times slower.

    GPUs before Ampere (T4, V100) only emulate bfloat16. There what is generated alone is computed in float16; what is
    trained afterwards stays in bfloat16, slow but right: float16 would need its gradients scaled.
    """
    import torch

    if quantization == "fp32" or (device == "cpu" and quantization != "bf16"):
        return torch.float32
    native = device != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if native or trains_after else torch.float16


def quantization_config(quantization: str, dtype: Any) -> Any:
    """QLoRA's NF4 with double quantisation (arXiv 2305.14314), LLM.int8, or None; `dtype` is computed in."""
    if quantization not in ("4bit", "8bit"):
        return None
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        # FSDP shards float types, all of a unit in one (training/accelerate/fsdp_qlora.yaml)
        bnb_4bit_quant_storage=dtype if sharded() else None,
    )


def attention_of(place: str, revision: str = "main", local: bool = False) -> dict[str, str]:
    """What from_pretrained must be told of attention: of a model that caps its scores (Gemma 2) to compute it plainly.

    transformers' default, torch's SDPA, leaves the cap out without a word: logits are off by several units.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(place, revision=revision, trust_remote_code=False, local_files_only=local)
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}
