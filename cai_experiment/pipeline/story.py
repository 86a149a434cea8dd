"""What the content log says of one finished example: every stage whole, in the order in which it happened."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Mapping, Sequence

from cai_experiment.constitution.principles import Principle
from cai_experiment.judging.judge import Verdict
from cai_experiment.observe.content_logger import LAST_STAGES, PLACE, TEXTS, ContentLogger
from cai_experiment.observe.screen import evaluation, pair_created
from cai_experiment.pipeline.stages import Draft, RoundDraft
from cai_experiment.records.schema import Example

CREATED, REJECTED = LAST_STAGES
CROSS = "✗ "  # before the reasons against an example
_QUOTED = re.compile(r'"([^"\n]{2,200})"|“([^”\n]{2,200})”|(?<!\w)\'([^\'\n]{2,200})\'(?!\w)')


def logged_examples(path: Path) -> dict[str, str]:
    """How the examples end (see `ending`) whose story earlier sessions wrote into the content log at `path`, by id."""
    ends: dict[str, str] = {}
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if CREATED in line or REJECTED in line:
                    ends |= _end_in(line)
    return ends


def _end_in(line: str) -> dict[str, str]:
    """{id: ending} of a log line that ends an example's story; nothing of any other line."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    if not isinstance(entry, dict) or entry.get("stage") not in LAST_STAGES or "example" not in entry["metadata"]:
        return {}
    reasons = entry["content"].removeprefix(CROSS).partition(":")[0] if entry["stage"] == REJECTED else ""
    return {str(entry["metadata"]["example"]): sys.intern(reasons)}


def ending(example: Example) -> str:
    """What the log says at an example's end: the reasons against it, "" for a pair."""
    return ", ".join(example.reject_reasons)


class Story:
    """Tells of examples as they are written, in their order."""

    def __init__(
        self, logger: ContentLogger, path: Path, principles: Sequence[Principle], pairs: int | None = None
    ) -> None:
        """`path` is the content log's, with what earlier sessions told. What follows on so many `pairs` may not stay in
        the files, and is not told."""
        self._logger, self._principles, self._pairs = logger, principles, pairs
        self._told = logged_examples(path)
        self._accepted = 0

    def tell(self, draft: Draft, example: Example, place: tuple[int, int], seconds: float) -> None:
        """Log the stages of one example; of one that was told before only its end, where that has changed.

        A pair's end changes when the guard has read it. `place` is (3, 20): the instruction's number, and
        the pairs wanted; `seconds` it took from its first prompt on.
        """
        stays = self._pairs is None or self._accepted < self._pairs
        self._accepted += not example.reject_reasons
        known = self._told.get(example.id)
        if not stays or known == ending(example):
            return
        if known is None:
            self._tell_stages(draft, example, place)
        self._tell_end(draft, example, place, seconds)

    def _tell_stages(self, draft: Draft, example: Example, place: tuple[int, int]) -> None:
        about = {"example": example.id, PLACE: _sampled_by(place)}
        self._logger.log_stage(
            f"TRAINING-EXAMPLE {place[0]}/{max(place)}", f'Prompt: "{example.instruction}"',
            about | {"source": draft.instruction.source, TEXTS: [example.instruction]},
        )  # fmt: skip
        self._logger.log_stage(
            "INITIAL-GENERATION", f'Base model (before training):\n"{example.initial_answer}"',
            about | {"model": example.meta["generator"], TEXTS: [example.initial_answer]},
        )  # fmt: skip
        for number, one in enumerate(draft.rounds):
            if number == 0:
                text, _ = _before(self._principles, one, example.initial_answer)
                self._logger.log_stage("INITIAL-EVALUATION", text, about | {"round": number})
            _tell_round(self._logger, self._principles, one, about | {"round": number}, example)

    def _tell_end(self, draft: Draft, example: Example, place: tuple[int, int], seconds: float) -> None:
        about = {"example": example.id, PLACE: _sampled_by(place)}
        if example.reject_reasons:
            text = CROSS + ending(example) + (f": {draft.error}" if draft.error else "")
            self._logger.log_stage(REJECTED, text, about)
            return
        _, before = _before(self._principles, draft.rounds[0], "")
        after = sum(p.weight for p in _violated(self._principles, _final(draft)))
        self._logger.log_stage(CREATED, pair_created(before, after, seconds), about)


