"""Keyed sampling: one uniform number per token from (seed, key, position), through the inverse CDF of the softmax.

A text therefore depends on its own prompt, seed and key only: never on the batch it was in, on its place there, or on
what was drawn before it. Temperature 0 takes the likeliest token (the lowest id among equals).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

NO_TOKEN = -1  # what `draw` gives for a row whose logits hold a NaN or nothing finite


def uniforms(seed: int, key: str, count: int) -> np.ndarray:
    """The uniform numbers in [0, 1) of a completion's first `count` positions, float64 [count].

    A Philox counter generator (Salmon et al. 2011) whose 128-bit key is the BLAKE2b hash of seed and key; the top 53
    bits of each raw 64-bit word become the number, so a longer row begins with the shorter one.
    """
    digest = hashlib.blake2b(f"{seed}\x00{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
    words = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: torch.Tensor, temperatures: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """One token per row: logits [N, V], temperatures [N] (0: greedy), uniform numbers [N] -> int64 [N].

    The cumulative sum runs along each row by itself in float64, so a row's token does not depend on its neighbours.
    A row without a usable distribution gives NO_TOKEN.
    """
    import torch

    peak, tokens = logits.max(dim=-1)
    usable = torch.isfinite(peak)
    if (temperatures > 0).any():
        kind = torch.float32 if logits.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        heat = torch.from_numpy(np.where(temperatures > 0, temperatures, 1)).to(logits.device, torch.float32)
        weights = torch.exp((logits.float() - peak.float().unsqueeze(1)) / heat.unsqueeze(1))
        cdf = torch.cumsum(weights, dim=-1, dtype=kind)
        total = cdf[:, -1:]
        # Rounding may lift number * total to the total itself, which no token's share reaches: stay just below it.
        aim = torch.from_numpy(numbers).to(logits.device, kind).unsqueeze(1) * total
        aim = torch.minimum(aim, torch.nextafter(total, torch.zeros_like(total)))
        sampled = torch.searchsorted(cdf, aim, right=True).squeeze(1)
        warm = torch.from_numpy(temperatures > 0).to(logits.device)
        tokens = torch.where(warm, sampled, tokens)
        usable &= torch.isfinite(total.squeeze(1))
    return torch.where(usable, tokens, NO_TOKEN).cpu().numpy()
