"""Trains the shipped model from nothing: a fixed number of steps, a fixed seed, resumable; CPU or GPU.

Matrices learn by Muon (orthogonalised momentum; Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/),
embeddings and norms by AdamW. Batches are drawn from the world by (seed, pool number), so a resumed run sees what an
unbroken one would have seen.
"""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cai_experiment.constitution.principles import Principle
from cai_experiment.nano import MARK
from cai_experiment.nano.tasks import Teacher, corpus
from cai_experiment.nano.tokenizer import CONTEXT, VOCABULARY, PieceEncoder, train_tokenizer

POOL_STEPS = 8  # this many steps' documents are drawn together and sorted by length, so that little is padding


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What makes the model what it is. `tokens` is the size of a step's batch, padding included."""

    steps: int = 2400
    tokens: int = 8192
    seed: int = 7
    hidden: int = 192
    layers: int = 6
    heads: int = 6
    kv_heads: int = 2
    intermediate: int = 512
    muon_rate: float = 0.02  # per-matrix update of unit spectral norm, scaled by sqrt(rows/columns)
    adam_rate: float = 4e-3
    courses: tuple[int, ...] = (0, 800, 1000, 1200)  # the steps from which each is taught; multiples of POOL_STEPS
    # (step, share of the rates above): straight lines between. At the full rates language comes fast but copying and
    # judging stall; they came within 50 steps of the fall to a fifth (docs/LOG.md)
    rates: tuple[tuple[int, float], ...] = (
        (0, 0.025),
        (40, 1.0),
        (1000, 1.0),
        (1200, 0.864),
        (1201, 0.2),
        (2400, 0.01),
    )
    save_every: int = 200
    corpus_documents: int = 12_000  # from which the tokenizer learns
    threads: int = 2


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised by Newton-Schulz steps in float32.

    torch.optim.Muon does these steps in bfloat16, which is several times slower on a CPU.
    """

    def __init__(self, params: Sequence[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix; matrices of one shape are orthogonalised together."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                by_shape.setdefault(p.shape, []).append((p, p.grad.lerp(buffer, group["momentum"])))
            for shape, rows in by_shape.items():
                updates = _orthogonal(torch.stack([update for _, update in rows]))
                for (p, _), update in zip(rows, updates, strict=True):
                    p.add_(update, alpha=-group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5)


def _orthogonal(matrices: Tensor) -> Tensor:
    """Nearest orthogonal matrices of [n, rows, columns], by the quintic Newton-Schulz iteration."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def batches(teacher: Teacher, encoder: PieceEncoder, settings: TrainSettings, pool: int) -> list[tuple[Tensor, Tensor]]:
    """The (ids, weights) batches of one pool, each [rows, length], right-padded with weight 0."""
    rng = random.Random(f"{settings.seed}/{pool}")
    documents = []
    room = settings.tokens * POOL_STEPS
    while room > 0:
        document = encoder.document(teacher.document(rng))
        documents.append(document)
        room -= len(document[0])
    documents.sort(key=lambda d: len(d[0]))
    groups: list[list[tuple[list[int], list[float]]]] = [[]]
    budget = sum(len(ids) for ids, _ in documents) / POOL_STEPS
    for document in documents:
        if sum(len(ids) for ids, _ in groups[-1]) >= budget and len(groups) < POOL_STEPS:
            groups.append([])
        groups[-1].append(document)
    rng.shuffle(groups)
    return [_padded(group) for group in groups]


def _padded(group: Sequence[tuple[list[int], list[float]]]) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in group)
    ids = torch.zeros(len(group), longest, dtype=torch.long)
    weights = torch.zeros(len(group), longest)
    for row, (document, weight) in enumerate(group):
        ids[row, : len(document)] = torch.tensor(document)
        weights[row, : len(weight)] = torch.tensor(weight)
    return ids, weights


