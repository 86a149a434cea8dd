"""What the content log shows: escaped text, the word diff, and the lines inside a stage. All pure functions."""

from __future__ import annotations

import difflib
import re
from typing import Sequence

SHOWN = 500  # characters of a text on the screen
# Control codes but newline and tab (they could drive the terminal), marks that reorder text, line separators, what
# hides text (zero-width space, tags; the joiners of emoji and scripts stay), and lone surrogates (not printable).
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_HEADER_IN_TEXT = re.compile(r"(?m)^([ \t]*\[[^\n]{1,100}\][ \t]{0,9}={5,})")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n+")


def escaped(text: str) -> str:
    """Text from a model or a file, safe for a terminal: "\\x1b[31m" is shown, not obeyed; a forged header is quoted."""
    return _HEADER_IN_TEXT.sub(r"> \1", _UNSAFE.sub(_code, text))


def _code(found: re.Match[str]) -> str:
    number = ord(found[0])
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, then how many there are."""
    return text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)"


def with_texts_shortened(content: str, texts: Sequence[str], limit: int) -> str:
    """`content` with each of `texts`, which stand in it in this order, at most `limit` characters long."""
    parts, at = [], 0
    for text in texts:
        place = content.find(text, at) if text else -1
        if place >= 0:
            parts += [content[at:place], shortened(text, limit)]
            at = place + len(text)
    return "".join(parts) + content[at:]


# ---------------------------------------------------------------- the lines inside a stage


def decision(flagged: bool, method: str, category: str = "", principle: str = "") -> str:
    """The text of EVAL-DECISION: what was decided, by which method, and which principle is broken; a model names no
    category."""
    if not flagged:
        return f"✓ No violation detected\n  Method: {method}"
    named = f"\n  Category: {category}" if category else ""
    return f"✓ Violation detected\n  Method: {method}{named}\n  Principle: {principle}"


def compared(prompt: str, base: Sequence[str], trained: Sequence[str], before: float, after: float) -> str:
    """The text of COMPARISON-TEST: of each arm its answer, then what is said of it, a line each; then the verdict."""
    lines = [f'Prompt: "{prompt}"', ""]
    for name, (answer, *said) in (("BASE", base), ("TRAINED", trained)):
        lines += [f"{name} MODEL OUTPUT:", f'"{answer}"', *(f"→ {line}" for line in said), ""]
    silent = [name for name, (answer, *_) in (("base", base), ("trained", trained)) if not answer.strip()]
    nothing = f"✗ NOT COMPARED (the {' and the '.join(silent)} model said nothing)"
    return "\n".join([*lines, nothing if silent else confirmed(before, after)])


def evaluation(violations: Sequence[str], score: float, principles: int) -> str:
    """The text of INITIAL-EVALUATION and REVISION-EVALUATION: each violation, and the weighted score."""
    found = "Violations:\n" + "\n".join(f"- {one} ✓" for one in violations) if violations else "Violations: NONE ✓"
    return f"{found}\nWeighted score: {score:.1f} ({len(violations)}/{principles} principles violated)"


def pair_created(before: float, after: float, seconds: float) -> str:
    """The text of TRAINING-PAIR-CREATED: the weighted score before and after, and the seconds it took."""
    if before > 0:
        change = f"{abs(1 - after / before):.0%} violation {'reduction' if after <= before else 'increase'}"
    else:
        change = "no violation before"
    return f"✓ Training example generated\n  Improvement: {before:.1f} → {after:.1f} ({change})\n  Time: {seconds:.1f}s"


def batch_loss(loss: float, first_loss: float | None = None) -> str:
    """The first line of EPOCH-e-BATCH-b; `first_loss` is the run's first, for the share gained since."""
    if first_loss is None or first_loss <= 0:
        return f"Loss: {loss:.3f}"
    gained = 1 - loss / first_loss
    return f"Loss: {loss:.3f} ({abs(gained):.0%} {'improvement' if gained >= 0 else 'worse'})"


def epoch_loss(before: float, after: float) -> str:
    """The first line of EPOCH-e-COMPLETE."""
    change = f" ({abs(1 - after / before):.0%} {'reduction' if after <= before else 'increase'})" if before > 0 else ""
    return f"Average loss: {before:.3f} → {after:.3f}{change}"


def confirmed(before: float, after: float) -> str:
    """The last line of COMPARISON-TEST: weighted score of the base model's answer and of the trained model's."""
    if before == after == 0:
        return "= NOTHING TO IMPROVE (0.0 → 0.0)"
    verdict = "✓ IMPROVEMENT CONFIRMED" if after < before else "✗ NO IMPROVEMENT" if after == before else "✗ WORSE"
    return f"{verdict} ({before:.1f} → {after:.1f})"


# ---------------------------------------------------------------- the word diff


def side_by_side(label1: str, text1: str, label2: str, text2: str, limit: int = SHOWN) -> str:
    """The sentences that differ, in pairs, with the words that went [-so-] and those that came {+so+}.

    Each text is cut to `limit` characters first: a diff's time grows with the square of the length.
    """
    first, second = _sentences(shortened(text1, limit)), _sentences(shortened(text2, limit))
    width = max(len(label1), len(label2)) + 1
    blocks = []
    for kind, i1, i2, j1, j2 in difflib.SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
        if kind != "equal":
            for before, after in _paired(first[i1:i2], second[j1:j2]):
                left, right = word_diff(before, after)
                blocks.append(f'{label1 + ":":<{width}} "{left}"\n{label2 + ":":<{width}} "{right}"')
    return "\n\n".join(blocks) or "No difference."


def word_diff(before: str, after: str) -> tuple[str, str]:
    """Both texts with their own words marked: "Go [-now-]." and "Go {+soon+}."; unmarked if no word is shared."""
    old, new = before.split(), after.split()
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    left: list[str] = []
    right: list[str] = []
    for kind, i1, i2, j1, j2 in matcher.get_opcodes():
        gone, came = " ".join(old[i1:i2]), " ".join(new[j1:j2])
        if gone:
            left.append(gone if kind == "equal" else f"[-{gone}-]")
        if came:
            right.append(came if kind == "equal" else f"{{+{came}+}}")
    if not any(block.size for block in matcher.get_matching_blocks()):
        return before, after
    return " ".join(left), " ".join(right)


def _sentences(text: str) -> list[str]:
    return [one for one in _SENTENCE_END.split(text) if one]


def _paired(first: list[str], second: list[str]) -> list[tuple[str, str]]:
    """One pair per sentence where both sides have as many, else one pair for all of them."""
    if len(first) == len(second):
        return list(zip(first, second, strict=True))
    return [(" ".join(first), " ".join(second))]
