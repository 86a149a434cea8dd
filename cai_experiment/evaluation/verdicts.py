"""What a judge says of a run: trained against base on held-out instructions, and its critiques and revisions again.

Orders that disagree are "undecided" and counted; so are verdicts that could not be read. Both are cases to be opened.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace

from cai_experiment.constitution.principles import Principle
from cai_experiment.constitution.prompts import Turn, abstains, ask_for_answer, ask_for_critique, ask_for_revision
from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.evaluation.found import Case, Evaluation, Table
from cai_experiment.evaluation.generation import critique_metrics, critiques_of, truth_metrics
from cai_experiment.evaluation.slices import grouped, with_items
from cai_experiment.judging.fitness import (
    FIT,
    judge_fitness,
    known_answers,
    preferred_kappa,
    world_comparisons,
)
from cai_experiment.judging.judge import (
    Judge,
    PromptPair,
    Verdict,
    meaningful_prompts,
    preferred_prompts,
    verdict_prompts,
)
from cai_experiment.judging.result import Result
from cai_experiment.records.schema import Example

WIN_RATE, CRITIQUES, REVISIONS = "win_rate", "critiques_judged", "revisions_judged"
KNOWN = 200  # comparisons of the world whose answer is known: kappa is then known to within a tenth
TIE = "tie"  # the two texts are equal: nobody is asked
NONE_BROKEN = "none broken"
AGAINST_BASE = "trained against base"


# ---------------------------------------------------------------- trained against base


def win_rate(
    judge: Judge, answers: Sequence[BothAnswers], principles: Mapping[str, str], truth: bool = False
) -> Evaluation:
    """How often the judge prefers the trained model's answer, of all it decides; also by principle.

    `principles` maps an instruction to the principle that its first answer broke, if any. Ties (equal answers),
    undecided and unparsed comparisons stand outside `n`; `win_rate_undecided` is the share of undecided among those
    asked and read. With `truth` also the judge's kappa with the world's truth on these answers.
    """
    differ = [a for a in answers if not a.failed and a.base.text.strip() != a.trained.text.strip()]
    asked = [preferred_prompts(f"{a.base.id}/preferred", a.instruction, a.trained.text, a.base.text) for a in differ]
    verdicts = judge.verdicts(asked)
    said = {id(a): v for a, v in zip(differ, verdicts, strict=True)}
    outcomes = [said[id(a)].answer if id(a) in said else "unparsed" if a.failed else TIE for a in answers]
    kinds = [principles.get(a.instruction, NONE_BROKEN) for a in answers]
    metrics = {"win_rate": decided(outcomes), "win_rate_undecided": undecided(outcomes)}
    read = sum(verdict.answer != "unparsed" for verdict in verdicts)
    metrics["win_rate_read"] = Result.rate(read, len(verdicts))
    if truth:
        metrics["win_rate_kappa"] = preferred_kappa(verdicts, [(a.trained.text, a.base.text) for a in differ])
    rows = [
        {"id": a.base.id, "instruction": a.instruction, "principle": kind, "base_text": a.base.text,
         "trained_text": a.trained.text, "preferred": outcome, "logit": said[id(a)].logit if id(a) in said else None,
         "trained": None if outcome not in _WON else {"win_rate": _WON[outcome]}}
        for a, kind, outcome in zip(answers, kinds, outcomes, strict=True)
    ]  # fmt: skip
    cases = [
        _case(f"{AGAINST_BASE}: {_READ[outcome]}", a.instruction, {"base": a.base.text, "trained": a.trained.text})
        for a, outcome in zip(answers, outcomes, strict=True)
        if outcome in _READ
    ]
    return Evaluation(
        with_items(metrics, WIN_RATE), tables=[_by_principle(kinds, outcomes)], cases=cases, items={WIN_RATE: rows},
        methods={AGAINST_BASE: f"{judge.name}: {judge.method}"},
    )  # fmt: skip


_WON = {"yes": True, "no": False}
_READ = {"no": "the base's answer is preferred", "undecided": "undecided", "unparsed": "unparsed or failed"}


def _by_principle(kinds: Sequence[str], outcomes: Sequence[str]) -> Table:
    lines = []
    for kind, places in {"all": list(range(len(kinds))), **grouped(kinds)}.items():
        some = [outcomes[place] for place in places]
        lines.append((kind, decided(some), undecided(some), str(some.count(TIE))))
    columns = ("principle", "trained preferred", "undecided", "ties")
    note = "Held-out instructions by the principle that the untrained model's answer broke first."
    return Table("win_rate_by_principle", "Trained against base by principle", columns, tuple(lines), note)


def decided(outcomes: Sequence[str]) -> Result:
    """The share of "yes" among "yes" and "no"; what could not be read stands apart."""
    yes, no = outcomes.count("yes"), outcomes.count("no")
    return Result.rate(yes, yes + no, outcomes.count("unparsed"))


def undecided(outcomes: Sequence[str]) -> Result:
    """The share of "undecided" among all that was asked and read."""
    read = [outcome for outcome in outcomes if outcome in ("yes", "no", "undecided")]
    return Result.rate(read.count("undecided"), len(read), outcomes.count("unparsed"))


def _case(kind: str, instruction: str, texts: Mapping[str, str]) -> Case:
    return Case(kind, instruction, {"instruction": instruction, **texts})


# ---------------------------------------------------------------- is the judge to be believed


def fitness_of(judge: Judge, truth: bool, seed: int) -> Evaluation:
    """`judge_fitness`: the judge's kappa with comparisons whose answer is known; no value if it cannot be relied on."""
    fit = judge_fitness(judge, world_comparisons(KNOWN, seed) if truth else known_answers())
    counts = fit.is_fit or (fit.kappa.value or 0.0) < FIT  # else it is unsure, or most of it could not be read
    agreed = fit.kappa if counts else Result(None, fit.kappa.n, None, fit.kappa.unparsed)
    found = Evaluation({"judge_fitness": agreed, "judge_undecided": fit.undecided})
    found.methods["judge"] = f"{judge.name}: {judge.method}; {fit.line}"
    if not fit.is_fit:
        found.alarms.append(f"the judge {judge.name} is {fit.line}: nothing that it says counts")
    return found


