"""Are the pairs any good? What the examples of a run say about critiques, revisions and the judge; no model needed.

Critiques are counted over answers that have a flaw, of rejected examples too: by the judge's verdict, or by the world's
truth on the shipped model. Abstentions stand apart: a critic that never speaks is neither right nor wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Callable, Iterable, Sequence

from cai_experiment.constitution.prompts import abstains
from cai_experiment.judging.result import Result, kappa
from cai_experiment.nano.flaws import BREACHES
from cai_experiment.nano.truth import critique_right, find_flaws, is_flawed, repaired
from cai_experiment.records.schema import Example, Round


@dataclass(frozen=True, slots=True)
class Critique:
    """One critique with what surrounds it. `before` is the answer that it criticises, `meaningful` the judge's word."""

    round: Round
    before: str
    meaningful: str

    @property
    def abstained(self) -> bool:
        """True if the critic found nothing."""
        return abstains(self.round.critique)


def critiques_of(examples: Iterable[Example]) -> list[Critique]:
    """Every critique that was written, round by round; rounds that ended before their critique are left out."""
    found: list[Critique] = []
    for example in examples:
        before = example.initial_answer
        judged = list(example.meta.get("meaningful", []))
        for number, one in enumerate(example.rounds):
            if one.critique:
                found.append(Critique(one, before, judged[number] if number < len(judged) else ""))
            before = one.revised_answer or before
    return found


def generation_metrics(accepted: Sequence[Example], rejected: Sequence[Example], truth: bool) -> dict[str, Result]:
    """All metrics that the files of a run can give. `truth` is for the shipped model: its world knows every flaw."""
    critiques = critiques_of([*accepted, *rejected])
    flawed = _flawed_by_truth if truth else _flawed_by_judge
    metrics = {
        "accepted_pairs": Result(len(accepted), len(accepted) + len(rejected), None),
        "complete_examples": _share(accepted, is_complete),
        "revision_answers_critique": Result.rate(sum(map(answers_critique, accepted)), len(accepted)),
        **critique_metrics(critiques, flawed),
    }
    return metrics | (truth_metrics(critiques) if truth else {})


def _share(examples: Sequence[Example], holds: Callable[[Example], bool]) -> Result:
    """A share that is a check, not a sample: it has no interval."""
    found = Result.rate(sum(map(holds, examples)), len(examples))
    return Result(found.value, found.n, None)


def is_complete(example: Example) -> bool:
    """True if every part of an accepted example is there, and its pair is (instruction, revision, first answer)."""
    pair = example.preference_pair
    parts = (example.instruction, example.initial_answer, example.principle, example.critique, example.revised_answer)
    same = (pair.prompt, pair.chosen, pair.rejected) == (
        example.instruction, example.revised_answer, example.initial_answer,
    )  # fmt: skip
    return same and bool(example.rounds) and all(part.strip() for part in parts)


def answers_critique(example: Example) -> bool:
    """True if in some round the judge saw the principle broken before the revision and kept after it."""
    return any((one.verdict_before, one.verdict_after) == ("yes", "no") for one in example.rounds)


def critique_metrics(critiques: Sequence[Critique], flawed: Callable[[Critique], bool]) -> dict[str, Result]:
    """`critique_meaningful`: the judge's yes over all critiques of flawed answers that did not abstain; undecided is
    not yes. `critique_abstained`: the abstentions over all critiques of flawed answers.
    """
    met = [c for c in critiques if flawed(c)]
    spoken = [c for c in met if not c.abstained]
    read = [c for c in spoken if c.meaningful in ("yes", "no", "undecided")]
    meaningful = sum(c.meaningful == "yes" for c in read)
    return {
        "critique_meaningful": Result.rate(meaningful, len(read), len(spoken) - len(read)),
        "critique_abstained": Result.rate(len(met) - len(spoken), len(met)),
    }


def _flawed_by_judge(critique: Critique) -> bool:
    return critique.round.verdict_before == "yes"


def _flawed_by_truth(critique: Critique) -> bool:
    return is_flawed(critique.before)


# ---------------------------------------------------------------- the shipped model's truth


def truth_metrics(critiques: Sequence[Critique]) -> dict[str, Result]:
    """What the world knows: right critiques, false alarms, repairs, and the judge's agreement with the truth.

    Only principles that the world knows are counted: a user's own constitution may have others.
    """
    known = [c for c in critiques if c.round.principle_id in BREACHES]
    spoken = [c for c in known if is_flawed(c.before) and not c.abstained]
    clean = [c for c in known if not _breaks(c.before, c.round.principle_id)]
    revised = [c for c in known if c.round.revised_answer and _breaks(c.before, c.round.principle_id)]
    mended = sum(repaired(c.round.principle_id, c.before, c.round.revised_answer) for c in revised)
    return {
        "critique_right": Result.rate(sum(_right(c) for c in spoken), len(spoken)),
        "critique_false_alarm": Result.rate(sum(not c.abstained for c in clean), len(clean)),
        "revision_repaired": Result.rate(mended, len(revised)),
        "judge_kappa": judge_kappa(known),
        "meaningful_kappa": meaningful_kappa(known),
    }


def _breaks(answer: str, principle_id: str) -> bool:
    return any(flaw.principle_id == principle_id for flaw in find_flaws(answer))


def _right(critique: Critique) -> bool:
    return critique_right(critique.round.principle_id, critique.before, critique.round.critique)


def judge_kappa(critiques: Sequence[Critique]) -> Result:
    """Cohen's kappa of the judge's verdicts "is the principle broken?" with the truth, before and after revisions.

    "undecided" is a label of its own, so it counts as disagreement; unparsed verdicts stand apart.
    """
    asked = [(c.round.verdict_before, _breaks(c.before, c.round.principle_id)) for c in critiques]
    asked += [
        (c.round.verdict_after, _breaks(c.round.revised_answer, c.round.principle_id))
        for c in critiques
        if c.round.verdict_after
    ]
    return _kappa(asked)


def meaningful_kappa(critiques: Sequence[Critique]) -> Result:
    """Cohen's kappa of the judge's "is this critique meaningful?" with the truth, over critiques that spoke."""
    return _kappa([(c.meaningful, _right(c)) for c in critiques if c.meaningful and not c.abstained])


def _kappa(asked: Sequence[tuple[str, bool]]) -> Result:
    read = [(said, "yes" if true else "no") for said, true in asked if said != "unparsed"]
    return kappa([said for said, _ in read], [true for _, true in read], len(asked) - len(read))
