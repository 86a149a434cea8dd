"""Trains the shipped model from nothing: a fixed number of steps, a fixed seed, resumable; CPU or GPU.

Batches are drawn from the world by (seed, pool number), so a resumed run sees what an unbroken one would have seen.
"""

from __future__ import annotations

import filecmp
import json
import os
import pickle
import random
import shutil
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from cai_experiment.constitution.principles import Principle
from cai_experiment.errors import BadInputError, DiskError
from cai_experiment.nano import MARK, is_nano
from cai_experiment.nano.copying import plant_copying
from cai_experiment.nano.tasks import Teacher, corpus
from cai_experiment.nano.tokenizer import CONTEXT, VOCABULARY, PieceEncoder, train_tokenizer

Document = tuple[list[int], list[float], list[bool]]  # ids, loss weights, whether the loss counts by difficulty
Batch = tuple[Tensor, Tensor, Tensor]  # the same, [rows, length]

CARD = "README.md"  # the model card, which is written by hand
POOL_STEPS = 8  # this many steps' documents are drawn together and sorted by length, so that little is padding


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """What makes the model what it is."""

    steps: int = 8960
    tokens: int = 4096  # of a batch
    # the steps from which each is taught; multiples of POOL_STEPS
    courses: tuple[int, ...] = (0, 400, 720, 1280, 2000, 8000)
    seed: int = 7
    hidden: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 640
    muon_until: int = 400  # speaking comes several times faster with Muon, judging is lost to it
    muon_rate: float = 6e-3  # of the matrices; root mean square of an update is a fifth of it, as AdamW's is
    muon_embedding_rate: float = 4e-3  # of embeddings, norms and biases in the meantime (AdamW)
    learning_rate: float = 1e-3  # AdamW's, afterwards
    warmup: int = 40  # steps, at the beginning of either
    # (step, factor) of the rates, straight lines between: the last course begins again at three tenths
    schedule: tuple[tuple[int, float], ...] = ((6000, 1.0), (8000, 0.01), (8001, 0.3), (8960, 0.005))
    weight_decay: float = 0.05
    save_every: int = 160
    corpus_documents: int = 12_000  # from which the tokenizer learns
    threads: int = 2


def batches(teacher: Teacher, encoder: PieceEncoder, settings: TrainSettings, pool: int) -> list[Batch]:
    """The (ids, weights, focal) batches of one pool, each [rows, length], right-padded with weight 0."""
    rng = random.Random(f"{settings.seed}/{pool}")
    documents = []
    room = settings.tokens * POOL_STEPS
    while room > 0:
        document = encoder.document(teacher.document(rng))
        documents.append(document)
        room -= len(document[0])
    documents.sort(key=lambda d: len(d[0]))
    groups: list[list[Document]] = [[]]
    budget = sum(len(document[0]) for document in documents) / POOL_STEPS
    for document in documents:
        if sum(len(one[0]) for one in groups[-1]) >= budget and len(groups) < POOL_STEPS:
            groups.append([])
        groups[-1].append(document)
    rng.shuffle(groups)
    return [padded(group) for group in groups]


def padded(group: Sequence[Document]) -> Batch:
    """(ids, weights, focal) of documents, each [rows, length], right-padded with weight 0."""
    longest = max(len(document[0]) for document in group)
    ids = torch.zeros(len(group), longest, dtype=torch.long)
    weights = torch.zeros(len(group), longest)
    focal = torch.zeros(len(group), longest, dtype=torch.bool)
    for row, (document, weight, by_difficulty) in enumerate(group):
        ids[row, : len(document)] = torch.tensor(document)
        weights[row, : len(weight)] = torch.tensor(weight)
        focal[row, : len(weight)] = torch.tensor(by_difficulty)
    return ids, weights, focal


