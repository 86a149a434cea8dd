"""Texts token by token from an ensemble: `decode` for batches of prompts, `prompt_log_probs` for what a router asks."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Sequence

import numpy as np

from cai_experiment.ensemble.blocks import BlockDecoder
from cai_experiment.ensemble.passes import Passes, open_passes
from cai_experiment.ensemble.plain import BATCH as BATCH
from cai_experiment.ensemble.plain import Counts, Decoder, DecodeSettings, OnToken, Spoken
from cai_experiment.ensemble.rules import MODES as MODES

if TYPE_CHECKING:
    import torch

LOGITS = 256  # positions whose logits are held at a time


def decode(
    model: Any, prompts: Sequence[Sequence[int]], settings: DecodeSettings, keys: Sequence[str],
    stop: Sequence[str] = (), max_new: Sequence[int] | None = None, on_token: OnToken | None = None,
) -> tuple[list[Spoken], Counts]:  # fmt: skip
    """Answers to `prompts` (token ids), in their order, with what they took.

    `keys`: with `settings.seed` and the position they fix each draw, whatever else is in the batch; `max_new`: tokens
    of each prompt, at most (None: `settings.max_new_tokens`); `on_token` is called for each token as it is fixed.
    Raises BadInputError for an empty prompt, one that leaves no room in the context, an unknown mode or expert;
    EngineError where an expert gives no finite numbers.
    """
    kind = BlockDecoder if settings.accelerate else Decoder
    decoder = kind(model, prompts, settings, keys, stop, max_new, on_token)
    started = time.perf_counter()
    spoken = decoder.run()
    decoder.counts.seconds = time.perf_counter() - started
    return spoken, decoder.counts


def prompt_log_probs(model: Any, prompts: Sequence[Sequence[int]], batch_size: int = BATCH) -> np.ndarray:
    """Mean log-probability of each prompt's tokens but the first under each expert, float64 [prompts, M].

    exp of minus it is the prompt's perplexity; a prompt of one token gives 0.
    """
    found = np.zeros((len(prompts), len(model.experts)))
    for m, expert in enumerate(model.experts):
        passes = open_passes(expert, model.vocabulary, batch_size, max(map(len, prompts), default=1))
        for first in range(0, len(prompts), batch_size):
            batch = [np.array(prompt, dtype=np.int64) for prompt in prompts[first : first + batch_size]]
            width = max(map(len, batch))
            ids = np.stack([np.pad(one, (0, width - len(one))) for one in batch])
            hidden = passes(range(len(batch)), ids, np.zeros(len(batch), dtype=np.int64))
            for row, one in enumerate(batch):
                if len(one) > 1:
                    found[first + row, m] = _log_probs(passes, hidden[row, : len(one) - 1], one[1:]).mean()
    return found


def _log_probs(passes: Passes, hidden: torch.Tensor, targets: np.ndarray) -> np.ndarray:
    """Log-probabilities [n] of `targets` [n] after states [n, H]: in float32, some rows of the vocabulary at a time."""
    import torch

    parts = []
    for start in range(0, len(targets), LOGITS):
        logits = passes.logits(hidden[start : start + LOGITS]).float()
        at = torch.from_numpy(targets[start : start + LOGITS]).to(logits.device)
        own = logits.gather(1, at[:, None]).squeeze(1)
        parts.append((own - torch.logsumexp(logits, dim=-1)).cpu().numpy().astype(np.float64))
    return np.concatenate(parts)
