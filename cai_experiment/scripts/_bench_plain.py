"""The plain arm: transformers' own `generate`, batch after batch, left-padded, cache on; nothing is kept between."""

from __future__ import annotations

from typing import Any

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.scripts._bench_chain import batches


class PlainGenerate:
    """Answers lists of prompts by `model.generate` in batches of `batch` rows, in the order in which they come."""

    def __init__(self, model: Any, tokenizer: Any, renderer: Any, batch: int) -> None:
        """`model` with its own attention (as transformers loads it), not with an engine's."""
        self.model, self.tokenizer, self.renderer, self.batch = model, tokenizer, renderer, batch

    def __call__(self, prompts: list[Prompt]) -> list[Completion]:
        """The completions of `prompts`, in their order by kind."""
        found: list[Completion] = []
        for batch in batches(prompts, self.batch):
            found += self._weigh(batch) if batch[0].options else self._speak(batch)
        return found

    def _speak(self, batch: list[Prompt]) -> list[Completion]:
        sampling, renderer = batch[0].sampling, self.renderer
        inputs = self._inputs(batch, sampling.max_tokens)
        # top_k and top_p as the engine has them: `generate` cuts at 50 unless told not to
        kind: dict[str, Any] = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        if renderer.stop_strings:
            kind |= {"stop_strings": list(renderer.stop_strings), "tokenizer": self.tokenizer}
        made = self.model.generate(
            **inputs, **kind, max_new_tokens=sampling.max_tokens, eos_token_id=list(renderer.stop_token_ids),
            pad_token_id=renderer.stop_token_ids[0],
        )  # fmt: skip
        rows = made[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._completion(prompt, row) for prompt, row in zip(batch, rows, strict=True)]

    def _completion(self, prompt: Prompt, row: list[int]) -> Completion:
        ends = set(self.renderer.stop_token_ids)
        made = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
        text, stopped = self.renderer.stops.text(row[:made])
        return Completion(prompt.id, text, "stop" if stopped else "length", completion_tokens=made)

    def _weigh(self, batch: list[Prompt]) -> list[Completion]:
        """One pass; the options' log-probabilities as the next token."""
        made = self.model.generate(
            **self._inputs(batch, 1), max_new_tokens=1, do_sample=False, return_dict_in_generate=True,
            output_logits=True, pad_token_id=self.renderer.stop_token_ids[0],
        )  # fmt: skip
        options = self.renderer.option_ids(batch[0].options)
        logs = made.logits[0].double().log_softmax(dim=-1)[:, options].tolist()
        return [Completion(p.id, "", "stop", logprobs=tuple(row)) for p, row in zip(batch, logs, strict=True)]

    def _inputs(self, batch: list[Prompt], max_tokens: int) -> dict[str, Any]:
        """Left-padded ids and mask of one batch, [rows, longest]."""
        import torch

        rows = [self.renderer.prompt_ids(p.turns, p.speak_as, max_tokens=max_tokens) for p in batch]
        width, device = max(map(len, rows)), self.model.device
        pad = self.renderer.stop_token_ids[0]
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
        return {"input_ids": ids, "attention_mask": mask}
