"""HarmBench for the report: tables by category, cases to be read, and every item with both answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from cai_experiment.constitution.wording import is_refusal
from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.evaluation.benchmarks.harmbench_answers import (
    ARMS,
    COPIES,
    DECIDED,
    HARMBENCH,
    SAFE,
    Asked,
    attack_success,
    evades,
)
from cai_experiment.evaluation.benchmarks.harmbench_rows import COPYRIGHT, JUDGED, SafePrompt
from cai_experiment.evaluation.found import Case, Cell, Table
from cai_experiment.judging.result import Result

SHOWN = 50  # cases of a kind; the items' files hold all
COPIES_LINE, NOT_SCORED = "copyright (apart: not scored by hashes)", "not scored"

Safe = tuple[SafePrompt, BothAnswers]


# ---------------------------------------------------------------- tables


def tables(asked: Sequence[Asked], safe: Sequence[Safe]) -> list[Table]:
    """Attack success and evasiveness by functional and semantic category, over-refusal by why a prompt is harmless."""
    return [_by_category(asked), _by_family(safe)]


def _by_category(asked: Sequence[Asked]) -> Table:
    counted = [one for one in asked if one.behavior.kind in JUDGED]
    groups: list[tuple[str, Sequence[Asked]]] = [("all standard and contextual", counted)]
    groups += [(kind, [one for one in counted if one.behavior.kind == kind]) for kind in JUDGED]
    names = sorted({one.behavior.category for one in counted})
    groups += [(name.replace("_", " "), [one for one in counted if one.behavior.category == name]) for name in names]
    copies = [one for one in asked if one.behavior.kind == COPYRIGHT]
    groups += [(COPIES_LINE, copies)] if copies else []
    columns = ("category", *(f"{what}, {arm}" for what in ("attack success", "evasive") for arm in ARMS),
               "undecided", "unparsed")  # fmt: skip
    note = (
        "Attack success over the behaviours that the judge decides for both arms; evasive by the answers' words. "
        "Upstream scores copyright by hashes of the works: no judge is asked of it."
    )
    lines = tuple(_line(*group) for group in groups)
    return Table("harmbench_by_category", "HarmBench by category", columns, lines, note)


def _line(name: str, asked: Sequence[Asked]) -> tuple[Cell, ...]:
    success = [NOT_SCORED] * len(ARMS) if name == COPIES_LINE else attack_success(asked).values()
    whole = [one.answers for one in asked if not one.answers.failed]
    evading = [Result.rate(sum(evades(getattr(a, arm).text) for a in whole), len(whole)) for arm in ARMS]
    said = Counter(one.word(arm) for one in asked for arm in ARMS)
    return (name, *success, *evading, str(said["undecided"]), str(said["unparsed"]))


def _by_family(safe: Sequence[Safe]) -> Table:
    families = {"all": list(safe)}
    for one in safe:
        families.setdefault(one[0].family, []).append(one)
    lines: list[tuple[Cell, ...]] = []
    for family, rows in families.items():
        whole = [answers for _, answers in rows if not answers.failed]
        shares = [Result.rate(sum(is_refusal(getattr(a, arm).text) for a in whole), len(whole)) for arm in ARMS]
        lines.append((family, *shares))
    note = "Safe prompts of our own that only look harmful, by what makes them harmless."
    return Table(
        "over_refusal", "Over-refusal of safe look-alikes", ("why it is safe", "base", "trained"), tuple(lines), note
    )


# ---------------------------------------------------------------- cases


def cases(asked: Sequence[Asked], safe: Sequence[Safe]) -> list[Case]:
    """What a person should look at, at most SHOWN of a kind."""
    counted = [one for one in asked if one.behavior.kind in JUDGED]
    found = _cases("HarmBench: fulfilled by the trained model, not by the base", counted, _newly_fulfilled)
    for word in ("undecided", "unparsed"):
        found += _cases(f"HarmBench: {word}", counted, partial(_said_of_either, word))
    refused = [(s, a) for s, a in safe if not a.failed and is_refusal(a.trained.text)]
    return found + [
        Case("safe look-alikes: refused by the trained model", s.text,
             {"it resembles": s.resembles, "base": a.base.text, "trained": a.trained.text})
        for s, a in refused[:SHOWN]
    ]  # fmt: skip


def _newly_fulfilled(one: Asked) -> bool:
    return (one.word("base"), one.word("trained")) == ("no", "yes")


def _said_of_either(word: str, one: Asked) -> bool:
    return word in (one.word("base"), one.word("trained"))


def _cases(kind: str, asked: Sequence[Asked], holds: Callable[[Asked], bool]) -> list[Case]:
    return [_case(kind, one) for one in asked if holds(one)][:SHOWN]


def _case(kind: str, one: Asked) -> Case:
    texts = {"asked": one.behavior.instruction}
    for arm in ARMS:
        said = getattr(one, arm)
        raw = f" ({said.raw})" if said.raw else ""
        texts |= {f"{arm}: {said.answer}{raw}": getattr(one.answers, arm).text}
    return Case(kind, f"{one.behavior.category.replace('_', ' ')}: {one.behavior.text}", texts)


# ---------------------------------------------------------------- items


def items(asked: Sequence[Asked], safe: Sequence[Safe]) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Rows as found.py describes them: behaviours, copyright behaviours apart, and safe prompts."""
    found: dict[str, Sequence[Mapping[str, Any]]] = {
        HARMBENCH: [_behavior_row(one) for one in asked if one.behavior.kind in JUDGED],
        SAFE: [_safe_row(*one) for one in safe],
    }
    copies = [_behavior_row(one) for one in asked if one.behavior.kind == COPYRIGHT]
    return found | ({COPIES: copies} if copies else {})


def _behavior_row(one: Asked) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": one.behavior.id, "instruction": one.behavior.instruction, "kind": one.behavior.kind,
        "category": one.behavior.category,
    }  # fmt: skip
    for arm in ARMS:
        said, text = getattr(one, arm), getattr(one.answers, arm).text
        says = _says(one.answers, arm, HARMBENCH)
        if says is not None:
            says |= {"evasive": evades(text)}
            says |= {} if said is None else {"attack_success": said.answer == "yes" if one.decided else None}
        row |= {arm: says, f"{arm}_text": text}
        if said is not None:
            row |= {f"{arm}_verdict": said.answer}
            row |= {f"{arm}_raw": said.raw} if said.raw and said.answer not in DECIDED else {}
    return row


def _safe_row(prompt: SafePrompt, answers: BothAnswers) -> dict[str, Any]:
    row: dict[str, Any] = {"id": prompt.id, "instruction": prompt.text, "resembles": prompt.resembles,
                           "family": prompt.family}  # fmt: skip
    for arm in ARMS:
        text, says = getattr(answers, arm).text, _says(answers, arm, SAFE)
        if says is not None:
            says |= {"over_refusal": is_refusal(text)}
        row |= {arm: says, f"{arm}_text": text}
    return row


def _says(answers: BothAnswers, arm: str, name: str) -> dict[str, Any] | None:
    """What needs no judge; None where an answer failed."""
    if answers.failed:
        return None
    completion = getattr(answers, arm)
    return {f"words_{name}": len(completion.text.split()), f"ends_by_itself_{name}": completion.finish == "stop"}
