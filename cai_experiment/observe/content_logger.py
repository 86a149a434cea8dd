"""The content log: what every stage really said. The file holds everything, the screen what the verbosity asks for.

Level 0 shows nothing; 1 final results (RESULT..., SUMMARY...); 2 also key stages: evaluations, epochs, comparisons, and
whole example blocks, all of these sampled where there are many; 3 every stage, with its metadata.
docs/CONTENT_LOG.md shows each level.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError
from cai_experiment.observe.log_file import LogFile, cannot_write
from cai_experiment.observe.screen import SHOWN, escaped, shortened, side_by_side, with_texts_shortened

CONTENT_LOG = "content_log.jsonl"  # in a run's folder
RULE = "=" * 50
LEVELS = (0, 1, 2, 3)
DIFF = "SIDE-BY-SIDE-DIFF"
SUMMARY = "SUMMARY"
RESULT_STAGES = ("RESULT", SUMMARY)
KEY_STAGES = ("EVAL-", "EPOCH-", "COMPARISON", DIFF, "INVESTIGATION-")
FIRST_STAGE = "TRAINING-EXAMPLE"  # as "TRAINING-EXAMPLE 3/20": opens an example's block
LAST_STAGES = ("TRAINING-PAIR-CREATED", "TRAINING-PAIR-REJECTED")
BLOCK_STAGES = (
    FIRST_STAGE, "INITIAL-GENERATION", "INITIAL-EVALUATION", "CRITIQUE-GENERATION", "REVISION-GENERATION",
    "REVISION-EVALUATION", *LAST_STAGES,
)  # fmt: skip
SAMPLED = 5  # of n places at level 2, evenly spread, besides the first
PLACE, TEXTS, LEVEL = "place", "texts", "level"  # keys of the metadata that rule what is shown, see `log_stage`
_NUMBERS = re.compile(r"-?\b\d+(/\d+)?")  # "EPOCH-1-BATCH-5" and "EPOCH-2-BATCH-1" count as one stage, EPOCH-BATCH
_NUMBERED = re.compile(r"(\d+)/(\d+)$")


class ContentLogger:
    """Logs stages to `path` (append-only JSONL, see LogFile; without a path to memory) and shows them on stdout.

    An entry is {"stage", "content", "metadata", "timestamp"}, the time in seconds since 1970. A resumed run appends.
    Threads may share a logger: entries and what is shown of them do not mix.
    """

    def __init__(
        self, verbosity: int = 2, path: str | Path | None = None, printer: Callable[[str], None] | None = None
    ) -> None:
        """`printer` is given what the verbosity shows, one stage at a time and escaped; without it, it is printed.

        Raises BadInputError for another verbosity than 0 to 3, or a path that cannot be opened.
        """
        self.set_verbosity(verbosity)
        self._printer = printer or _print
        self._lock = threading.RLock()
        self._file = LogFile(path) if path is not None else None
        self._start = 0  # of the file: the first byte to export
        self._read = (0, 0)  # entries that `entries` has passed since the start, and the byte after them
        self._entries: list[dict[str, Any]] = []
        self._stages: Counter[str] = Counter()
        self._characters = 0
        self._held: dict[str, list[str]] = {}  # example -> what to show of it, until its block is whole

    def set_verbosity(self, verbosity: int) -> None:
        """Change what the screen shows from now on."""
        if verbosity not in LEVELS:
            raise BadInputError(f"verbosity {verbosity!r} is not one of 0, 1, 2, 3", "use for example -v 2")
        self.verbosity = verbosity

    def log_stage(
        self, stage: str, content: str, metadata: Mapping[str, Any] | None = None, truncate: int = SHOWN
    ) -> None:
        """Log one stage. The file gets all of it; the screen at most `truncate` characters, without control codes.

        metadata["place"], as "3/20", says that it is one of many: level 2 shows the first and every (n / 5)-th.
        metadata["level"] is the level from which it is shown, where its stage would be shown from a lower one on.
        metadata["texts"] are texts within `content`, in their order: each is shortened, what stands around them is not.
        The stages of many examples arrive mixed: give metadata["example"] (the id), and they are held back and shown
        as one block when its TRAINING-PAIR-CREATED or -REJECTED comes. Raises DiskError when the file cannot grow.
        """
        with self._lock:
            entry = self._record(stage, content, dict(metadata or {}))
            shown = shown_at(entry, self.verbosity, truncate)
            example = entry["metadata"].get("example") if stage.startswith(BLOCK_STAGES) else None
            if example is None:
                self._show(shown)
                return
            if shown is not None:
                self._held.setdefault(str(example), []).append(shown)
            if stage.startswith(LAST_STAGES):
                self._show_block(str(example))

    def log_comparison(
        self, label1: str, text1: str, label2: str, text2: str, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Log two texts under SIDE-BY-SIDE-DIFF: the file gets both whole, the screen a word diff of what differs."""
        facts = {**(metadata or {}), "labels": [label1, label2], TEXTS: [text1, text2]}
        self.log_stage(DIFF, f"{label1}: {text1}\n{label2}: {text2}", facts)

    def entries(self, start: int = 0) -> list[dict[str, Any]]:
        """The entries since the last `clear_logs` (of the file: earlier sessions' too), from number `start` on.

        To follow a log, ask again with `start` raised by what came: only the new part of the file is read.
        """
        with self._lock:
            if self._file is None:
                return self._entries[start:]
            passed, byte = self._read if start >= self._read[0] else (0, self._start)
            found, end = self._file.read(byte, start - passed)
            if found:
                self._read = (start + len(found), end)
            return found

    def tail(self, count: int) -> list[dict[str, Any]]:
        """The last `count` entries since the last `clear_logs`, oldest first; no more of the file is read."""
        with self._lock:
            if count < 1:
                return []
            return self._file.tail(count, self._start) if self._file else self._entries[-count:]

    def get_summary(self) -> dict[str, Any]:
        """What was logged since the start or the last `clear_logs`: entries, entries by stage, characters, file."""
        with self._lock:
            return {
                "entries": self._stages.total(),
                "stages": dict(sorted(self._stages.items())),
                "characters": self._characters,
                "file": str(self._file.path) if self._file else None,
            }

    def export_logs(self, path: str | Path) -> None:
        """Write all entries (of the file: earlier sessions too) since the last `clear_logs` as one JSON list."""
        try:
            with self._lock, open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
                file.write("[")
                entries = self._file.entries(self._start) if self._file else self._entries
                for index, entry in enumerate(entries):
                    file.write(",\n" if index else "\n")
                    file.write(json.dumps(entry, ensure_ascii=False, indent=2, default=str))
                file.write("\n]\n")
        except OSError as error:
            raise cannot_write(path, error) from error

    def clear_logs(self) -> None:
        """Forget what was logged: summary and export start anew here. The file is append-only and keeps everything."""
        with self._lock:
            self._entries.clear()
            self._stages.clear()
            self._characters = 0
            self._start = self._file.size if self._file else 0
            self._read = (0, self._start)

    def close(self) -> None:
        """Show the blocks still open (an interrupted run has some), and close the file."""
        with self._lock:
            for example in list(self._held):
                self._show_block(example)
            if self._file:
                self._file.close()

    def __enter__(self) -> ContentLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, stage: str, content: str, metadata: dict[str, Any]) -> dict[str, Any]:
        entry = {"stage": stage, "content": content, "metadata": metadata, "timestamp": time.time()}
        if self._file:
            self._file.append(entry)
        else:
            self._entries.append(entry)
        self._stages[_NUMBERS.sub("", stage).strip()] += 1
        self._characters += len(content)
        return entry

    def _show(self, shown: str | None) -> None:
        if shown is not None:
            self._printer(shown)

    def _show_block(self, example: str) -> None:
        for shown in self._held.pop(example, []):
            self._printer(shown)


