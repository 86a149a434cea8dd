"""What the content log says of a comparison: each cell, from the instruction to the revision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cai_experiment.observe.content_logger import PLACE, TEXTS, ContentLogger

CELL = "COMPARISON-CELL"


def tell_cells(log: ContentLogger, rows: Sequence[Mapping[str, Any]]) -> None:
    """A stage for every row of cells.jsonl, with the texts that came to pass."""
    for number, row in enumerate(rows, 1):
        generator, critic = row["generator"], row["critic"]
        said = [("Prompt", row["instruction"]), (f"Answer by {generator}", row["answer"]),
                (f"Critique by {critic}", row["critique"]), (f"Revision by {generator}", row["revision"])]  # fmt: skip
        some = [(name, str(text)) for name, text in said if text]
        content = "\n".join(f'{name}:\n"{text}"' for name, text in some)
        fault = f"\n✗ {row['fault']}" if row["fault"] else ""
        facts = {"id": row["id"], "principle": row["principle"], PLACE: f"{number}/{len(rows)}"}
        log.log_stage(CELL, content + fault, {**facts, TEXTS: [text for _, text in some]})
