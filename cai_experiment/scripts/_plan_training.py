"""The parts of a plan that train (SFT, DPO) and evaluate, in words: tokens, FLOPs, memory, what helps. See _plan.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.milestones import Milestone
from cai_experiment.models.choice import ModelChoice, numbers_of, resolve_model
from cai_experiment.models.disk import checkpoints_gb, hub_cache
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import GB
from cai_experiment.models.plan import Part, pairs_seen
from cai_experiment.models.training_memory import Parts
from cai_experiment.models.training_plan import Lengths, TrainingWork, evaluation
from cai_experiment.scripts._generation import WITH_TRAINING
from cai_experiment.scripts._plan_parts import Need, cost_of, download_gb_of, in_block, in_line
from cai_experiment.training import sft
from cai_experiment.training.data import HELD_OUT_SHARE, Pair
from cai_experiment.training.settings import MEASURED_PAIRS, DPOSettings, even_batch, total_steps

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPEC_LENGTH = 4096  # tokens of a training row: the spec's limit
HELD_OUT = 200  # evaluation.measure.HELD_OUT: held-out instructions that are answered
COUNTED = 2000  # pairs whose lengths are counted
LETTERS_A_TOKEN = 4  # English in Qwen2's vocabulary, where there is no tokenizer at hand
TEMPLATE = 8  # tokens of a layout around a prompt, about

Found = tuple[list[Part], list[Need], list[str]]


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


def training_after(
    args: argparse.Namespace, milestone: Milestone, generator: ModelChoice, hardware: Hardware, pairs: int, drawn: int,
    engine: str,
) -> Found:  # fmt: skip
    """(parts, disk, lines) of the training on `pairs` pairs of `drawn` examples by `engine`, and its evaluation."""
    same_load = milestone.name in WITH_TRAINING
    try:
        served = engine == "server" and args.random_weights is None
        choice = resolve_model(args.model, hardware) if served else generator  # train_dpo.py takes the run's own
        numbers = numbers_of(choice)
    except (BadInputError, EngineError):
        return [], [], [in_line("training", f"not reckoned: the size of {args.model} is not known here")]
    held_out = 0 if same_load else round(HELD_OUT_SHARE * pairs)
    settings = DPOSettings((), args.checkpoint_dir, steps=milestone.dpo_steps, epochs=milestone.epochs)
    steps = total_steps(settings, pairs - held_out)
    quantization = args.quantization or hardware.training_quantization
    trainer = backend_of(args, choice, hardware, quantization)
    same_files = engine != "server" and (engine == "unsloth") == (trainer == "unsloth")
    fetched = same_load or (same_files and choice.path_or_id == generator.path_or_id)
    download = 0.0 if fetched else download_gb_of(args, choice, trainer, quantization)
    of_pairs = (pairs - held_out, held_out)
    part, lines = dpo_lines(args, choice, hardware, of_pairs, steps, settings, download, loaded=same_load)
    disk = [Need(f"{quantization} to train", download), Need("checkpoints", checkpoints_gb(numbers), download=False)]
    tried, said = ([], []) if same_load else evaluation_lines(args, choice, hardware, held_out, drawn - pairs)
    return [part, *tried], disk, [*lines, *said]


def dpo_lines(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, pairs: tuple[int, int], steps: int,
    settings: DPOSettings, download_gb: float, loaded: bool,
) -> tuple[Part, list[str]]:  # fmt: skip
    """(part, lines) of DPO, or of SFT, on `pairs` (to train on, held out); those of `settings` are counted where they
    are no stand-ins."""
    work, counted = _work(args, choice, hardware, pairs, steps, settings)
    part = work.part(download_gb, loaded)
    usual = work.usual()
    command = "in the same load" if loaded else "train_dpo.py"
    batch, plural = settings.effective_batch, "s" if steps > 1 else ""
    what = "rows" if work.is_sft else "pairs"
    verdict = "fits" if work.fits else "DOES NOT FIT"
    takes = cost_of(part, args.price_per_hour) if work.fits or usual.fits else "DOES NOT FIT"
    lines = [
        f"{command}, {work.backend}, {work.quantization}: {steps:,} step{plural} of up to {batch} {what}, "
        f"{work.tokens:,} tokens{counted}: {takes}",
        _speed(work),
        _memory(work),
        f"   {_in_parts(work.parts())}, no KV cache: {verdict}",
    ]
    if not work.fits:
        helps = work.remedies()
        lines.append(f"   fits with {', or '.join(helps)}" if helps else "   no flag of train_dpo.py makes it fit")
        if usual.fits and not work.lengths:
            lines.append(f"   rows of up to {usual.max_length:,} tokens fit: {usual.parts().total / GB:.1f} GB")
    part = part if work.fits else (usual.part(download_gb, loaded) if usual.fits and not work.lengths else part)
    return part, in_block("sft" if work.is_sft else "training", lines)


def _work(
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


def _speed(work: TrainingWork) -> str:
    """FLOPs a token and in all, and what the card's limit would allow."""
    limit, each = work.limit(), work.flops_a_token()
    usual = "" if work.lengths or work.backend != "fast" else f" in rows of up to {work.usual().max_length:,}"
    whole = f"   {each:.3g} N FLOPs a token{usual}, {work.flops():.2g} in all"
    if limit is None:
        return whole
    most = limit / (each * work.numbers.parameters)
    hours = work.hours()
    share = work.flops() / limit / 3600 / hours if hours else 1.0
    return f"{whole}; the limit is {most:,.0f} tokens/s, reckoned with {share:.0%} of it"


