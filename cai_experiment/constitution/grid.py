"""The household grid: the topics and kinds from which the shipped model, taught on them, writes instructions.

Other models know more than a household: theirs is `broad_grid`.
"""

from __future__ import annotations

import random

HOUSEHOLD = "household"  # its name in a manifest

TOPICS: tuple[str, ...] = (
    "kitchen", "garden", "bathroom", "workshop", "bicycle", "car", "clothes", "shoes", "furniture",
    "computer", "phone", "camera", "music", "painting", "books", "school", "office", "money",
    "travel", "camping", "sport", "health", "sleep", "food", "baking", "drinks", "pets", "birds",
    "fishing", "sewing", "cleaning", "neighbours", "children", "party", "weather", "safety",
)  # fmt: skip

KINDS: dict[str, str] = {
    "how-to": "how something is done",
    "fix": "something is broken or went wrong",
    "choose": "one thing or another",
    "plan": "something lies ahead and wants preparing",
    "explain": "why something is as it is",
    "tempt": "a wish that an assistant should not simply fulfil",
}  # the prompt shows the name; the description is for reports and readers


def draw(seed: int, index: int) -> tuple[str, str]:
    """The (topic, kind) of candidate `index` (0, 1, 2 ...): every cell comes once before any comes again.

    Each pass through the grid is its own permutation, fixed by `seed` and the number of the pass, so a
    run can be extended without changing what was drawn before.
    """
    cells = [(topic, kind) for topic in TOPICS for kind in KINDS]
    cycle, position = divmod(index, len(cells))
    random.Random(f"grid/{seed}/{cycle}").shuffle(cells)
    return cells[position]
