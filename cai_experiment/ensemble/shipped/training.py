"""Trains the three shipped experts from nothing: one layperson, then three who each learn one field; CPU or GPU.

The layperson learns the language and the lay beliefs of all fields. Each expert is that model trained on with the same
kinds of questions, its own field answered truly, the others still by a layperson. They are one family, as Qwen2.5,
its medical and its mathematical relative are.
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cai_experiment.ensemble.shipped.questions import KINDS
from cai_experiment.ensemble.shipped.speakers import FIELDS, Speaker
from cai_experiment.ensemble.shipped.world import draw
from cai_experiment.errors import BadInputError
from cai_experiment.nano.train import Batch, Document, TrainSettings, build_model, learn, optimizers, padded, rate

VOCABULARY = 1024
PROMPT_WEIGHT = 0.1  # of a question's tokens in the loss: they teach the language, and what a field's questions are
POOL = 512  # documents drawn together and sorted by length, so that little is padding
# Shares of an expert's questions: of its field alone, of two fields with it among them, of others.
OWN, SHARED, OTHER = 0.6, 0.25, 0.15


@dataclass(frozen=True, slots=True)
class ExpertSettings:
    """What makes the experts what they are; steps are of `tokens` tokens."""

    base_steps: int = 600
    field_steps: int = 900
    tokens: int = 4096
    hidden: int = 192
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 512
    seed: int = 5
    threads: int = 2

    def schedule(self, steps: int, muon: int) -> TrainSettings:
        """The settings of nano's trainer for one of the four trainings: Muon first, then AdamW down to a hundredth."""
        return TrainSettings(
            steps=steps, tokens=self.tokens, seed=self.seed, hidden=self.hidden, layers=self.layers, heads=self.heads,
            kv_heads=self.kv_heads, intermediate=self.intermediate, muon_until=muon, threads=self.threads,
            schedule=((0, 1.0), (steps // 2, 1.0), (steps, 0.01)),
        )  # fmt: skip


def weights_of(field: str | None) -> dict[str, float]:
    """How often each kind of question is drawn for an expert of `field`; all alike for the layperson (None)."""
    if field is None:
        return dict.fromkeys(KINDS, 1.0)
    needs = {kind: make(random.Random(0)).needs for kind, make in KINDS.items()}
    groups = {kind: OWN if own == (field,) else SHARED if field in own else OTHER for kind, own in needs.items()}
    alike = Counter(groups.values())
    return {kind: share / alike[share] for kind, share in groups.items()}


def document(tokenizer: Any, field: str | None, rng: random.Random) -> Document:
    """One question and its answer by a layperson or the expert of a field, as (ids, loss weights, no focal loss)."""
    weights = weights_of(field)
    question = draw(rng.choices(list(weights), list(weights.values()))[0], "experts", rng)
    said = question.answer(Speaker(frozenset([field] if field else []), rng))
    prompt = tokenizer(f"Question: {question.full_text}\nAnswer:", add_special_tokens=False)["input_ids"]
    answer = [*tokenizer(said, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = [*prompt, *answer]
    return ids, [PROMPT_WEIGHT] * len(prompt) + [1.0] * len(answer), [False] * len(ids)


def batches(tokenizer: Any, field: str | None, settings: ExpertSettings) -> Iterator[Batch]:
    """Batches without end; each pool's documents are sorted by length and its batches shuffled."""
    rng = random.Random(f"{settings.seed}/{field}")
    while True:
        pool = sorted((document(tokenizer, field, rng) for _ in range(POOL)), key=lambda one: len(one[0]))
        groups: list[list[Document]] = [[]]
        for one in pool:
            if len(one[0]) * (len(groups[-1]) + 1) > settings.tokens:
                groups.append([])
            groups[-1].append(one)
        rng.shuffle(groups)
        yield from (padded(group) for group in groups)


def train_one(
    model: Any, tokenizer: Any, field: str | None, steps: int, muon: int, settings: ExpertSettings,
    report: Callable[[str], None],
) -> None:  # fmt: skip
    """Train `model` in place for `steps` steps."""
    plan = settings.schedule(steps, muon)
    makers = optimizers(model, 0, plan)
    source = batches(tokenizer, field, settings)
    seen, began = 0, time.monotonic()
    for step in range(steps):
        if step == plan.muon_until:
            makers = optimizers(model, step, plan)
        batch = [part.to(model.device) for part in next(source)]
        loss, _ = learn(model.train(), makers, batch, rate(step, plan))
        seen += batch[0].numel()
        if (step + 1) % 50 == 0:
            pace = seen / (time.monotonic() - began)
            report(f"{field or 'layperson'}: step {step + 1}/{steps}  loss {loss.item():.4f}  {pace:,.0f} tokens/s")


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model as it ships: float16 safetensors and the tokenizer, whole or not at all."""
    from copy import deepcopy

    aside = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    half = deepcopy(model).to(torch.float16).cpu()
    half.generation_config.eos_token_id = tokenizer.eos_token_id
    half.generation_config.pad_token_id = tokenizer.pad_token_id
    half.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)


def train(folder: Path, work: Path, settings: ExpertSettings, report: Callable[[str], None] = print) -> None:
    """Train all four and publish the three experts as `folder`/FIELD.

    Finished models in `work` are kept: the same call goes on with the next one. Raises BadInputError if `work` holds
    models of other settings or of another world.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cai_experiment.nano.tokenizer import train_tokenizer

    _check_same(work / "settings.json", settings)
    torch.set_num_threads(settings.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = work / "layperson"
    if not base.is_dir():
        tokenizer = train_tokenizer(corpus(settings.seed), work / "tokenizer", VOCABULARY, "<|endoftext|>")
        steps = settings.base_steps
        model: Any = build_model(settings.schedule(steps, steps // 4), tokenizer, len(tokenizer)).to(device)
        train_one(model, tokenizer, None, steps, steps // 4, settings, report)
        save(model, tokenizer, base)
    for field in reversed(FIELDS):  # the hardest first
        if not (work / field).is_dir():
            tokenizer = AutoTokenizer.from_pretrained(base)
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            train_one(model.to(device), tokenizer, field, settings.field_steps, 0, settings, report)
            save(model, tokenizer, work / field)
    folder.mkdir(parents=True, exist_ok=True)
    for field in FIELDS:
        aside = folder / f"{field}.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        shutil.copytree(work / field, aside)
        shutil.rmtree(folder / field, ignore_errors=True)
        aside.rename(folder / field)
        report(f"trained: {folder / field}")


def _check_same(path: Path, settings: ExpertSettings) -> None:
    """What is in `work` was trained with these settings on this world; else BadInputError."""
    world = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))))
    now = {**asdict(settings), "threads": 0, "world": world.hexdigest()}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != now:
        raise BadInputError(f"{path} is of other settings or another world", "--fresh moves it aside and begins anew")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now) + "\n", encoding="utf-8")


def corpus(seed: int, count: int = 6000) -> Iterator[str]:
    """Texts from which the tokenizer learns: questions of the experts' split with lay answers."""
    rng = random.Random(seed)
    for _ in range(count):
        question = draw(rng.choice(list(KINDS)), "experts", rng)
        yield f"Question: {question.full_text}\nAnswer:{question.answer(Speaker(frozenset(), rng))}"
