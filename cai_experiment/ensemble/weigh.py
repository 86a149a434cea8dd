"""What an ensemble thinks of the options of a verdict: their log-probabilities as the next token, by the same rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cai_experiment.engines.base import Completion
from cai_experiment.engines.branches import groups, repeated
from cai_experiment.engines.common import NO_NUMBERS, Request

if TYPE_CHECKING:
    import torch

    from cai_experiment.ensemble.experts import Expert
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads


def weigh(model: MultiModelWithScalarHeads, requests: Sequence[Request], mode: str) -> list[Completion]:
    """One completion a request, in their order, with the log-probabilities of its options.

    Mode "select": those of the expert that the heads choose there; "mixture": log sum_m pi_m p_m(option). Requests that
    share a stem (an example's verdicts) have it read once by each expert. In float32: Apple's GPUs have no float64.
    """
    return [done for run, stem in groups(requests) for done in _weigh(model, run, stem, mode)]


def _weigh(model: MultiModelWithScalarHeads, run: Sequence[Request], stem: int, mode: str) -> list[Completion]:
    import torch

    hidden = [_last_states(expert, run, stem) for expert in model.experts]
    both = zip(model.experts, hidden, strict=True)
    logits = [expert.logits(states)[:, : model.vocabulary].float() for expert, states in both]
    logs = torch.stack([torch.log_softmax(one, dim=-1) for one in logits], dim=1)  # [R, M, V]
    pi = torch.log_softmax(model.scalars(hidden), dim=-1).to(logs.device)  # [R, M]
    if mode == "select":
        found = logs[torch.arange(len(run), device=logs.device), pi.argmax(dim=-1)]
    else:
        found = torch.logsumexp(pi.unsqueeze(-1) + logs, dim=1)
    kept = found.cpu().numpy()
    return [_completion(request, kept[row], stem if row else 0) for row, request in enumerate(run)]


def _last_states(expert: Expert, run: Sequence[Request], stem: int) -> torch.Tensor:
    """The expert's states [R, H] at the last token of each request; the first `stem` tokens, alike in all, read once.

    Padded on the right, where causal attention never looks.
    """
    import torch

    device, decoder = expert.model.device, expert.model.base_model
    rest = [request.ids[stem:].astype(np.int64) for request in run]
    width = max(map(len, rest))
    ids = torch.from_numpy(np.stack([np.pad(own, (0, width - len(own))) for own in rest])).to(device)
    cache = None
    if stem > 0:
        first = torch.from_numpy(run[0].ids[None, :stem].astype(np.int64)).to(device)
        cache = repeated(decoder(input_ids=first, use_cache=True).past_key_values, len(run))
    places = torch.arange(stem, stem + width, device=device).expand(len(run), -1)
    states = decoder(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True)[0]
    ends = torch.tensor([len(own) - 1 for own in rest], device=device)
    found: torch.Tensor = states[torch.arange(len(run), device=device), ends]
    return found


def _completion(request: Request, logs: np.ndarray, known: int) -> Completion:
    """`known`: tokens of the prompt that were read for another request."""
    size = len(request.ids)
    weights = tuple(float(logs[token]) for token in request.option_ids)
    if not np.isfinite(weights).all():
        return Completion(request.prompt.id, "", "error", size, size - known, 0, NO_NUMBERS)
    return Completion(request.prompt.id, "", "stop", size, size - known, logprobs=weights)
