"""Is a judge fit to judge? Its verdicts on comparisons whose answer is known, as Cohen's kappa.

A judge that is wrong on purpose, guesses, or always says one thing has a kappa near 0 or below: no gate may then rest
on it. The known answers are our own questions on general topics (known_answers.jsonl), or, for the shipped model,
comparisons composed from its world.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import NamedTuple, Sequence

from cai_experiment.judging.judge import Judge, PromptPair, Verdict, preferred_prompts
from cai_experiment.judging.result import Result, kappa
from cai_experiment.nano import world
from cai_experiment.nano.truth import find_flaws

FIT = 0.4  # agreement is "moderate" above it (Landis and Koch 1977)
UNREAD = 0.5  # a judge of whom more than this share cannot be read is not fit, however good the rest is
KNOWN_ANSWERS = Path(__file__).with_name("known_answers.jsonl")
COMPARISONS = 200  # of the world: kappa is then known to within a tenth
YES_NO = {True: "yes", False: "no"}

Known = tuple[PromptPair, bool]  # a comparison, and whether "yes" (the first answer is better) is right


class Fitness(NamedTuple):
    """What a judge is worth: its agreement with known answers, and the share that it left undecided."""

    kappa: Result
    undecided: Result

    @property
    def is_fit(self) -> bool:
        """True if kappa is at least FIT, surely above chance, and most verdicts could be read."""
        value, interval, unparsed = self.kappa.value, self.kappa.interval, self.kappa.unparsed
        if value is None or interval is None:
            return False
        return value >= FIT and interval[0] > 0 and unparsed <= UNREAD * (self.kappa.n + unparsed)

    @property
    def line(self) -> str:
        """In one line, for the report: "fit: kappa 0.85 (0.70 to 1.00) with 42 known answers, 5% undecided (...)"."""
        interval, unparsed = self.kappa.interval, self.kappa.unparsed
        said = "no kappa"
        if interval is not None:
            said = f"kappa {self.kappa.value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"
        unread = f", {unparsed} more could not be read" if unparsed else ""
        low, high = self.undecided.interval or (0.0, 1.0)
        share = f"{self.undecided.value or 0:.0%} ({low:.0%} to {high:.0%})"
        shares = f"{self.kappa.n} known answers, {share} undecided{unread}"
        return f"{'fit' if self.is_fit else 'not fit'}: {said} with {shares} (fit from {FIT:g} on)"


def judge_fitness(judge: Judge, known: Sequence[Known]) -> Fitness:
    """The judge's verdicts held against known answers. "undecided" is a label of its own, so it counts as disagreement;
    unparsed verdicts stand apart. Raises EngineError for what no question gets past.
    """
    return fitness(judge.verdicts([pair for pair, _ in known]), [right for _, right in known])


def fitness(verdicts: Sequence[Verdict], right: Sequence[bool]) -> Fitness:
    """As `judge_fitness`, of verdicts at hand. Raises ValueError if the two differ in length."""
    read = [(v.answer, YES_NO[true]) for v, true in zip(verdicts, right, strict=True) if v.answer != "unparsed"]
    said, unparsed = [one for one, _ in read], len(verdicts) - len(read)
    return Fitness(
        kappa(said, [true for _, true in read], unparsed), Result.rate(said.count("undecided"), len(read), unparsed)
    )


# ---------------------------------------------------------------- comparisons whose answer is known


def known_answers() -> list[Known]:
    """The comparisons that we ship: 42 questions, each with a good answer and a clearly worse one of like length (wrong
    facts, rude, dangerous, beside the question, repetition, unfinished). The good one comes first in every second.
    """
    rows = [json.loads(line) for line in KNOWN_ANSWERS.read_text(encoding="utf-8").splitlines()]
    return [
        _known(f"known/{number}", row["question"], row["better"], row["worse"], number % 2 == 0)
        for number, row in enumerate(rows)
    ]


def world_comparisons(n: int = COMPARISONS, seed: int = 0) -> list[Known]:
    """`n` comparisons from the shipped model's world, in held-out combinations of words: an answer with one flaw or two
    against the same one mended, or against another without a flaw.
    """
    rng = random.Random(f"comparisons/{seed}")
    found = []
    for number in range(n):
        question = world.compose_question(rng, held_out=True)
        worse = world.compose_answer(rng, question, flaws=rng.choice((1, 1, 2)), held_out=None)
        mended = world.compose_revision(rng, worse, worse.flaws()[0].principle, question.noun)
        better = mended if rng.random() < 0.5 else world.compose_answer(rng, question, flaws=0)
        found.append(_known(f"world/{number}", question.text, better.text, worse.text, number % 2 == 0))
    return found


def _known(id: str, question: str, better: str, worse: str, better_first: bool) -> Known:
    answers = (better, worse) if better_first else (worse, better)
    return preferred_prompts(id, question, *answers), better_first


# ---------------------------------------------------------------- a run's own comparisons, on the shipped model


def preferred_kappa(verdicts: Sequence[Verdict], texts: Sequence[tuple[str, str]]) -> Result:
    """Cohen's kappa of the judge's preferences with the world's truth: the answer with fewer flaws is better. `texts`
    are the (first, second) answer behind each verdict, whose "yes" means the first; ties by the truth are left out.

    Every second pair is read the other way round: which answer is called the first is our choice, and where it is
    the revision nearly all right answers would be "yes", of which kappa says nothing. Raises ValueError if the two
    differ in length.
    """
    swapped = {"yes": "no", "no": "yes"}
    pairs: list[tuple[str, str]] = []
    unparsed = 0
    for verdict, (first, second) in zip(verdicts, texts, strict=True):
        more = len(find_flaws(second)) - len(find_flaws(first))
        if more == 0:
            continue
        if verdict.answer == "unparsed":
            unparsed += 1
            continue
        said, true = str(verdict.answer), YES_NO[more > 0]
        pairs.append((said, true) if len(pairs) % 2 == 0 else (swapped.get(said, said), swapped[true]))
    return kappa([said for said, _ in pairs], [true for _, true in pairs], unparsed)
