"""Accelerated decoding: one expert drafts a block, all read it in one pass each, the rule judges every token.

Speculative decoding (Leviathan et al. 2023) with a rule in the place of rejection sampling: since each draw is keyed by
its position, the token that the plain loop would take can be computed from the block's hidden states, and drafted
tokens are kept as far as they are those. The first that is not is replaced by the rule's own, so that every block
brings at least one token. The expert that rules drafts; after a rejection it is the one whose token was taken.

Rows of a batch that have the same drafter go on together. A draft of a single row is read in the fastest arithmetic
and once more by the block pass; in a batch the drafter's passes are those that count.

On a CPU in float32, with the lean pass over unquantised weights, a block's hidden states have the bits of single steps,
so the texts are the plain ones to the last bit, whatever the block lengths: these follow measured times. Elsewhere
(CUDA, MPS, bfloat16, quantised weights, other architectures) the draws and the distribution are the same, but last bits
depend on how many tokens are read at once: where two tokens are nearly as likely, an accelerated text may part from the
plain one. There block lengths follow acceptance and fixed costs alone, no clock, so that the same command on the same
machine gives the same texts again; it is the default there too, and `accelerate=False` gives the plain loop.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Sequence

import numpy as np

from cai_experiment.ensemble.plain import Decoder, Row

if TYPE_CHECKING:
    import torch

HOPE, SOBER = 0.98, 0.9  # trust that plain steps restore: with measured times, with fixed costs
FORGETTING = 0.98  # of what blocks failed to bring, by a plain step
MEMORY = 0.9  # weight of all that was seen before a new trust or time
WAITING = 1.15  # how much faster a block must be while other rows wait: they will be fewer, and dearer, at the end
FULL = 3  # rows from which a CPU takes plain steps: seldom have they one drafter (4 and 16 by blocks: 0.91-1.04 times)
STEP, READ, TOKEN = 1.0, 1.0, 0.02  # fixed costs of a drafted token, of an expert's pass over a block, and its tokens
OUTLIER = 3.0  # a pass that takes so many times the expected time says nothing


@dataclass(slots=True)
class Line:
    """Seconds over block length, a straight line through what was measured lately (weighted least squares)."""

    weight: float = 0.0
    x: float = 0.0  # weighted sums
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def add(self, length: int, seconds: float) -> None:
        """One measurement."""
        if self.weight > 2:
            seconds = min(seconds, OUTLIER * self.at(length))
        for name, value in (
            ("weight", 1.0),
            ("x", length),
            ("y", seconds),
            ("xx", length**2),
            ("xy", length * seconds),
        ):
            setattr(self, name, MEMORY * getattr(self, name) + value)

    def at(self, length: int) -> float:
        """Expected seconds; where only one length was seen, the same for all."""
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x**2
        slope = max(0.0, (self.xy / self.weight - mean_x * mean_y) / spread) if spread > 1e-9 else 0.0
        return max(mean_y + slope * (length - mean_x), mean_y / 10)


@dataclass(frozen=True, slots=True)
class Fixed:
    """A line that no measurement changes, in passes of one expert: on a GPU one of a block takes little longer."""

    start: float
    slope: float
    weight: float = 1.0

    def add(self, length: int, seconds: float) -> None:
        """Nothing."""

    def at(self, length: int) -> float:
        """Its height."""
        return self.start + self.slope * length


def fixed_costs(experts: int, alone: bool) -> tuple[Fixed, Fixed, Fixed]:
    """(draft, check, plain step) for `experts` of about one size; a draft of several rows is its expert's own check."""
    readers = experts if alone else experts - 1
    return Fixed(0, STEP), Fixed(readers * READ, readers * TOKEN), Fixed(experts * STEP, 0)


