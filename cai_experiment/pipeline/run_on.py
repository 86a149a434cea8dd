"""Where a written message goes on into what does not belong to it: an answer, a second message, headings, a dialogue.

A message of several lines is one that shows something: a passage, lines of code, a draft. So every line of it either
leads up to what is asked, asks it, or belongs to what is shown; and a line behind the question that is none of these is
an answer or the next message.
"""

from __future__ import annotations

import re

MAX_LINES = 30  # a message has 200 tokens at most; more lines are a list

_CODE = re.compile(r"^[ \t]*(```|~~~)[^\n`]*\n.*?(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_SHOWN = "\x00"  # in the place of a block of code
_QUOTED = re.compile(r"[\x00>\"'“‘«|]|(?:\t|    )\s*\S")  # a line of code or of a quotation
_LABEL = re.compile(
    r"[*_\s>\[(]*(?:human|user|person|assistant|ai|ai assistant|chatbot|bot|system|message|question|answer"
    r"|response|reply"
    r"|result|task|instructions?|topic|kind|length|q|a)(?: ?\d+)?[*_\])]*\s*:",
    re.IGNORECASE,
)
_HEADING = re.compile(r"#{2,}\s|\*\*[^*]+\*\*:?$|(?:-{3,}|={3,}|\*{3,}|_{3,})$")
_LIST = re.compile(r"(?:[-*•]|\d+[.)])\s|#\s")  # a first line that opens a list of messages, or a page
_ANNOUNCED = re.compile(
    r"(?:(?:sure|certainly|of course|okay|absolutely|great)\b[\s,.!:]*here\b|here(?:'s|’s| is| are) (?:an?|one|the"
    r"|some) "
    r"(?:\w+ ){0,2}(?:messages?|questions?|prompts?|requests?|examples?)\b)",
    re.IGNORECASE,
)
_SHOWS = re.compile(  # what follows is the thing that is asked about
    r"\b(?:following|below|given(?! (?:that|the)\b))\b"
    r"|\bthe (?:text|passage|paragraph|sentence|article|code|items|statement|phrase|words|equation)\b"
    r"|\b(?:this|these|my) (?:[\w'-]+ ){0,2}(?:text|passage|paragraphs?|sentences?|lines?|e-?mail|letter|message"
    r"|poem|story"
    r"|stor(?:y|ies)|code|script|function|query|formula|error|output|snippet|class|loop|notes?|draft|facts?|review"
    r"|article"
    r"|opening|introduction|intro|abstract|essay|report|recipe|post|speech|verse|stanza|haiku|limerick|lyrics|song"
    r"|title"
    r"|list|data|table|numbers|letter|paragraph|bio|caption|toast|note|quote|scene|dialogue|plan|schedule|summary)\b"
    r"|\b(?:rewrite|rephrase|improve|summari[sz]e|translate|shorten|critique|fix|debug|make|turn|put|edit|check|say) "
    r"(?:this|these|it)\b",
    re.IGNORECASE,
)
_SHOWN_INLINE = re.compile(r":\s+\S|[\"“][^\"”]{8,}[\"”]")  # it stands in the same line
_ASKS = re.compile(
    r"\?[\"'”’)]*$|\b(?:please|can you|could you|would you|will you|tell me|help me|give me|show me|let me know"
    r"|write me"
    r"|advise me|i(?:'d|’d| would) like|i want (?:to know|you)|i need (?:you|a|an|some|help|to know)"
    r"|what (?:should|can) i)\b",
    re.IGNORECASE,
)
_OPENS_ASKING = re.compile(
    r"(?:write|make|explain|describe|summari[sz]e|rewrite|rephrase|translate|compare|list|suggest|find|shorten"
    r"|turn|fix"
    r"|critique|review|improve|edit|plan|give|tell|show|help|pretend|play|argue|estimate|create|identify|draft"
    r"|generate"
    r"|design|provide|name|calculate|compose|develop|outline|discuss|rank|classify|come up|brainstorm)\b",
    re.IGNORECASE,
)
_THANKS = re.compile(
    r"(?:thanks|thank you|cheers|many thanks|please|any help|kind regards|best wishes)\b", re.IGNORECASE
)


def runs_on(text: str) -> bool:
    """True if `text` is more than one message, or has labels or headings of a page around it."""
    lines = [line.rstrip() for line in _CODE.sub(_SHOWN, text.strip()).splitlines()]
    if len(lines) > MAX_LINES or _ANNOUNCED.match(lines[0]) or _LABEL.match(lines[0]):
        return True
    if len(lines) == 1:
        return False
    if _LIST.match(lines[0]) or any(_LABEL.match(line) or _HEADING.match(line) for line in lines):
        return True
    return _goes_past_its_question(lines)


def _goes_past_its_question(lines: list[str]) -> bool:
    """True if a plain line follows the question, or if none of the lines asks."""
    asked = asked_at_all = showing = begun = False  # `showing`: what a line announced; `begun`: some of it stands
    for line in lines:
        if not line:
            showing = showing and not begun
            continue
        if showing or _QUOTED.match(line):
            begun, asked = True, False
            continue
        if asked and not _THANKS.match(line):
            return True
        shows = line.endswith(":") or bool(_SHOWS.search(line) and not _SHOWN_INLINE.search(line))
        asks = bool(_ASKS.search(line) or _OPENS_ASKING.match(line))
        asked_at_all = asked_at_all or asks or shows
        asked, showing, begun = asks and not shows, shows, False
    return not asked_at_all
