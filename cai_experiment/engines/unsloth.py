"""The engine of the pod: one 4-bit load by Unsloth that serves generation and DPO alike.

Read against the source of unsloth 2026.10.7. Unsloth replaces the attention of the model's layers, so the packed passes
of hf.py do not apply; it speaks through `generate` (which Unsloth patches on the model) in left-padded batches.

`import unsloth` must come before transformers, TRL and PEFT are imported: it patches their classes as they are
imported, and trains without its kernels if they were there first. So nothing here is imported at the top, and
`load_engine` calls `load` before anything else of transformers.
"""

from __future__ import annotations

from typing import Any, Iterable, Iterator

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.generate import GenerateEngine


def load(place: str, max_length: int) -> tuple[Any, Any]:
    """(model, tokenizer) in 4 bit with bfloat16 compute, for generation first.

    Unsloth's table (unsloth/models/mapper.py) maps "Qwen/Qwen2.5-32B" in 4 bit to "unsloth/Qwen2.5-32B-bnb-4bit", the
    same weights quantised beforehand: some 20 GB are fetched, not 65. There is no dynamic "-unsloth-bnb-4bit" of it.
    """
    from unsloth import FastLanguageModel  # isort: skip - before torch's friends, see above

    import torch

    model, tokenizer = FastLanguageModel.from_pretrained(
        place, dtype=torch.bfloat16, load_in_4bit=True, max_seq_length=max_length
    )
    return FastLanguageModel.for_inference(model), tokenizer


class UnslothEngine(GenerateEngine):
    """A GenerateEngine over a model that Unsloth loaded, which is switched between speaking and training."""

    name = "unsloth"

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`; switches the model to inference first."""
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(self.model)
        return super().stream(prompts)

    def release_for_training(self) -> tuple[Any, Any]:
        """(model, tokenizer), the model switched to training, with the gradient checkpointing chosen at load."""
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(self.model)
        return self.model, self.tokenizer
