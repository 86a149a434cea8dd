"""The training objective of the heads: "perfect alignment" of the weights with the experts that know the next token."""

from __future__ import annotations

from typing import NamedTuple

import torch

ENTROPY_WEIGHT = 0.1


class LossParts(NamedTuple):
    """Scalar tensors, in nats: `loss` = `alignment` - entropy_weight * `entropy`, both means over the tokens."""

    loss: torch.Tensor
    alignment: torch.Tensor
    entropy: torch.Tensor


def perfect_alignment_loss(
    scalars: torch.Tensor, log_p: torch.Tensor, mask: torch.Tensor, entropy_weight: float = ENTROPY_WEIGHT
) -> LossParts:
    """Mean over tokens of -log sum_m pi_m p_m(next token), minus entropy_weight times the mean entropy of pi.

    `scalars` [B, T, M] are the heads' at position t, `log_p` [B, T, M] the log-probability that each frozen expert
    gives to the actual token t + 1, `mask` [B, T] is true where that token counts (the answer's). pi = softmax of the
    scalars over the experts.

    What is maximised: the likelihood of the training text under the mixture, whose weights are all that can be
    trained. Its gradient by a scalar is pi_m - pi_m p_m / sum_k pi_k p_k (of the loss, without entropy): weight moves
    to the experts which foresaw the token better than the mixture did. Perfectly aligned, all weight lies where
    p_m is largest, and alignment is -log max_m p_m, the least that it can be. The entropy is rewarded, for it keeps
    weight on every expert while little is known: an expert whose weight is 0 gets no gradient and never comes back.
    So with entropy_weight > 0 the best pi is softer than perfect alignment.

    This is the likelihood of sampling from the mixture. Decoding by the arg-max expert, as the original does,
    maximises something else: evaluation measures both.

    All in log space (log-softmax, log-sum-exp): p_m of 1e-30 is -69 and no zero. Masked places are left out before
    anything is computed, so that what stands there (NaN, minus infinity) touches neither loss nor gradient; without
    any counted token all parts are 0. Raises ValueError if the shapes do not go together.
    """
    if scalars.shape != log_p.shape or scalars.shape[:-1] != mask.shape:
        shapes = f"scalars {tuple(scalars.shape)}, log_p {tuple(log_p.shape)}, mask {tuple(mask.shape)}"
        raise ValueError(f"shapes do not go together: {shapes}")
    counted = mask.bool()
    log_pi = torch.log_softmax(scalars[counted].float(), dim=-1)
    tokens = max(len(log_pi), 1)
    alignment = -torch.logsumexp(log_pi + log_p[counted].float(), dim=-1).sum() / tokens
    entropy = -(log_pi.exp() * log_pi).sum() / tokens
    return LossParts(alignment - entropy_weight * entropy, alignment, entropy)