def _memory(work: TrainingWork) -> str:
    one, again = work.fullest_pass()
    layers = work.numbers.layers
    least = f"{again} of {layers} layers computed again" if again else "no layer computed again"
    parts, have = work.parts(), work.part().have_gb
    of = f"{parts.total / GB:.1f} GB of {have:g} GB"
    if work.backend == "fast":
        return f"memory: {of}; passes of {one.tokens:,} tokens, the longest pair {work.longest.tree:,}; {least}"
    plural = "s" if work.at_once > 1 else ""
    return f"memory: {of}; {work.at_once} pair{plural} at a time, rows of up to {one.longest:,} tokens; {least}"


def _in_parts(parts: Parts) -> str:
    """Memory by part at the fullest moment, in GB."""
    named = {
        "weights": parts.weights, "quantisation constants": parts.constants, "merged copies": parts.merged,
        "LoRA": parts.lora, "gradients": parts.gradients, "optimizer": parts.optimizer,
        "activations kept": parts.kept, "a layer computed again": parts.recomputed, "head": parts.head,
        "workspace": parts.workspace,
    }  # fmt: skip
    shown = {name: size / GB for name, size in named.items() if size}
    digits = 1 if parts.total > 10 * GB else 3
    return " + ".join(f"{size:.{digits}f} {name}" for name, size in shown.items() if size >= 0.5 * 10**-digits)


def evaluation_lines(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, held_out: int, unused: int, engine: str = ""
) -> tuple[list[Part], list[str]]:
    """(part, line) of train_dpo.py's evaluation: held-out pairs, and instructions whose examples were rejected.

    `engine` speaks; without it the one that training loads.
    """
    quantization = args.quantization or hardware.training_quantization
    engine = engine or ("unsloth" if backend_of(args, choice, hardware, quantization) == "unsloth" else "hf")
    questions = min(HELD_OUT, held_out + max(0, unused))
    part = evaluation(choice, hardware, engine, quantization, questions, held_out)
    said = f"{engine}, {quantization}: base and trained answer {questions} held-out instructions and 400 sums, "
    said += f"{held_out} held-out pairs scored, {part.written:,} tokens written"
    return [part], [in_line("evaluation", f"{said}: {cost_of(part, args.price_per_hour)}")]


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
