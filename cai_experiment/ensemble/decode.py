"""Texts token by token from an ensemble: `decode` for batches of prompts, `prompt_log_probs` for what a router asks."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Callable, Sequence

import numpy as np

from cai_experiment.engines.sampling import NO_TOKEN, uniforms
from cai_experiment.engines.stops import StopRule
from cai_experiment.ensemble.passes import Passes, open_passes
from cai_experiment.ensemble.rules import MODES as MODES
from cai_experiment.ensemble.rules import Rule
from cai_experiment.errors import BadInputError, EngineError

if TYPE_CHECKING:
    import torch

OnToken = Callable[[int, int, int], None]  # (index of the prompt, token id, expert)

BATCH = 16


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """How to decode. `accelerate` changes the speed, never the tokens (float32; see `blocks`)."""

    mode: str = "select"  # one of MODES
    expert: int = 0  # of mode "single"
    temperature: float = 0.3
    max_new_tokens: int = 200
    seed: int = 0
    accelerate: bool = True
    batch_size: int | None = None  # prompts at a time; None: BATCH
    max_block: int = 8  # tokens drafted at a time, at most


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
    drafted: int = 0  # tokens that the rule could have rejected
    accepted: int = 0
    row_passes: int = 0  # rows in all passes: passes if every prompt were alone
    seconds: float = 0.0

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

    @property
    def last(self) -> int:
        """The token that no expert has read yet."""
        return self.ids[-1] if self.ids else int(self.prompt[-1])

    @property
    def place(self) -> int:
        """Its position."""
        return len(self.prompt) + len(self.ids) - 1


def decode(
    model: Any, prompts: Sequence[Sequence[int]], settings: DecodeSettings, keys: Sequence[str],
    stop: Sequence[str] = (), max_new: Sequence[int] | None = None, on_token: OnToken | None = None,
) -> tuple[list[Spoken], Counts]:  # fmt: skip
    """Answers to `prompts` (token ids), in their order, with what they took.

    `keys`: with `settings.seed` and the position they fix each draw, whatever else is in the batch; `max_new`: tokens
    of each prompt, at most (None: `settings.max_new_tokens`); `on_token` is called for each token as it is fixed.
    Raises BadInputError for an empty prompt, one that leaves no room in the context, an unknown mode or expert;
    EngineError where an expert gives no finite numbers.
    """
    decoder = Decoder(model, prompts, settings, keys, stop, max_new, on_token)
    started = time.perf_counter()
    spoken = decoder.run()
    decoder.counts.seconds = time.perf_counter() - started
    return spoken, decoder.counts


class Decoder:
    """Decodes a list of prompts, `batch_size` at a time; a row that ends makes room for the next prompt."""

    def __init__(
        self, model: Any, prompts: Sequence[Sequence[int]], settings: DecodeSettings, keys: Sequence[str],
        stop: Sequence[str], max_new: Sequence[int] | None, on_token: OnToken | None,
    ) -> None:  # fmt: skip
        self.settings, self.on_token = settings, on_token
        self.rule = Rule(model, settings.mode, settings.expert, settings.temperature)
        self.stops = _stop_rule(model.tokenizer, tuple(sorted(model.eos_ids)), tuple(stop))
        wanted = [settings.max_new_tokens] * len(prompts) if max_new is None else list(max_new)
        room = context_of(model)
        self.waiting = [
            _row(index, prompt, most, room, settings.seed, key)
            for index, (prompt, most, key) in enumerate(zip(prompts, wanted, keys, strict=True))
        ][::-1]
        self.done: dict[int, Spoken] = {}
        self.counts = Counts(prompts=len(prompts), passes=[0] * self.rule.count)
        self.slots = max(1, min(len(prompts), settings.batch_size or BATCH))
        longest = max([len(row.prompt) + len(row.numbers) for row in self.waiting], default=1)
        self.passes: dict[int, Passes] = {
            member: open_passes(model.experts[member].model, model.vocabulary, self.slots, longest)
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
        """The plain way: every member reads every row's last token; one token for each row."""
        slots, ids = [row.slot for row in rows], np.array([[row.last] for row in rows])
        starts = np.array([row.place for row in rows])
        hidden: list[torch.Tensor | None] = [None] * self.rule.count
        for member in self.rule.members:
            hidden[member] = self.read(member, slots, ids, starts)[:, 0]
        numbers = np.array([row.numbers[len(row.ids)] for row in rows])
        chosen = self.rule(hidden, numbers, self.logits)
        for row, *one in zip(rows, chosen.tokens, chosen.experts, chosen.weights, strict=True):
            self.take(row, *one)

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


def context_of(model: Any) -> int:
    """Tokens that every expert can hold."""
    configs = (expert.model.config.get_text_config() for expert in model.experts)
    return min(getattr(config, "max_position_embeddings", 1 << 30) for config in configs)


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


def prompt_log_probs(model: Any, prompts: Sequence[Sequence[int]], batch_size: int = BATCH) -> np.ndarray:
    """Mean log-probability of each prompt's tokens but the first under each expert, float64 [prompts, M].

    exp of minus it is the prompt's perplexity; a prompt of one token gives 0.
    """
    import torch

    found = np.zeros((len(prompts), len(model.experts)))
    for m, expert in enumerate(model.experts):
        passes = open_passes(expert.model, model.vocabulary, batch_size, max(map(len, prompts), default=1))
        for first in range(0, len(prompts), batch_size):
            batch = [np.array(prompt, dtype=np.int64) for prompt in prompts[first : first + batch_size]]
            width = max(map(len, batch))
            ids = np.stack([np.pad(one, (0, width - len(one))) for one in batch])
            hidden = passes(range(len(batch)), ids, np.zeros(len(batch), dtype=np.int64))
            for row, one in enumerate(batch):
                if len(one) > 1:
                    logs = torch.log_softmax(passes.logits(hidden[row, : len(one) - 1]).double(), dim=-1)
                    target = torch.from_numpy(one[1:]).to(logs.device)
                    found[first + row, m] = logs.gather(1, target[:, None]).mean().item()
    return found
