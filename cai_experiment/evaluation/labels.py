"""What people say of a run's critiques and pairs (scripts/label_critiques.py), beside what the judge says of them.

labels.jsonl holds a line for each answer: {"id", "round", "question", "label", "who", "judge"}, and when it was given.
Of two lines of one person on one item the later holds. "meaningful" asks of the critique of a round whether its quoted
words really break the principle, "preferred" of a pair (round null) whether the revision is the better answer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.found import ITEMS_FOLDER, Case, Cell, Evaluation, Table
from cai_experiment.evaluation.verdicts import CRITIQUES, REVISIONS
from cai_experiment.judging.result import Result, kappa
from cai_experiment.records.files import read_examples, read_jsonl, show
from cai_experiment.records.schema import Example

LABELS = "labels.jsonl"  # in a run's data folder
MEANINGFUL, PREFERRED = "meaningful", "preferred"
YES, NO, UNSURE = "yes", "no", "unsure"
QUESTIONS = {MEANINGFUL: "is the critique meaningful?", PREFERRED: "is the revision better?"}
JUDGED = {MEANINGFUL: CRITIQUES, PREFERRED: REVISIONS}  # items of the evaluation that hold a judge's own word
NAMES = {MEANINGFUL: "judge_person", PREFERRED: "preferred_person"}  # of the metrics
FIELDS = ("id", "round", "question", "label", "who", "judge")

Item = tuple[str, int | None]  # an example's id; the round of its critique


@dataclass(frozen=True, slots=True)
class Label:
    """One person's word on one item. `judge` is the judge's when it was labelled: "" if it had not been asked."""

    id: str
    round: int | None
    question: str
    label: str
    who: str
    judge: str

    @property
    def item(self) -> Item:
        """What it is about."""
        return self.id, self.round


def read_labels(folder: Path) -> list[Label]:
    """The labels of a run that hold, in the order of their items' first labels; none if nobody has labelled.

    Raises BadInputError for a line that lacks a field or holds an unknown label.
    """
    path = folder / LABELS
    if not path.exists():
        return []
    newest: dict[tuple[Any, ...], Label] = {}
    for row in read_jsonl(path):
        if not set(FIELDS) <= row.keys() or row["question"] not in QUESTIONS or row["label"] not in (YES, NO, UNSURE):
            raise BadInputError(f"{show(path)} has a line that is no label: {str(row)[:80]}", "correct or remove it")
        one = Label(*(row[name] for name in FIELDS))
        newest[one.question, one.item, one.who] = one
    return list(newest.values())


def agreement(folder: Path) -> Evaluation:
    """Judge against people, and people against each other; an empty Evaluation if nobody has labelled the run.

    For critiques `judge_person_kappa` and `judge_person_agreement`, for pairs `preferred_person_kappa` and
    `preferred_person_agreement`: over items that have a judge's word and a person's yes or no, of several people the
    majority's. A judge's "undecided" disagrees with both; unparsed verdicts stand apart. `person_meaningful` and
    `person_preferred` are the shares of yes. `person_person_kappa` is of the two people who share most critiques.
    """
    labels = read_labels(folder)
    found = Evaluation()
    if not labels:
        return found
    rows: list[tuple[Cell, ...]] = []
    for question in QUESTIONS:
        some = [one for one in labels if one.question == question]
        if some:
            judged = _judged(folder, question, some)
            found += _against_judge(folder, question, some, judged)
            rows += _rows(question, some, judged)
    found.metrics |= _between_people([one for one in labels if one.question == MEANINGFUL])
    found.metrics = {name: replace(result, items=LABELS) for name, result in found.metrics.items()}
    columns = ("question", "who", "agreement", "Cohen's kappa", "unsure")
    note = "Percent agreement with Wilson intervals; unsure answers stand outside n."
    found.tables.append(Table("label_agreement", "Judge and people", columns, tuple(rows), note))
    return found


def _judged(folder: Path, question: str, labels: Iterable[Label]) -> dict[Item, str]:
    """The judge's word on each item: of the evaluation's judge where it has read them, else of the run's critic."""
    said = {one.item: one.judge for one in labels if one.judge}
    path = folder / ITEMS_FOLDER / f"{JUDGED[question]}.jsonl"
    for row in read_jsonl(path) if path.exists() else ():
        id, _, number = str(row["id"]).partition("/")
        said[id, int(number) if number else None] = str(row[question])
    return said


# ---------------------------------------------------------------- figures


