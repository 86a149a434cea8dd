"""Forward passes of one expert over the rows of a batch, each row with keys and values of its own.

`lean.py` serves Qwen2 and its like; `HfPasses` below serves every other causal language model of transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Sequence

import numpy as np

if TYPE_CHECKING:
    import torch

    from cai_experiment.ensemble.experts import Expert


class Passes(Protocol):
    """What decoding asks of an expert. A row holds the first tokens of a text; nothing is read beyond them."""

    def __call__(self, rows: Sequence[int], ids: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        """Last hidden states [R, T, H] of tokens `ids` [R, T], which stand in `rows` from positions `starts` [R] on.

        What a row held from its start on is forgotten (rejected tokens, another text) and these tokens are kept.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, V] over the shared vocabulary."""

    exact: bool  # a token has the same bits alone, in a block and in any batch: on a CPU in float32, if at all

    def quick(self, row: int, token: int, place: int) -> torch.Tensor:
        """The hidden state [1, H] of one token, kept like the others; its last bits may be others than a block's."""

    def quick_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[1, H] -> [1, V], likewise."""


def open_passes(expert: Expert, vocabulary: int, rows: int, length: int) -> Passes:
    """Passes of an expert over `rows` rows of at most `length` tokens, drafts included.

    `vocabulary`: how many first tokens are shared; what the model's output layer has beyond them is cut off.
    """
    from cai_experiment.ensemble.lean import LeanPasses, weights_of

    weights = weights_of(expert.model)
    return HfPasses(expert, vocabulary, rows) if weights is None else LeanPasses(weights, vocabulary, rows, length)


class HfPasses:
    """Through the model's own forward pass, row by row with caches that are cropped: slower, for all architectures."""

    exact = False

    def __init__(self, expert: Expert, vocabulary: int, rows: int) -> None:
        self.expert, self.vocabulary = expert, vocabulary
        self.caches: list[Any] = [None] * rows

    def __call__(self, rows: Sequence[int], ids: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        """See `Passes`."""
        import torch

        each = [self._one(row, line, int(start)) for row, line, start in zip(rows, ids, starts, strict=True)]
        return torch.cat(each)

    def _one(self, row: int, ids: np.ndarray, start: int) -> torch.Tensor:
        import torch
        from transformers import DynamicCache

        model = self.expert.model
        if start == 0:
            self.caches[row] = DynamicCache(config=model.config)
            if hasattr(
                self.caches[row], "activate_past_recording"
            ):  # sliding windows forget, unless they are told not to
                self.caches[row].activate_past_recording()
        cache = self.caches[row]
        if (held := cache.get_seq_length()) > start:
            cache.crop(start - held)  # how many to drop, as a negative number
        tokens = torch.from_numpy(np.ascontiguousarray(ids[None], dtype=np.int64)).to(model.device)
        positions = torch.arange(start, start + len(ids), device=tokens.device)[None]
        with torch.inference_mode():
            out = model.base_model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
        states: torch.Tensor = out[0]
        return states

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Passes`."""
        import torch

        with torch.inference_mode():
            return self.expert.logits(hidden)[:, : self.vocabulary]

    def quick(self, row: int, token: int, place: int) -> torch.Tensor:
        """See `Passes`; the same pass here."""
        return self._one(row, np.array([token]), place)[:, 0]

    quick_logits = logits