def build_model(settings: TrainSettings, tokenizer: Any, vocabulary: int = VOCABULARY) -> Any:
    """A Qwen2-architecture model with random weights, fixed by the seed, and a copying circuit among them."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # Qwen2.5's
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():  # what each part adds at first shrinks with their number (Radford et al. 2019)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight /= (2 * settings.layers) ** 0.5
            layer.mlp.down_proj.weight /= (2 * settings.layers) ** 0.5
    plant_copying(model, settings.seed)
    return model


def loss_of(model: Any, ids: Tensor, weights: Tensor, focal: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean next-token loss and the plain one; the head's input is kept to weighted positions (a third of all).

    Where `focal` is set a token's loss counts by 1 - p, p its probability (focal loss with gamma 1, Lin et al. 2017).
    """
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    wanted = weights[:, 1:] > 0
    logits = model.lm_head(hidden[wanted]).float()
    losses = torch.nn.functional.cross_entropy(logits, ids[:, 1:][wanted], reduction="none")
    share = weights[:, 1:][wanted]
    hard = torch.where(focal[:, 1:][wanted], 1.0 - torch.exp(-losses.detach()), 1.0)
    return (losses * share * hard).sum() / share.sum(), losses.detach().mean()


def rate(step: int, settings: TrainSettings) -> float:
    """The factor of a step on its optimizers' rates: a warm-up, then the schedule."""
    begun = settings.muon_until if step >= settings.muon_until else 0
    steps, factors = zip(*settings.schedule, strict=True)
    planned = float(np.interp(step, steps, factors))
    return min(1.0, (step - begun + 1) / settings.warmup) * planned


