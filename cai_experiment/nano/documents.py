"""A conversation as a training document: pieces of text in either layout, each with its weight in the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Sequence

from cai_experiment.constitution.prompts import BASE_END, Turn, render_base
from cai_experiment.constitution.worked_examples import examples_for

# a critique decides in its first tokens (object or abstain, which sentence), and so does a revision (the same opener)
LEAD_TOKENS, LEAD_WEIGHT, LED = 5, 6.0, ("critique", "revision")
OPENER_TOKENS, OPENER_WEIGHT = 16, 5.0  # of an answer, in the last course: they copy what the question is about
FOCAL = ("critique", "revision", "verdict")  # in the last course: a quote is easy but for the one word that varies


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a document: its text, whether it is markup (special tokens allowed), and its weight in the loss."""

    text: str
    markup: bool
    weight: float
    lead: float = 1.0  # multiplies the weight of the first `lead_tokens` tokens
    lead_tokens: int = 0
    focal: bool = False  # each token's loss counts by how unlikely it still is (train.loss_of)


Weighted = tuple[Turn, float]


def _spoken(turn: Turn, weight: float, last_course: bool) -> Piece:
    """The piece of a turn's text in ChatML, its first tokens and its difficulty weighed as its kind asks for."""
    if turn.kind == "answer" and last_course and weight < 1.0:  # a sum's or a list's weighs more
        return Piece(turn.text, False, weight, OPENER_WEIGHT, OPENER_TOKENS)
    focal = last_course and turn.kind in FOCAL
    return Piece(turn.text, False, weight, LEAD_WEIGHT if turn.kind in LED else 1.0, LEAD_TOKENS, focal)


def chat_pieces(turns: Sequence[Weighted], last_course: bool = False) -> list[Piece]:
    """ChatML, as the tokenizer's chat template renders it; the end token has the weight of its turn."""
    pieces = []
    for turn, weight in turns:
        pieces += [
            Piece(f"<|im_start|>{turn.role}\n", True, 0.0),
            _spoken(turn, weight, last_course),
            Piece("<|im_end|>", True, weight if turn.role == "assistant" else 0.0),
            Piece("\n", True, 0.0),
        ]
    return pieces


def base_pieces(turns: Sequence[Weighted], examples: int, bare: bool, last_course: bool = False) -> list[Piece]:
    """The base layout with its first `examples` worked examples; `bare` ends in <|endoftext|>, as DPO's prompt does."""
    first = turns[0][0]
    shown = (
        () if bare else examples_for("written_instruction" if first.kind == "task" else "verdict", [first])[:examples]
    )
    pieces = [Piece(s.text, s.markup, 0.0) for s in render_base((), None, shown)]
    for i, (turn, weight) in enumerate(turns):
        head, text, blank = render_base([turn], None)
        last = i == len(turns) - 1
        focal = last_course and turn.kind in FOCAL
        pieces += [Piece(head.text, True, 0.1 if i else 0.0), Piece(text.text, False, weight, focal=focal)]
        pieces.append(
            Piece(
                BASE_END if bare and last else blank.text,
                True,
                weight if turn.role == "assistant" else 0.0,
            )
        )
    return pieces if bare else [*pieces, Piece("###\n\n", True, 1.0)]
