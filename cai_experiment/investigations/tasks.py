"""What is investigated: the default tasks in their order, or questions that the model names itself."""

from __future__ import annotations

import re
from dataclasses import dataclass

from cai_experiment.investigations import prompts

STYLES = ("guided", "research-driven")
MOST_QUESTIONS = 3
_MARK = re.compile(r"^\s*(?:[*_]{1,3})?\s*(?:[-*•+]\s|\(?\d{1,2}[.):](?!\d))\s*")  # a bullet or a number, bold or plain
_PREFIX = re.compile(r"^(?:question\s*\d*|q\s*\d+)\s*[.:)–-]\s*", re.IGNORECASE)
_QUESTION = re.compile(r"^.{8,300}\?$")


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
    """The questions that a reply names, each once: lines that end in a question mark, without number and markup.

    Where questions are numbered or bulleted only those count: what a model says around them may be one too.
    """
    lines = reply.splitlines()
    marked = [found for line in lines if _MARK.match(line) and (found := _question(line))]
    plain = [found for line in lines if (found := _question(line))]
    return list(dict.fromkeys(marked or plain))[:MOST_QUESTIONS]


def _question(line: str) -> str:
    """The question of a line, bare; "" if it holds none."""
    text = _MARK.sub("", line).strip(' \t*_"“”')
    text = _PREFIX.sub("", text).strip(' \t*_"“”')
    return text if _QUESTION.match(text) else ""


def as_tasks(questions: list[str]) -> tuple[Stage, ...]:
    """A task for each question; without any, the guided tasks before the synthesis."""
    named = tuple(Stage(f"question {i}", text) for i, text in enumerate(questions, 1))
    return named or (ARCHITECTURE, ACTIVATIONS)
