"""The content log: what every stage really said. The file holds everything, the screen what the verbosity asks for.

Level 0 shows nothing; 1 final results (RESULT..., SUMMARY...); 2 also key stages: evaluations, epochs, comparisons,
and some whole examples; 3 every stage of every example, with its metadata.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, Mapping

from cai_experiment.errors import BadInputError
from cai_experiment.observe.log_file import LogFile, cannot_write
from cai_experiment.observe.screen import SHOWN, escaped, shortened, side_by_side

RULE = "=" * 50
RESULT_STAGES = ("RESULT", "SUMMARY")
KEY_STAGES = ("EVAL-", "EPOCH-", "COMPARISON", "SIDE-BY-SIDE-DIFF")
FIRST_STAGE = "TRAINING-EXAMPLE"  # as "TRAINING-EXAMPLE 3/20": opens an example's block
LAST_STAGES = ("TRAINING-PAIR-CREATED", "TRAINING-PAIR-REJECTED")
BLOCK_STAGES = (
    FIRST_STAGE, "INITIAL-GENERATION", "INITIAL-EVALUATION", "CRITIQUE-GENERATION", "REVISION-GENERATION",
    "REVISION-EVALUATION", *LAST_STAGES,
)  # fmt: skip
BLOCKS_SHOWN = 5  # of a run's examples at level 2, evenly spread, besides the first
_NUMBERS = re.compile(r"-?\b\d+(/\d+)?")  # "EPOCH-1-BATCH-5" and "EPOCH-2-BATCH-1" count as one stage, EPOCH-BATCH
_NUMBERED = re.compile(rf"{FIRST_STAGE} (\d+)/(\d+)$")


class ContentLogger:
    """Logs stages to `path` (append-only JSONL, see LogFile; without a path to memory) and shows them on stdout.

    An entry is {"stage", "content", "metadata", "timestamp"}, the time in seconds since 1970. A resumed run appends.
    """

    def __init__(self, verbosity: int = 2, path: str | Path | None = None) -> None:
        """Raises BadInputError for another verbosity than 0 to 3, or a path that cannot be opened."""
        self.set_verbosity(verbosity)
        self._file = LogFile(path) if path is not None else None
        self._start = 0  # of the file: the first byte to export
        self._entries: list[dict[str, Any]] = []
        self._stages: Counter[str] = Counter()
        self._characters = 0
        self._sampled: set[str] = set()  # examples whose block level 2 shows
        self._held: dict[str, list[str]] = {}  # example -> what to show of it, until its block is whole

    def set_verbosity(self, verbosity: int) -> None:
        """Change what the screen shows from now on."""
        if verbosity not in (0, 1, 2, 3):
            raise BadInputError(f"verbosity {verbosity!r} is not one of 0, 1, 2, 3", "use for example -v 2")
        self.verbosity = verbosity

    def log_stage(
        self, stage: str, content: str, metadata: Mapping[str, Any] | None = None, truncate: int = SHOWN
    ) -> None:
        """Log one stage. The file gets all of it; the screen at most `truncate` characters, without control codes.

        The stages of many examples arrive mixed: give metadata["example"] (the id), and they are held back and shown
        as one block when its TRAINING-PAIR-CREATED or -REJECTED comes. Raises DiskError when the file cannot grow.
        """
        self._record(stage, content, dict(metadata or {}))
        if self.verbosity == 0:
            return
        shown = f"\n[{escaped(stage)}] {RULE}\n{escaped(shortened(content, truncate))}"
        if self.verbosity == 3 and metadata:
            details = json.dumps(metadata, ensure_ascii=False, default=str)
            shown += f"\nMetadata: {escaped(shortened(details, truncate))}"
        if stage.startswith(BLOCK_STAGES):
            self._show_in_block(stage, shown, (metadata or {}).get("example"))
        elif self.verbosity >= _level(stage):
            _print(shown)

    def log_comparison(self, label1: str, text1: str, label2: str, text2: str) -> None:
        """Log two texts under SIDE-BY-SIDE-DIFF: the file gets both whole, the screen a word diff of what differs."""
        whole = f"{label1}: {text1}\n{label2}: {text2}"
        self._record("SIDE-BY-SIDE-DIFF", whole, {"labels": [label1, label2], "texts": [text1, text2]})
        if self.verbosity >= 2:  # a diff takes milliseconds: made only to be seen
            _print(f"\n[SIDE-BY-SIDE-DIFF] {RULE}\n{escaped(side_by_side(label1, text1, label2, text2))}")

    def get_summary(self) -> dict[str, Any]:
        """What was logged since the start or the last `clear_logs`: entries, entries by stage, characters, file."""
        return {
            "entries": self._stages.total(),
            "stages": dict(sorted(self._stages.items())),
            "characters": self._characters,
            "file": str(self._file.path) if self._file else None,
        }

    def export_logs(self, path: str | Path) -> None:
        """Write all entries (of the file: earlier sessions too) since the last `clear_logs` as one JSON list."""
        try:
            with open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
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
        self._entries.clear()
        self._stages.clear()
        self._characters = 0
        self._start = self._file.size if self._file else 0

    def close(self) -> None:
        """Show the blocks still open (an interrupted run has some), and close the file."""
        for example in list(self._held):
            self._show_block(example)
        if self._file:
            self._file.close()

    def __enter__(self) -> ContentLogger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _record(self, stage: str, content: str, metadata: dict[str, Any]) -> None:
        entry = {"stage": stage, "content": content, "metadata": metadata, "timestamp": time.time()}
        if self._file:
            self._file.append(entry)
        else:
            self._entries.append(entry)
        self._stages[_NUMBERS.sub("", stage).strip()] += 1
        self._characters += len(content)

    def _show_in_block(self, stage: str, shown: str, example: object) -> None:
        """Show a stage of an example if its block is to be seen: at once, or held back until the block is whole."""
        key = "" if example is None else str(example)
        if stage.startswith(FIRST_STAGE) and _is_sampled(stage):
            self._sampled.add(key)
        elif stage.startswith(FIRST_STAGE):
            self._sampled.discard(key)
        if self.verbosity == 3 or (self.verbosity == 2 and key in self._sampled):
            if example is None:
                _print(shown)
            else:
                self._held.setdefault(key, []).append(shown)
        if stage.startswith(LAST_STAGES):
            self._sampled.discard(key)
            self._show_block(key)

    def _show_block(self, example: str) -> None:
        for shown in self._held.pop(example, []):
            _print(shown)


def _level(stage: str) -> int:
    """The verbosity from which a stage outside an example's block is shown."""
    if stage.startswith(RESULT_STAGES):
        return 1
    return 2 if stage.startswith(KEY_STAGES) else 3


def _is_sampled(stage: str) -> bool:
    """Level 2 shows the first example and every (n / BLOCKS_SHOWN)-th; an example without "i/n" is shown."""
    found = _NUMBERED.search(stage)
    if found is None:
        return True
    index, count = int(found[1]), int(found[2])
    return index == 1 or index % max(1, count // BLOCKS_SHOWN) == 0


def _print(text: str) -> None:
    """Print what the terminal's encoding knows, and the rest as escapes; with a live bar rich puts it above."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)
