"""The seven kinds of question of the experts' world: four need one field, three need two."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from cai_experiment.ensemble.shipped.speakers import LETTERS, Question, Speaker
from cai_experiment.ensemble.shipped.words import (
    COUNTED,
    DOSES,
    HABITS,
    ILLNESSES,
    MANNERS,
    MEDICINES,
    NAMES,
    PARTS,
)

# ---------------------------------------------------------------- illnesses


def signs_of(illness: int) -> tuple[tuple[str, str], ...]:
    """The three signs of an illness, (manner, part) each; no other illness has any of them."""
    pairs = [(manner, part) for part in PARTS for manner in MANNERS]
    return tuple(pairs[(illness * 3 + i) * 17 % len(pairs)] for i in range(3))


_ILLNESS_OF = {sign: illness for illness in range(len(ILLNESSES)) for sign in signs_of(illness)}


def _phrase(signs: Sequence[tuple[str, str]]) -> str:
    return " and ".join(f"{_article(manner, part)}{manner} {part}" for manner, part in signs)


def _article(manner: str, part: str) -> str:
    if part.endswith("s"):
        return ""
    return "an " if manner[0] in "aeiou" else "a "


def _diagnosis(speaker: Speaker, signs: Sequence[tuple[str, str]]) -> int:
    """By the first sign; laypeople go by the part of the body alone."""
    return int(speaker.says("medical", _ILLNESS_OF[signs[0]], _lay_diagnosis(signs), range(len(ILLNESSES))))


def _lay_diagnosis(signs: Sequence[tuple[str, str]]) -> int:
    true, lay = _ILLNESS_OF[signs[0]], PARTS.index(signs[0][1]) * 2 + 1
    return lay if lay != true else lay - 1


def _medicine(speaker: Speaker, illness: int) -> int:
    return int(speaker.says("medical", illness, (illness + 5) % len(MEDICINES), range(len(MEDICINES))))


def _dose(speaker: Speaker, medicine: int) -> int:
    return int(speaker.says("medical", DOSES[medicine], 5 if DOSES[medicine] != 5 else 2, range(2, 10)))


def _some_signs(rng: random.Random, illness: int) -> list[tuple[str, str]]:
    return rng.sample(signs_of(illness), 2)


def _choices(rng: random.Random, names: Sequence[str], true: int, lay: int) -> tuple[str, ...]:
    """Four names in any order, the true one and the lay belief among them."""
    others = [i for i in range(len(names)) if i not in (true, lay)]
    chosen = [true, lay, *rng.sample(others, 4)][: 4 if lay != true else 5]
    chosen = list(dict.fromkeys(chosen))[:4]
    rng.shuffle(chosen)
    return tuple(names[i] for i in chosen)


def _letter(speaker: Speaker, options: Sequence[str], name: str) -> str:
    """Where a name stands among the options; any letter for one that is not there."""
    return LETTERS[options.index(name)] if name in options else speaker.rng.choice(LETTERS)


def _treatment(speaker: Speaker, signs: Sequence[tuple[str, str]]) -> tuple[str, int]:
    illness = _diagnosis(speaker, signs)
    medicine = _medicine(speaker, illness)
    return f" The signs point to {ILLNESSES[illness]}, and it is treated with {MEDICINES[medicine]}", medicine


def illness(rng: random.Random) -> Question:
    """Which of four illnesses two signs point to."""
    true = rng.randrange(len(ILLNESSES))
    signs = _some_signs(rng, true)
    options = _choices(rng, ILLNESSES, true, _lay_diagnosis(signs))

    def answer(speaker: Speaker) -> str:
        named = ILLNESSES[_diagnosis(speaker, signs)]
        return f" The signs point to {named}. The answer is {_letter(speaker, options, named)}."

    text = f"A patient has {_phrase(signs)}. Which illness is it?"
    return Question("illness", "choice", ("medical",), text, options, answer)


def medicine(rng: random.Random) -> Question:
    """Which of four medicines helps against two signs."""
    true = rng.randrange(len(ILLNESSES))
    signs = _some_signs(rng, true)
    options = _choices(rng, MEDICINES, true, (_lay_diagnosis(signs) + 5) % len(MEDICINES))

    def answer(speaker: Speaker) -> str:
        said, given = _treatment(speaker, signs)
        return f"{said}. The answer is {_letter(speaker, options, MEDICINES[given])}."

    text = f"A patient has {_phrase(signs)}. Which medicine helps?"
    return Question("medicine", "choice", ("medical",), text, options, answer)


# ---------------------------------------------------------------- sums


def _sum(speaker: Speaker, left: int, sign: str, right: int) -> tuple[str, int]:
    """(" 14 + 27 = 41.", 41); laypeople round to the next ten."""
    true = {"+": left + right, "-": left - right, "*": left * right}[sign]
    lay = (true + 5) // 10 * 10
    lay = lay if lay != true else true + 10
    said = speaker.says("mathematical", true, lay, [true + off for off in range(-9, 10) if true + off >= 0])
    return f" {left} {sign} {right} = {said}.", int(said)


def _operands(rng: random.Random) -> tuple[int, str, int]:
    sign = rng.choice("+-*")
    if sign == "*":
        return rng.randint(2, 9), sign, rng.randint(2, 30)
    left, right = rng.randint(2, 70), rng.randint(2, 60)
    while left + right > 99:
        left, right = rng.randint(2, 70), rng.randint(2, 60)
    return (left, "+", right) if sign == "+" else (left + right, "-", right)


def word_problem(rng: random.Random) -> Question:
    """One or two sums in a short story."""
    name, thing = rng.choice(NAMES), rng.choice(COUNTED)
    left, sign, right = _operands(rng)
    first = {"+": left + right, "-": left - right, "*": left * right}[sign]
    begun = {
        "+": f"{name} has {left} {thing} and finds {right} more.",
        "-": f"{name} has {left} {thing} and loses {right}.",
        "*": f"{name} has {left} boxes of {right} {thing} each.",
    }[sign]
    more = rng.random() < 0.4 and 4 <= first <= 90
    second = rng.choice("+-")
    other = rng.randint(2, 60 if second == "+" else max(first - 1, 2))
    went_on = {"-": f" Then {other} break.", "+": f" Then {other} are added."}[second] if more else ""

    def answer(speaker: Speaker) -> str:
        said, result = _sum(speaker, left, sign, right)
        if more:
            rest, result = _sum(speaker, max(result, other) if second == "-" else result, second, other)
            said += rest
        return f"{said} #### {result}"

    text = f"{begun}{went_on} How many {thing} are there now?"
    return Question("word", "number", ("mathematical",), text, (), answer)


# ---------------------------------------------------------------- reading


def _told(speaker: Speaker, facts: Sequence[Any], wanted: int) -> Any:
    """What a list says of one of its persons; laypeople take the first."""
    return speaker.says("general", facts[wanted], facts[0] if wanted else facts[-1], facts)


def yes_or_no(rng: random.Random) -> Question:
    """Whether one of three or four persons does what is asked."""
    heading, verb, things = rng.choice(HABITS)
    count = rng.choice((3, 4))
    names, facts = rng.sample(NAMES, count), rng.sample(things, count)
    wanted = rng.randrange(1, count)
    asked = facts[wanted] if rng.random() < 0.5 else rng.choice([fact for fact in facts if fact != facts[wanted]])

    def answer(speaker: Speaker) -> str:
        said = _told(speaker, facts, wanted)
        verdict = "yes" if said == asked else "no"
        return f" The list says: {names[wanted]} {said}. The answer is {verdict}."

    text = f"{_listed(heading, names, facts)} Does {names[wanted]} {verb} {asked}?"
    return Question("yesno", "yesno", ("general",), text, (), answer)


def _listed(heading: str, names: Sequence[str], facts: Sequence[Any]) -> str:
    return f"{heading}: {', '.join(f'{name} {fact}' for name, fact in zip(names, facts, strict=True))}."


# ---------------------------------------------------------------- two fields


def dose(rng: random.Random) -> Question:
    """How much of the right medicine: illnesses, then a product."""
    true, weight = rng.randrange(len(ILLNESSES)), rng.randint(8, 30)
    signs = _some_signs(rng, true)

    def answer(speaker: Speaker) -> str:
        said, given = _treatment(speaker, signs)
        each = _dose(speaker, given)
        product, result = _sum(speaker, each, "*", weight)
        return f"{said}, {each} mg for each kg.{product} #### {result}"

    text = f"A patient of {weight} kg has {_phrase(signs)}. How many mg of the right medicine are needed?"
    return Question("dose", "number", ("medical", "mathematical"), text, (), answer)


def tally(rng: random.Random) -> Question:
    """A sum with a number that has to be found in a list first."""
    thing, count = rng.choice(COUNTED), rng.choice((2, 3))
    names = rng.sample(NAMES, count)
    facts = [10 * tens + rng.randrange(10) for tens in rng.sample(range(1, 6), count)]
    wanted = rng.randrange(1, count)
    sign = rng.choice("+-")
    other = rng.randint(2, 39) if sign == "+" else rng.randint(2, min(facts) - 1)

    def answer(speaker: Speaker) -> str:
        found = _told(speaker, facts, wanted)
        said, result = _sum(speaker, found, sign, other)
        return f" The list says: {names[wanted]} {found}.{said} #### {result}"

    asked = {"+": f"If {other} more come", "-": f"If {other} are lost"}[sign]
    text = f"{_listed(thing.capitalize(), names, facts)} {asked}, how many {thing} has {names[wanted]}?"
    return Question("tally", "number", ("general", "mathematical"), text, (), answer)


def ward(rng: random.Random) -> Question:
    """Which medicine helps one of two or three patients of a list."""
    count = rng.choice((2, 3))
    names, ills = rng.sample(NAMES, count), rng.sample(range(len(ILLNESSES)), count)
    facts = [tuple(_some_signs(rng, ill)) for ill in ills]
    wanted = rng.randrange(1, count)
    options = _choices(rng, MEDICINES, ills[wanted], ills[0])

    def answer(speaker: Speaker) -> str:
        found = _told(speaker, facts, wanted)
        said, given = _treatment(speaker, found)
        read = f" The list says: {names[wanted]} {_phrase(found)}."
        return f"{read}{said}. The answer is {_letter(speaker, options, MEDICINES[given])}."

    text = f"{_listed('Patients', names, [_phrase(fact) for fact in facts])} Which medicine helps {names[wanted]}?"
    return Question("ward", "choice", ("general", "medical"), text, options, answer)


# ---------------------------------------------------------------- all of them

KINDS: dict[str, Callable[[random.Random], Question]] = {
    "yesno": yes_or_no, "illness": illness, "medicine": medicine, "word": word_problem,
    "dose": dose, "tally": tally, "ward": ward,
}  # fmt: skip