def optimizers(model: Any, step: int, settings: TrainSettings) -> list[torch.optim.Optimizer]:
    """Those that make a step: Muon (Jordan et al. 2024) for matrices and AdamW for the rest, then AdamW for all."""
    decay = settings.weight_decay
    if step >= settings.muon_until:
        rate = settings.learning_rate
        made: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=decay)
        ]
    else:
        inner = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
        outer = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
        made = [
            torch.optim.Muon(
                inner, lr=settings.muon_rate, momentum=0.95, weight_decay=decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(outer, lr=settings.muon_embedding_rate, betas=(0.9, 0.98), weight_decay=0.01),
        ]
    for group in (group for maker in made for group in maker.param_groups):
        group["initial_lr"] = group["lr"]
    return made


def train(
    settings: TrainSettings,
    principles: Sequence[Principle],
    folder: Path,
    work: Path,
    report: Callable[[str], None] = print,
) -> None:
    """Train, and publish weights, tokenizer and mark as `folder` after the last step, not before.

    `work` keeps the state from which the same call resumes, and work/model the model as it stands. Raises
    BadInputError if `folder` holds something else than a model of the world, or `work` a training with other settings;
    DiskError if there is no room.
    """
    if folder.exists() and not is_nano(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise BadInputError(f"{folder} is there and holds no model of the written world", "name a new folder")
    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus(principles, settings.corpus_documents, settings.seed), work / "tokenizer")
    model = build_model(settings, tokenizer).to(device)
    first, makers = _resume(work / "state.pt", model, settings)
    encoder = PieceEncoder(tokenizer)
    seen, start = 0, time.monotonic()
    for step, batch in _each_step(principles, encoder, settings, first):
        if step == settings.muon_until:
            makers = optimizers(model, step, settings)
        loss, plain = learn(model, makers, [part.to(device) for part in batch], rate(step, settings))
        seen += batch[0].numel()
        if (step + 1) % 20 == 0:
            pace = seen / (time.monotonic() - start)
            losses = f"loss {loss.item():.4f}  plain {plain.item():.4f}"
            report(f"step {step + 1}/{settings.steps}  {losses}  {pace:,.0f} tokens/s")
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            with _disk_errors(work):
                _save_state(work / "state.pt", model, makers, step + 1, settings)
                save_model(model, tokenizer, work / "model")
    with _disk_errors(folder):
        save_model(model, tokenizer, work / "model")  # of the state, should a kill have come between the two above
        older = publish(work / "model", folder)
    report(f"trained: {folder}" + (f"; the older model is now {older}" if older else ""))


def _each_step(
    principles: Sequence[Principle], encoder: PieceEncoder, settings: TrainSettings, first: int
) -> Iterator[tuple[int, Batch]]:
    """The steps that are left and their batches, from the course that each belongs to."""
    teachers = [Teacher(principles, course) for course in range(len(settings.courses))]
    ready: list[Batch] = []
    for step in range(first, settings.steps):
        if not ready or step % POOL_STEPS == 0:
            course = sum(step >= beginning for beginning in settings.courses) - 1
            ready = batches(teachers[course], encoder, settings, step // POOL_STEPS)
        yield step, ready[step % len(ready)]


def learn(
    model: Any, makers: Sequence[torch.optim.Optimizer], batch: Sequence[Tensor], factor: float
) -> tuple[Tensor, Tensor]:
    """One step at `factor` times the optimizers' rates; gives the losses of `loss_of`."""
    with torch.autocast(model.device.type, torch.bfloat16):  # twice as fast where the processor has it
        loss, plain = loss_of(model, *batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for maker in makers:
        for group in maker.param_groups:
            group["lr"] = group["initial_lr"] * factor
        maker.step()
        maker.zero_grad(set_to_none=True)
    return loss, plain


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


def publish(source: Path, folder: Path) -> Path | None:
    """Make a copy of `source` appear as `folder`, whole; gives where the older model went, None if nothing changed.

    The copy is made aside and renamed; the older folder is renamed before, its model card stays with the new one.
    """
    weights = "model.safetensors"
    if (folder / weights).is_file() and filecmp.cmp(source / weights, folder / weights, shallow=False):
        return None
    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source, aside)
    if not is_nano(folder):  # absent or empty
        os.rename(aside, folder)
        return None
    if (folder / CARD).is_file():
        shutil.copy2(folder / CARD, aside / CARD)
    older = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    os.rename(folder, older)
    os.rename(aside, folder)
    return older


@contextmanager
def _disk_errors(place: Path) -> Iterator[None]:
    """Turn what libraries raise while they write into one DiskError; torch.save raises RuntimeError on a full disk."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DiskError(f"{place} cannot be written: {why}", "free space, then the same command resumes") from error


def _save_state(path: Path, model: Any, makers: Sequence[Any], step: int, settings: TrainSettings) -> None:
    aside = path.with_suffix(".tmp")
    torch.save(
        {
            "step": step,
            "model": model.state_dict(),
            "optimizers": [maker.state_dict() for maker in makers],
            "settings": asdict(settings),
        },
        aside,
    )
    os.replace(aside, path)


def _resume(path: Path, model: Any, settings: TrainSettings) -> tuple[int, list[torch.optim.Optimizer]]:
    """The step to go on from and its optimizers, with the state loaded if there is one.

    Raises BadInputError for a state that was made with other settings (threads apart), or that cannot be read.
    """
    if not path.is_file():
        return 0, optimizers(model, 0, settings)
    begin_anew = "--fresh moves it aside and begins anew"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before, now = {**state["settings"], "threads": settings.threads}, asdict(settings)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise BadInputError(f"{path} cannot be read: {str(error).splitlines()[0]}", begin_anew) from error
    changed = [
        f"{name} was {before.get(name)}, now {now.get(name)}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    ]
    if changed:
        raise BadInputError(f"{path} is of other settings: {'; '.join(changed)}", f"use the same, or {begin_anew}")
    model.load_state_dict(state["model"])
    makers = optimizers(
        model, state["step"] - 1, settings
    )  # those of the last step; the loop changes them in its place
    for maker, saved in zip(makers, state["optimizers"], strict=True):
        maker.load_state_dict(saved)
    return int(state["step"]), makers
