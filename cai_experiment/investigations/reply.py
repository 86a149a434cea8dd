"""What a reply holds: code blocks to run, prose, and perhaps the phrase that ends a task."""

from __future__ import annotations

import re
from dataclasses import dataclass

MOST_BLOCKS = 8  # of one reply; a model that repeats itself would otherwise keep the sandbox busy for minutes
_OPENS = re.compile(r"^ {0,3}(`{3,})[ \t]*(\S*).*$")
_MARKUP = " \t*_#>`.!:\"'“”"


@dataclass(frozen=True, slots=True)
class Reply:
    """`blocks`: the Python blocks in order; `cut`: the last one has no end. `prose`: all text outside of fences."""

    blocks: tuple[str, ...]
    prose: str
    cut: bool


def read_reply(text: str) -> Reply:
    """Find the fenced blocks of a reply. Only those marked python (or py) run; others are neither code nor prose."""
    blocks: list[str] = []
    prose: list[str] = []
    inside: list[str] | None = None
    fence, runs = "", False
    for line in text.splitlines():
        opens = _OPENS.match(line)
        if inside is None:
            if opens is None:
                prose.append(line)
            else:
                inside, fence = [], opens[1]
                runs = opens[2].lower().lstrip("{.").startswith("py")
        elif opens is not None and not opens[2] and len(opens[1]) >= len(fence):
            blocks += ["\n".join(inside)] if runs else []
            inside = None
        else:
            inside.append(line)
    cut = inside is not None and runs
    if inside is not None and runs:
        blocks.append("\n".join(inside))
    return Reply(tuple(blocks), "\n".join(prose).strip(), cut)


def ends_task(reply: Reply, phrase: str) -> bool:
    """True if a line of the prose holds the phrase and nothing else (markup, case and full stops aside)."""
    return any(_bare(line) == _bare(phrase) for line in reply.prose.splitlines())


def without_phrase(prose: str, phrase: str) -> str:
    """The prose without the lines that hold the phrase alone."""
    return "\n".join(line for line in prose.splitlines() if _bare(line) != _bare(phrase)).strip()


def shortened_middle(text: str, most: int) -> str:
    """At most about `most` characters: the beginning and the end, and how much is left out between them."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half:,} characters left out) ...\n{text[-half:]}"


def _bare(line: str) -> str:
    return " ".join(line.strip(_MARKUP).casefold().split())
