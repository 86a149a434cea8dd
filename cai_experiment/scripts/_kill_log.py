"""What a kill may do to the content log: cut one example's story short, which is then told again from its beginning."""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

from cai_experiment.observe.log_file import LogFile

Entry = tuple[str, str, str]  # example, stage, content
SECONDS = re.compile(r"Time: [\d.]+s$")  # the one thing in a story that another run tells otherwise


def entries(path: Path) -> list[Entry]:
    """What stands in the content log of a run, without clock times."""
    log = LogFile(path)
    try:
        return [(str(row["metadata"].get("example")), row["stage"], SECONDS.sub("", row["content"]))
                for row in log.entries()]  # fmt: skip
    finally:
        log.close()


def log_faults(path: Path, reference: Path, kills: int) -> list[str]:
    """What is wrong with a content log: each story of the unbroken run's is to stand there once, whole, in order.

    Each of the `kills` may have left one that was cut short before it.
    """
    found, at, cut = entries(path), 0, 0
    for example, one in groupby(entries(reference), key=lambda entry: entry[0]):
        story = list(one)
        while (told := _told(story, found[at:])) < len(story):
            if told == 0:
                return [f"the content log has no whole story of example {example} where it should stand"]
            at, cut = at + told, cut + 1
        at += told
    wrong = [f"the content log has {len(found) - at} entries too many"] * (at < len(found))
    return wrong + [f"the content log has {cut} stories cut short by {kills} kills"] * (cut > kills)


def _told(story: list[Entry], found: list[Entry]) -> int:
    """How many first entries of a story stand at the beginning of `found`."""
    pairs = zip(story, found, strict=False)
    return next((number for number, (one, other) in enumerate(pairs) if one != other), min(len(story), len(found)))
