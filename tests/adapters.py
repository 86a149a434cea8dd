"""A model in memory with a fresh LoRA adapter, which changes nothing until a test disturbs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def with_fresh_adapter(folder: Path) -> tuple[Any, Any]:
    """(PEFT model in float32, tokenizer) of a model's folder; the adapter is the same at every call."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(base, config), AutoTokenizer.from_pretrained(folder)
