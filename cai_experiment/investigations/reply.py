"""What a reply holds: code blocks to run, prose, and perhaps the phrase that ends a task."""

from __future__ import annotations

import re
from dataclasses import dataclass
from textwrap import dedent

MOST_BLOCKS = 8  # of one reply; a model that repeats itself would otherwise keep the sandbox busy for minutes
# A fence, at any depth of a list, also on the line of the item itself; a backtick behind it makes it inline code.
_FENCE = re.compile(r"^(?P<before>[ \t]*(?:(?:[-*+]|\d{1,2}[.)])[ \t]+)?)(?P<ticks>`{3,})[ \t]*(?P<info>[^\s`]*)[^`]*$")
_THINKS, _THOUGHT = re.compile(r"^\s*<think(?:ing)?>"), re.compile(r"</think(?:ing)?>")
_MARKUP = " \t*_#>`.!:\"'“”-[]()<•"
_SENTENCE = re.compile(r"(?<=[.!?])[ \t]+")
TAB = 4


@dataclass(frozen=True, slots=True)
class Reply:
    """`blocks`: the Python blocks in order; `cut`: the last one has no end. `prose`: all text outside of fences.

    `other`: what stands in fences that are not marked python. Thoughts (<think>) are in none of these.
    """

    blocks: tuple[str, ...]
    prose: str
    cut: bool
    other: tuple[str, ...] = ()


def read_reply(text: str) -> Reply:
    """Find the fenced blocks of a reply. Only those marked python (or py) run; others are neither code nor prose."""
    blocks: list[str] = []
    prose: list[str] = []
    other: list[str] = []
    inside: list[str] | None = None
    indent, ticks, runs = "", "", False
    for line in _spoken(text):
        fence = _FENCE.match(line)
        if inside is not None and not (fence and _closes(fence, indent, ticks)):
            inside.append(line)
        elif inside is not None:
            (blocks if runs else other).append(_code(inside, indent))
            inside = None
        elif fence is None:
            prose.append(line)
        else:
            inside, indent, ticks = [], re.sub(r"[^ \t]", " ", fence["before"]), fence["ticks"]
            runs = fence["info"].lower().lstrip("{.").startswith("py")
    if inside is not None:
        (blocks if runs else other).append(_code(inside, indent))
    return Reply(tuple(blocks), "\n".join(prose).strip(), inside is not None and runs, tuple(other))


def _spoken(text: str) -> list[str]:
    """The lines of a reply without its thoughts: <think> ... </think>, to the end where these are not closed.

    Code in them was not meant to run. A chat template may hold the opening tag itself; then the reply begins in
    thought. Lines end in a line feed: `str.splitlines` would cut code at characters that Python allows in a string.
    """
    lines = text.replace("\r\n", "\n").split("\n")
    ends = next((i for i, line in enumerate(lines) if re.match(rf"\s*{_THOUGHT.pattern}", line)), None)
    thinking = ends is not None and not any(_THINKS.match(line) for line in lines[: ends + 1])
    spoken, in_fence = [], False
    for line in lines:
        if not thinking and not in_fence and (opens := _THINKS.match(line)):
            thinking, line = True, line[opens.end() :]
        if thinking:
            ended = _THOUGHT.search(line)
            if ended is None:
                continue
            thinking, line = False, line[ended.end() :]
        in_fence ^= _FENCE.match(line) is not None
        spoken.append(line)
    return spoken


def _closes(fence: re.Match[str], indent: str, ticks: str) -> bool:
    """True for a bare fence, as long as the opening one at least, and no deeper than a fence may stand (CommonMark)."""
    deeper = len(fence["before"].expandtabs(TAB)) - len(indent.expandtabs(TAB))
    bare = not fence["info"] and not fence["before"].strip()
    return bare and deeper < TAB and len(fence["ticks"]) >= len(ticks)


def _code(lines: list[str], indent: str) -> str:
    """A block without the indent of its fence, and without a further one that all of its lines share."""
    code = "\n".join(_without(line, indent) for line in lines)
    return dedent(code) if code.lstrip("\n")[:1] in (" ", "\t") else code


def _without(line: str, indent: str) -> str:
    if line.startswith(indent):
        return line[len(indent) :]
    bare = line.lstrip(" \t")
    return line[: len(line) - len(bare)].expandtabs(TAB)[len(indent.expandtabs(TAB)) :] + bare


def ends_task(reply: Reply, phrase: str) -> bool:
    """True if a line of the prose is the phrase, or a sentence and then the phrase (markup, case and stops aside).

    So does a fence that holds the phrase alone, unless it is code.
    """
    lines = (_SENTENCE.split(line)[-1] for line in reply.prose.splitlines())
    return any(_is_phrase(part, phrase) for part in (*reply.prose.splitlines(), *lines, *reply.other))


def without_phrase(prose: str, phrase: str) -> str:
    """The prose without the lines that hold the phrase alone."""
    return "\n".join(line for line in prose.splitlines() if not _is_phrase(line, phrase)).strip()


def shortened_middle(text: str, most: int) -> str:
    """At most about `most` characters: the beginning and the end, and how much is left out between them."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n... ({len(text) - 2 * half:,} characters left out) ...\n{text[-half:]}"


def _is_phrase(text: str, phrase: str) -> bool:
    return _bare(text) == (_bare(phrase) or phrase)  # a phrase of markup alone is compared as it is


def _bare(line: str) -> str:
    return " ".join(line.strip(_MARKUP).casefold().split())