# ---------------------------------------------------------------- what a verbosity shows


def shown_at(entry: Mapping[str, Any], verbosity: int, truncate: int = SHOWN) -> str | None:
    """An entry as the terminal shows it: header, content, at level 3 its metadata, all escaped; None where it does not.

    It begins with an empty line. In HTML it must still be escaped for HTML.
    """
    stage, metadata = str(entry["stage"]), entry.get("metadata") or {}
    if verbosity < max(level(stage), metadata.get(LEVEL, 0)) or (verbosity == 2 and not _is_sampled(stage, metadata)):
        return None
    header = f"[{escaped(' '.join(stage.split()))}] {RULE}"
    shown = f"\n{header}\n{escaped(_content(stage, str(entry['content']), metadata, truncate))}"
    facts = {name: value for name, value in metadata.items() if name not in (PLACE, TEXTS, LEVEL)}
    if verbosity == 3 and facts:
        details = json.dumps(facts, ensure_ascii=False, default=str)
        shown += f"\nMetadata: {escaped(shortened(details, truncate))}"
    return shown


def level(stage: str) -> int:
    """The verbosity from which a stage is shown, at level 2 where it is sampled."""
    if stage.startswith(RESULT_STAGES):
        return 1
    return 2 if stage.startswith((*KEY_STAGES, *BLOCK_STAGES)) else 3


def is_sampled(index: int, count: int) -> bool:
    """Whether level 2 shows place `index` (from 1) of `count`: the first, and every (count / SAMPLED)-th."""
    return index == 1 or index % max(1, count // SAMPLED) == 0


def _is_sampled(stage: str, metadata: Mapping[str, Any]) -> bool:
    """What says nothing of its place is shown."""
    found = _NUMBERED.search(str(metadata.get(PLACE, stage)))
    return found is None or is_sampled(int(found[1]), int(found[2]))


def _content(stage: str, content: str, metadata: Mapping[str, Any], truncate: int) -> str:
    texts = metadata.get(TEXTS)
    if not texts:
        return shortened(content, truncate)
    if stage == DIFF:  # a diff takes milliseconds: made only to be seen
        (label1, label2), (text1, text2) = metadata["labels"], texts
        return side_by_side(label1, text1, label2, text2, truncate)
    return with_texts_shortened(content, texts, truncate)


def _print(text: str) -> None:
    """Print what the terminal's encoding knows, and the rest as escapes; with a live bar rich puts it above."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
