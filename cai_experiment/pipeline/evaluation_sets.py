"""Texts of evaluation sets, which must not be trained on: kept as hashes, so that a set can be shipped without them.

HarmBench (MIT, centerforaisafety) and MT-Bench (Apache-2.0, lm-sys/FastChat) are shipped in this way, under
constitution/evaluation_sets/; scripts/hash_evaluation_set.py made the files, and makes others.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterable, Iterator, Sequence

from cai_experiment import constitution
from cai_experiment.errors import BadInputError
from cai_experiment.pipeline.known import MAX_JACCARD, Fingerprint, fingerprint
from cai_experiment.pipeline.sources import TURNS, load_instructions
from cai_experiment.records.files import read_json, show, write_json

SHIPPED = Path(constitution.__file__).parent / "evaluation_sets"
# A text of fewer shingles may stand in an innocent longer one by chance: then both must be nearly the same.
MIN_CONTAINED = 5
PARTS = {"words": "<u8", "sizes": "<u4", "shingles": "<u4"}  # of a file: numpy's types, little-endian


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationSet:
    """The fingerprints of a set's texts. `name` is what the manifest says of it: a name and a hash of all of them.

    numpy arrays: `words` [texts] of 64 bits, `sizes` [texts] shingles each, `shingles` [sum of sizes] of 32 bits, each
    text's in ascending order, so that they do not tell the order of its words.
    """

    name: str
    words: Any
    sizes: Any
    shingles: Any

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, name: str, texts: Iterable[str]) -> EvaluationSet:
        """The set of these texts."""
        import numpy

        all_prints = list({one.words: one for one in map(fingerprint, texts)}.values())
        rows = {
            "words": [one.words for one in all_prints],
            "sizes": [len(one.shingles) for one in all_prints],
            "shingles": [shingle for one in all_prints for shingle in sorted(one.shingles)],
        }
        return cls._named(name, {part: numpy.array(rows[part], dtype) for part, dtype in PARTS.items()})

    @classmethod
    def read(cls, path: Path) -> EvaluationSet:
        """The set in a file that `write` wrote; BadInputError if it is damaged."""
        import numpy

        again = "make it again with hash_evaluation_set.py, or take it away"
        row = read_json(path, again)
        try:
            parts = {part: numpy.frombuffer(base64.b64decode(row[part]), dtype) for part, dtype in PARTS.items()}
            whole = len(parts["words"]) == len(parts["sizes"]) and int(parts["sizes"].sum()) == len(parts["shingles"])
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            raise BadInputError(f"{show(path)} is no whole set of hashes", again)
        return cls._named(str(row.get("name", path.stem)), parts)

    def write(self, path: Path, source: str, licence: str) -> None:
        """Write the set as JSON, with a line on where its texts are from and under which licence. Raises DiskError."""
        facts = {"name": self.name.partition(" sha256:")[0], "source": source, "licence": licence, "texts": len(self)}
        parts = {part: getattr(self, part).astype(dtype).tobytes() for part, dtype in PARTS.items()}
        write_json(path, facts | {part: base64.b64encode(content).decode() for part, content in parts.items()})

    @classmethod
    def _named(cls, name: str, parts: dict[str, Any]) -> EvaluationSet:
        digest = hashlib.sha256(b"".join(parts[part].tobytes() for part in PARTS)).hexdigest()
        return cls(f"{name} sha256:{digest}", **parts)


class EvaluationTexts:
    """All texts of some sets, to be asked whether one of them stands in an instruction, whole or nearly."""

    def __init__(self, sets: Sequence[EvaluationSet]) -> None:
        import numpy

        self._words = {int(one) for each in sets for one in each.words}
        self._sizes = numpy.concatenate([numpy.zeros(0, "<u4"), *(each.sizes for each in sets)]).astype(numpy.int64)
        shingles = numpy.concatenate([numpy.zeros(0, "<u4"), *(each.shingles for each in sets)])
        order = numpy.argsort(shingles, kind="stable")
        self._shingles = shingles[order]
        self._owners = numpy.repeat(numpy.arange(len(self._sizes)), self._sizes)[order]

    def __len__(self) -> int:
        return len(self._sizes)

    def holds(self, one: Fingerprint) -> bool:
        """True if the instruction has the words of a text, or nearly.

        Nearly: it holds MAX_JACCARD of the text's shingles (containment, Broder 1997), whatever stands around them;
        for a text of fewer than MIN_CONTAINED shingles, that is the Jaccard index of both.
        """
        import numpy

        if one.words in self._words:
            return True
        asked = numpy.fromiter(one.shingles, dtype=self._shingles.dtype, count=len(one.shingles))
        first = numpy.searchsorted(self._shingles, asked, "left")
        last = numpy.searchsorted(self._shingles, asked, "right")
        owners = [self._owners[a:b] for a, b in zip(first, last, strict=True) if a < b]
        if not owners:
            return False
        texts, shared = numpy.unique(numpy.concatenate(owners), return_counts=True)
        sizes = self._sizes[texts]
        of = numpy.where(sizes >= MIN_CONTAINED, sizes, sizes + len(asked) - shared)
        return bool((shared >= MAX_JACCARD * of).any())


def shipped_sets() -> tuple[EvaluationSet, ...]:
    """The sets that lie in SHIPPED, by the names of their files."""
    return tuple(EvaluationSet.read(path) for path in sorted(SHIPPED.glob("*.json")))


def read_evaluation_set(path: Path, name: str = "", field: str | None = None) -> EvaluationSet:
    """The set of an instruction file: its rows as a run would read them, and what else of a row an evaluation asks.

    That is HarmBench's behaviour without its context, and MT-Bench's later turns. Raises BadInputError.
    """
    rows = [row.text for row in load_instructions(path, field)]
    return EvaluationSet.of(name or path.name, [*rows, *_asked_beside(path)])


def _asked_beside(path: Path) -> Iterator[str]:
    content = path.read_bytes().decode("utf-8-sig")
    if path.suffix.lower() == ".csv":
        for row in csv.DictReader(io.StringIO(content, newline="")):
            yield from [row["Behavior"]] if row.get("ContextString") and row.get("Behavior") else []
    elif path.suffix.lower() == ".jsonl" and not content.lstrip().startswith("["):
        for row in map(json.loads, filter(str.strip, content.split("\n"))):
            turns = row.get(TURNS) if isinstance(row, dict) else None
            yield from (turn for turn in (turns or [])[1:] if isinstance(turn, str))
