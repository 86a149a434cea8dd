"""What is investigated: the default tasks in their order, or questions that the model names itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cai_experiment.investigations import prompts

STYLES = ("guided", "research-driven")
MOST_QUESTIONS = 3
_NUMBERED = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.):])?\s*(?:\*\*)?(.{8,300}?\?)[\s*\"”]*$")


@dataclass(frozen=True, slots=True)
class Stage:
    """One task of a session. `names_questions`: the reply names the tasks that follow it.

    `revises`: it follows the conclusions and may change them. `documents`: they arrive in the turn that gives it.
    """

    name: str
    text: str
    names_questions: bool = False
    revises: bool = False
    documents: bool = False


ARCHITECTURE = Stage("architecture", prompts.ARCHITECTURE)
ACTIVATIONS = Stage("activations", prompts.ACTIVATIONS)
SYNTHESIS = Stage("synthesis", prompts.SYNTHESIS)
QUESTIONS = Stage("questions", prompts.QUESTIONS, names_questions=True)
REVISE = Stage("revision", prompts.REVISE, revises=True)


def tasks_of(style: str) -> tuple[Stage, ...]:
    """The tasks of a style, the synthesis last; those that a `research-driven` model names come before it."""
    return (ARCHITECTURE, ACTIVATIONS, SYNTHESIS) if style == "guided" else (QUESTIONS, SYNTHESIS)


def questions_in(reply: str) -> list[str]:
    """The questions that a reply names: lines that end in a question mark, without their numbers, each once."""
    found = (_NUMBERED.match(line) for line in reply.splitlines())
    return list(dict.fromkeys(one[1].strip() for one in found if one))[:MOST_QUESTIONS]


def as_tasks(questions: list[str]) -> tuple[Stage, ...]:
    """A task for each question; without any, the guided tasks before the synthesis."""
    named = tuple(Stage(f"question {i}", text) for i, text in enumerate(questions, 1))
    return named or (ARCHITECTURE, ACTIVATIONS)
