"""What a session's texts say in figures: how like the documents its conclusions are, and what it revised.

Similarity is the cosine of two texts' TF-IDF vectors (Salton and Buckley 1988) over content words: words of two letters
or more, without scikit-learn's English stop words, the inverse document frequencies those of both document sets and of
the text itself. It tells shared words, not shared thoughts, and depends on how long the text is: read it beside that of
condition `none`, whose model saw no document, and beside the similarity to the other set.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cai_experiment.investigations.conditions import DocumentSet
from cai_experiment.investigations.reply import read_reply, without_phrase
from cai_experiment.investigations.session import Session

DEFINED = (
    "cosine of TF-IDF vectors over content words (English stop words left out), idf over both document sets and the "
    "text itself"
)


def measured(session: Session, heritage: DocumentSet, other: DocumentSet) -> dict[str, Any]:
    """The similarity of the conclusions to both document sets, and the revisions."""
    before, after = conclusions(session, revised=False), conclusions(session, revised=True)
    last = after or before
    return {
        "conclusion_words": len(last.split()),
        "similarity_to_documents": similarity(last, heritage, other)[0],
        "similarity_to_other_subject": similarity(last, heritage, other)[1],
        "similarity_is": DEFINED,
        "revisions": _revisions(session, before, after, heritage, other),
    }


def conclusions(session: Session, revised: bool) -> str:
    """What the session concluded, up to the documents of `delayed` or (`revised`) after them; "" if nothing.

    The notes of kind conclusion, and the prose of the last reply to the task that draws conclusions.
    """
    tasks = [one.name for one in session.stages if one.revises] if revised else _before(session)
    if not tasks:
        return ""
    notes = [n["text"] for n in session.notebook.all() if n["kind"] == "conclusion" and n["task"] in tasks]
    replies = [one.text for one in session.said if one.role == "assistant" and one.task == tasks[-1]]
    prose = without_phrase(read_reply(replies[-1]).prose, session.settings.finish_phrase) if replies else ""
    return "\n".join(filter(None, (*notes, prose)))


def _before(session: Session) -> list[str]:
    revising = {one.name for one in session.stages if one.revises}
    return [name for name, _ in session.ends if name not in revising]


def _revisions(
    session: Session, before: str, after: str, heritage: DocumentSet, other: DocumentSet
) -> dict[str, Any]:  # fmt: skip
    """What the session itself calls a revision, and for `delayed` how far its similarities changed.

    Other words for the same thing change a similarity too. How much, the set that the model never read shows: a change
    towards the documents that is no larger than the one towards those says nothing.
    """
    notes = [one["text"] for one in session.notebook.all() if one["kind"] == "revision"]
    found: dict[str, Any] = {"notes": len(notes), "texts": notes, "closer_to_documents": None,
                             "closer_to_other_subject": None}  # fmt: skip
    if before and after:
        was, now = similarity(before, heritage, other), similarity(after, heritage, other)
        found["closer_to_documents"], found["closer_to_other_subject"] = map(_change, was, now)
    return found


def _change(was: float | None, now: float | None) -> float | None:
    return None if was is None or now is None else round(now - was, 4)


def similarity(text: str, heritage: DocumentSet, other: DocumentSet) -> tuple[float | None, float | None]:
    """(to the documents, to those of another subject), each 0 to 1; None if the text has no content word."""
    corpus = [one.text for one in (*heritage.chosen, *other.chosen)]
    return cosine(text, heritage.text, corpus), cosine(text, other.text, corpus)


def cosine(text: str, against: str, corpus: Sequence[str]) -> float | None:
    """The cosine of two texts' TF-IDF vectors, fitted on `corpus` and `text`; None if one has no content word."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(stop_words="english", token_pattern=r"(?u)\b[^\W\d_]{2,}\b")
    try:
        vectorizer.fit([*corpus, text])
    except ValueError:  # "empty vocabulary"
        return None
    one, two = vectorizer.transform([text, against])
    if not one.nnz or not two.nnz:
        return None
    return round(float((one @ two.T).toarray()[0, 0]), 4)