def _sampled_by(place: tuple[int, int]) -> str:
    """What level 2 samples by: the goal, also beyond it (more instructions are drawn than pairs are wanted)."""
    return f"{place[0]}/{place[1]}"


def _tell_round(
    logger: ContentLogger, principles: Sequence[Principle], draft: RoundDraft, about: Mapping[str, object],
    example: Example,
) -> None:  # fmt: skip
    """Log one round from its critique on, as far as it came."""
    principle = {} if not draft.direct else {"principle": draft.principle.id}
    if not draft.direct:
        _tell_critique(logger, draft, about, example)
    if draft.revised_answer:
        text, facts = f'Revised output:\n"{draft.revised_answer}"', {**principle, TEXTS: [draft.revised_answer]}
        logger.log_stage("REVISION-GENERATION", text, {**about, **facts})
    if draft.verdict_after is not None:
        logger.log_stage("REVISION-EVALUATION", _after(principles, draft)[0], about)


def _tell_critique(
    logger: ContentLogger, draft: RoundDraft, about: Mapping[str, object], example: Example
) -> None:  # fmt: skip
    text = f"Principle: {draft.principle.text}\nCritique by {example.meta['critic']}:\n\"{draft.critique}\""
    meaningful = draft.meaningful.answer if draft.meaningful else "not asked"
    facts = {"principle": draft.principle.id, "abstained": draft.abstained, "meaningful": meaningful}
    logger.log_stage("CRITIQUE-GENERATION", text, {**about, **facts, TEXTS: [draft.principle.text, draft.critique]})


def _before(principles: Sequence[Principle], draft: RoundDraft, answer: str) -> tuple[str, float]:
    """See `_evaluation`, of the `answer` before a round; the critique points at its words."""
    quoted = {draft.principle.id: quotes(draft.critique, answer)}
    return _evaluation(principles, draft.judged_before, draft.weighed_before, quoted)


def _after(principles: Sequence[Principle], draft: RoundDraft) -> tuple[str, float]:
    """See `_evaluation`, of the answer after a round that was judged."""
    assert draft.verdict_after is not None
    # what was judged before and not asked again stands as it was: a revision leaves it alone
    judged = draft.judged_before | {draft.principle.id: draft.verdict_after}
    return _evaluation(principles, judged, draft.weighed_before)


def _final(draft: Draft) -> dict[str, Verdict]:
    """What is known of a pair's chosen answer, by principle id; as in `_after`, what was not asked again stands."""
    asked = {one.principle.id: one.final_verdict for one in draft.revisions if one.final_verdict is not None}
    return draft.rounds[-1].judged_before | asked


def _evaluation(
    principles: Sequence[Principle], verdicts: Mapping[str, Verdict], weighed: int,
    quoted: Mapping[str, Sequence[str]] | None = None,
) -> tuple[str, float]:  # fmt: skip
    """The judge's findings as text, and the sum of the weights of the principles found violated.

    Behind each stands the reason: the answer's words that the critique quotes, or how sure the judge was.
    """
    violated = _violated(principles, verdicts)
    score = sum(p.weight for p in violated)
    found = [f"{p.name}: {_reason(verdicts[p.id], (quoted or {}).get(p.id, ()))}" for p in violated]
    return evaluation(found, score, weighed), score


def _reason(verdict: Verdict, quoted: Sequence[str]) -> str:
    if quoted:
        return ", ".join(f'"{words}"' for words in quoted)
    return f"the judge says yes, by {verdict.logit:.1f} nats" if verdict.logit else "the judge says yes"


def quotes(critique: str, answer: str) -> list[str]:
    """The words between quotation marks in `critique` that really stand in `answer`, each once."""
    found = (next(filter(None, match.groups())) for match in _QUOTED.finditer(critique))
    return list(dict.fromkeys(words for words in found if words in answer))


def _violated(principles: Sequence[Principle], verdicts: Mapping[str, Verdict]) -> list[Principle]:
    return [p for p in principles if p.id in verdicts and verdicts[p.id].answer == "yes"]
