"""From a finished draft to its line: the record of every stage, and the gate's decision."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Mapping

from cai_experiment.engines.guard import GuardVerdict
from cai_experiment.judging.judge import Verdict
from cai_experiment.pipeline.gate import GateSettings, gate, similarity
from cai_experiment.pipeline.stages import Draft, RoundDraft
from cai_experiment.records.schema import Example, PreferencePair, Round


@dataclass(frozen=True, slots=True)
class Origin:
    """What every line of a run says about where it came from."""

    seed: int
    generator: str
    critic: str


def weights_name(facts: Mapping[str, object]) -> str:
    """Which weights wrote a line, from an engine's `describe()`: "nano@0b1f8a2c9d3e" (their hash or commit)."""
    version = facts.get("weights_sha256") or facts.get("revision")
    return f"{facts['model']}@{str(version)[:12]}" if version else str(facts["model"])


def turned_down(example: Example, verdict: GuardVerdict | None) -> Example:
    """The line with the guard's reason against it, where its accepted pair is unsafe or the verdict cannot be read."""
    if verdict is None or verdict.safe or example.reject_reasons:
        return example
    if verdict.safe is None:
        reply = {"reply": verdict.raw} | ({"error": verdict.error} if verdict.error else {})
        return replace(example, meta=example.meta | {"guard": reply}, reject_reasons=("guard_unparsed",))
    found = {"categories": list(verdict.categories)}
    return replace(example, meta=example.meta | {"guard": found}, reject_reasons=("guard_unsafe",))


def to_example(draft: Draft, settings: GateSettings, origin: Origin) -> Example:
    """The line of `draft`; its `reject_reasons` are empty if the pair may train a model.

    `meta` also holds `meaningful` (one verdict a round, "" where the critic abstained), `final_verdicts` (one a round:
    does the last revision break its principle? "" where nothing was revised) and, after an engine's failure, its
    `error`. `direct` stands there, true, where the answer was to be revised without a critique.
    """
    instruction = draft.instruction
    revised = draft.answer if draft.revisions else ""
    shown = _first_change(draft) or (draft.rounds[0] if draft.rounds else None)
    return Example(
        id=instruction.id,
        instruction=instruction.text,
        initial_answer=draft.initial_answer,
        principle=shown.principle.text if shown else "",
        critique=shown.critique if shown else "",
        revised_answer=revised,
        preference_pair=PreferencePair(instruction.text, revised, draft.initial_answer),
        rounds=tuple(_to_round(r) for r in draft.rounds),
        meta=_meta(draft, revised, origin),
        reject_reasons=tuple(reject_reasons(draft, settings)),
    )


def reject_reasons(draft: Draft, settings: GateSettings) -> list[str]:
    """The gate's reasons against `draft`, in the gate's order; an early end is the only reason of its draft."""
    if draft.fault:
        return [draft.fault]
    if not draft.revisions:
        return ["no_violation_found"]
    least = settings.min_judge_margin
    verdicts = [(_said(r.verdict_before, least), _said(r.final_verdict, least)) for r in draft.revisions]
    return gate(draft.initial_answer, draft.answer, verdicts, settings)


def _said(verdict: Verdict | None, least: float) -> str:
    """A verdict as the gate reads it: one of less than `least` nats is undecided."""
    assert verdict is not None  # a draft without a fault was judged to its end
    weak = verdict.answer in ("yes", "no") and abs(verdict.logit) < least
    return "undecided" if weak else verdict.answer


def _first_change(draft: Draft) -> RoundDraft | None:
    """The first round after which the answer read otherwise."""
    answer = draft.initial_answer
    for one in draft.revisions:
        if one.revised_answer != answer:
            return one
        answer = one.revised_answer
    return None


def _to_round(draft: RoundDraft) -> Round:
    after = draft.verdict_after.answer if draft.verdict_after else ""
    return Round(
        draft.principle.id,
        draft.principle.text,
        draft.critique,
        draft.revised_answer,
        draft.verdict_before.answer,
        after,
    )


def _meta(draft: Draft, revised: str, origin: Origin) -> dict[str, Any]:
    measured = {}
    if revised and draft.initial_answer:
        measured = {
            "similarity": round(similarity(draft.initial_answer, revised), 4),
            "length_ratio": round(len(revised) / len(draft.initial_answer), 4),
        }
    meta: dict[str, Any] = {
        "source": draft.instruction.source,
        "seed": origin.seed,
        "generator": origin.generator,
        "critic": origin.critic,
        "tokens": {"prompt": draft.prompt_tokens, "completion": draft.completion_tokens},
        "gate": measured,
        "meaningful": [r.meaningful.answer if r.meaningful else "" for r in draft.rounds],
        "final_verdicts": [r.final_verdict.answer if r.final_verdict else "" for r in draft.rounds],
    }
    direct = {"direct": True} if any(r.direct for r in draft.rounds) else {}
    return meta | direct | ({"error": draft.error} if draft.error else {})
