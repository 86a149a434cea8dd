"""Answers read from what a model wrote (first version)."""

from __future__ import annotations

import re
from collections.abc import Sequence

TASKS = ("number", "choice", "yesno", "text")


def read_answer(text: str, task: str, options: Sequence[str] = ()) -> str | None:
    """The answer that a text gives; None: none can be read."""
    if task == "text":
        return text.strip() or None
    pattern = {"number": r"-?\d[\d,]*(?:\.\d+)?", "choice": r"\b[A-E]\b(?=[).:]|$)",
               "yesno": r"(?i)\b(?:yes|no)\b"}[task]  # fmt: skip
    found = re.findall(pattern, text)
    return found[-1].replace(",", "").lower() if found and task != "choice" else found[0] if found else None


def stated_task(answer: str, options: Sequence[str] = ()) -> str:
    """The kind of answer that a reference answer is."""
    if options:
        return "choice"
    if "####" in answer:
        return "number"
    return "yesno" if re.fullmatch(r"(?i)\s*(?:yes|no)\.?\s*", answer) else "text"
