"""Generation and the guard, in turns: pairs that the guard turns down are made up for until enough passed both."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any, Protocol

from cai_experiment.engines.guard import GuardChoice
from cai_experiment.pipeline.guarding import GuardCounts, Standing, spare_for, standing
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.records.files import ExampleFile
from cai_experiment.records.manifest import Manifest
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._generation import write_anew
from cai_experiment.scripts._guarding import guard_pairs, pairs_to_read, said
from cai_experiment.scripts._inputs import speaks_of_world


class Models(Protocol):
    """The models of a run, loaded when pairs are to be made (see _milestone.py)."""

    def make(self, settings: RunSettings) -> None:
        """Generate until `settings` are met, or nothing is left to draw."""
        ...

    def leave(self, guard: GuardChoice) -> Any | None:
        """Make room for the guard; gives the generator's engine if it stays, since the guard speaks through it."""
        ...


def make_guarded(
    args: argparse.Namespace, settings: RunSettings, folder: RunFolder, guard: GuardChoice, models: Models, made: bool
) -> GuardCounts:
    """Generate and have the guard read, in turns, until the pairs that are wanted passed both; gives what it said.

    Each turn may load the generator anew, so some pairs are made to spare. In the end the files are written anew with
    every verdict, and cut behind the last wanted pair: no byte depends on how many were spare, on the turns, or on
    where earlier sessions were killed. `made`: one of them generated to its end, so the guard comes first.
    """
    whole = dataclasses.replace(settings, whole_blocks=settings.match_lengths)
    now = standing((), folder.journal)
    while True:
        if not made:
            models.make(dataclasses.replace(whole, spare=_spare(args, settings, guard, now)))
        counts = _read(args, folder, guard, models)
        pairs = len(ExampleFile(folder.path / "pairs.jsonl"))
        as_wanted = pairs < settings.pairs or (pairs == settings.pairs and not settings.match_lengths)
        if as_wanted and not counts.unsafe and not counts.unparsed:
            return counts  # where there are fewer, nothing was left to draw
        made = write_anew(args, whole, folder).complete
        now = _standing(folder)
        if made and not now.unread:
            if settings.match_lengths:
                write_anew(args, settings, folder)
            return _standing(folder).counts


def _spare(args: argparse.Namespace, settings: RunSettings, guard: GuardChoice, now: Standing) -> int:
    """How many pairs more than wanted to make; none where another turn loads nothing, or every row is used anyway."""
    stays = args.server is not None or (guard.family == "nano" and speaks_of_world(args))
    if stays or settings.instructions is not None:
        return 0
    spare = spare_for(max(0, settings.pairs - now.safe), now.share)
    if spare:
        print(f"{spare:,} pairs are made to spare, since the guard may turn down {now.share:.0%}", flush=True)
    return spare


def _standing(folder: RunFolder) -> Standing:
    return standing(pairs_to_read(folder.path), folder.journal)


def _read(args: argparse.Namespace, folder: RunFolder, guard: GuardChoice, models: Models) -> GuardCounts:
    """The verdicts on the pairs in the files; the guard is loaded if it has not read them all."""
    engine, now = models.leave(guard), _standing(folder)
    noted = Manifest.read(folder.path / "manifest.json").guard
    counts = guard_pairs(args, folder, guard, engine) if now.unread or not noted else now.counts
    print(said(counts), flush=True)
    return counts
