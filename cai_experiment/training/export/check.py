"""Does an export say what the adapter model says? Logits and greedy text of 20 prompts, and the reasons for limits.

The adapter model (base and LoRA apart, in PEFT) answers the prompts greedily. The export is then led along the very
same tokens, so that every position can be compared; its own greedy text is the same up to the first position where
its best token is another one, and is compared by that.

Why the two differ at all: `W + scaling * B @ A` is rounded once to the export's precision, and in 16 bit each layer's
outputs are rounded too. One rounding has a relative error of at most u (2^-8 for bf16, 2^-11 for fp16; in fp32 a sum of
thousands of products is itself rounded at every step, so 2^-20 is taken). Errors of 2 L residual branches, independent
of each other, add up as a root: the logits, whose spread at a position is s (a standard deviation over the vocabulary),
differ by about u * sqrt(2 L) * s. Measured, with 4 layers and 24, bf16 and fp16, four adapters: 0.91 to 0.95 of that by
root mean square where the computation rounds too, and 0.23 to 0.43 where only the weights were rounded, so u is the
root of the squares of the computation's roundoff and half the weights'; the largest difference was up to 13 times it.
(GGUF's q8_0 rounds a block of 32 values to 1/127 of its largest: 2^-7, 0.5 measured.) Limits:

- root mean square of all logit differences: at most RMS_FACTOR times that;
- the largest single difference: at most MAX_FACTOR times that (of millions of values, with unlike positions);
- the mean KL divergence of next-token distributions: at most what differences of that size can cause (its square);
- greedy text: the same. A differing token passes only where the adapter model itself is undecided: its own gap between
  the two tokens is at most TIE_FACTOR times the root mean square difference measured at that position or, where larger,
  over all, and in no case more than TIE_FACTOR times the limit. (Each of the two logits carries that error, so their
  difference carries 1.4 of it, and 5.7 are four standard deviations.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

PROMPTS = 20
LONGEST_PROMPT = 256  # tokens; longer ones are passed over: 32B in bf16 leaves 14 of 80 GB
ANSWER_TOKENS = 64
RMS_FACTOR, MAX_FACTOR, TIE_FACTOR = 4.0, 48.0, 5.7
UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-20, "q8_0": 2.0**-7}
OWN_PROMPTS = (
    "How do I keep bread fresh for longer?", "My neighbour plays loud music at night. What can I say to him?",
    "Explain in two sentences why the sky is blue.", "What should I pack for a walk in the mountains?",
    "Write a short note that thanks a colleague for help.", "How can I learn ten new words a day?",
    "Is it safe to mix bleach and vinegar?", "Give me three ideas for a rainy afternoon with children.",
    "How do I change the tyre of a bicycle?", "What is the difference between weather and climate?",
    "I cannot sleep. What may help?", "How much water does a tomato plant need?",
    "Which is heavier, a litre of oil or a litre of water?", "Suggest a simple dinner for two from rice and eggs.",
    "How do I write a complaint about a broken lamp?", "Why do cats purr?",
    "How can I save money on heating?", "What does a good apology say?",
    "My phone fell into water. What should I do first?", "Describe the sea to somebody who has never seen it.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts as text and as token ids; `stops` are the ids that end an answer, `tokenizer` names tokens."""

    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    stops: tuple[int, ...]
    tokenizer: Any

    def word(self, token: int) -> str:
        """A token's text, quoted, with its number."""
        return f"{self.tokenizer.decode([token])!r} (token {token})"


@dataclass(slots=True)
class Answers:
    """What a model said: per prompt the token ids of its answer and the logits before each (float32 or 16 bit, CPU)."""

    tokens: list[list[int]]
    logits: list[Tensor]  # (tokens, vocabulary)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Export against adapter model. Logits are natural units, KL is in nats; `problem` is "" or why it is refused."""

    prompts: int
    positions: int
    rms_difference: float
    max_difference: float
    rms_limit: float
    max_limit: float
    mean_kl: float
    max_kl: float
    same_text: int  # prompts
    ties: int  # prompts whose text differs from a token on that the adapter model is undecided about
    problem: str

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        return asdict(self)

    def line(self, of: str = "adapter model", limits: bool = True) -> str:
        """One line for the terminal."""
        ties = f", {self.ties} part at a tie" if self.ties else ""
        rms, most = (f" (limit {limit:.2g})" if limits else "" for limit in (self.rms_limit, self.max_limit))
        return (
            f"{self.prompts} prompts, {self.positions} positions against the {of}: logits differ by "
            f"{self.rms_difference:.2g} rms{rms}, by {self.max_difference:.2g} at most{most}; "
            f"KL {self.mean_kl:.2g} nats; same greedy text on {self.same_text}{ties}"
        )


# ---------------------------------------------------------------- asking a model


