"""`--match-lengths`: chosen and rejected of equal length on average, by choice of pairs; nothing is rewritten.

A model trained on longer (or shorter) chosen answers learns length first. Accepted pairs are taken in blocks of BLOCK
in their order; of each block up to BLOCK - KEEP are left out, those that bring the sum of log length ratios nearest to
zero. A choice depends on its block and what was kept before, never on the run's size, so a longer run begins with a
shorter one's pairs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Sequence

from cai_experiment.records.schema import Example

BLOCK, KEEP = 50, 40  # a fifth at most is left out
SURPLUS = "length_surplus"


def log_ratio(example: Example) -> float:
    """Natural log of the chosen answer's length over the rejected one's, in characters."""
    pair = example.preference_pair
    return math.log(len(pair.chosen) / len(pair.rejected))


def surplus(ratios: Sequence[float], carried: float, most: int) -> set[int]:
    """Places of up to `most` ratios whose leaving brings |carried + sum of the rest| nearest to zero, one by one."""
    left, total = set(range(len(ratios))), carried + sum(ratios)
    gone: set[int] = set()
    while len(gone) < most:
        best = min(sorted(left), key=lambda place: abs(total - ratios[place]))
        if abs(total - ratios[best]) >= abs(total):
            break
        left.remove(best)
        gone.add(best)
        total -= ratios[best]
    return gone


class LengthMatcher:
    """Holds examples back until their block is full, and marks the accepted ones that are left out."""

    def __init__(self) -> None:
        self._block: list[Example] = []
        self._accepted = 0  # in the block
        self._sum = 0.0  # of the log ratios of what was kept so far

    def take(self, example: Example) -> list[Example]:
        """The next example in order; gives a whole block back once it is full."""
        self._block.append(example)
        self._accepted += not example.reject_reasons
        if self._accepted < BLOCK:
            return []
        places = [place for place, one in enumerate(self._block) if not one.reject_reasons]
        ratios = [log_ratio(self._block[place]) for place in places]
        gone = surplus(ratios, self._sum, BLOCK - KEEP)
        self._sum += sum(ratio for number, ratio in enumerate(ratios) if number not in gone)
        left_out = {places[number] for number in gone}
        return [
            replace(one, reject_reasons=(SURPLUS,)) if place in left_out else one
            for place, one in enumerate(self.rest())
        ]

    def rest(self) -> list[Example]:
        """What is held back, as it is: a run that ends within a block needs all its pairs."""
        block, self._block, self._accepted = self._block, [], 0
        return block
