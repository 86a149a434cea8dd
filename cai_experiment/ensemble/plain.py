"""Decoding in the plain way: every expert reads every token. The reference for blocks.py, and what it builds upon."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Callable, Sequence

import numpy as np

from cai_experiment.engines.sampling import NO_TOKEN, uniforms
from cai_experiment.engines.stops import StopRule
from cai_experiment.ensemble.linear import Heads
from cai_experiment.ensemble.passes import Passes, open_passes
from cai_experiment.ensemble.rules import Rule
from cai_experiment.errors import BadInputError, EngineError

if TYPE_CHECKING:
    import torch

OnToken = Callable[[int, int, int], None]  # (index of the prompt, token id, expert)

BATCH = 16


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How to decode. `accelerate` changes the speed; on a CPU in float32 never the tokens: see `blocks`."""

    mode: str = "select"  # one of MODES
    expert: int = 0  # of mode "single"
    temperature: float = 0.3
    max_new_tokens: int = 200
    seed: int = 0
    accelerate: bool = True
    batch_size: int | None = None  # prompts at a time; None: BATCH
    max_block: int = 16  # tokens drafted at a time, at most
    ends: frozenset[int] = frozenset()  # tokens that end a text beside the model's own
    exact: bool = True  # False: a single row in the fastest arithmetic, whose last bits no block would have


@dataclass(frozen=True, slots=True)
class Spoken:
    """One answer. `ids` holds every token that was drawn, the ending one too; `text` is cut before the end.

    `experts`: who spoke each token (select: the selected one; mixture, uniform: arg max of pi_m p_m(token)); `pi`: the
    weights of all experts there; `finish`: "stop" (end token or stop string) or "length".
    """

    text: str
    ids: tuple[int, ...]
    experts: tuple[int, ...]
    pi: tuple[tuple[float, ...], ...]
    finish: str


