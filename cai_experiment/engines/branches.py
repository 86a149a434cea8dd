"""Prompts to be weighed that share a stem: the stem is read once, the questions beside one another behind it.

An example's thirty verdicts differ in their last 45 tokens of about a thousand. Questions are padded on the right,
where causal attention never looks, so no mask is needed; works with any model whose forward takes `past_key_values`.
"""

from __future__ import annotations

from typing import Any, Iterator, Sequence

import numpy as np
import torch

from cai_experiment.engines.base import Completion
from cai_experiment.engines.common import NO_NUMBERS, Request

OWN = 2  # tokens that each prompt keeps for itself at least: Unsloth takes a single one for a step of `generate`


def groups(requests: Sequence[Request]) -> Iterator[tuple[list[Request], int]]:
    """Runs of `requests` that share more than half of their tokens, each with the length of what all of them share."""
    run: list[Request] = []
    stem = 0
    for request in requests:
        shared = min(stem, _common(run[0].ids, request.ids)) if run else 0
        if run and 2 * shared > len(request.ids):
            run.append(request)
            stem = shared
            continue
        if run:
            yield run, stem
        run, stem = [request], len(request.ids) - OWN
    if run:
        yield run, stem


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two prompts have in common at their beginning, at most all but OWN of the shorter one."""
    size = min(len(a), len(b)) - OWN
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def weigh(model: Any, run: Sequence[Request], stem: int) -> list[Completion]:
    """The log-probabilities of each request's options as its next token; the first `stem` tokens are read once.

    `computed_tokens` counts the stem for the first request of the run only.
    """
    device = model.device
    rest = [request.ids[stem:] for request in run]
    ids = np.zeros((len(run), max(map(len, rest))), dtype=np.int64)
    for row, own in enumerate(rest):
        ids[row, : len(own)] = own
    cache = None
    if stem > 0:
        first = torch.from_numpy(run[0].ids[None, :stem].astype(np.int64)).to(device)
        cache = repeated(model(input_ids=first, use_cache=True, logits_to_keep=1).past_key_values, len(run))
    places = torch.arange(stem, stem + ids.shape[1], device=device).expand(len(run), -1)
    logits = model(
        input_ids=torch.from_numpy(ids).to(device), position_ids=places, past_key_values=cache, use_cache=True
    ).logits
    ends = torch.tensor([len(own) - 1 for own in rest], device=device)
    logs = torch.log_softmax(logits[torch.arange(len(run), device=device), ends].double(), dim=-1).cpu()
    return [_completion(request, logs[row], len(rest[row]) + (0 if row else stem)) for row, request in enumerate(run)]


def repeated(kept: Any, rows: int) -> Any:
    """The keys and values of one row as a cache of `rows` equal rows; Unsloth gives them as plain pairs per layer."""
    from transformers import DynamicCache

    pairs = kept if isinstance(kept, tuple) else [(layer.keys, layer.values) for layer in kept.layers]
    cache = DynamicCache()
    for number, (keys, values) in enumerate(pairs):
        cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), number)
    return cache


def _completion(request: Request, logs: torch.Tensor, computed: int) -> Completion:
    weights = tuple(float(logs[token]) for token in request.option_ids)
    size = len(request.ids)
    if not np.isfinite(weights).all():
        return Completion(request.prompt.id, "", "error", size, computed, 0, NO_NUMBERS)
    return Completion(request.prompt.id, "", "stop", size, computed, logprobs=weights)