def _against_judge(folder: Path, question: str, labels: Sequence[Label], judged: Mapping[Item, str]) -> Evaluation:
    people = _majority(labels)
    decided = [label for label in people.values() if label != UNSURE]
    agrees, chance_corrected = compare(people, judged)
    who = ", ".join(sorted({one.who for one in labels}))
    what = "critiques" if question == MEANINGFUL else "pairs"
    return Evaluation(
        {
            f"{NAMES[question]}_agreement": agrees,
            f"{NAMES[question]}_kappa": chance_corrected,
            f"person_{question}": Result.rate(decided.count(YES), len(decided)),
        },
        notes=[f"{len(people)} {what} labelled by {who}, {len(people) - len(decided)} of them unsure"],
        cases=_disagreements(folder, question, people, judged),
    )


def compare(first: Mapping[Item, str], second: Mapping[Item, str]) -> tuple[Result, Result]:
    """(percent agreement, Cohen's kappa) over the items that both speak of; `first` says yes or no, else it is unsure.

    "unparsed" in `second` is counted as such and stands outside n.
    """
    both = [(said, second[item]) for item, said in first.items() if said != UNSURE and item in second]
    read = [(one, other) for one, other in both if other in (YES, NO, "undecided")]
    lost = len(both) - len(read)
    same = sum(one == other for one, other in read)
    return Result.rate(same, len(read), lost), kappa([one for one, _ in read], [other for _, other in read], lost)


def _majority(labels: Iterable[Label]) -> dict[Item, str]:
    """What most people say of each item, those who are unsure aside; a tie is unsure."""
    said: dict[Item, Counter[str]] = {}
    for one in labels:
        said.setdefault(one.item, Counter())[one.label] += 1
    return {
        item: UNSURE if votes[YES] == votes[NO] else YES if votes[YES] > votes[NO] else NO
        for item, votes in said.items()
    }


def _by_person(labels: Iterable[Label]) -> dict[str, dict[Item, str]]:
    people: dict[str, dict[Item, str]] = {}
    for one in labels:
        people.setdefault(one.who, {})[one.item] = one.label
    return people


def _decided(labels: Mapping[Item, str]) -> dict[Item, str]:
    return {item: label for item, label in labels.items() if label != UNSURE}


def _between_people(labels: Iterable[Label]) -> dict[str, Result]:
    people = {who: _decided(said) for who, said in _by_person(labels).items()}
    pairs = list(combinations(people.values(), 2))
    if not pairs:
        return {}
    one, other = max(pairs, key=lambda pair: len(pair[0].keys() & pair[1].keys()))
    return {"person_person_kappa": compare(one, other)[1]} if one.keys() & other.keys() else {}


def _rows(question: str, labels: Sequence[Label], judged: Mapping[Item, str]) -> list[tuple[Cell, ...]]:
    """One row for each person against the judge, one for all of them, one for each two people."""
    people = _by_person(labels)
    voices = {**people, **({"the majority": _majority(labels)} if len(people) > 1 else {})}
    rows: list[tuple[Cell, ...]] = [
        (QUESTIONS[question], f"{who} and the judge", *compare(said, judged), str(list(said.values()).count(UNSURE)))
        for who, said in voices.items()
    ]
    for (who, said), (other, also) in combinations(people.items(), 2):
        if said.keys() & also.keys():
            rows.append((QUESTIONS[question], f"{who} and {other}", *compare(said, _decided(also)), ""))
    return rows


def _disagreements(
    folder: Path, question: str, people: Mapping[Item, str], judged: Mapping[Item, str]
) -> list[Case]:  # fmt: skip
    """The items where a judge says otherwise than people, with their texts."""
    differ = {item for item, said in people.items() if said != UNSURE and item in judged and judged[item] != said}
    examples = {one.id: one for name in ("pairs", "rejected") for one in read_examples(folder / f"{name}.jsonl")}
    return [
        Case(f"judge and people differ: {QUESTIONS[question]}", examples[id].instruction,
             {**_texts(examples[id], number), "people say": people[id, number], "the judge says": judged[id, number]})
        for id, number in people
        if (id, number) in differ and id in examples
    ]  # fmt: skip


def _texts(example: Example, number: int | None) -> dict[str, str]:
    if number is None:
        return {"first answer": example.initial_answer, "revision": example.revised_answer}
    one = example.rounds[number]
    return {"answer": answer_before(example, number), "principle": one.principle, "critique": one.critique}


def answer_before(example: Example, number: int) -> str:
    """The answer that the critique of a round is about: the newest revision before it, else the first answer."""
    earlier = [one.revised_answer for one in example.rounds[:number] if one.revised_answer]
    return earlier[-1] if earlier else example.initial_answer
