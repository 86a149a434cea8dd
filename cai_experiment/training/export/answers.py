"""Load models for the check of an export, one after the other, and let them answer its prompts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.engines.common import is_out_of_memory
from cai_experiment.engines.load import LoadSettings, load_model, make_plan, renderer_for
from cai_experiment.engines.weights import loading_error
from cai_experiment.errors import EngineError, UserError
from cai_experiment.models.hardware import detect
from cai_experiment.records.files import show
from cai_experiment.training.export import merge
from cai_experiment.training.export.check import Answers, Prompts, answer
from cai_experiment.training.export.source import Base, prompts_for

SPARE_GB = 8.0  # beside the weights: LoRA in float32, cache and logits of 20 prompts


@dataclass(frozen=True, slots=True)
class Precision:
    """How a model is loaded for the check."""

    device: str
    dtype: str  # "bf16" | "fp16" | "fp32"


def precision_for(folder: Path, stored: str) -> Precision:
    """The GPU where it holds the weights in the precision `stored`; else the CPU, in float32 if it holds that."""
    import torch

    size = {name: merge.bytes_needed(folder, name) / 1e9 for name in merge.DTYPES}
    if torch.cuda.is_available() and size[stored] + SPARE_GB < torch.cuda.mem_get_info()[0] / 1e9:
        return Precision("cuda:0", stored)
    return Precision("cpu", "fp32" if size["fp32"] + SPARE_GB < 0.8 * detect().ram_gb else stored)


def prompts_of(base: Base, instructions: list[str], layout: str) -> Prompts:
    """The prompts of a check, in the base's layout ("auto": the model's own)."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    folder = base.folder
    has_ends = (folder / "generation_config.json").is_file()
    ends = GenerationConfig.from_pretrained(folder) if has_ends else None
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = LoadSettings(layout=layout)
    return prompts_for(
        instructions, renderer_for(AutoConfig.from_pretrained(folder), ends, tokenizer, base.choice, settings)
    )


def answers_of(
    folder: Path,
    how: Precision,
    prompts: Prompts,
    adapter: Path | None = None,
    forced: Answers | None = None,
    gguf: str | None = None,
) -> Answers:
    """Load a model (with an adapter on it, or from a GGUF file in `folder`), let it answer, give the memory back."""

    def ask() -> Answers:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        from cai_experiment.engines.precision import attention_of

        logging.disable_progress_bar()  # a bar is for downloads
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[how.dtype]
        form: dict[str, Any] = {"gguf_file": gguf} if gguf is not None else {"use_safetensors": True}
        form |= {} if gguf is not None else attention_of(str(folder))
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": how.device}, trust_remote_code=False, **form
        )
        if adapter is not None:
            model = PeftModel.from_pretrained(model, str(adapter))
        return answer(model.eval(), prompts, forced)

    with loading(folder):
        return ask()


def answers_in_4bit(base: Base, adapter: Path, prompts: Prompts, forced: Answers) -> Answers:
    """The answers of the base in NF4 with its adapter (as QLoRA trained it), along another model's tokens."""

    def ask() -> Answers:
        from peft import PeftModel

        settings = LoadSettings(model=str(base.folder), quantization="4bit", engine="hf")
        model, _, _ = load_model(make_plan(settings, detect()), settings)
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
        return answer(model, prompts, forced)

    with loading(base.folder):
        return ask()


def answers_of_both(
    base: Base, quantization: str | None, adapter: Path, export: Path, prompts: Prompts
) -> tuple[Answers, Answers, str]:
    """(answers of one adapter, of another along the same tokens, precision of the computation), on one base."""

    def ask() -> tuple[Answers, Answers, str]:
        import torch
        from peft import PeftModel

        settings = LoadSettings(model=base.loadable, quantization=quantization, engine="hf")
        model, _, _ = load_model(make_plan(settings, detect()), settings)
        computed = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(model.dtype, "fp32")
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
        right = answer(model, prompts)
        model.load_adapter(str(export), "export")
        model.set_adapter("export")
        return right, answer(model.eval(), prompts, right), computed

    with loading(base.folder):
        return ask()


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Within it, errors of loading and of memory become one line; afterwards the memory is given back."""
    import torch

    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            step = "free the GPU, or set CUDA_VISIBLE_DEVICES= to check on the CPU"
            raise EngineError(f"out of memory in the check of {show(folder)}", step) from None
        raise loading_error(show(folder), error) from error
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