class Pace:
    """How long the next block of about so many rows should be: by what passes take, and what drafts bring."""

    def __init__(self, longest: int, costs: tuple[Fixed, Fixed, Fixed] | None = None) -> None:
        """`costs` (see `fixed_costs`): None measures them."""
        self.longest = longest
        lines: tuple[Line | Fixed, ...] = costs or (Line(), Line(), Line())
        self.draft, self.check, self.plain = lines  # seconds, or fixed costs, by length
        self.expected = self.brought = 1.0  # tokens of the blocks so far, the latest weighing most: texts end within

    def best(self, trusts: Sequence[float]) -> tuple[int, float]:
        """(length, tokens a second) of the fastest block for rows with these acceptance rates."""
        if not self.draft.weight:
            return max(2, self.longest // 2), float("inf")  # to be measured
        lengths = range(2, self.longest + 1)
        tokens = self.brought / self.expected * np.array([expected(trusts, n) for n in lengths])
        speed = tokens / np.array([self.draft.at(n) + self.check.at(n) for n in lengths])
        return lengths[int(speed.argmax())], float(speed.max())

    def add(self, draft: float, check: float, length: int, tokens: int, hoped: float) -> None:
        """One block: seconds of both parts, its length, the tokens that it brought and those that were expected."""
        self.draft.add(length, draft)
        self.check.add(length, check)
        self.expected = MEMORY * self.expected + hoped
        self.brought = MEMORY * self.brought + tokens

    def forget(self) -> None:
        """One plain step: what blocks brought less than expected weighs a little less."""
        self.brought = self.expected + FORGETTING * (self.brought - self.expected)


def expected(trusts: Sequence[float], length: int) -> float:
    """Tokens that one block of rows with these acceptance rates brings, the rule's own after a rejection included."""
    return sum((1 - trust**length) / (1 - trust) for trust in trusts)


class BlockDecoder(Decoder):
    """As `Decoder`, by blocks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.on_cpu = self.device.type == "cpu"
        self.exact = self.on_cpu and all(passes.exact for passes in self.passes.values())
        self.paces: dict[int, Pace] = {}

    def step(self, rows: Sequence[Row]) -> None:
        """The largest group of rows with one drafter takes a block; all take a plain step when one has none yet.

        They do so too where that gives more tokens a second.
        """
        fresh = any(row.leader < 0 for row in rows)
        plain = self.pace(len(rows)).plain
        full = self.on_cpu and len(rows) >= FULL
        if fresh or full or not plain.weight or len(self.rule.members) == 1 or self.settings.max_block < 2:
            return self._plain(rows)
        groups: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            groups[row.leader].append(row)
        group = max(groups.values(), key=len)
        pace = self.pace(len(group))
        length, speed = pace.best([row.trust for row in group])
        length = min(length, self._room(group))
        if length > 1 and speed > (WAITING if len(rows) > len(group) else 1) * len(rows) / plain.at(1):
            return self.block(group, length, pace)
        self._plain(rows)
        for row in rows:  # a plain step says nothing of drafts: try again after some
            row.trust = max(row.trust, min(HOPE if self.exact else SOBER, row.trust + 0.02))
        if not self.exact:  # what clocks say of a block changes by itself, fixed costs do not
            pace.forget()

    def pace(self, rows: int) -> Pace:
        """Of about so many rows; by the clock only where that cannot change a token."""
        kind = rows.bit_length()
        if kind not in self.paces:
            costs = None if self.exact else fixed_costs(len(self.rule.members), kind == 1)
            self.paces[kind] = Pace(self.settings.max_block, costs)
        return self.paces[kind]

    def _plain(self, rows: Sequence[Row]) -> None:
        started = time.perf_counter()
        super().step(rows)
        self.pace(len(rows)).plain.add(1, time.perf_counter() - started)

    def _room(self, group: Sequence[Row]) -> int:
        """No longer than the longest row may become, nor any beyond the context."""
        wanted = max(len(row.numbers) - len(row.ids) for row in group)
        return min(wanted, self.room - max(row.place for row in group))

    def block(self, group: Sequence[Row], length: int, pace: Pace) -> None:
        """Draft, read and judge one block of every row."""
        started = time.perf_counter()
        before, hoped = self.counts.tokens, expected([row.trust for row in group], length)
        leader = group[0].leader
        slots, starts = [row.slot for row in group], np.array([row.place for row in group])
        numbers = np.stack([_some(row.numbers, len(row.ids), length) for row in group])
        hidden: list[torch.Tensor | None] = [None] * self.rule.count
        if len(group) == 1:
            drafts = self._quick_draft(group[0], numbers[0])
        else:
            drafts, hidden[leader] = self._draft(leader, group, numbers)
        drafted = time.perf_counter()
        lasts = np.array([[row.last] for row in group])
        length = drafts.shape[1]
        ids = np.concatenate([lasts, drafts[:, :-1]], axis=1)
        for member in self.rule.members:
            if hidden[member] is None:
                hidden[member] = self.read(member, slots, ids, starts)
        flat = [None if states is None else states.flatten(0, 1) for states in hidden]
        chosen = self.rule(flat, numbers[:, :length].ravel(), self.logits)
        for place, row in enumerate(group):
            part = slice(place * length, (place + 1) * length)
            self._judge(row, drafts[place], chosen.tokens[part], chosen.experts[part], chosen.weights[part])
        ended = time.perf_counter()
        pace.add(drafted - started, ended - drafted, length, self.counts.tokens - before, hoped)
        self.timed(len(group), length, ended - started)

    def _quick_draft(self, row: Row, numbers: np.ndarray) -> np.ndarray:
        """The leader's tokens [1, at most length]; it stops at an end token."""
        token, passes, drafts = row.last, self.passes[row.leader], []
        for step in range(len(numbers)):
            hidden = self.quick(row.leader, row.slot, token, row.place + step)
            token = max(0, int(self.rule.draw(passes.quick_logits(hidden), numbers[step : step + 1])[0]))
            drafts.append(token)
            if self.stops.is_stop_token(np.array([token]))[0]:
                break
        return np.array([drafts])

    def _draft(self, leader: int, group: Sequence[Row], numbers: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        """The leader's tokens [R, T] and its exact hidden states [R, T, H]."""
        import torch

        slots, starts = [row.slot for row in group], np.array([row.place for row in group])
        tokens = np.array([row.last for row in group])
        drafts, states = [], []
        for step in range(numbers.shape[1]):
            states.append(self.read(leader, slots, tokens[:, None], starts + step))
            logits = self.logits(leader, states[-1][:, 0])
            tokens = np.maximum(0, self.rule.draw(logits, numbers[:, step]))
            drafts.append(tokens)
        return np.stack(drafts, axis=1), torch.cat(states, dim=1)

    def _judge(
        self, row: Row, drafts: np.ndarray, tokens: np.ndarray, experts: np.ndarray, weights: np.ndarray
    ) -> None:  # fmt: skip
        """Take the rule's tokens up to the first that was not drafted, or to the end."""
        for step, token in enumerate(tokens):
            same, ended = bool(token == drafts[step]), self.take(row, int(token), int(experts[step]), weights[step])
            self.counts.drafted += 1
            self.counts.accepted += same
            row.trust = min(0.98, MEMORY * row.trust + (1 - MEMORY) * same)
            if ended or not same:
                self.counts.wasted += len(tokens) - step - 1
                break
        if not same or self.settings.mode == "select":
            row.leader = row.experts[-1]


def _some(numbers: np.ndarray, start: int, count: int) -> np.ndarray:
    """`count` numbers from `start` on; beyond the end, where tokens are dropped anyway, the last one."""
    return numbers[np.minimum(np.arange(start, start + count), len(numbers) - 1)]