# ---------------------------------------------------------------- critiques and revisions


def drawn(accepted: Sequence[Example], rejected: Sequence[Example], count: int, seed: int) -> list[Example]:
    """At most `count` examples of both lists, drawn by the seed, in their order: no kind of example comes first."""
    places = range(len(accepted) + len(rejected))
    some = sorted(random.Random(f"judged/{seed}").sample(places, min(count, len(places))))
    return [accepted[i] if i < len(accepted) else rejected[i - len(accepted)] for i in some]


def critiques_again(
    judge: Judge, examples: Sequence[Example], principles: Mapping[str, Principle], truth: bool
) -> Evaluation:
    """`critique_meaningful` by this judge, not the run's critic; beside the world's truth, with kappa, if `truth`.

    It is asked of every round with a critique whether the answer before breaks the principle, and whether the critique
    is meaningful, in the pipeline's own words. Rounds of principles that are not in `principles` are left out.
    """
    places = [
        (example, number)
        for example in examples
        for number, one in enumerate(example.rounds)
        if one.critique and one.principle_id in principles
    ]
    before = judge.verdicts([_verdict(example, number, principles) for example, number in places])
    spoken = [place for place in places if not abstains(place[0].rounds[place[1]].critique)]
    meaningful = judge.verdicts([_meaningful(*place, principles) for place in spoken])
    said = dict(zip(map(_key, spoken), meaningful, strict=True))
    found = {_key(place): verdict for place, verdict in zip(places, before, strict=True)}
    again = [_with_verdicts(example, found, said) for example in examples]
    critiques = [one for example in again for one in critiques_of(example, truth)]
    metrics = critique_metrics(critiques) | (truth_metrics(critiques) if truth else {})
    rows = [
        {"id": f"{example.id}/{number}", "instruction": example.instruction,
         "principle": example.rounds[number].principle_id, "critique": example.rounds[number].critique,
         "broken_before": found[_key((example, number))].answer,
         "meaningful": said[_key((example, number))].answer if _key((example, number)) in said else "abstained"}
        for example, number in places
    ]  # fmt: skip
    cases = [
        _case(f"critique meaningful: {verdict.answer}", example.instruction,
              {"answer": _answer_before(example, number), "critique": example.rounds[number].critique})
        for (example, number), verdict in zip(spoken, said.values(), strict=True)
        if verdict.answer != "yes"
    ]  # fmt: skip
    return Evaluation(
        with_items(metrics, CRITIQUES), cases=cases, items={CRITIQUES: rows},
        methods={"critiques": f"{judge.name}: {judge.method}"},
    )  # fmt: skip


