"""The parts of a plan that train (SFT, DPO) and evaluate, in words: tokens, FLOPs, memory, what helps. See _plan.py."""

from __future__ import annotations

import argparse

from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.milestones import Milestone
from cai_experiment.models.choice import ModelChoice, numbers_of, resolve_model
from cai_experiment.models.disk import checkpoints_gb
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import GB
from cai_experiment.models.plan import Part
from cai_experiment.models.training_memory import Parts
from cai_experiment.models.training_plan import TrainingWork, evaluation
from cai_experiment.scripts._generation import WITH_TRAINING
from cai_experiment.scripts._plan_parts import Need, cost_of, download_gb_of, in_block, in_line
from cai_experiment.scripts._training_work import backend_of, model_words, with_length, work_of
from cai_experiment.training.data import HELD_OUT_SHARE
from cai_experiment.training.settings import DPOSettings, total_steps

HELD_OUT = 200  # evaluation.measure.HELD_OUT: held-out instructions that are answered

Found = tuple[list[Part], list[Need], list[str]]


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
    if same_load and (engine, hardware.kind) == ("hf", "cuda"):
        args = argparse.Namespace(**{**vars(args), "backend": "trl"})  # what hf loaded, TRL trains
    settings = DPOSettings((), args.checkpoint_dir / args.run, steps=milestone.dpo_steps, epochs=milestone.epochs,
                           model_name=model_words(args, choice, hardware))  # fmt: skip
    settings, why = with_length(args, settings, choice, hardware)
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
    return [part, *tried], disk, [*lines, *([in_line("", f"   {why}")] if why else []), *said]


def dpo_lines(
    args: argparse.Namespace, choice: ModelChoice, hardware: Hardware, pairs: tuple[int, int], steps: int,
    settings: DPOSettings, download_gb: float, loaded: bool,
) -> tuple[Part, list[str]]:  # fmt: skip
    """(part, lines) of DPO, or of SFT, on `pairs` (to train on, held out); those of `settings` are counted where they
    are no stand-ins."""
    work, counted = work_of(args, choice, hardware, pairs, steps, settings)
    part = work.part(download_gb, loaded)
    command = "in the same load" if loaded else "train_dpo.py"
    batch, plural = settings.effective_batch, "s" if steps > 1 else ""
    what = "rows" if work.is_sft else "pairs"
    verdict = "fits" if work.fits else "DOES NOT FIT"
    takes = cost_of(part, args.price_per_hour) if work.fits else verdict
    lines = [
        f"{command}, {work.backend}, {work.quantization}: {steps:,} step{plural} of up to {batch} {what}, "
        f"{work.tokens:,} tokens{counted}: {takes}",
        _speed(work),
        _memory(work),
        f"   {_in_parts(work.parts())}, no KV cache: {verdict}",
    ]
    if hardware.compute == "float16" and work.backend != "unsloth" and work.quantization != "fp32":
        lines.append(f"   {hardware.gpu_name} only emulates bfloat16: training is slower than reckoned")
    if not work.fits:
        flag = "--generator" if vars(args).get("generator") else "--model"  # which named the model
        helps = [told.replace("--model", flag, 1) for told in work.remedies()]
        lines.append(f"   fits with {', or '.join(helps)}" if helps else "   no flag of train_dpo.py makes it fit")
    return part, in_block("sft" if work.is_sft else "training", lines)


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
