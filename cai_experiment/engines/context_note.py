"""Does a model's context hold the chain (answer, critique, revision)? Said before the first token."""

from __future__ import annotations

from cai_experiment.constitution.prompts import Turn
from cai_experiment.constitution.worked_examples import examples_for
from cai_experiment.engines.render import PromptTooLong, Renderer
from cai_experiment.models.workload import (
    ANSWER_TOKENS,
    CRITIQUE_REQUEST,
    CRITIQUE_TOKENS,
    INSTRUCTION_PROMPT,
    REVISION_REQUEST,
)

STEP = 20  # tokens between the lengths that are tried


def context_note(name: str, renderer: Renderer, answer: int, critique: int) -> str:
    """One line, or "" where a revision of an answer of `answer` tokens and a critique of `critique` fits.

    Also says how many worked examples of the base layout an average revision keeps: they are dropped to make room.
    """
    longest = next((size for size in range(answer, 0, -STEP) if _fits(renderer, size, critique, size, 0)), 0)
    if longest == answer:
        return ""
    line = (f"{name}: a context of {renderer.max_length:,} tokens does not hold the revision of an answer of {answer} "
            f"tokens; up to {longest} it does (--max-tokens-answer {max(longest, 1)}), longer ones are rejected as "
            "prompt_too_long")  # fmt: skip
    turns = _turns(renderer, ANSWER_TOKENS, CRITIQUE_TOKENS)
    known = len(examples_for("revision", turns)) if renderer.layout == "base" else 0
    if not known:
        return line
    counts = range(known, -1, -1)
    kept = next((n for n in counts if _fits(renderer, ANSWER_TOKENS, CRITIQUE_TOKENS, answer, n)), 0)
    return f"{line}; {kept} of {known} worked examples fit beside an answer of {ANSWER_TOKENS}"


def _fits(renderer: Renderer, answer: int, critique: int, new: int, examples: int) -> bool:
    try:
        renderer.prompt_ids(_turns(renderer, answer, critique), "revision", examples=examples, max_tokens=new)
    except PromptTooLong:
        return False
    return True


def _turns(renderer: Renderer, answer: int, critique: int) -> tuple[Turn, ...]:
    """A conversation up to its revision, of texts of about these many tokens."""
    each = len(renderer.encode(" so" * 100, False)) / 100
    sizes = {"instruction": INSTRUCTION_PROMPT, "answer": answer, "critique_request": CRITIQUE_REQUEST,
             "critique": critique, "revision_request": REVISION_REQUEST}  # fmt: skip
    return tuple(Turn(kind, " so" * max(1, int(size / each))) for kind, size in sizes.items())
