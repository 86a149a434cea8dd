"""Rows of text as token ids: what the experts read, and which of the tokens count in the loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cai_experiment.ensemble.data import Row

BATCH = 1000  # texts handed to the tokenizer at once


@dataclass(frozen=True, slots=True)
class EncodedRow:
    """One row's tokens. The tokens from `start` on count: each is predicted at the place before it."""

    id: str
    dataset: str
    ids: tuple[int, ...]
    start: int

    @property
    def counted(self) -> int:
        """How many tokens count."""
        return len(self.ids) - self.start


def encode_rows(
    rows: Iterable[Row], tokenizer: Any, max_length: int, train_on_prompt: bool = False
) -> tuple[list[EncodedRow], list[str]]:
    """(encoded rows, ids of those that were left out because they have more than `max_length` tokens).

    Prompt and answer are encoded apart, as decoding sees them: the prompt first, then one token of the answer after
    the other; the end token is the answer's last. No text becomes a control token. With `train_on_prompt` every token
    but the first counts.
    """
    encoded: list[EncodedRow] = []
    dropped: list[str] = []
    iterator = iter(rows)
    while part := list(islice(iterator, BATCH)):
        prompts = tokenizer([row.prompt for row in part], split_special_tokens=True).input_ids
        answers = tokenizer(
                [row.answer for row in part], add_special_tokens=False, split_special_tokens=True
            ).input_ids
        for row, prompt, answer in zip(part, prompts, answers, strict=True):
            ids = (*prompt, *answer, tokenizer.eos_token_id)
            if len(ids) > max_length:
                dropped.append(row.id)
            else:
                encoded.append(EncodedRow(row.id, row.dataset, ids, 1 if train_on_prompt else max(len(prompt), 1)))
    return encoded, dropped


def sha256_of(rows: Sequence[EncodedRow]) -> str:
    """SHA-256 over the rows' tokens and which of them count, in order; neither ids nor names of datasets matter."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.start, row.ids]).encode())
    return digest.hexdigest()


def text_sha256(rows: Iterable[Row]) -> str:
    """SHA-256 over the rows' prompts and answers, in order: known before a tokenizer is loaded."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.dataset, row.prompt, row.answer], ensure_ascii=True).encode())
    return digest.hexdigest()
