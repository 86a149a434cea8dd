"""The training that a script's flags mean, as a plan reckons it: trainer, lengths of real pairs, longest row."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.models.choice import ModelChoice, resolve_model
from cai_experiment.models.disk import hub_cache
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.plan import pairs_seen
from cai_experiment.models.training_plan import Lengths, TrainingWork, row_length
from cai_experiment.records.files import read_json, show
from cai_experiment.training import checkpoints, dpo, sft
from cai_experiment.training.data import Pair
from cai_experiment.training.settings import MEASURED_PAIRS, DPOSettings, even_batch

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPEC_LENGTH = 4096  # tokens of a training row: the spec's limit
COUNTED = 2000  # pairs whose lengths are counted
LETTERS_A_TOKEN = 4  # English in Qwen2's vocabulary, where there is no tokenizer at hand
TEMPLATE = 8  # tokens of a layout around a prompt, about


def backend_of(args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, quantization: str) -> str:
    """Which trainer --backend means there: as training.backends decides it once the model is loaded."""
    asked = vars(args).get("backend", "auto")
    if asked != "auto":
        return str(asked)
    family = choice.preset.architecture if choice.preset is not None else None
    if hardware.kind == "cpu":  # fast.start_check.foreign_kind, by architecture
        return "trl" if family is not None and (family.capped or family.experts > 1 or family.positions) else "fast"
    installed = bool(args.hardware) or find_spec("unsloth") is not None
    four_bit = (hardware.kind, quantization) == ("cuda", "4bit") and args.random_weights is None
    known = choice.preset is None or choice.preset.unsloth
    return "unsloth" if four_bit and installed and known else "trl"


def work_of(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, pairs: tuple[int, int], steps: int,
    settings: DPOSettings,
) -> tuple[TrainingWork, str]:  # fmt: skip
    """(what is to be planned, how its lengths were counted)."""
    quantization = args.quantization or hardware.training_quantization
    context = choice.preset.context if choice.preset else SPEC_LENGTH
    batch = settings.effective_batch
    at_once = settings.batch_size or (even_batch(batch, 8) if hardware.kind == "cpu" else 1)
    lengths, counted = lengths_of(settings.pairs, choice)
    backend = backend_of(args, choice, hardware, quantization)
    times = -(-steps // (settings.eval_every or max(1, steps // 10)))  # run.Training: a tenth of the run
    work = TrainingWork(
        choice, hardware, backend, quantization, pairs[0], pairs_seen(pairs[0], steps, batch),
        min(settings.max_length, context), 1 if backend == "fast" else at_once, settings.token_budget, settings.lora_r,
        lengths, times * min(pairs[1], MEASURED_PAIRS), settings.loss == sft.LOSS,
    )  # fmt: skip
    return work, counted


# ---------------------------------------------------------------- the longest row


def model_words(args: argparse.Namespace, choice: ModelChoice, hardware: Hardware) -> str:
    """What settings.json calls the model: its name, precision and layout."""
    quantization = args.quantization or hardware.training_quantization
    return " ".join((args.random_weights or choice.name, quantization, args.format))


def with_length(
    args: argparse.Namespace, settings: DPOSettings, choice: ModelChoice, hardware: Hardware
) -> tuple[DPOSettings, str]:
    """(`settings` with the --max-length that is taken where none is given, a line that says why or "").

    A run that has begun keeps its own. What the machine allows is a matter of its nominal memory and not of the pairs,
    so that a plan before there are any, the run and its resumption take the same.
    """
    begun = None if args.fresh else _begun_with(settings)
    if begun is not None:
        said = f"with which {show(settings.output_dir)} began; longer pairs are left out and counted"
        return replace(settings, max_length=begun), f"--max-length {begun}: {said}" if begun < SPEC_LENGTH else ""
    if args.random_weights is not None:
        choice = resolve_model(args.random_weights, hardware)
    alone = bool(vars(args).get("sft_first")) and args.sft_share == 1
    of_any = replace(settings, pairs=(), max_length=SPEC_LENGTH, loss=sft.LOSS if alone else settings.loss)
    try:
        length, why = row_length(work_of(args, choice, hardware, (1, 0), 1, of_any)[0])
    except (BadInputError, EngineError):  # the model's size is not known before it is loaded
        return replace(settings, max_length=SPEC_LENGTH), ""
    return replace(settings, max_length=length), f"--max-length {length}: {why}" if why else ""


def _begun_with(settings: DPOSettings) -> int | None:
    """The --max-length of a training of the same model that was begun in the folder, of its SFT where that is first."""
    for folder in (settings.output_dir, settings.output_dir / sft.FOLDER):
        place = folder / dpo.SETTINGS
        if place.is_file() and (checkpoints.any_in(folder) or (folder / "final").exists()):
            then = read_json(place)
            length = then.get("max_length") if then.get("model_name") == settings.model_name else None
            return length if isinstance(length, int) else None
    return None


# ---------------------------------------------------------------- lengths of real pairs


def lengths_of(pairs: Sequence[Pair], choice: ModelChoice) -> tuple[tuple[Lengths, ...], str]:
    """(lengths of the pairs, how they were counted); () for the stand-ins of a milestone that has none yet.

    Counted with the model's tokenizer where its file lies in the model's folder or in the download cache.
    """
    pairs = [pair for pair in pairs if pair.chosen]
    if not pairs:
        return (), " by an average pair"
    tokenizer = _tokenizer(choice)
    found = tuple(_lengths(pair, tokenizer) for pair in pairs[:COUNTED])
    of = "" if len(pairs) <= COUNTED else f" of the first {COUNTED:,} pairs"
    how = "counted by its tokenizer" if tokenizer is not None else f"reckoned as {LETTERS_A_TOKEN} letters a token"
    return found, f" ({how}{of})"


def _tokenizer(choice: ModelChoice) -> Tokenizer | None:
    folder = Path(choice.path_or_id)
    cached = hub_cache() / f"models--{choice.path_or_id.replace('/', '--')}" / "snapshots"
    places = [folder / "tokenizer.json"] if folder.is_dir() else sorted(cached.glob("*/tokenizer.json"))
    for place in places:
        if place.is_file():
            from tokenizers import Tokenizer

            return Tokenizer.from_file(str(place))
    return None


def _lengths(pair: Pair, tokenizer: Tokenizer | None) -> Lengths:
    prompt = sum(_tokens(turn.text, tokenizer) + TEMPLATE for turn in pair.turns)
    answers = [_ids(text, tokenizer) for text in (pair.chosen, pair.rejected)]
    shared = 0
    for one, other in zip(*answers, strict=False):
        if one != other:
            break
        shared += 1
    chosen, rejected = (_count(ids, tokenizer) + 1 for ids in answers)  # and the end token
    return Lengths(prompt, chosen, rejected, min(_count(answers[0][:shared], tokenizer), chosen - 1, rejected - 1))


def _ids(text: str, tokenizer: Tokenizer | None) -> Sequence[Any]:
    return text if tokenizer is None else tokenizer.encode(text, add_special_tokens=False).ids


def _count(ids: Sequence[Any], tokenizer: Tokenizer | None) -> int:
    return len(ids) if tokenizer is not None else -(-len(ids) // LETTERS_A_TOKEN)


def _tokens(text: str, tokenizer: Tokenizer | None) -> int:
    return _count(_ids(text, tokenizer), tokenizer)
