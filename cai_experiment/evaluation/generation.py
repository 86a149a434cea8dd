"""Are the pairs any good? What the examples of a run say about critiques, revisions and the judge; no model needed.

Critiques are counted over answers that have a flaw, of rejected examples too: by the judge's verdict, or by the world's
truth on the shipped model. Abstentions stand apart: a critic that never speaks is neither right nor wrong.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import Callable, Collection, Iterator, Sequence

from cai_experiment.constitution.prompts import abstains
from cai_experiment.judging.result import Result, kappa
from cai_experiment.nano.flaws import BREACHES
from cai_experiment.nano.truth import critique_right, find_flaws, is_flawed, repaired
from cai_experiment.records.schema import Example, Round

DIRECT = "direct_revisions"  # rounds that revised without a critique, of so many: there only in a run without them
OF_PAIRS = frozenset({  # metrics of a run's files; a report of before does not say whose a metric is
    "accepted_pairs", "complete_examples", "revision_answers_critique", "revision_preferred", "revision_repaired",
    "critique_meaningful", "critique_abstained", "critique_right", "critique_false_alarm", "judge_kappa",
    "meaningful_kappa", DIRECT,
})  # fmt: skip
NO_CRITIQUE = "--no-critique: answers were revised directly from the principle, so no gate speaks of critiques"


@dataclass(frozen=True, slots=True)
class Critique:
    """What is counted of one critique; its texts are let go, so that 50,000 examples can be counted.

    `meaningful` is the judge's word, `before` and `after` its verdicts on the answers ("" if it was not asked).
    `direct`: a round of a run without critiques, which has none.
    """

    abstained: bool
    meaningful: str
    before: str
    after: str
    truth: Truth | None
    direct: bool = False


@dataclass(frozen=True, slots=True)
class Truth:
    """What the shipped model's world knows of a critique. `known`: the world knows the principle."""

    known: bool
    flawed: bool  # the answer before has any flaw
    broken_before: bool  # of this principle
    broken_after: bool  # in the revision; False if there is none
    revised: bool
    right: bool
    mended: bool


def critiques_of(example: Example, truth: bool) -> Iterator[Critique]:
    """Every critique that was written, round by round; rounds that ended before their critique are left out.

    Of a run without critiques every round.
    """
    direct = is_direct(example)
    before = example.initial_answer
    judged = list(example.meta.get("meaningful", []))
    for number, one in enumerate(example.rounds):
        if one.critique or direct:
            said = judged[number] if number < len(judged) else ""
            known = _truth(one, before) if truth else None
            yield Critique(abstains(one.critique), said, one.verdict_before, one.verdict_after, known, direct)
        before = one.revised_answer or before


def generation_metrics(accepted: Collection[Example], rejected: Collection[Example], truth: bool) -> dict[str, Result]:
    """All metrics that the files of a run can give. `truth` is for the shipped model: its world knows every flaw."""
    critiques = [one for example in chain(accepted, rejected) for one in critiques_of(example, truth)]
    metrics = {
        "accepted_pairs": Result(len(accepted), len(accepted) + len(rejected), None),
        "complete_examples": _share(accepted, is_complete),
        **critique_metrics(critiques),
    }
    rounds = [example.rounds for example in chain(accepted, rejected) if is_direct(example)]
    if rounds:
        del metrics["complete_examples"]
        revised = sum(bool(one.revised_answer) for each in rounds for one in each)
        metrics[DIRECT] = Result(revised, sum(map(len, rounds)), None)
    else:
        metrics["revision_answers_critique"] = Result.rate(sum(map(answers_critique, accepted)), len(accepted))
    return metrics | (truth_metrics(critiques) if truth else {})


def is_direct(example: Example) -> bool:
    """True if the run that made it revises without critiques (--no-critique), as far as the example came to that."""
    return bool(example.meta.get("direct"))


def _share(examples: Collection[Example], holds: Callable[[Example], bool]) -> Result:
    """A share that is a check, not a sample: it has no interval."""
    return replace(Result.rate(sum(map(holds, examples)), len(examples)), interval=None)


