"""Before the first step of fast DPO: is the packed arithmetic the model's own, and is the reference the reference?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cai_experiment.errors import EngineError
from cai_experiment.training.data import TokenPair
from cai_experiment.training.fast.packing import pack, tree_of

if TYPE_CHECKING:
    from cai_experiment.training.fast_dpo import FastTrainer

FLOAT32_LAYOUT = 1e-3  # nats of an answer's sum, packed against plain
# nats in 16 bits, a token, and at least: a logit between 16 and 32 is rounded at 0.125; over many tokens that averages
# out, a wrong mask does not
OTHER_LAYOUT, OTHER_LEAST = 0.05, 0.25
FLOAT32_MARGIN = 1e-4  # beta times nats, with a reference that another pass computed
GPU_NATS = 0.1  # on a GPU the first pass's attention is compiled for its very shape, later ones for any
NOISE = 4.0  # in 16 bits the margin may be off by so many times what the layout alone changes


@torch.no_grad()
def check_start(trainer: FastTrainer) -> float:
    """How far from 0 a margin before the first step may be: on a CPU 0 where the reference was computed in this call.

    Raises EngineError if (1) the shortest pairs score otherwise in a packed pass than in a plain forward pass, (2)
    policy and reference differ at all in one and the same pass, or (3) the stored reference is further from the
    computed one than rounding explains.
    """
    trainer.policy.model.eval()
    numbers = _to_score(trainer)
    shortest = [trainer.pairs.rows[n] for n in numbers]
    with trainer.policy.autocast():
        noise = check_layout(trainer, shortest)
        packed = pack([trainer.pairs.trees[n] for n in numbers], trainer.policy.fill).to(trainer.args.device)
        with trainer.policy.ready():
            now = torch.stack(trainer.policy.answer_logps(packed))
            reference = torch.stack(trainer.reference.logps(packed))
    apart = (now - reference).abs().max().item()
    if apart != 0.0:
        message = f"the reference is not the starting model: they differ by {apart:.3g} nats before the first step"
        raise EngineError(message, "train from the model itself, without an adapter in it")
    stored = trainer.pairs.reference[numbers].T.to(now.device)
    off = trainer.settings.beta * (stored - reference).abs().max().item()
    if not trainer.reference.was_read:  # `measure` takes the very passes that the reference was computed in
        return 0.0 if now.device.type == "cpu" else trainer.settings.beta * GPU_NATS
    tolerance = FLOAT32_MARGIN if _is_float32(trainer) else FLOAT32_MARGIN + trainer.settings.beta * NOISE * noise
    if off > tolerance:
        message = f"{trainer.reference.folder}: stored log-probabilities of the reference are off by {off:.3g} (margin)"
        raise EngineError(message, "delete that folder; it is made again")
    return tolerance


def foreign_kind(model: Any) -> str:
    """What packed passes leave out of a model, or how it is built unlike those that they are for; "" if nothing."""
    text = model.config.get_text_config()
    if getattr(text, "router_aux_loss_coef", None) is not None:
        return "a mixture of experts"  # TRL adds their load-balancing loss
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "a softcap on attention"
    return "" if hasattr(model.base_model, "layers") else "layers that it does not know"


def check_kind(model: Any) -> None:
    """EngineError for a model of a foreign kind."""
    if what := foreign_kind(model):
        raise EngineError(f"--backend fast does not train {model.config.model_type}: {what}", "use --backend trl")


def _to_score(trainer: FastTrainer) -> list[int]:
    """The two shortest pairs; with a sliding window also the shortest pair that reaches beyond it."""
    rows, costs = trainer.pairs.rows, trainer.pairs.costs
    by_cost = sorted(range(len(rows)), key=lambda n: costs[n])
    window = getattr(trainer.policy.causal_lm.config.get_text_config(), "sliding_window", None)
    beyond = [n for n in by_cost if window is not None and rows[n].length > window + 1]
    return list(dict.fromkeys([*by_cost[:2], *beyond[:1]]))


def check_layout(trainer: FastTrainer, rows: list[TokenPair]) -> float:
    """The largest difference, nats of an answer's sum, between packed and plain; EngineError if it is no rounding."""
    policy = trainer.policy
    packed = pack([tree_of(row) for row in rows], policy.fill).to(trainer.args.device)
    with policy.ready():
        ours = torch.stack(policy.answer_logps(packed))
    answers = [row.chosen_ids for row in rows], [row.rejected_ids for row in rows]
    sums = [[_plain(policy, row, ids) for row, ids in zip(rows, side, strict=True)] for side in answers]
    plain = torch.tensor(sums, dtype=ours.dtype, device=ours.device)
    differences = (ours - plain).abs()
    tokens = torch.stack([packed.chosen_tokens, packed.rejected_tokens])
    rounding = OTHER_LAYOUT * tokens + OTHER_LEAST
    allowed = torch.full_like(differences, FLOAT32_LAYOUT) if _is_float32(trainer) else rounding
    if (differences > allowed).any() or not torch.isfinite(ours).all():
        off = f"by {differences.max():.3g} nats"
        message = f"packed passes ({policy.attention}) score pairs otherwise than the model: {off}"
        raise EngineError(message, "use --backend trl for this model, and report this")
    return differences.max().item()


def _plain(policy: Any, row: TokenPair, answer: list[int]) -> float:
    """Sum of an answer's log-probabilities in a forward pass of its own, as transformers and PEFT compute it."""
    ids = torch.tensor([[*row.prompt_ids, *answer]], device=policy.device)
    logits = policy.model(input_ids=ids, use_cache=False).logits[0, len(row.prompt_ids) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(row.prompt_ids) :, None]).double().sum().item()


def _is_float32(trainer: FastTrainer) -> bool:
    return bool(trainer.policy.causal_lm.dtype == torch.float32)
