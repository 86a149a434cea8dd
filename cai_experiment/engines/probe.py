"""Holds the packed passes of a loaded model against themselves and against the plain model, on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cai_experiment.engines import attention
from cai_experiment.engines.cache import SlotCache
from cai_experiment.engines.common import is_out_of_memory
from cai_experiment.engines.forward import VIEW_STEP, Branch, Forward, Part, round_up
from cai_experiment.errors import EngineError

USE_GENERATE = "use --engine generate"


class Unservable(EngineError):
    """An architecture that packed passes do not serve; `generate` may. `reason` is the message without its remedy."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason, USE_GENERATE)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Probe:
    """What the probe found. `bit_equal`: the same logits, to the bit, in every tried shape."""

    bit_equal: bool
    shapes: int
    largest_difference: float
    view_step: int


def refuse_unservable(model: Any, context: int) -> None:
    """Raise EngineError for an architecture that packed passes would serve wrongly, before anything is computed."""
    name, config = type(model).__name__, model.config.get_text_config()
    if not model._can_set_attn_implementation():
        raise Unservable(f"{name} does not take attention functions from outside")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or not getattr(config, "layer_types", None)  # old configs: every layer does
    if slides and window is not None and window < context:
        raise Unservable(f"{name} looks back {window} tokens, less than the context of {context}")
    if kinds - {"full_attention", "sliding_attention"}:
        raise Unservable(f"{name} has layers of other kinds than attention: {', '.join(sorted(kinds))}")


def probe(model: Any, context: int, plain_attention: str) -> Probe:
    """Compute one conversation in several shapes, and once by the model's `plain_attention`.

    If logits on a CPU change with the length that attention reads, a second try reads one fixed length. Raises
    EngineError if they are not those of the plain model: this architecture needs something that packed passes lack.
    """
    length = min(140, context - 8)
    ids = np.random.default_rng(0).integers(0, model.config.get_text_config().vocab_size, size=length)
    try:
        logits = _in_all_shapes(model, ids, context, VIEW_STEP)
    except Exception as error:  # whatever an architecture does that ours does not expect
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise Unservable(f"{type(model).__name__}: packed passes fail ({error})") from error
    _agree_with_plain(model, ids, logits[0], plain_attention)
    found = _result(logits, VIEW_STEP)
    if found.bit_equal or model.device.type != "cpu":
        return found
    fixed = round_up(context, VIEW_STEP)
    again = _result(_in_all_shapes(model, ids, context, fixed), fixed)
    return again if again.bit_equal else found


def _result(logits: list[torch.Tensor], view_step: int) -> Probe:
    difference = max(float((other - logits[0]).abs().max()) for other in logits[1:])
    return Probe(difference == 0.0, len(logits), difference, view_step)


@dataclass(frozen=True, slots=True)
class _Shape:
    """One way to compute the conversation in `slot` of `slots`: by prefill in parts of `part` tokens beside `others`
    prompts, and, if one part is not all, the last three tokens by decoding while another row is `far` along (0: alone).
    Or the last `branch` tokens as a branch, beside others, of a slot that inherits what is before them."""

    slots: int
    slot: int
    part: int
    others: int
    far: int
    branch: int = 0


def _in_all_shapes(model: Any, ids: np.ndarray, context: int, view_step: int) -> list[torch.Tensor]:
    """The last logits [V] of one conversation: alone, in two parts, among others, token by token, and as a branch.

    `far` sets how many columns attention reads: 256 and 320 once showed other bits than 192 and 512.
    """
    size = len(ids)
    shapes = (
        _Shape(16, 0, size, 0, 0),
        _Shape(16, 5, size // 2, 0, 250),
        _Shape(16, 2, size, 3, 0),
        _Shape(32, 20, size - 3, 5, 310),
        _Shape(48, 47, size - 3, 1, 500),
        _Shape(48, 40, size - 3, 2, 0),
        _Shape(32, 9, size - 21, 4, 0, branch=21),
    )
    return [_last_logits(model, ids, context, view_step, shape).float().cpu() for shape in shapes]


def _last_logits(model: Any, ids: np.ndarray, context: int, view_step: int, shape: _Shape) -> torch.Tensor:
    forward = Forward(model, SlotCache(shape.slots, round_up(context, VIEW_STEP)), view_step)
    none = np.zeros(0, dtype=np.int64)
    rows = np.arange(shape.slots) if shape.far else np.array([shape.slot])
    if shape.branch:
        return _branch_logits(forward, ids, shape)
    done, logits = 0, torch.empty(0)
    while done < len(ids):
        if done and len(ids) - done <= 3:  # every other slot decodes too, one of them far along
            positions, tokens = rows % 7, rows % 89
            positions[(shape.slot + 3) % len(rows)] = min(shape.far, context - 1)
            positions[rows == shape.slot], tokens[rows == shape.slot] = done, ids[done]
            logits = forward(rows, tokens, positions)[int(np.flatnonzero(rows == shape.slot)[0])]
            done += 1
        else:
            end = min(len(ids) - 3 * (shape.part < len(ids)), done + shape.part)
            others = [
                Part((shape.slot + 1 + i) % shape.slots, 0, np.arange(3 + 9 * i) % 97) for i in range(shape.others)
            ]
            logits = forward(none, none, none, [*others, Part(shape.slot, done, ids[done:end])])[-1]
            done = end
    return logits


def _branch_logits(forward: Forward, ids: np.ndarray, shape: _Shape) -> torch.Tensor:
    none, stem, heir = np.zeros(0, dtype=np.int64), len(ids) - shape.branch, shape.slot + 1
    forward(none, none, none, [Part(shape.slot, 0, ids[:stem])], heirs=[(shape.slot, heir, stem)])
    others = [Branch(shape.slot, stem - 7 * i, np.arange(5 + 9 * i) % 97) for i in range(shape.others)]
    return forward(none, none, none, [], [*others, Branch(heir, stem, ids[stem:])])[-1]


def _agree_with_plain(model: Any, ids: np.ndarray, ours: torch.Tensor, plain_attention: str) -> None:
    """Raise EngineError unless the plain model gives (nearly) the same logits."""
    model.set_attn_implementation(plain_attention)
    try:
        with torch.inference_mode():
            plain = model(input_ids=torch.from_numpy(ids[None]).to(model.device), use_cache=False).logits[0, -1]
    finally:
        model.set_attn_implementation(attention.NAME)
    scale = float(plain.float().abs().max()) or 1.0
    allowed = 1e-3 if computes_in_float32(model) else 5e-2
    difference = float((plain.float().cpu() - ours).abs().max()) / scale
    if not difference <= allowed:  # NaN counts as a difference
        message = f"{type(model).__name__} gives other logits in packed passes (by {difference:.1e} of their size)"
        raise Unservable(message)


def computes_in_float32(model: Any) -> bool:
    """True if every layer computes in float32. After training in 4 or 8 bit a model's own dtype says so too soon:
    PEFT turns its norms and embeddings to float32, while the quantised layers stay in bfloat16 or int8.
    """
    if model.dtype != torch.float32 or getattr(model, "is_loaded_in_8bit", False):
        return False
    if not getattr(model, "is_loaded_in_4bit", False):
        return True
    return bool(model.config.quantization_config.bnb_4bit_compute_dtype == torch.float32)
