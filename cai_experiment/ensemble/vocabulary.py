"""One vocabulary for all experts: token by token, or a line that names the first token that differs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError

if TYPE_CHECKING:
    from cai_experiment.ensemble.experts import Expert

NEXT = "an ensemble needs models of one family; name others with --models"


def shared_vocabulary(experts: Sequence[Expert]) -> int:
    """The number of tokens that all experts share: ids 0 to it - 1 mean the same to each of them.

    Embeddings may have more rows than the tokenizer has tokens (padding), and a tokenizer may end in added tokens that
    others lack: what lies beyond is cut off. Raises BadInputError naming the first differing token and both models.
    """
    first, *others = experts
    tokens = _tokens(first.tokenizer)
    sizes = [_size(first, tokens)]
    for other in others:
        theirs = _tokens(other.tokenizer)
        sizes.append(_size(other, theirs))
        common = min(len(tokens), len(theirs))
        if tokens[:common] != theirs[:common]:
            at = next(i for i in range(common) if tokens[i] != theirs[i])
            raise _differ(at, tokens[at], theirs[at], first, other)
        for longer, names, shorter in ((first, tokens, other), (other, theirs, first)):
            _check_rest(longer, names, common, shorter)
    shared = min(sizes)
    for expert in experts:
        _check_ends(expert, shared)
    return shared


def _tokens(tokenizer: Any) -> list[str | None]:
    """Every id's token as the tokenizer writes it; None for an id without one."""
    vocabulary = tokenizer.get_vocab()
    tokens: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
    for token, at in vocabulary.items():
        tokens[at] = token
    return tokens


def _size(expert: Expert, tokens: Sequence[str | None]) -> int:
    return min(len(tokens), int(expert.model.get_output_embeddings().weight.shape[0]))


def _check_rest(longer: Expert, tokens: Sequence[str | None], common: int, shorter: Expert) -> None:
    """Beyond the shorter vocabulary only added tokens (chat marks, padding) may stand: they can be cut off."""
    added = longer.tokenizer.added_tokens_decoder
    at = next((i for i in range(common, len(tokens)) if tokens[i] is not None and i not in added), None)
    if at is not None:
        raise _differ(at, tokens[at], None, longer, shorter)


def _check_ends(expert: Expert, shared: int) -> None:
    """An expert whose end token is cut off could never end an answer."""
    ends = [end for end in expert.eos_ids if end >= shared]
    if ends and len(ends) == len(expert.eos_ids):
        message = f"{expert.name} ends its texts with token {ends[0]}, which not every expert has (they share {shared})"
        raise BadInputError(message, NEXT)


def _differ(at: int, left: str | None, right: str | None, one: Expert, other: Expert) -> BadInputError:
    words = [f"{token!r} in {expert.name}" if token is not None else f"nothing in {expert.name}"
             for token, expert in ((left, one), (right, other))]  # fmt: skip
    return BadInputError(f"token {at} is {words[0]} and {words[1]}: the vocabularies differ", NEXT)
