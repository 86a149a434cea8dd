"""What the content log says of one finished example: every stage whole, in the order in which it happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Mapping, Sequence

from cai_experiment.constitution.principles import Principle
from cai_experiment.judging.judge import Verdict
from cai_experiment.observe.content_logger import LAST_STAGES, ContentLogger
from cai_experiment.observe.screen import evaluation, pair_created
from cai_experiment.pipeline.stages import Draft, RoundDraft
from cai_experiment.records.schema import Example

CREATED, REJECTED = LAST_STAGES


def logged_examples(path: Path) -> set[str]:
    """Ids of the examples whose whole story an earlier session wrote into the content log at `path`."""
    if not path.exists():
        return set()
    ids: set[str] = set()
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if CREATED in line or REJECTED in line:
                ids.add(_example_of(line))
    return ids - {""}


def _example_of(line: str) -> str:
    """The example id in a log line that ends an example's story; "" for any other line."""
    try:
        entry = json.loads(line)
    except ValueError:
        return ""
    is_end = isinstance(entry, dict) and entry.get("stage") in LAST_STAGES
    return str(entry["metadata"].get("example", "")) if is_end else ""


def tell(
    logger: ContentLogger, principles: Sequence[Principle], draft: Draft, example: Example, place: str, seconds: float
) -> None:
    """Log the stages of one example. `place` is "3/20"; `seconds` it took from its first prompt on."""
    about = {"example": example.id}
    logger.log_stage(
        f"TRAINING-EXAMPLE {place}", f"Prompt: {example.instruction}", about | {"source": draft.instruction.source}
    )
    logger.log_stage("INITIAL-GENERATION", example.initial_answer, about | {"model": example.meta["generator"]})
    scores: list[float] = []
    for number, one in enumerate(draft.rounds):
        scores += _tell_round(logger, principles, one, about | {"round": number}, example, first=number == 0)
    if example.reject_reasons:
        reasons = ", ".join(example.reject_reasons)
        logger.log_stage(REJECTED, f"✗ {reasons}" + (f": {draft.error}" if draft.error else ""), about)
    else:
        logger.log_stage(CREATED, pair_created(scores[0], scores[-1], seconds), about)


def _tell_round(
    logger: ContentLogger, principles: Sequence[Principle], draft: RoundDraft, about: Mapping[str, object],
    example: Example, first: bool,
) -> list[float]:  # fmt: skip
    """Log one round; gives back the weighted scores of the answer before and after it, as far as it was judged."""
    text, score = _evaluation(principles, draft.judged_before, draft.weighed_before)
    scores = [score]
    if first:
        logger.log_stage("INITIAL-EVALUATION", text, about)
    critique = f"Principle: {draft.principle.text}\nCritique by {example.meta['critic']}:\n{draft.critique}"
    meaningful = draft.meaningful.answer if draft.meaningful else "not asked"
    logger.log_stage(
        "CRITIQUE-GENERATION", critique,
        {**about, "principle": draft.principle.id, "abstained": draft.abstained, "meaningful": meaningful},
    )  # fmt: skip
    if draft.revised_answer:
        logger.log_stage("REVISION-GENERATION", draft.revised_answer, about)
    if draft.verdict_after is not None:
        # what was judged before and not asked again stands as it was: a revision leaves it alone
        after = draft.judged_before | {draft.principle.id: draft.verdict_after}
        text, score = _evaluation(principles, after, draft.weighed_before)
        logger.log_stage("REVISION-EVALUATION", text, about)
        scores.append(score)
    return scores


def _evaluation(
    principles: Sequence[Principle], verdicts: Mapping[str, Verdict], weighed: int
) -> tuple[str, float]:
    """The judge's findings as text, and the sum of the weights of the principles found violated."""
    violated = [p for p in principles if p.id in verdicts and verdicts[p.id].answer == "yes"]
    score = sum(p.weight for p in violated)
    return evaluation([p.name for p in violated], score, weighed), score
