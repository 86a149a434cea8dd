"""The engine of milestones 0 and 1: one 4-bit load by Unsloth that serves generation and DPO alike.

Read against the source of unsloth 2026.10.7. Unsloth replaces the attention of the model's layers, so the packed passes
of hf.py do not apply; it speaks through `generate` (which Unsloth patches on the model) in left-padded batches.

What that costs. In a step of `generate` Unsloth keeps keys and values in one buffer per layer in which all rows stand
at the same position, so a row cannot leave early nor another join: a batch lasts as long as its longest answer (see
generate.py for what that means for its rows), and what it read is forgotten with it. So a spoken prompt is read whole;
verdicts, of which an example has some sixty, share the reading of their stem (branches.py). For thousands of rows
`--engine auto` takes vLLM instead.

Unsloth's own `fast_inference=True` is not used: it holds vLLM in this process over bitsandbytes weights, which vLLM
0.32 serves only with a plug-in (vllm-bnb-plugin) and slowly, and whose memory training would not get back.

`import unsloth` must come before transformers, TRL and PEFT are imported: it patches their classes as they are
imported, and trains without its kernels if they were there first. So nothing here is imported at the top, and
`load_engine` calls `load` before anything else of transformers.
"""

from __future__ import annotations

import os
from typing import Any, Iterable, Iterator

import torch

from cai_experiment.engines import branches
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.common import Request, core_of
from cai_experiment.engines.generate import GenerateEngine
from cai_experiment.models.disk import hf_home


def load(files: str, max_length: int, revision: str = "main") -> tuple[Any, Any]:
    """(model, tokenizer) in 4 bit with bfloat16 compute, for generation first.

    `files`: a folder, or the hub id of exactly the files to load (see `serving.files_for`): of Qwen2.5-32B
    "unsloth/Qwen2.5-32B-bnb-4bit", the weights quantised beforehand; some 20 GB are fetched, not 65. Unsloth's own
    table (unsloth/models/mapper.py) names the same for the 32B models, but for most smaller ones the dynamic
    "-unsloth-bnb-4bit", which is larger than what is reckoned and fetched here; so it is not asked.
    """
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    # what it compiles; by its own default that goes into the current folder
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(hf_home() / "unsloth_compiled_cache"))
    from unsloth import FastLanguageModel  # isort: skip - before torch's friends, see above

    model, tokenizer = FastLanguageModel.from_pretrained(
        files, dtype=torch.bfloat16, load_in_4bit=True, max_seq_length=max_length,
        revision=None if revision == "main" else revision, use_exact_model_name=True,
    )  # fmt: skip
    return FastLanguageModel.for_inference(model), tokenizer


class UnslothEngine(GenerateEngine):
    """A GenerateEngine over a model that Unsloth loaded, which is switched between speaking and training."""

    name = "unsloth"

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`; switches the model to inference first."""
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(self.model)
        return super().stream(prompts)

    def _speak(self, batch: list[Request]) -> list[Completion]:
        """Speak by `generate`, or weigh by shared stems: a batch is of one kind."""
        if not batch[0].option_ids:
            return super()._speak(batch)
        return [completion for run, stem in branches.groups(batch) for completion in self._weigh(run, stem)]

    @torch.inference_mode()
    def _weigh(self, run: list[Request], stem: int) -> list[Completion]:
        core = core_of(self.model)
        # as its `generate`: in the model's own type, which is float16 where the GPU only emulates bfloat16 (T4)
        with torch.autocast(core.device.type, core.dtype, enabled=core.device.type == "cuda"):
            return branches.weigh(core, run, stem)

    def release_for_training(self) -> tuple[Any, Any]:
        """(model, tokenizer), the model switched to training, with the gradient checkpointing chosen at load."""
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(self.model)
        return self.model, self.tokenizer
