"""HTML for texts that nobody may trust: all that a page shows of a model, a file or a user goes through here.

    card("Answer", joined(block(answer), notice("✓ no violation", "ok")))

Text stays text: markup is escaped, nothing becomes a link, and what cannot be seen (control codes, marks that reorder
text, zero-width characters) is shown as its code, so "\\x1b[31m" is read, not obeyed. Emoji and scripts written from
right to left stay as they are. A text is cut to what a person reads on a page; files keep all of it.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from cai_experiment.evaluation.reporting.differences import Piece, differences
from cai_experiment.observe.screen import shortened

SHOWN = 20_000  # characters of a text in a block: some 10 pages
CELL = 300  # characters of a text in a table
DIFF = 6_000  # characters of each text in a word diff, whose time grows faster than the texts
ROWS = 500  # rows of a table
STACKED = 4  # marks on one letter
TITLES = 4  # reasons in one title
Kind = Literal["ok", "bad", "note"]

# As observe.screen.escaped, and what has no width: soft hyphen, joiners, fillers, invisible operators, variation
# selectors, tags (they can hide a whole message), interlinear marks and noncharacters. "\r\n" is a plain line end.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]|\r(?!\n)"
)
_MARKS = (  # that stand on a letter: a few of them, not a tower over the lines above
    "[\u0300-\u036f\u0483-\u0489\u0591-\u05bd\u064b-\u065f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u1ab0-\u1aff\u1dc0-\u1dff"
    "\u20d0-\u20ff\ufe20-\ufe2f]"
)
_EMOJI = "\u00a9\u00ae\u203c-\u3299\U0001f000-\U0001faff"
_JOINED_SCRIPTS = "\u0600-\u08ff\u0900-\u0dff\u1000-\u109f\u1780-\u17ff"  # Arabic to Sinhala, Myanmar, Khmer
# Where such a character does what it is for, it stays: in a family of emoji, after one, as a keycap, a flag of a
# region, and between the letters of scripts that join.
_AT_HOME = re.compile(
    f"(?<=[{_EMOJI}\ufe0f])\u200d(?=[{_EMOJI}])|(?<=[{_EMOJI}])[\ufe0e\ufe0f]|(?<=[0-9#*])\ufe0f(?=\u20e3)"
    f"|(?<=[{_JOINED_SCRIPTS}])[\u200c\u200d](?=[{_JOINED_SCRIPTS}])"
    "|(?<=\U0001f3f4)[\U000e0061-\U000e007a]{3,6}\U000e007f"
)
_VISIBLE = re.compile(f"(?P<home>{_AT_HOME.pattern})|{_HIDDEN.pattern}|(?<={_MARKS * STACKED}){_MARKS}")


class Html(str):
    """Finished markup: what the functions here return, and what a table takes as it is."""

    __slots__ = ()


class Marked(Protocol):
    """A stretch of a text that broke an axis, as evaluation.harm_rules.Span."""

    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...
    @property
    def axis(self) -> str: ...
    @property
    def category(self) -> str: ...
    @property
    def reason(self) -> str: ...


def escaped(text: str, limit: int = SHOWN) -> Html:
    """The text for the inside of an element or a quoted attribute, at most `limit` characters of it."""
    return _escaped(shortened(text, limit))


def visible(text: str) -> str:
    """The text with a code for each character that cannot be seen: "\\x1b", "\\u202e". Not yet HTML."""
    return _VISIBLE.sub(lambda found: found[0] if found["home"] else _code(found[0]), text)


def in_words(name: str) -> str:
    """A name of ours as people read it: "harm_prevention" is "harm prevention"."""
    return name.replace("_", " ")


# ---------------------------------------------------------------- texts


def block(text: str, limit: int = SHOWN, mono: bool = False) -> Html:
    """A text by itself, in its own direction, lines and blanks kept; `mono` for output that is code or a log."""
    return Html(f'<div class="cai-text{" cai-mono" if mono else ""}" dir="auto">{escaped(text, limit)}</div>')


def inline(text: str, limit: int = CELL) -> Html:
    """A text inside a line of ours, which its direction does not turn round."""
    return Html(f"<bdi>{escaped(text, limit)}</bdi>")


def highlighted(text: str, spans: Iterable[Marked], limit: int = SHOWN) -> Html:
    """A text with its matches marked. Each names its axis in words; its title says category and reason.

    Spans that overlap become one mark with what all of them say. Those behind the first `limit` characters are counted.
    """
    shown = text[:limit]
    in_order = sorted(spans, key=lambda span: (span.start, span.end))
    parts, at = [], 0
    for group in _merged([span for span in in_order if 0 <= span.start < min(span.end, len(shown))]):
        start, end = group[0].start, min(max(span.end for span in group), len(shown))
        parts += [_escaped(shown[at:start]), _mark(shown[start:end], group)]
        at = end
    parts.append(_escaped(shown[at:] + shortened(text, limit)[len(shown) :]))
    later = sum(span.start >= limit for span in in_order)
    more = notice(f"{later:,} more matches stand behind what is shown", "note") if later else ""
    return Html(f'<div class="cai-text" dir="auto">{"".join(parts)}</div>{more}')


def word_diff_html(before: str, after: str, labels: tuple[str, str] = ("before", "after")) -> Html:
    """Two texts beside each other: words that went are struck out, words that came underlined."""
    left, right = differences(shortened(before, DIFF), shortened(after, DIFF))
    sides = zip(labels, (before, after), (left, right), strict=True)
    made = (f'<div><div class="cai-label">{escaped(label)}</div>{_side(text, p)}</div>' for label, text, p in sides)
    return Html(f'<div class="cai-diff">{"".join(made)}</div>')


# ---------------------------------------------------------------- the page's parts


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Html:
    """A table. A cell of type Html is taken as it is; any other is escaped and cut to 300 characters."""
    head = "".join(f'<th scope="col">{escaped(name, CELL)}</th>' for name in headers)
    listed = list(rows)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in listed[:ROWS])
    more = notice(f"... ({len(listed):,} rows)", "note") if len(listed) > ROWS else ""
    made = f'<table class="cai-table"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return Html(f'<div class="cai-scroll">{made}</div>{more}')


def facts(rows: Iterable[tuple[str, object]]) -> Html:
    """Names with their values, as a list. A value of type Html is taken as it is."""
    parts = [f'<dt>{escaped(name, CELL)}</dt><dd dir="auto">{_value(value)}</dd>' for name, value in rows]
    return Html(f'<dl class="cai-facts">{"".join(parts)}</dl>')


def notice(line: str, kind: Kind = "note") -> Html:
    """A line of our own about what happened; `line` may quote anything."""
    role = "alert" if kind == "bad" else "status"
    return Html(f'<p class="cai-{kind}" role="{role}" dir="auto">{escaped(line, 2_000)}</p>')


def card(title: str, inner: str) -> Html:
    """A box with a title; `inner` is finished markup."""
    return Html(f'<section class="cai-card"><h3 dir="auto">{escaped(title, CELL)}</h3>{inner}</section>')


def details(summary: str, inner: str, is_open: bool = False) -> Html:
    """A box that opens on a click; `inner` is finished markup."""
    head = f'<summary dir="auto">{escaped(summary, CELL)}</summary>'
    return Html(f'<details class="cai-details"{" open" if is_open else ""}>{head}{inner}</details>')


def joined(*parts: str) -> Html:
    """Finished pieces after each other."""
    return Html("".join(parts))


# ---------------------------------------------------------------- parts of the above


def _escaped(text: str) -> Html:
    return Html(html.escape(visible(text), quote=True))


def _code(hidden: str) -> str:
    number = ord(hidden)
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"


def _merged(spans: Sequence[Marked]) -> list[list[Marked]]:
    """Sorted spans in groups: in one, each begins before the furthest end of those before it."""
    groups: list[list[Marked]] = []
    end = 0
    for span in spans:
        if groups and span.start < end:
            groups[-1].append(span)
        else:
            groups.append([span])
        end = max(end, span.end)
    return groups


def _mark(text: str, spans: Sequence[Marked]) -> str:
    axes = ", ".join(dict.fromkeys(in_words(span.axis) for span in spans))
    said = list(dict.fromkeys(f"{in_words(span.category)}: {span.reason}" for span in spans))
    title = "\n".join(shortened(one, CELL) for one in said[:TITLES])
    title += f"\nand {len(said) - TITLES:,} more" if len(said) > TITLES else ""
    label = f'<sup class="cai-axis">{escaped(axes, CELL)}</sup>'
    return f'<mark class="cai-hit" title="{escaped(title)}">{_escaped(text)}{label}</mark>'


def _side(whole: str, pieces: Sequence[Piece]) -> str:
    """One text of a diff; the blank before a marked word stands outside of the mark."""
    tags = {"del": ('<del class="cai-gone">', "</del>"), "ins": ('<ins class="cai-came">', "</ins>")}
    parts = []
    for piece in pieces:
        begin, end = tags.get(piece.kind, ("", ""))
        word = piece.text.lstrip() if begin else piece.text
        parts.append(f"{_escaped(piece.text[: len(piece.text) - len(word)])}{begin}{_escaped(word)}{end}")
    inner = "".join(parts) or ("" if whole.strip() else '<span class="cai-note">(empty)</span>')
    return f'<div class="cai-text" dir="auto">{inner}</div>'


def _cell(value: object) -> str:
    return f'<td dir="auto">{_value(value)}</td>'


def _value(value: object) -> str:
    return value if isinstance(value, Html) else escaped(str(value), CELL)