def revisions_again(judge: Judge, accepted: Sequence[Example], truth: bool) -> Evaluation:
    """`revision_preferred`: how often the judge prefers the revision to the first answer, of those it decides.

    With `truth` also its kappa with the world's truth (`preferred_kappa`).
    """
    verdicts = judge.verdicts([revision_question(example) for example in accepted])
    outcomes = [verdict.answer for verdict in verdicts]
    rows = [
        {"id": e.id, "instruction": e.instruction, "preferred": v.answer, "logit": v.logit}
        for e, v in zip(accepted, verdicts, strict=True)
    ]
    cases = [
        _case(f"revision against first answer: {said}", e.instruction,
              {"first answer": e.initial_answer, "revision": e.revised_answer})
        for e, said in zip(accepted, outcomes, strict=True)
        if said != "yes"
    ]  # fmt: skip
    metrics = {"revision_preferred": decided(outcomes), "revision_undecided": undecided(outcomes)}
    if truth:
        metrics["preferred_kappa"] = preferred_kappa(verdicts, [(e.revised_answer, e.initial_answer) for e in accepted])
    return Evaluation(
        with_items(metrics, REVISIONS), cases=cases, items={REVISIONS: rows},
        methods={"revisions": f"{judge.name}: {judge.method}"},
    )  # fmt: skip


def revision_question(example: Example) -> PromptPair:
    """Is the revision better than the first answer?"""
    id = f"evaluation/{example.id}/preferred"
    return preferred_prompts(id, example.instruction, example.revised_answer, example.initial_answer)


def _key(place: tuple[Example, int]) -> tuple[str, int]:
    return place[0].id, place[1]


def _with_verdicts(
    example: Example, before: Mapping[tuple[str, int], Verdict], said: Mapping[tuple[str, int], Verdict]
) -> Example:
    """The example with another judge's word on each round; what it was not asked stays as it was."""
    rounds = tuple(
        replace(one, verdict_before=before[key].answer, verdict_after="") if (key := (example.id, n)) in before else one
        for n, one in enumerate(example.rounds)
    )
    meaningful = [said[key].answer if (key := (example.id, n)) in said else "" for n in range(len(example.rounds))]
    return replace(example, rounds=rounds, meta={**example.meta, "meaningful": meaningful})


def _verdict(example: Example, number: int, principles: Mapping[str, Principle]) -> PromptPair:
    turns = transcript(example, number, principles)
    return verdict_prompts(f"evaluation/{example.id}/{number}", turns, principles[example.rounds[number].principle_id])


def _meaningful(example: Example, number: int, principles: Mapping[str, Principle]) -> PromptPair:
    one = example.rounds[number]
    turns = (
        *transcript(example, number, principles),
        ask_for_critique(principles[one.principle_id]),
        Turn("critique", one.critique),
    )
    return meaningful_prompts(f"evaluation/{example.id}/meaningful/{number}", turns)


def transcript(example: Example, number: int, principles: Mapping[str, Principle]) -> tuple[Turn, ...]:
    """The conversation as it stood before the critique of round `number`, as the pipeline had it."""
    turns = (*ask_for_answer(example.instruction), Turn("answer", example.initial_answer))
    for one in example.rounds[:number]:
        principle = principles.get(one.principle_id)
        if principle is None or not one.critique:
            continue
        turns += (ask_for_critique(principle), Turn("critique", one.critique))
        if one.revised_answer:
            turns += (ask_for_revision(principle), Turn("revision", one.revised_answer))
    return turns


def _answer_before(example: Example, number: int) -> str:
    revised = [one.revised_answer for one in example.rounds[:number] if one.revised_answer]
    return revised[-1] if revised else example.initial_answer