def is_complete(example: Example) -> bool:
    """True if every part of an accepted example is there, and its pair is (instruction, revision, first answer)."""
    pair = example.preference_pair
    parts = (example.instruction, example.initial_answer, example.principle, example.critique, example.revised_answer)
    same = (pair.prompt, pair.chosen, pair.rejected) == (
        example.instruction, example.revised_answer, example.initial_answer,
    )  # fmt: skip
    return same and bool(example.rounds) and all(part.strip() for part in parts)


def answers_critique(example: Example) -> bool:
    """True if the judge saw the principle of some round broken before it, and kept by the last revision."""
    last = final_verdicts(example)
    return any((one.verdict_before, said) == ("yes", "no") for one, said in zip(example.rounds, last, strict=True))


def final_verdicts(example: Example) -> list[str]:
    """Does the last revision break each round's principle? "" where a round revised nothing.

    Lines of earlier versions hold only what was said of each round's own revision; that is taken for them.
    """
    return list(example.meta.get("final_verdicts", [one.verdict_after for one in example.rounds]))


def verdicts_after(example: Example) -> list[str]:
    """For people, one a round: what the judge said of its revision, and of the last one where that differs."""
    return [
        (one.verdict_after or "not revised") + (f", in the end {last}" if last not in ("", one.verdict_after) else "")
        for one, last in zip(example.rounds, final_verdicts(example), strict=True)
    ]


def critique_metrics(critiques: Sequence[Critique]) -> dict[str, Result]:
    """`critique_meaningful`: the judge's yes over all critiques of flawed answers that did not abstain; undecided is
    not yes. `critique_abstained`: the abstentions over all critiques of flawed answers. Neither without critiques.
    """
    if any(c.direct for c in critiques):
        return {}
    met = [c for c in critiques if (c.truth.flawed if c.truth else c.before == "yes")]
    spoken = [c for c in met if not c.abstained]
    read = [c for c in spoken if c.meaningful in ("yes", "no", "undecided")]
    meaningful = sum(c.meaningful == "yes" for c in read)
    return {
        "critique_meaningful": Result.rate(meaningful, len(read), len(spoken) - len(read)),
        "critique_abstained": Result.rate(len(met) - len(spoken), len(met)),
    }


# ---------------------------------------------------------------- the shipped model's truth


def truth_metrics(critiques: Sequence[Critique]) -> dict[str, Result]:
    """What the world knows: right critiques, false alarms, repairs, and the judge's agreement with the truth.

    Only principles that the world knows are counted: a user's own constitution may have others.
    """
    known = [(c, c.truth) for c in critiques if c.truth and c.truth.known]
    spoken = [true for c, true in known if true.flawed and not c.abstained]
    clean = [c for c, true in known if not true.broken_before]
    revised = [true for _, true in known if true.revised and true.broken_before]
    judged = [(c.before, true.broken_before) for c, true in known]
    judged += [(c.after, true.broken_after) for c, true in known if c.after]
    of_critiques = {
        "critique_right": Result.rate(sum(true.right for true in spoken), len(spoken)),
        "critique_false_alarm": Result.rate(sum(not c.abstained for c in clean), len(clean)),
        "meaningful_kappa": _kappa([(c.meaningful, t.right) for c, t in known if c.meaningful and not c.abstained]),
    }
    return (of_critiques if not any(c.direct for c in critiques) else {}) | {
        "revision_repaired": Result.rate(sum(true.mended for true in revised), len(revised)),
        "judge_kappa": _kappa(judged),
    }


def _truth(one: Round, before: str) -> Truth:
    principle = one.principle_id
    return Truth(
        principle in BREACHES, is_flawed(before), _breaks(before, principle), _breaks(one.revised_answer, principle),
        bool(one.revised_answer), critique_right(principle, before, one.critique),
        repaired(principle, before, one.revised_answer),
    )  # fmt: skip


def _breaks(answer: str, principle_id: str) -> bool:
    return any(flaw.principle_id == principle_id for flaw in find_flaws(answer))


def _kappa(asked: Sequence[tuple[str, bool]]) -> Result:
    """Cohen's kappa of the judge's verdicts with the truth, over (said, true) pairs.

    "undecided" is a label of its own, so it counts as disagreement; unparsed verdicts stand apart.
    """
    read = [(said, "yes" if true else "no") for said, true in asked if said != "unparsed"]
    return kappa([said for said, _ in read], [true for _, true in read], len(asked) - len(read))
