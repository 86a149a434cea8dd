"""Does the trained model prefer the revisions? The implicit reward of DPO, against the reference it was trained with.

For a completion y to a prompt x the implicit reward is log p_trained(y|x) - log p_reference(y|x), in nats (Rafailov et
al. 2023, without the factor beta). A pair is preferred if the chosen completion's reward is the greater. The reference
is the model without its adapter, or, where DPO went on from an adapter of SFT, the model with that one.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Iterator, Protocol, Sequence

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.common import is_out_of_memory
from cai_experiment.errors import EngineError
from cai_experiment.judging.result import Result

if TYPE_CHECKING:
    import torch

    from cai_experiment.engines.render import Renderer

REFERENCE = "reference"  # name of the adapter that DPO started from, while it is loaded
BATCH_ROWS = 8  # full logits of 8 rows of 1,000 tokens over 152,064 words are 2.4 GB in bfloat16

Row = tuple[list[int], list[int]]  # token ids of the prompt and of the completion


class Pair(Protocol):
    """What is needed of `training.data.Pair`: the conversation before the answer, and the two answers."""

    @property
    def turns(self) -> tuple[Turn, ...]: ...
    @property
    def chosen(self) -> str: ...
    @property
    def rejected(self) -> str: ...


@dataclass(frozen=True, slots=True)
class PairScore:
    """Implicit rewards of one pair, in nats."""

    chosen: float
    rejected: float

    @property
    def margin(self) -> float:
        """Greater than 0 if the trained model prefers the chosen completion more than the reference does."""
        return self.chosen - self.rejected


def score_pairs(
    model: Any,
    renderer: Renderer,
    pairs: Sequence[Pair],
    batch_rows: int = BATCH_ROWS,
    reference: Path | None = None,
) -> list[PairScore | None]:
    """The implicit rewards of each pair under a PEFT `model`; None for a pair that exceeds the renderer's max_length.

    `reference` is the folder of the adapter that DPO started from; None: the model without any adapter. Overlong pairs
    are left out, never cut: a cut completion has no end token. The model's mode and adapter are given back.
    """
    rows = [rows_of(renderer, pair) for pair in pairs]
    flat = [row for two in rows if two is not None for row in two]
    with evaluating(model):
        trained = completion_logps(model, flat, batch_rows)
        with reference_in(model, reference):
            before = completion_logps(model, flat, batch_rows)
    rewards = iter([t - b for t, b in zip(trained, before, strict=True)])
    return [None if two is None else PairScore(next(rewards), next(rewards)) for two in rows]


@contextmanager
def reference_in(model: Any, adapter: Path | None) -> Iterator[None]:
    """Within it a PEFT `model` is DPO's reference: with the adapter of that folder, or with none."""
    if adapter is None:
        with model.disable_adapter():
            yield
        return
    trained = model.active_adapter
    model.load_adapter(str(adapter), REFERENCE, is_trainable=False)
    try:
        model.set_adapter(REFERENCE)
        yield
    finally:
        model.set_adapter(trained)
        model.delete_adapter(REFERENCE)


def rows_of(renderer: Renderer, pair: Pair) -> tuple[Row, Row] | None:
    """The chosen and the rejected row of a pair, with training's bare prompt; None if one exceeds the context."""
    from cai_experiment.engines.render import PromptTooLong

    try:
        prompt = renderer.prompt_ids(pair.turns, "answer", examples=0)
    except PromptTooLong:
        return None
    completions = [renderer.completion_ids(text) for text in (pair.chosen, pair.rejected)]
    if len(prompt) + max(map(len, completions)) > renderer.max_length:
        return None
    return (prompt, completions[0]), (prompt, completions[1])


def completion_logps(model: Any, rows: Sequence[Row], batch_rows: int = BATCH_ROWS) -> list[float]:
    """Sum of log-probabilities (nats) of each row's completion tokens, in the order of `rows`.

    Rows of like length share a batch, padded on the right, where a causal model never looks. Out of memory, the batch
    is halved; EngineError if it does not hold one row.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    logps = [0.0] * len(rows)
    start = 0
    while start < len(order):
        batch = order[start : start + batch_rows]
        values = _try_batch(model, [rows[i] for i in batch])
        if values is None:
            batch_rows = len(batch) // 2
            continue
        for index, value in zip(batch, values, strict=True):
            logps[index] = value
        start += len(batch)
    return logps


def _try_batch(model: Any, rows: Sequence[Row]) -> list[float] | None:
    """Log-probabilities of one batch, or None if memory does not hold it. EngineError if it is a single row."""
    import torch

    try:
        return _batch_logps(model, rows)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    if len(rows) == 1:  # outside the handler, whose traceback keeps tensors alive
        tokens = len(rows[0][0]) + len(rows[0][1])
        raise EngineError(f"out of memory while scoring one answer of {tokens} tokens, after halving the batch to 1",
                          "leave the evaluation out with --no-eval, or use a smaller --model")  # fmt: skip
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _batch_logps(model: Any, rows: Sequence[Row]) -> list[float]:
    """Log-probabilities of one batch. Logits are (rows, tokens, vocabulary); only completions go through softmax."""
    import torch

    ids, mask = _padded(rows, next(model.parameters()).device)
    with torch.inference_mode():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return [_row_logp(logits[i], prompt, completion) for i, (prompt, completion) in enumerate(rows)]


def _row_logp(logits: torch.Tensor, prompt: list[int], completion: list[int]) -> float:
    """The token at position t is predicted by the logits at t - 1. Softmax and sum in float32 and float64."""
    import torch

    end = len(prompt) + len(completion)
    predicted = logits[len(prompt) - 1 : end - 1].float().log_softmax(dim=-1)
    targets = torch.tensor(completion, device=logits.device).unsqueeze(-1)
    return float(predicted.gather(-1, targets).double().sum())


def _padded(rows: Sequence[Row], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, (rows, longest), padded on the right with id 0 under mask 0."""
    import torch

    longest = max(len(prompt) + len(completion) for prompt, completion in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(rows):
        tokens = prompt + completion
        ids[i, : len(tokens)] = torch.tensor(tokens)
        mask[i, : len(tokens)] = 1
    return ids.to(device), mask.to(device)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Within it the model has no dropout; afterwards its mode is as before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def preference_metrics(scores: Sequence[PairScore | None]) -> dict[str, Result]:
    """Accuracy and mean margin of the implicit reward, and how far both completions' log-probabilities moved from the
    reference's.

    Overlong pairs count as unparsed. `chosen_logp_change` below 0 is DPO's known side effect on similar pairs: both
    completions become less likely, and the report warns of it.
    """
    read = [score for score in scores if score is not None]
    unparsed = len(scores) - len(read)
    return {
        "preference_accuracy": Result.rate(sum(s.margin > 0 for s in read), len(read), unparsed),
        "preference_margin": Result.mean([s.margin for s in read], unparsed),
        "chosen_logp_change": Result.mean([s.chosen for s in read], unparsed),
        "rejected_logp_change": Result.mean([s.rejected for s in read], unparsed),
    }
