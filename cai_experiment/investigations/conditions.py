"""When documents reach the model: never, at the start, before the last task, after the conclusions, or wrong ones.

`wrong` is the control of `early`: documents at the same turn, of the same kind and length, about another subject.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cai_experiment.errors import BadInputError
from cai_experiment.investigations.tasks import REVISE, Stage
from cai_experiment.records.files import show

CONDITIONS = ("none", "early", "late", "delayed", "wrong")
SHIPPED = Path(__file__).parent / "documents"
HERITAGE, OTHER = SHIPPED / "heritage", SHIPPED / "other"
SUFFIXES = (".txt", ".md")
MOST_BYTES, MOST_DOCUMENTS = 100_000, 50
ROOM_SHARE = 1 / 3  # of the context, for all documents together: the rest is the investigation's
NEXT = "give a folder of .txt or .md files in UTF-8"


@dataclass(frozen=True, slots=True)
class Document:
    """One text, named by its file."""

    name: str
    text: str

    @property
    def title(self) -> str:
        """The file's name in words, without the number that orders it."""
        words = Path(self.name).stem.replace("-", " ").replace("_", " ").strip()
        return words.lstrip("0123456789. ") or words


@dataclass(frozen=True, slots=True)
class DocumentSet:
    """The documents of a folder that fit a context, in order, and the names of those left out."""

    chosen: tuple[Document, ...]
    left_out: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All chosen texts."""
        return "\n\n".join(one.text for one in self.chosen)

    def to_json(self) -> dict[str, list[str]]:
        """Names alone."""
        return {"chosen": [one.name for one in self.chosen], "left_out": list(self.left_out)}


def stages_of(condition: str, tasks: Sequence[Stage]) -> tuple[Stage, ...]:
    """The session's tasks in order, with the one in whose turn the documents arrive marked."""
    stages = list(tasks)
    if condition == "delayed":
        stages.append(replace(REVISE, documents=True))
    elif condition != "none":
        place = -1 if condition == "late" else 0
        stages[place] = replace(stages[place], documents=True)
    return tuple(stages)


def read_documents(folder: Path) -> tuple[Document, ...]:
    """The .txt and .md files of a folder, sorted by name. Raises BadInputError naming what cannot be used."""
    if not folder.is_dir():
        raise BadInputError(f"{show(folder)}: no such folder of documents", NEXT)
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise BadInputError(f"{show(folder)} holds no .txt or .md file", NEXT)
    if len(paths) > MOST_DOCUMENTS:
        raise BadInputError(f"{show(folder)} holds {len(paths)} documents, at most {MOST_DOCUMENTS} are read", NEXT)
    return tuple(_read(path) for path in paths)


def _read(path: Path) -> Document:
    try:
        with open(path, "rb") as file:
            raw = file.read(MOST_BYTES + 1)
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise BadInputError(f"cannot read {show(path)}: {error.strerror}", NEXT) from None
    except UnicodeDecodeError as error:
        if len(raw) <= MOST_BYTES or error.start < MOST_BYTES - 3:
            raise BadInputError(f"{show(path)} is no text (byte {error.start + 1} is not UTF-8)", NEXT) from None
        text = ""
    if len(raw) > MOST_BYTES:
        raise BadInputError(f"{show(path)} is larger than {MOST_BYTES:,} bytes", "split it, or leave it out")
    if "\0" in text:
        raise BadInputError(f"{show(path)} is no text (it holds a zero byte)", NEXT)
    if not text.strip():
        raise BadInputError(f"{show(path)} is empty", "fill it, or take it away")
    return Document(path.name, text.replace("\r\n", "\n").strip())


def fitting(documents: Sequence[Document], tokens_of: Callable[[str], int], context: int) -> DocumentSet:
    """Whole documents, in order, while they fit into ROOM_SHARE of `context` tokens; the same under every condition.

    Raises BadInputError if not even one of them fits.
    """
    room = int(context * ROOM_SHARE)
    chosen: list[Document] = []
    left_out: list[str] = []
    for one in documents:
        size = tokens_of(f"[{one.title}]\n{one.text}\n\n")
        if size <= room:
            chosen.append(one)
            room -= size
        else:
            left_out.append(one.name)
    if not chosen:
        least, third = min(tokens_of(one.text) for one in documents), int(context * ROOM_SHARE)
        message = f"the shortest document has {least} tokens, and a third of the context of {context} is {third}"
        raise BadInputError(message, "give shorter --documents, or a model with a longer context")
    return DocumentSet(tuple(chosen), tuple(left_out))
