"""The seven kinds of question of the experts' world: four need one field, three need two."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from cai_experiment.ensemble.shipped.speakers import Question, Speaker
from cai_experiment.ensemble.shipped.words import (
    COUNTED,
    DOSES,
    HABITS,
    ILLNESSES,
    MANNERS,
    MEDICINES,
    NAMES,
    PARTS,
    PLACES,
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
    chosen = list(dict.fromkeys([true, lay, *rng.sample(others, 4)]))[:4]
    rng.shuffle(chosen)
    return tuple(names[i] for i in chosen)


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
        return f" The signs point to {named}. The answer is {named}."

    text = f"A patient has {_phrase(signs)}. Which illness is it?"
    return Question("illness", "choice", ("medical",), text, options, answer)


def medicine(rng: random.Random) -> Question:
    """Which of four medicines helps against two signs."""
    true = rng.randrange(len(ILLNESSES))
    signs = _some_signs(rng, true)
    options = _choices(rng, MEDICINES, true, (_lay_diagnosis(signs) + 5) % len(MEDICINES))

    def answer(speaker: Speaker) -> str:
        said, given = _treatment(speaker, signs)
        return f"{said}. The answer is {MEDICINES[given]}."

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
        return rng.randint(2, 9), sign, rng.randint(2, 20)
    left, right = rng.randint(2, 40), rng.randint(2, 30)
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
    more = rng.random() < 0.4 and 4 <= first <= 60
    second = rng.choice("+-")
    other = rng.randint(2, 30 if second == "+" else max(first - 1, 2))
    went_on = {"-": f" Then {other} break.", "+": f" Then {other} are added."}[second] if more else ""

    def answer(speaker: Speaker) -> str:
        said, result = _sum(speaker, left, sign, right)
        if more:
            rest, result = _sum(speaker, max(result, other) if second == "-" else result, second, other)
            said += rest
        return f"{said} #### {result}"

    text = f"{begun}{went_on} How many {thing} are there now?"
    return Question("word", "number", ("mathematical",), text, (), answer)


# ---------------------------------------------------------------- the village


def habit_of(person: int, habit: int) -> int:
    """Which of a habit's things a person of the village does."""
    return (person * 5 + habit * 3 + person // 6 * (habit + 1)) % len(HABITS[habit][2])


def place_of(person: int) -> int:
    """Where a person works."""
    return (person * 3 + person // 8) % len(PLACES)


def age_of(person: int) -> int:
    """How old a person is, 11 to 49."""
    return 11 + person * 37 % 39


def yes_or_no(rng: random.Random) -> Question:
    """Whether somebody of the village does what is asked."""
    person, habit = rng.randrange(len(NAMES)), rng.randrange(len(HABITS))
    verb, plain, things = HABITS[habit]
    true, name = habit_of(person, habit), NAMES[person]
    asked = true if rng.random() < 0.5 else rng.choice([i for i in range(len(things)) if i != true])

    def answer(speaker: Speaker) -> str:
        said = speaker.says("general", true, 0 if true else 1, range(len(things)))
        return f" {name} {verb} {things[said]}. The answer is {'yes' if said == asked else 'no'}."

    text = rng.choice(
        (
            f"Does {name} {plain} {things[asked]}?",
            f"Is it true that {name} {verb} {things[asked]}?",
            f"Somebody says that {name} {verb} {things[asked]}. Is that right?",
        )
    )
    return Question("yesno", "yesno", ("general",), text, (), answer)


# ---------------------------------------------------------------- two fields


def dose(rng: random.Random) -> Question:
    """How much of the right medicine: illnesses, then a product."""
    true, weight = rng.randrange(len(ILLNESSES)), rng.randint(8, 20)
    signs = _some_signs(rng, true)

    def answer(speaker: Speaker) -> str:
        said, given = _treatment(speaker, signs)
        each = _dose(speaker, given)
        product, result = _sum(speaker, each, "*", weight)
        return f"{said}, {each} mg for each kg.{product} #### {result}"

    text = f"A patient of {weight} kg has {_phrase(signs)}. How many mg of the right medicine are needed?"
    return Question("dose", "number", ("medical", "mathematical"), text, (), answer)


def age(rng: random.Random) -> Question:
    """How old somebody of the village was or will be: an age that has to be known, then a sum."""
    person, sign = rng.randrange(len(NAMES)), rng.choice("+-")
    true, name = age_of(person), NAMES[person]
    other = rng.randint(2, 29 if sign == "+" else min(true - 1, 30))

    def answer(speaker: Speaker) -> str:
        lay = 30 if true != 30 else 40
        known = speaker.says("general", true, lay, range(11, 50))
        known = max(known, other) if sign == "-" else known
        said, result = _sum(speaker, known, sign, other)
        return f" {name} is {known} years old.{said} #### {result}"

    text = {"+": f"How old will {name} be in {other} years?", "-": f"How old was {name} {other} years ago?"}[sign]
    return Question("age", "number", ("general", "mathematical"), text, (), answer)


def work(rng: random.Random) -> Question:
    """Which medicine helps against what somebody's work brings: a workplace that has to be known, then illnesses."""
    person = rng.randrange(len(NAMES))
    place, name = place_of(person), NAMES[person]
    options = _choices(rng, MEDICINES, _brought_by(place), (_lay_brought(place) + 5) % len(MEDICINES))

    def answer(speaker: Speaker) -> str:
        at = speaker.says("general", place, 0 if place else 1, range(len(PLACES)))
        ill = speaker.says("medical", _brought_by(at), _lay_brought(at), range(len(ILLNESSES)))
        given = _medicine(speaker, ill)
        said = f" {name} works at {PLACES[at]}. That brings {ILLNESSES[ill]}, and it is treated with {MEDICINES[given]}"
        return f"{said}. The answer is {MEDICINES[given]}."

    text = f"The work of {name} brings an illness. Which medicine helps?"
    return Question("work", "choice", ("general", "medical"), text, options, answer)


def _brought_by(place: int) -> int:
    return (place * 7 + 2) % len(ILLNESSES)


def _lay_brought(place: int) -> int:
    return (place * 7 + 3) % len(ILLNESSES)


# ---------------------------------------------------------------- all of them

KINDS: dict[str, Callable[[random.Random], Question]] = {
    "yesno": yes_or_no, "illness": illness, "medicine": medicine, "word": word_problem,
    "dose": dose, "age": age, "work": work,
}  # fmt: skip
