"""Sample answers while a model trains, and how much of what they say is new: where text collapses, it shows here first.

Preference accuracy and margin can be perfect while free text falls apart, since neither looks at what the model would
say by itself. So a few instructions are answered greedily every now and then, for the content log, and the share of
distinct bigrams is followed (distinct-2, Li et al. 2016, arXiv 1510.03055), here over all answers of one moment
together: it falls when an answer repeats itself, when all answers become the same one, and when nothing is said at all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cai_experiment.engines.render import Renderer

SAMPLES = 4  # instructions
SAMPLE_TOKENS = 64  # of an answer, at most


@dataclass(frozen=True, slots=True)
class Samples:
    """The answers of one moment; `distinct` is the share of distinct ones among their bigrams of tokens, 0 of none."""

    answers: tuple[str, ...]
    distinct: float


class Sampler:
    """Answers the first SAMPLES instructions that leave room in the context."""

    def __init__(self, prompts: Sequence[str], renderer: Renderer) -> None:
        rendered = [(prompt, renderer.bare_prompt_ids(prompt)) for prompt in prompts]
        room = renderer.max_length - SAMPLE_TOKENS
        kept = [(prompt, ids) for prompt, ids in rendered if len(ids) <= room][:SAMPLES]
        self.prompts = tuple(prompt for prompt, _ in kept)
        self.ids = [ids for _, ids in kept]
        self.renderer = renderer

    def answer(self, model: Any) -> Samples:
        """Greedy answers of a model as it stands in training; its modes and all random states are left as they were."""
        stops = self.renderer.stops
        with undisturbed(model, to_generate=True):
            found = _greedy(model, self.ids, list(stops.stop_token_ids))
        answers = tuple(stops.text(tokens)[0] for tokens in found)
        return Samples(answers, distinct_bigrams([self.renderer.encode(answer, False) for answer in answers]))


def distinct_bigrams(answers: Sequence[Sequence[int]]) -> float:
    """Distinct-2 over all answers together: 1 when no bigram comes twice, 0 where there is none."""
    bigrams = [pair for tokens in answers for pair in pairwise(tokens)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def _greedy(model: Any, prompts: Sequence[Sequence[int]], stops: list[int]) -> list[list[int]]:
    """New tokens of every prompt, padded on the left to one batch."""
    longest = max(len(ids) for ids in prompts)
    device = next(model.parameters()).device
    ids = torch.tensor([[stops[0]] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=SAMPLE_TOKENS, do_sample=False, num_beams=1,
            temperature=None, top_p=None, top_k=None, repetition_penalty=1.0, use_cache=True,
            eos_token_id=stops, pad_token_id=stops[0],
        )  # fmt: skip
    found: list[list[int]] = out[:, longest:].tolist()
    return found


@contextmanager
def undisturbed(model: Any, to_generate: bool = False) -> Iterator[None]:
    """Within it the model is in evaluation mode; afterwards its modes and every random state are what they were.

    A training that measures or samples now and then thereby ends at the same weights as one that does not. Models that
    Unsloth loaded have another way to generate, which they are switched to with `to_generate`.
    """
    modes = [(module, module.training, getattr(module, "gradient_checkpointing", None)) for module in model.modules()]
    cache = model.config.use_cache
    states = random.getstate(), _numpy_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    by_unsloth = to_generate and hasattr(model, "for_inference")
    try:
        with torch.random.fork_rng(devices=devices):
            if by_unsloth:
                model.for_inference()
            model.eval()
            yield
    finally:
        if by_unsloth:
            model.for_training()
        for module, training, recomputes in modes:
            module.training = training
            if recomputes is not None:
                module.gradient_checkpointing = recomputes
        model.config.use_cache = cache
        random.setstate(states[0])
        _set_numpy_state(states[1])


def _numpy_state() -> Any:
    import numpy as np

    return np.random.get_state()


def _set_numpy_state(state: Any) -> None:
    import numpy as np

    np.random.set_state(state)
