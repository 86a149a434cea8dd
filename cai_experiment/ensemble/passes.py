"""Forward passes of one expert over the rows of a batch, each row with keys and values of its own.

`lean.py` serves Qwen2 and its like; `HfPasses` below serves every other causal language model of transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Sequence

import numpy as np

if TYPE_CHECKING:
    import torch


class Passes(Protocol):
    """What decoding asks of an expert. A row holds the first tokens of a text; nothing is read beyond them."""

    def __call__(self, rows: Sequence[int], ids: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        """Last hidden states [R, T, H] of tokens `ids` [R, T], which stand in `rows` from positions `starts` [R] on.

        What a row held from its start on is forgotten (rejected tokens, another text) and these tokens are kept.
        """

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, V] over the shared vocabulary."""


def open_passes(model: Any, vocabulary: int, rows: int, length: int) -> Passes:
    """Passes of a transformers causal language model over `rows` rows of at most `length` tokens.

    `vocabulary`: how many first tokens are shared; what the model's head has beyond them is cut off.
    """
    return HfPasses(model, vocabulary, rows)


class HfPasses:
    """Through the model's own forward pass, row by row with a cache that is cropped."""

    def __init__(self, model: Any, vocabulary: int, rows: int) -> None:
        self.model, self.vocabulary = model, vocabulary
        self.caches: list[Any] = [None] * rows

    def __call__(self, rows: Sequence[int], ids: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        """See `Passes`."""
        import torch

        with torch.inference_mode():
            each = [self._one(row, line, int(start)) for row, line, start in zip(rows, ids, starts, strict=True)]
            return torch.cat(each)

    def _one(self, row: int, ids: np.ndarray, start: int) -> torch.Tensor:
        import torch
        from transformers import DynamicCache

        if start == 0:
            self.caches[row] = DynamicCache(config=self.model.config)
        cache = self.caches[row]
        if (held := cache.get_seq_length()) > start:
            cache.crop(start - held)  # a negative number is what to drop, in all versions
        tokens = torch.from_numpy(np.ascontiguousarray(ids[None], dtype=np.int64)).to(self.model.device)
        positions = torch.arange(start, start + len(ids), device=tokens.device)[None]
        out = self.model.get_decoder()(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
        return out.last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Passes`."""
        import torch

        with torch.inference_mode():
            return self.model.get_output_embeddings()(hidden)[:, : self.vocabulary]
