"""An engine over `model.generate`, in left-padded batches: slower than hf.py, for models that its loop cannot serve.

Texts are drawn by the same keyed sampling and cut by the same stop rule. `unsloth.py` loads its models into this one.

A batch lasts as long as its longest answer, so it is made of prompts alike: of verdicts, which take one pass, or of
those that may write equally much. What comes waits until a batch of its kind is full, or nothing else comes; then the
shortest kind goes first, since what follows on it may fill the batches of the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Iterable, Iterator, Sequence

import numpy as np
import torch

from cai_experiment.engines import culprits
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.common import (
    DEADLOCK,
    NO_NUMBERS,
    Intake,
    Request,
    choose_by_stream,
    close_model,
    core_of,
    is_out_of_memory,
)
from cai_experiment.engines.render import Renderer
from cai_experiment.engines.sampling import NO_TOKEN, draw, uniforms
from cai_experiment.engines.stops import StopRule
from cai_experiment.errors import EngineError

BATCH = 16


class GenerateEngine:
    """Speaks by `model.generate`. A batch is filled from the stream, spoken to its end, and given back."""

    name = "generate"

    def __init__(
        self, model: Any, tokenizer: Any, renderer: Renderer, batch_size: int | None = None,
        facts: dict[str, object] | None = None,
    ) -> None:
        """`model` may be a PEFT model; `facts` go into `describe`."""
        self.model, self.tokenizer, self.renderer = model, tokenizer, renderer
        self.facts = facts or {}
        self.first_line = ""
        self.batch_size = self._wanted = batch_size or BATCH

    @classmethod
    def from_model(
        cls, model: Any, tokenizer: Any, renderer: Renderer, batch_size: int | None = None
    ) -> GenerateEngine:
        """An engine over weights that are loaded already."""
        return cls(model, tokenizer, renderer, batch_size)

    def describe(self) -> dict[str, object]:
        """What the manifest records. There is no probe: a batch's shape may change the last bits here."""
        core = core_of(self.model)
        return {
            **self.facts,
            "engine": self.name,
            "architecture": type(core).__name__,
            "layout": self.renderer.layout,
            "dtype": str(core.dtype).removeprefix("torch."),
            "device": str(core.device),
            "max_length": self.renderer.max_length,
            "slots": self.batch_size,
            "probe": None,
        }

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`. Raises EngineError if `prompts` gives None while nothing is in work, or if even a
        harmless prompt fails; one that makes its batch fail comes back as its own error."""
        intake = Intake(self.renderer, prompts)
        waiting: dict[int, list[Request]] = {}  # by `_most_tokens`; no list is empty
        while intake.open or waiting:
            moved = False
            while not (full := self._full(waiting)) and (item := intake.take()) is not None:
                if isinstance(item, Request):
                    waiting.setdefault(_most_tokens(item), []).append(item)
                else:
                    moved = True
                    yield item
            if waiting:
                yield from self._speak_some(waiting, min(full or waiting))
            elif intake.open and not moved:
                raise EngineError(DEADLOCK)

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
        """See `base.Engine.choose`. Raises EngineError for a prompt that cannot be weighed."""
        return choose_by_stream(self, prompts, options)

    def _full(self, waiting: dict[int, list[Request]]) -> list[int]:
        """The kinds of which a whole batch waits."""
        return [kind for kind, rows in waiting.items() if len(rows) >= self.batch_size]

    def _speak_some(self, waiting: dict[int, list[Request]], kind: int) -> list[Completion]:
        """Speak a batch of one kind, and strike it off `waiting` unless it is to be tried again in halves."""
        rows = waiting[kind]
        batch = rows[: self.batch_size]
        done = self._try(batch)
        if done:
            del rows[: len(batch)]
        if not rows:
            del waiting[kind]
        return done

    def _try(self, batch: list[Request]) -> list[Completion]:
        """Speak one batch; out of memory, halve the batch size and give nothing.

        Where that is no way out, the rows at fault are found, and the batch size is what it was.
        """
        try:
            return self._speak(batch)
        except Exception as error:  # of whatever library
            memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
            broken = culprits.failure(error, len(batch))
        if memory and len(batch) > 1:  # outside the handler, whose traceback keeps tensors alive
            self.batch_size = len(batch) // 2
            torch.cuda.empty_cache()
            return []
        if memory:
            self.batch_size = self._wanted
        return list(culprits.apart(batch, self._speak, broken))

    @torch.inference_mode()
    def _speak(self, batch: list[Request]) -> list[Completion]:
        from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

        core = core_of(self.model)
        width = max(len(request.ids) for request in batch)
        ids = np.zeros((len(batch), width), dtype=np.int64)
        for row, request in enumerate(batch):
            ids[row, width - len(request.ids) :] = request.ids
        seen = np.arange(width) >= width - np.array([[len(request.ids)] for request in batch])
        rows = Rows(batch, self.renderer.stops)
        # The model's own generation config may hold a repetition penalty or a top-p: none of these is ours.
        own, core.generation_config = core.generation_config, GenerationConfig()
        try:
            core.generate(
                input_ids=torch.from_numpy(ids).to(core.device),
                attention_mask=torch.from_numpy(seen.astype(np.int64)).to(core.device),
                max_new_tokens=rows.longest,
                do_sample=False,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([rows.force]),
                stopping_criteria=StoppingCriteriaList([rows.ended]),
            )
        finally:
            core.generation_config = own
        return rows.completions()

    def release_for_training(self) -> tuple[Any, Any]:
        """(model, tokenizer), ready to be trained."""
        return self.model, self.tokenizer

    def close(self) -> None:
        """Forget the model and give its memory back."""
        close_model(self)


def _most_tokens(request: Request) -> int:
    """How many tokens it may write; 0 if it is only weighed."""
    return 0 if request.option_ids else request.prompt.sampling.max_tokens


@dataclass
class Rows:
    """One batch in `generate`: draws every row's token (`force`) and says which rows have ended (`ended`).

    `generate` takes the likeliest token, so `force` leaves one token possible: the drawn one.
    """

    batch: list[Request]
    stops: StopRule
    drawn: list[np.ndarray] = field(default_factory=list)  # one [rows] of tokens per step

    def __post_init__(self) -> None:
        sampling = [request.prompt.sampling for request in self.batch]
        limits = [1 if request.option_ids else request.prompt.sampling.max_tokens for request in self.batch]
        self.limits, self.longest = np.array(limits), max(limits)
        self.temperatures = np.array([s.temperature for s in sampling], dtype=np.float32)
        keys = [s.key or request.prompt.id for s, request in zip(sampling, self.batch, strict=True)]
        numbers = [uniforms(s.seed, key, self.longest) for s, key in zip(sampling, keys, strict=True)]
        self.numbers = np.stack(numbers)
        self.done = np.zeros(len(self.batch), dtype=bool)
        self.made = np.zeros(len(self.batch), dtype=np.int64)
        self.weights: dict[int, tuple[float, ...]] = {}

    def force(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """A LogitsProcessor: scores [rows, V] become minus infinity but for each row's drawn token."""
        step = len(self.drawn)
        if step == 0:
            for row, request in enumerate(self.batch):
                if request.option_ids:
                    logs = torch.log_softmax(scores[row].double(), dim=-1)
                    self.weights[row] = tuple(logs[list(request.option_ids)].tolist())
        # On CUDA `generate` may look one step beyond the end, since it checks for the end late.
        tokens = draw(scores, self.temperatures, self.numbers[:, min(step, self.longest - 1)])
        self.drawn.append(tokens)
        self._note_ends(tokens)
        forced = torch.full_like(scores, float("-inf"))
        chosen = torch.from_numpy(np.maximum(tokens, 0)).to(scores.device)
        return forced.scatter_(1, chosen.unsqueeze(1), 0.0)

    def _note_ends(self, tokens: np.ndarray) -> None:
        running = ~self.done
        self.made += running
        ends = self.stops.is_stop_token(tokens) | (self.made >= self.limits) | (tokens == NO_TOKEN)
        for row in np.flatnonzero(running & self.stops.may_end(tokens) & ~ends):
            ends[row] = self.stops.text(self._tokens(row))[1]
        self.done |= running & ends

    def ended(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """A StoppingCriteria: bool [rows]."""
        return torch.from_numpy(self.done.copy()).to(input_ids.device)

    def _tokens(self, row: int) -> list[int]:
        return [int(step[row]) for step in self.drawn[: self.made[row]]]

    def completions(self) -> list[Completion]:
        """What came of each row."""
        return [self._completion(row, request) for row, request in enumerate(self.batch)]

    def _completion(self, row: int, request: Request) -> Completion:
        size, tokens = len(request.ids), self._tokens(row)
        weights = self.weights.get(row, ())
        if NO_TOKEN in tokens or not np.isfinite(weights).all():
            return Completion(request.prompt.id, "", "error", size, size, 0, NO_NUMBERS)
        if request.option_ids:
            return Completion(request.prompt.id, "", "stop", size, size, 0, logprobs=weights)
        text, stopped = self.stops.text(tokens)
        return Completion(request.prompt.id, text, "stop" if stopped else "length", size, size, len(tokens))
