"""The losses of preference training, on sums of log-probabilities: the same formulas as TRL 1.14's.

sigmoid       DPO, arXiv 2305.18290, eq. 7
ipo           arXiv 2310.12036, eq. 17, with log-ratios averaged over an answer's tokens
apo_zero      arXiv 2408.06266, eq. 7: chosen answers up and rejected ones down, each against the reference
sigmoid_norm  DPO on log-ratios averaged over an answer's tokens, so that length alone earns nothing
An NLL term on chosen answers (TRL's "sft") may be added to each; it keeps their log-probability from falling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from cai_experiment.training.settings import LOSSES

TRUNK_CANCELS = ("sigmoid",)  # only the difference of the sums counts, in which what both answers share cancels


class Scores(NamedTuple):
    """Of n pairs, all (n,): log-probabilities (float64; sums over an answer's tokens, nats), tokens of an answer."""

    chosen: torch.Tensor
    rejected: torch.Tensor
    reference_chosen: torch.Tensor
    reference_rejected: torch.Tensor
    chosen_tokens: torch.Tensor
    rejected_tokens: torch.Tensor


def preference_loss(kind: str, beta: float, scores: Scores) -> torch.Tensor:
    """(n,): the loss of every pair. `kind` is one of LOSSES."""
    chosen = scores.chosen - scores.reference_chosen
    rejected = scores.rejected - scores.reference_rejected
    if kind == "sigmoid":
        return -logsigmoid(beta * (chosen - rejected))
    if kind == "apo_zero":
        return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)
    difference = chosen / scores.chosen_tokens - rejected / scores.rejected_tokens
    if kind == "sigmoid_norm":
        return -logsigmoid(beta * difference)
    if kind == "ipo":
        return (difference - 1 / (2 * beta)) ** 2
    raise ValueError(f"unknown loss {kind!r}, not one of {', '.join(LOSSES)}")