def answer(model: Any, prompts: Prompts, forced: Answers | None = None) -> Answers:
    """Answer all prompts in one batch, greedily, or along the tokens of `forced`; up to ANSWER_TOKENS tokens each.

    An answer ends with the first of its stop ids. Two models of one shape compute in the same order, whatever the text.
    """
    import torch

    length = max(len(ids) for ids in prompts.ids)
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts.ids], device=model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts.ids], device=model.device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    steps = ANSWER_TOKENS if forced is None else max(len(tokens) for tokens in forced.tokens)
    said: list[list[int]] = [[] for _ in prompts.ids]
    kept: list[Tensor] = []
    cache = None
    with torch.inference_mode():
        for step in range(steps):
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache,
                        use_cache=True, logits_to_keep=1)  # fmt: skip
            cache = out.past_key_values
            kept.append(out.logits[:, -1].cpu())
            best = kept[-1].argmax(-1).tolist() if forced is None else [_at(row, step) for row in forced.tokens]
            for row, token in zip(said, best, strict=True):
                if len(row) == step and not (row and row[-1] in prompts.stops) and token is not None:
                    row.append(token)
            if all(len(row) <= step for row in said):
                break
            ids = torch.tensor([[token or 0] for token in best], device=model.device)
            mask = torch.cat([mask, mask.new_ones(len(said), 1)], dim=1)
            positions = positions[:, -1:] + 1
    logits = [torch.stack([kept[step][i] for step in range(len(row))]) for i, row in enumerate(said)]
    return Answers(said, logits)


def _at(tokens: Sequence[int], step: int) -> int | None:
    return tokens[step] if step < len(tokens) else None


# ---------------------------------------------------------------- comparing


def compare(right: Answers, export: Answers, stored: str, computed: str, layers: int, prompts: Prompts) -> Comparison:
    """Hold an export's logits along the adapter model's answers against that model's own.

    `stored` and `computed` are keys of UNIT_ROUNDOFF: the precision of the export's weights, and of the computation.
    """
    import torch

    rows = [_differences(a.float(), b.float()) for a, b in zip(right.logits, export.logits, strict=True)]
    squares = torch.cat([row["square"] for row in rows])
    kl, spread = torch.cat([row["kl"] for row in rows]), torch.cat([row["spread"] for row in rows])
    rms, largest = float(squares.mean().sqrt()), float(torch.cat([row["largest"] for row in rows]).max())
    roundoff = math.hypot(UNIT_ROUNDOFF[stored] / 2, UNIT_ROUNDOFF[computed])
    unit = roundoff * math.sqrt(2 * layers) * float(spread.mean())
    same = ties = 0
    problem = ""
    for number, (tokens, theirs) in enumerate(zip(right.tokens, export.logits, strict=True)):
        at = _first_other(tokens, theirs)
        if at is None:
            same += 1
            continue
        other = int(theirs[at].argmax())
        gap = float(right.logits[number][at, tokens[at]].float() - right.logits[number][at, other].float())
        rounding = max(rms, float(rows[number]["square"][at].sqrt()))
        if gap <= TIE_FACTOR * min(rounding, RMS_FACTOR * unit):
            ties += 1
        elif not problem:
            problem = (
                f"on prompt {number + 1} ({_short(prompts.texts[number])}) token {at + 1} is {prompts.word(other)} "
                f"and not {prompts.word(tokens[at])}, which the adapter model prefers by {gap:.2g}"
            )
    found = Comparison(
        len(rows), len(squares), rms, largest, RMS_FACTOR * unit, MAX_FACTOR * unit, float(kl.mean()), float(kl.max()),
        same, ties, "",
    )  # fmt: skip
    limits = _beyond(found, rows, prompts.texts)
    return replace(found, problem="; ".join(filter(None, (problem, limits))))


def _differences(right: Tensor, export: Tensor) -> dict[str, Tensor]:
    """Per position: mean square and largest difference of the logits, KL(right || export), spread of the logits."""
    import torch

    difference = export - right
    if not bool(difference.isfinite().all()):
        difference = torch.full_like(difference, math.inf)
    log_p, log_q = right.double().log_softmax(-1), export.double().log_softmax(-1)  # in float32 KL has noise of 1e-8
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).nan_to_num(math.inf).clamp(min=0)
    return {"square": difference.square().mean(-1), "largest": difference.abs().amax(-1), "kl": kl,
            "spread": right.std(-1)}  # fmt: skip


def _first_other(tokens: Sequence[int], logits: Tensor) -> int | None:
    """The first position whose best token is another one, or None."""
    best = logits.argmax(-1).tolist()
    return next((i for i, token in enumerate(tokens) if best[i] != token), None)


def _beyond(found: Comparison, rows: Sequence[dict[str, Tensor]], prompts: Sequence[str]) -> str:
    """Which limit was passed, and the prompt where most; "" if none."""
    worst = max(range(len(rows)), key=lambda i: float(rows[i]["largest"].max()))
    where = f"most on prompt {worst + 1} ({_short(prompts[worst])})"
    if not found.rms_difference <= found.rms_limit:
        return f"logits differ by {found.rms_difference:.3g} rms, {found.rms_limit:.3g} allowed, {where}"
    if not found.max_difference <= found.max_limit:
        return f"a logit differs by {found.max_difference:.3g}, {found.max_limit:.3g} allowed, {where}"
    if not found.mean_kl <= found.rms_limit**2:
        return f"the mean KL divergence is {found.mean_kl:.3g} nats, {found.rms_limit**2:.3g} allowed, {where}"
    return ""


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else line[:57] + "...")


def refuse(found: Comparison, what: str) -> None:
    """Raise EngineError (exit code 1) if the comparison found a problem."""
    if found.problem:
        message = f"{what} does not say what the adapter model says: {found.problem}"
        raise EngineError(message, "nothing was published; export again, and report it if it comes back")