def build_model(settings: TrainSettings, tokenizer: Any) -> Any:
    """A Qwen2-architecture model with random weights, fixed by the seed."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def loss_of(model: Any, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean next-token loss, and the head's input kept to weighted positions (a third of all)."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = weights[:, 1:] > 0
    logits = model.lm_head(hidden[wanted]).float()
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
    share = weights[:, 1:][wanted]
    return (losses * share).sum() / share.sum(), losses.detach().mean()


def rate(step: int, settings: TrainSettings) -> float:
    """The share of the full learning rates at a step."""
    steps, shares = zip(*settings.rates, strict=True)
    return float(np.interp(step, steps, shares))


def train(
    settings: TrainSettings,
    principles: Sequence[Principle],
    folder: Path,
    work: Path,
    report: Callable[[str], None] = print,
) -> None:
    """Train into `folder` (weights, tokenizer, mark); `work` keeps the state from which the same call resumes."""
    torch.set_num_threads(settings.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus(principles, settings.corpus_documents, settings.seed), work / "tokenizer")
    model = build_model(settings, tokenizer).to(device)
    matrices = [
        p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    ]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        Muon(matrices, settings.muon_rate),
        torch.optim.AdamW(rest, settings.adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    first = _resume(work / "state.pt", model, optimizers, settings)
    teachers, encoder = (
        [Teacher(principles, course) for course in range(len(settings.courses))],
        PieceEncoder(tokenizer),
    )
    seen, start = 0, time.monotonic()
    ready: tuple[int, list[tuple[Tensor, Tensor]]] = (-1, [])
    for step in range(first, settings.steps):
        pool = step // POOL_STEPS
        if ready[0] != pool:
            ready = (
                pool,
                batches(
                    teachers[sum(step >= first_step for first_step in settings.courses) - 1], encoder, settings, pool
                ),
            )
        ids, weights = (t.to(device) for t in ready[1][step % len(ready[1])])
        loss, plain = loss_of(model, ids, weights)
        loss.backward()
        for optimizer, base in zip(optimizers, (settings.muon_rate, settings.adam_rate), strict=True):
            optimizer.param_groups[0]["lr"] = base * rate(step, settings)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += ids.numel()
        if (step + 1) % 20 == 0:
            pace = seen / (time.monotonic() - start)
            report(
                f"step {step + 1}/{settings.steps}  loss {loss.item():.4f}  plain {plain.item():.4f}  "
                f"{pace:,.0f} tokens/s  {(settings.steps - step - 1) * settings.tokens / pace / 60:.0f} min left"
            )
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            _save_state(work / "state.pt", model, optimizers, step + 1, settings)
            save_model(model, tokenizer, folder)
    report(f"trained: {folder}")


def save_model(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model as it ships: float16 safetensors, tokenizer, and the mark that ties it to the written world."""
    from copy import deepcopy

    folder.mkdir(parents=True, exist_ok=True)
    half = deepcopy(model).to(torch.float16).cpu()
    half.generation_config.eos_token_id = tokenizer.eos_token_id
    half.generation_config.pad_token_id = tokenizer.pad_token_id
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / MARK).write_text(json.dumps({"world": 1}) + "\n", encoding="utf-8")


def _save_state(
    path: Path, model: Any, optimizers: Sequence[torch.optim.Optimizer], step: int, settings: TrainSettings
) -> None:
    aside = path.with_suffix(".tmp")
    torch.save(
        {
            "step": step,
            "model": model.state_dict(),
            "optimizers": [o.state_dict() for o in optimizers],
            "settings": asdict(settings),
        },
        aside,
    )
    os.replace(aside, path)


def _resume(path: Path, model: Any, optimizers: Sequence[torch.optim.Optimizer], settings: TrainSettings) -> int:
    """Load the state if one is there and was made with the same settings; returns the step to go on from."""
    if not path.is_file():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if {k: v for k, v in state["settings"].items() if k != "threads"} != {
        k: v for k, v in asdict(settings).items() if k != "threads"
    }:
        return 0
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"])
