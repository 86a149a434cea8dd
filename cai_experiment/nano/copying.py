"""A network that can copy before it has learned anything: an induction circuit in its initial weights.

Copying word by word (a quote, a repaired answer) takes two heads that are of no use without each other, so on the
little text of the written world it did not come by training in reach of an hour (docs/LOG.md). The circuit is that
of Olsson et al. 2022 (arXiv 2209.11895); training is free to keep, move or drop it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

PEAK = 40.0  # attention score of the previous token over any other, before the softmax
MATCH = 20.0  # attention score of a position whose predecessor is the current token
SECOND_MATCH = 1.0  # times that, if the token before the predecessor is the one before the current token too
SIZE_OF_PREDECESSOR, SIZE_OF_COPY = 0.8, 9.0  # of what the heads add to the stream, in lengths of an embedding
FAST, REACH = 3, 300  # rotary pairs that tell neighbours apart; tokens over which the matching pairs hardly turn


@torch.no_grad()
def plant_copying(model: Any, seed: int) -> None:
    """Set heads 0 and 1 of layer 0 and head 0 of layer 1 of a fresh Qwen2 model (in place): look one and two tokens
    back; then look for a token whose predecessor is the current one, and speak it.

    Where several are ("the" stands everywhere), the one decides whose last two predecessors are the last two tokens.
    Random orthonormal maps [head size, hidden] serve as names for tokens: one for what is looked for, one for where
    the name of the predecessor is put, one for where that of its predecessor is, one for what is copied. Only rotary
    pairs that turn by less than 0.6 over REACH tokens match, so distance does not matter.
    """
    config = model.config
    hidden, heads = config.hidden_size, config.num_attention_heads
    size, half = hidden // heads, hidden // heads // 2
    draw = torch.Generator().manual_seed(seed)
    looked_for, predecessor, before_it, copied = (_orthonormal(size, hidden, draw) for _ in range(4))
    turns = config.rope_parameters["rope_theta"] ** (-torch.arange(half) / half)
    embedding = float(model.model.embed_tokens.weight.norm(dim=1).mean())

    fast = (torch.arange(half) < FAST).float()
    scale = math.sqrt(PEAK * math.sqrt(size) / FAST)
    back = model.model.layers[0].self_attn
    back.k_proj.bias[:size] = scale * torch.cat([fast, torch.zeros(half)])
    for head, target in enumerate((predecessor, before_it)):  # they share keys and values
        rows, turned = slice(head * size, (head + 1) * size), (head + 1) * turns
        back.q_proj.bias[rows] = scale * torch.cat([fast * torch.cos(turned), -fast * torch.sin(turned)])
        back.q_proj.weight[rows] = 0
        back.o_proj.weight[:, rows] = target.T * (SIZE_OF_PREDECESSOR * embedding / math.sqrt(size))
    back.k_proj.weight[:size] *= 0.1
    back.v_proj.weight[:size] = looked_for

    slow = (turns * REACH < 0.6).float().repeat(2)[:, None]
    scale = 1.2 * math.sqrt(MATCH * math.sqrt(size) / float(slow.sum()))
    match = model.model.layers[1].self_attn
    other = _orthonormal(size, size, draw)  # tells the second match from the first
    match.q_proj.weight[:size] = (looked_for + SECOND_MATCH * other @ predecessor) * slow * scale
    match.k_proj.weight[:size] = (predecessor + other @ before_it) * slow * scale
    match.v_proj.weight[:size] = copied
    match.o_proj.weight[:, :size] = copied.T * (SIZE_OF_COPY * embedding / math.sqrt(size))


def _orthonormal(rows: int, columns: int, draw: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(columns, rows, generator=draw))[0].T