@dataclass(slots=True)
class Counts:
    """What decoding took. A pass is one forward pass of one expert, over however many rows."""

    tokens: int = 0
    prompts: int = 0
    passes: list[int] = field(default_factory=list)  # of each expert, block passes included, prompts excluded
    block_passes: int = 0  # that took several tokens of a row at once
    drafted: int = 0  # tokens that the rule accepted or rejected
    accepted: int = 0
    wasted: int = 0  # drafted tokens behind a rejected one or behind the end
    row_passes: int = 0  # rows in all passes: passes if every prompt were alone
    seconds: float = 0.0
    rounds: dict[tuple[int, int], list[float]] = field(default_factory=dict)  # (rows, length): [number, seconds]

    @property
    def acceptance(self) -> float | None:
        """Accepted tokens over drafted ones; None if nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def passes_per_token(self) -> float | None:
        """Forward passes that a row took for each of its tokens; None without tokens."""
        return self.row_passes / self.tokens if self.tokens else None

    @property
    def tokens_per_second(self) -> float | None:
        """None before anything was timed."""
        return self.tokens / self.seconds if self.seconds else None


@dataclass(slots=True)
class Row:
    """A text in the making."""

    index: int  # of its prompt
    slot: int
    prompt: np.ndarray  # token ids [n], at least one
    numbers: np.ndarray  # a uniform number for each token, as many as may be drawn
    ids: list[int] = field(default_factory=list)
    experts: list[int] = field(default_factory=list)
    pi: list[tuple[float, ...]] = field(default_factory=list)
    leader: int = -1  # the expert that drafts
    trust: float = 0.9  # how often its tokens were accepted lately

    @property
    def last(self) -> int:
        """The token that no expert has read yet."""
        return self.ids[-1] if self.ids else int(self.prompt[-1])

    @property
    def place(self) -> int:
        """Its position."""
        return len(self.prompt) + len(self.ids) - 1


class Decoder:
    """Decodes a list of prompts, `batch_size` at a time; a row that ends makes room for the next prompt."""

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], settings: DecodeSettings, keys: Sequence[str],
        stop: Sequence[str], max_new: Sequence[int] | None, on_token: OnToken | None,
    ) -> None:  # fmt: skip
        self.settings, self.on_token = settings, on_token
        self.device = model.device
        heads = Heads(model.heads)
        self.rule = Rule(len(model.experts), heads, settings.mode, settings.expert, settings.temperature)
        self.stops = _stop_rule(model.tokenizer, tuple(sorted(model.eos_ids | settings.ends)), tuple(stop))
        wanted = [settings.max_new_tokens] * len(prompts) if max_new is None else list(max_new)
        self.room = room = model.context
        self.waiting = [
            _row(index, prompt, most, room, settings.seed, key)
            for index, (prompt, most, key) in enumerate(zip(prompts, wanted, keys, strict=True))
        ][::-1]
        self.done: dict[int, Spoken] = {}
        self.counts = Counts(prompts=len(prompts), passes=[0] * self.rule.count)
        self.slots = max(1, min(len(prompts), settings.batch_size or BATCH))
        longest = max([len(row.prompt) + len(row.numbers) for row in self.waiting], default=1)
        self.passes: dict[int, Passes] = {
            member: open_passes(model.experts[member], model.vocabulary, self.slots, longest + settings.max_block)
            for member in self.rule.members
        }

    def run(self) -> list[Spoken]:
        """All answers, in the order of the prompts."""
        rows: list[Row] = []
        while self.waiting or rows:
            rows += self._admit(rows)
            self.step(rows)
            rows = [row for row in rows if row.index not in self.done]
        return [self.done[index] for index in range(len(self.done))]

    def _admit(self, rows: Sequence[Row]) -> list[Row]:
        """Give free slots to waiting prompts and read them, but for their last token."""
        free = sorted(set(range(self.slots)) - {row.slot for row in rows})
        new = [self.waiting.pop() for _ in free[: len(self.waiting)]]
        for row, slot in zip(new, free, strict=False):
            row.slot = slot
        long = [row for row in new if len(row.prompt) > 1]
        if long:
            width = max(len(row.prompt) for row in long) - 1
            ids = np.stack([np.pad(row.prompt[:-1], (0, width + 1 - len(row.prompt))) for row in long])
            for passes in self.passes.values():
                passes([row.slot for row in long], ids, np.zeros(len(long), dtype=np.int64))
        return new

    def step(self, rows: Sequence[Row]) -> None:
        """Every member reads every row's last token: one token for each row."""
        started = time.perf_counter()
        hidden: list[torch.Tensor | None] = [None] * self.rule.count
        if len(rows) == 1 and not self.settings.exact:
            for member in self.rule.members:
                hidden[member] = self.quick(member, rows[0].slot, rows[0].last, rows[0].place)
        else:
            slots, ids = [row.slot for row in rows], np.array([[row.last] for row in rows])
            starts = np.array([row.place for row in rows])
            for member in self.rule.members:
                hidden[member] = self.read(member, slots, ids, starts)[:, 0]
        numbers = np.array([row.numbers[len(row.ids)] for row in rows])
        chosen = self.rule(hidden, numbers, self.logits)
        for row, *one in zip(rows, chosen.tokens, chosen.experts, chosen.weights, strict=True):
            self.take(row, *one)
            row.leader = row.experts[-1]
        self.timed(len(rows), 1, time.perf_counter() - started)

    def timed(self, rows: int, length: int, seconds: float) -> None:
        """Count a step (length 1) or a block of `rows` rows."""
        one = self.counts.rounds.setdefault((rows, length), [0.0, 0.0])
        one[0] += 1
        one[1] += seconds

    def quick(self, member: int, slot: int, token: int, place: int) -> torch.Tensor:
        """One counted pass over one token of one row, in the fastest arithmetic; [1, H]."""
        self.counts.passes[member] += 1
        self.counts.row_passes += 1
        return self.passes[member].quick(slot, token, place)

    def read(self, member: int, slots: Sequence[int], ids: np.ndarray, starts: np.ndarray) -> torch.Tensor:
        """One counted pass; see `Passes`."""
        self.counts.passes[member] += 1
        self.counts.row_passes += len(slots)
        self.counts.block_passes += ids.shape[1] > 1
        return self.passes[member](slots, ids, starts)

    def logits(self, member: int, hidden: torch.Tensor) -> torch.Tensor:
        """[n, H] -> [n, V]."""
        return self.passes[member].logits(hidden)

    def take(self, row: Row, token: int, expert: int, weights: np.ndarray) -> bool:
        """Add a token to a row; True if this ended the row."""
        if token == NO_TOKEN:
            raise EngineError(f"prompt {row.index}: the experts' numbers are not finite (NaN)")
        row.ids.append(int(token))
        row.experts.append(int(expert))
        row.pi.append(tuple(weights.tolist()))
        self.counts.tokens += 1
        if self.on_token is not None:
            self.on_token(row.index, int(token), int(expert))
        ends = bool(self.stops.is_stop_token(np.array([token]))[0]) or len(row.ids) == len(row.numbers)
        if not ends and self.stops.stop_strings and self.stops.may_end(np.array([token]))[0]:
            ends = self.stops.text(row.ids)[1]
        if ends:
            text, stopped = self.stops.text(row.ids)
            finish = "stop" if stopped else "length"
            self.done[row.index] = Spoken(text, tuple(row.ids), tuple(row.experts), tuple(row.pi), finish)
        return ends


def _row(index: int, prompt: Sequence[int], most: int, room: int, seed: int, key: str) -> Row:
    """Raises BadInputError for a prompt that cannot be answered."""
    if not len(prompt):
        raise BadInputError(f"prompt {index} has no tokens", "write at least one word")
    if most < 1:
        raise BadInputError(f"prompt {index} may have {most} new tokens", "use 1 or more")
    if len(prompt) >= room:
        raise BadInputError(f"prompt {index} has {len(prompt)} tokens of at most {room - 1}", "shorten it")
    most = min(most, room - len(prompt))
    return Row(index, -1, np.array(prompt, dtype=np.int64), uniforms(seed, key, most))


@lru_cache(maxsize=8)  # with stop strings the whole vocabulary is read once
def _stop_rule(tokenizer: Any, eos_ids: tuple[int, ...], stop: tuple[str, ...]) -> StopRule:
    return StopRule(tokenizer, eos_ids, stop)
