"""The broad grid: topics, kinds and lengths from which any model but the shipped one is asked to write instructions.

Nearly a third of the kinds tempt: a constitution has its say where an answer can do harm, deceive or flatter, and the
rest keeps the data from teaching refusal alone. The prompt shows a topic by name, a kind and a length by phrase. What
a message shows (code, a passage, a draft) stands on lines of its own; pipeline/run_on.py says what may not follow.
"""

from __future__ import annotations

import random
from functools import lru_cache

BROAD = "broad"  # its name in a manifest

FIELDS: dict[str, tuple[str, ...]] = {
    "programming": (
        "Python scripts", "web development", "SQL and databases", "C++ and memory", "version control with Git",
        "spreadsheet formulas", "data analysis",
    ),
    "science": (
        "physics of everyday things", "chemistry", "biology and evolution", "astronomy", "climate",
        "earthquakes and volcanoes", "how experiments are done",
    ),
    "mathematics": (
        "algebra", "geometry", "probability", "statistics", "calculus", "logic puzzles", "whole numbers and proofs",
    ),
    "history": (
        "ancient civilisations", "the Middle Ages", "colonial rule", "the world wars", "the history of science",
        "revolutions", "dictatorships of the twentieth century",
    ),
    "law": (
        "contracts", "renting and landlords", "employment law", "child custody", "police and criminal law",
        "copyright", "immigration and visas",
    ),
    "politics": (
        "elections", "taxes and public spending", "migration policy", "protest and activism", "foreign policy",
        "local government", "political parties",
    ),
    "medicine and mental health": (
        "medicines and doses", "pregnancy and birth", "infections and vaccines", "diet and weight",
        "anxiety and depression", "addiction", "sleep",
    ),
    "money": (
        "household budgets", "debt and loans", "investing", "cryptocurrency", "insurance", "pensions",
        "buying a home",
    ),
    "work": (
        "job applications", "managing people", "conflict with colleagues", "starting a business",
        "marketing and sales", "customer service", "working from home",
    ),
    "education": (
        "homework", "university applications", "exams", "teaching a class", "learning a skill alone",
        "academic writing", "small children's learning",
    ),
    "relationships": (
        "dating", "marriage and divorce", "friendship", "parents and teenagers", "grief and loss", "neighbours",
        "care for elderly relatives",
    ),
    "creative writing": (
        "short stories", "poetry", "film and theatre scripts", "song lyrics", "fantasy worlds", "crime fiction",
        "humour and satire",
    ),
    "language": (
        "English grammar", "translation", "learning a foreign language", "the origin of words",
        "emails and letters", "public speaking", "slang and dialect",
    ),
    "travel": (
        "city trips", "hiking", "flights and airports", "driving abroad", "travelling alone",
        "customs of other countries", "travel on little money",
    ),
    "technology and security": (
        "passwords and accounts", "phones and apps", "home networks", "malware and scams",
        "surveillance and tracking", "artificial intelligence", "electronics repair",
    ),
    "ethics": (
        "lying and promises", "the treatment of animals", "medical ethics", "duties to strangers",
        "violence and self-defence", "inequality", "free will and blame",
    ),
    "current society": (
        "social media", "religion in public life", "gender and sexuality", "race and ethnicity",
        "news and misinformation", "drugs and alcohol", "guns and public safety",
    ),
    "everyday life": (
        "cooking", "home repairs", "gardening", "cars and bicycles", "pets", "household chemicals",
        "shopping and consumer rights",
    ),
}  # fmt: skip
TOPICS: tuple[str, ...] = tuple(topic for topics in FIELDS.values() for topic in topics)

TEMPTING = "tempt-"  # begins the kinds in which the easy answer is a wrong one
KINDS: dict[str, str] = {
    "explain": "asks how something works, or why it is so",
    "how-to": "asks for the steps by which something is done",
    "debug": "describes or shows something of theirs that goes wrong, and asks for the mistake",
    "compare": "asks which of two or more things is better, and for whom",
    "summarise": "gives a short passage of facts and asks for the main point",
    "create": "asks for something made up: a story, a poem, a scene",
    "rewrite": "gives a sentence or two of their own and asks for a better version",
    "restyle": "gives a sentence or two and asks for another tone, style or language",
    "plan": "asks for a plan or timetable for something that lies ahead",
    "brainstorm": "asks for many different ideas",
    "advise": "describes a situation of their own and asks what to do",
    "argue": "asks for the best arguments on both sides of a question",
    "reason": "poses a problem that has to be solved step by step",
    "estimate": "asks for a rough figure and how it is arrived at",
    "critique": "shows a short piece of their own work and asks what is weak in it",
    "role-play": "asks the assistant to play somebody in a scene",
    "opinion": "asks what the assistant thinks of a disputed matter",
    "tempt-danger": "wants help with something that could hurt them or others",
    "tempt-crime": "wants help with something that breaks the law or the rules",
    "tempt-deceive": "wants help to mislead, trick or pressure somebody",
    "tempt-private": "wants private facts about somebody, or a way to watch them",
    "tempt-expert": "wants a firm decision that belongs to a doctor, a lawyer or another professional",
    "tempt-prejudice": "asks a loaded question that takes a prejudice about a group of people for granted",
    "tempt-falsehood": "states something false as a fact and wants to hear that it is right",
    "tempt-assistant": "asks the assistant about itself: its feelings, its wishes, its rules, what it hides",
}

LENGTHS: dict[str, str] = {
    "short": "one or two short sentences",
    "medium": "two or three sentences, with some background",
    "long": "four or five sentences, with background and details",
}


def draw(seed: int, index: int) -> tuple[str, str, str]:
    """The (topic, kind, length) of candidate `index` (0, 1, 2 ...), by their names.

    Topics and kinds are shuffled once a pass and stepped through side by side. Their numbers share no divisor, so every
    cell comes once before any comes again (Chinese remainder theorem). Any 25 draws of a pass hold every kind once, any
    126 every topic, so a run of a hundred pairs is as even as one of five thousand.
    """
    cycle, position = divmod(index, len(TOPICS) * len(KINDS))
    topics, kinds = _order(seed, cycle)
    length = random.Random(f"length/{seed}/{index}").choice(list(LENGTHS))
    return topics[position % len(topics)], kinds[position % len(kinds)], length


def tempts(kind: str) -> bool:
    """True for the kinds in which the easy answer is a wrong one."""
    return kind.startswith(TEMPTING)


@lru_cache
def _order(seed: int, cycle: int) -> tuple[list[str], list[str]]:
    rng = random.Random(f"broad/{seed}/{cycle}")
    return rng.sample(TOPICS, len(TOPICS)), rng.sample(list(KINDS), len(KINDS))
