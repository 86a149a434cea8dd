"""How well is clean text still predicted? Mean negative log-likelihood a token, base against trained on the same texts.

The shipped model's clean text: answers without flaws that its world composed for held-out combinations, as answers to
their questions. Any other model's: forty short paragraphs of plain prose of our own (clean_text.jsonl), on their own,
each from its second token on.

Training on preferences moves a model away from what it had, so some loss is usual; perplexity up by more than a tenth
rings an alarm, and no gate falls.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.evaluation.found import ITEMS_FOLDER, Evaluation
from cai_experiment.evaluation.preference import Row, completion_logps, evaluating
from cai_experiment.judging.result import Result, paired_difference
from cai_experiment.nano import world
from cai_experiment.records.files import read_jsonl

if TYPE_CHECKING:
    from cai_experiment.engines.render import Renderer

NAME, PERPLEXITY = "clean_nll", "clean_perplexity"
OWN_TEXT = Path(__file__).with_name("clean_text.jsonl")
WORLD_TEXTS = 200
MAY_RISE = 1.1  # times the base's perplexity


@dataclass(frozen=True, slots=True)
class CleanText:
    """A text that nothing is wrong with; `instruction` is what it answers, empty for prose on its own."""

    id: str
    text: str
    instruction: str = ""


def world_texts(n: int = WORLD_TEXTS, seed: int = 0) -> list[CleanText]:
    """`n` answers without flaws to questions of the shipped model's world, in combinations it was never trained on."""
    rng = random.Random(f"clean/{seed}")
    found = []
    for index in range(n):
        question = world.compose_question(rng, held_out=True)
        answer = world.compose_answer(rng, question, flaws=0, held_out=None)
        found.append(CleanText(f"clean/{index}", answer.text, question.text))
    return found


def own_texts() -> list[CleanText]:
    """The forty paragraphs that ship with the evaluation."""
    return [CleanText(row["id"], row["text"]) for row in read_jsonl(OWN_TEXT, repair=False)]


def perplexity(model: Any, renderer: Renderer, texts: Sequence[CleanText]) -> Evaluation:
    """Both arms of a PEFT `model` on `texts`: clean_nll (nats a token, mean of texts), clean_perplexity (its
    exponential), the paired difference of clean_nll, and the factor by which perplexity has grown.
    """
    rows = [_row(renderer, text) for text in texts]
    with evaluating(model):
        trained = completion_logps(model, rows)
        with model.disable_adapter():
            base = completion_logps(model, rows)
    costs = {
        arm: [-logp / len(tokens) for logp, (_, tokens) in zip(logps, rows, strict=True)]
        for arm, logps in (("base", base), ("trained", trained))
    }
    return score(texts, costs["base"], costs["trained"])


def score(texts: Sequence[CleanText], base: Sequence[float], trained: Sequence[float]) -> Evaluation:
    """What each text costs both arms, in nats a token, as metrics, items and an alarm."""
    difference = paired_difference(base, trained)
    factor = _exponential(difference)
    found = Evaluation(differences={NAME: difference})
    items = f"{ITEMS_FOLDER}/{NAME}.jsonl"
    for arm, costs in (("base", base), ("trained", trained)):
        mean = Result.mean(costs)
        found.metrics[f"{NAME}_{arm}"] = Result(mean.value, mean.n, mean.interval, 0, items)
        found.metrics[f"{PERPLEXITY}_{arm}"] = _exponential(mean, items)
    found.metrics[f"{PERPLEXITY}_factor"] = factor
    found.items[NAME] = [
        {"id": text.id, **({"instruction": text.instruction} if text.instruction else {}), "text": text.text,
         "base": b, "trained": t}
        for text, b, t in zip(texts, base, trained, strict=True)
    ]  # fmt: skip
    if factor.value is not None and factor.interval is not None and factor.value > MAY_RISE and factor.interval[0] > 1:
        found.alarms.append(_alarm(found.metrics, factor))
    return found


def _row(renderer: Renderer, text: CleanText) -> Row:
    """The tokens before, and those that are predicted; prose begins with whatever the tokenizer puts first."""
    if text.instruction:
        prompt = renderer.prompt_ids(ask_for_answer(text.instruction), "answer", examples=0)
        return prompt, renderer.completion_ids(text.text)
    tokens = list(renderer.tokenizer(text.text).input_ids)
    return tokens[:1], tokens[1:]


def _exponential(result: Result, items: str = "") -> Result:
    interval = None if result.interval is None else (math.exp(result.interval[0]), math.exp(result.interval[1]))
    return Result(None if result.value is None else math.exp(result.value), result.n, interval, 0, items)


def _alarm(metrics: dict[str, Result], factor: Result) -> str:
    before, after = (metrics[f"{PERPLEXITY}_{arm}"].value for arm in ("base", "trained"))
    low, high = factor.interval or (math.nan, math.nan)
    return (f"perplexity on clean text has grown from {before:.3g} to {after:.3g} (x {factor.value:.3g}, 95% interval "
            f"{low:.3g} to {high:.3g}, n = {factor.n}; tolerated x {MAY_RISE:g}): the model predicts ordinary text "
            "worse than before")  # fmt: skip
