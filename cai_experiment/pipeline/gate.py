"""The gate: which pairs may train a model. Pure functions; every refusal is a named, counted reason.

Revisions resemble the answers they revise, and pairs that hardly differ, announce themselves ("Sure, here is the
revised answer") or turn help into a bare refusal teach DPO the wrong thing. Measures are of texts as written;
verdicts are the judge's, in both orders, and a principle's second one is about the answer that is chosen in the end.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Iterable, Sequence

from cai_experiment.constitution.wording import has_meta_prefix, is_bare_refusal, is_refusal
from cai_experiment.errors import BadInputError

REASONS: dict[str, str] = {
    "empty": "the model wrote nothing where an answer, critique or revision was due",
    "too_long": "a text hit its token limit, so it does not end by itself",
    "prompt_too_long": "a prompt did not fit the context, even as a separate stage prompt",
    "engine_error": "the engine failed three times on one prompt, or refused it (its words in meta.error)",
    "no_violation_found": "the critic abstained in every round (without critiques: the judge found nothing broken)",
    "identical": "the revision is the first answer",
    "near_identical": "the revision hardly differs from the first answer",
    "meta_prefix": "the revision talks about itself or an earlier answer (\"Here is the revised answer\")",
    "refusal_as_revision": "the revision is a bare refusal where the first answer was none",
    "length_ratio": "the revision is far shorter or longer than the first answer",
    "verdict_unchanged": "for no principle did the judge go from \"yes, it is broken\" to \"no\" on the last revision",
    "contradicts_principle": "the judge says the last revision breaks a principle that the answer was revised for",
    "judge_undecided": "the judge's two orders disagree, and no principle is clearly mended",
    "judge_unparsed": "a verdict came without usable probabilities, and no principle is clearly mended",
    "guard_unsafe": "the guard model calls the revision unsafe (category in meta.guard)",
    "guard_unparsed": "the guard gave no verdict that can be read (its reply in meta.guard)",
    "length_surplus": "left out by --match-lengths, though it passed the gate",
}  # fmt: skip
NO_PAIR = frozenset({"empty", "too_long", "prompt_too_long", "engine_error", "no_violation_found", "identical"})
MOST_ALIKE = 20_000  # pairs of places with the same word; two human texts of 1,500 words have about 12,000
CANNOT_SKIP = NO_PAIR | {"guard_unsafe", "guard_unparsed", "length_surplus"}  # these have flags of their own


@dataclass(frozen=True, slots=True)
class GateSettings:
    """Thresholds of the gate. `skip` names reasons that are not applied."""

    max_similarity: float = 0.97  # word-level; one changed sentence in a 300-word answer still gives about 0.95
    min_length_ratio: float = 0.4  # characters of the revision over those of the first answer
    max_length_ratio: float = 2.5
    max_refusal_words: int = 40  # a longer revision that begins with a refusal goes on to help
    min_judge_margin: float = 0.0  # nats of log-odds, averaged over both orders; a weaker verdict counts as undecided
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for reason in self.skip:
            if reason not in REASONS or reason in CANNOT_SKIP:
                allowed = ", ".join(sorted(set(REASONS) - CANNOT_SKIP))
                raise BadInputError(f"the gate has no reason {reason!r} that can be skipped", f"use one of {allowed}")


def gate(before: str, after: str, verdicts: Sequence[tuple[str, str]], settings: GateSettings) -> list[str]:
    """Reasons against the pair (chosen `after`, rejected `before`), in REASONS' order; an empty list accepts it.

    `verdicts` holds, for each principle that was revised for, what the judge said before its round and what it says of
    `after`: "yes" (it breaks the principle), "no", "undecided" or "unparsed".
    """
    found = {*text_reasons(before, after, settings), *verdict_reasons(verdicts)}
    return in_order(found - set(settings.skip))


def in_order(reasons: Iterable[str]) -> list[str]:
    """`reasons` in the order of REASONS, so that files do not depend on the order of checks."""
    return sorted(reasons, key=list(REASONS).index)


def text_reasons(before: str, after: str, settings: GateSettings) -> set[str]:
    """What the two texts alone say against the pair."""
    if not before.strip() or not after.strip():
        return {"empty"}
    if " ".join(before.split()) == " ".join(after.split()):
        return {"identical"}
    checks = {
        "near_identical": similarity(before, after) > settings.max_similarity,
        "meta_prefix": has_meta_prefix(after) and not has_meta_prefix(before),
        "refusal_as_revision": is_bare_refusal(after, settings.max_refusal_words) and not is_refusal(before),
        "length_ratio": not settings.min_length_ratio <= len(after) / len(before) <= settings.max_length_ratio,
    }
    return {reason for reason, applies in checks.items() if applies}


def verdict_reasons(verdicts: Sequence[tuple[str, str]]) -> set[str]:
    """What the judge says against the pair. One clear repair (yes to no) is enough, if none is broken at the end.

    So a later round that merely polishes (no to no) does not cost the example.
    """
    reasons = {"contradicts_principle"} if any(final == "yes" for _, final in verdicts) else set()
    if ("yes", "no") in verdicts:
        return reasons
    spoken = {answer for pair in verdicts for answer in pair}
    if "unparsed" in spoken:
        return reasons | {"judge_unparsed"}
    return reasons | {"judge_undecided" if "undecided" in spoken else "verdict_unchanged"}


def similarity(before: str, after: str) -> float:
    """Share of words that both texts have in the same order: 2 * matches / total words (Ratcliff-Obershelp), 0 to 1.

    Of two loops ("the the the ...") its time would grow with the cube of their length, so there the order is not
    looked at: that share is an upper bound, and the same for one repeated phrase.
    """
    one, two = before.split(), after.split()
    matcher = SequenceMatcher(None, one, two, autojunk=False)
    counts, others = Counter(one), Counter(two)
    alike = sum(count * others[word] for word, count in counts.items())  # pairs of places with the same word
    return matcher.ratio() if alike <= MOST_ALIKE else matcher.quick_ratio()
