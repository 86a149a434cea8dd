"""The SL-CAI warm start: a LoRA adapter is fine-tuned on revised answers, and DPO goes on from it.

Constitutional AI, arXiv 2212.08073, section 3: instruction -> revised answer, with helpful answers mixed in. A row is a
preference pair with the same answer on both sides, so that files, token ids, the split and what identifies a training
are those of DPO; the loss is the mean negative log-probability of all answer tokens of a step, the end token included.

    sft_pairs, dpo_pairs = split_for_sft(pairs, seed, share)
    first = train(sft_settings(settings, sft_rows(sft_pairs, helpful), epochs, rate), model, tokenizer, renderer)
    dpo.train(replace(settings, pairs=dpo_pairs, start_adapter=first.adapter_dir), first.model or model, ...)

DPO continues that adapter, which is not merged: same rank, one adapter file at the end, and a 4-bit base stays as it
is. One trainer serves all backends (sft_trainer.py). This file imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError, Interrupted
from cai_experiment.records.files import show, write_json
from cai_experiment.training import checkpoints, dpo, processes
from cai_experiment.training.data import Pair, normalized, split_by_instruction, tokenize_pairs
from cai_experiment.training.settings import MEASURED_PAIRS, DPOSettings, TrainResult, check_flags, total_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cai_experiment.engines.render import Renderer
    from cai_experiment.observe.content_logger import ContentLogger

FOLDER = "sft"  # in the run's checkpoint folder
LOSS = "sft"  # TRL's name
SHARE = 0.5  # of the training instructions; the rest is DPO's
HELPFUL_SHARE = 0.2  # of the rows of SFT
EPOCHS = 3.0  # the paper takes one over its hundreds of thousands of revisions; a milestone has tens to thousands
LEARNING_RATE = 1e-4  # QLoRA's for 33B and 65B (arXiv 2305.14314, table 9); DPO's 5e-6 would hardly move an adapter


# ---------------------------------------------------------------- rows


def split_for_sft(pairs: Sequence[Pair], seed: int, share: float = SHARE) -> tuple[list[Pair], list[Pair]]:
    """(SFT's, DPO's), both in file order; all pairs of one instruction fall on one side, by its seeded hash.

    A share of 1 leaves none for DPO: SFT alone. Raises BadInputError where there is only one instruction to share.
    """
    if share == 1:
        return list(pairs), []
    dpo_pairs, sft_pairs = split_by_instruction(pairs, seed, share)
    if not sft_pairs:
        message = "a single instruction cannot be shared by SFT and DPO, which have no instruction in common"
        raise BadInputError(message, "use more pairs, or leave --sft-first out")
    return sft_pairs, dpo_pairs


def sft_rows(pairs: Sequence[Pair], helpful: Sequence[Pair] = ()) -> tuple[Pair, ...]:
    """The rows of SFT: each distinct instruction and chosen answer once, in order, then the helpful ones."""
    revisions = {(normalized(pair.instruction), pair.chosen): replace(pair, rejected=pair.chosen) for pair in pairs}
    return (*revisions.values(), *helpful)


def sft_settings(settings: DPOSettings, rows: Sequence[Pair], epochs: float, learning_rate: float) -> DPOSettings:
    """The settings of SFT beside those of its run's DPO: the same adapter, batch, limits; its own folder.

    What does not concern SFT stands at its default, so that another --beta does not ask for another SFT.
    """
    default = DPOSettings((), Path())
    return replace(
        settings, pairs=tuple(rows), output_dir=settings.output_dir / FOLDER, steps=None, epochs=epochs,
        learning_rate=learning_rate, loss=LOSS, beta=default.beta, nll_weight=0.0, start_adapter=None, held_out=(),
        eval_every=None, early_stop=None, resume=None,
    )  # fmt: skip


# ---------------------------------------------------------------- training


def train(
    settings: DPOSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    say: Callable[[str], None] = print,
    content: ContentLogger | None = None,
) -> TrainResult:
    """Fine-tune, or go on where an interrupted call stopped; a finished one is not repeated.

    `result.loss_before` and `loss_after` are nats a token of the first `measured` rows. `result.model` is the model
    with its adapter, or None if the fine-tuning had been finished before: `model` is as it was then. Answers to
    `settings.sample_prompts` go to the log `content`, if there is one.

    Raises as `dpo.train` does.
    """
    check_flags(settings)
    processes.start()
    if (done := _done_before(settings, say)) is not None:
        return done
    limit = min(settings.max_length, renderer.max_length)
    rows, dropped = tokenize_pairs(settings.pairs, renderer, limit)
    if dropped:
        say(f"SFT: {len(dropped)} of {len(settings.pairs)} rows exceed {limit} tokens and were dropped, not cut")
    from cai_experiment.training.backends import backend_of
    from cai_experiment.training.memory_errors import memory_errors
    from cai_experiment.training.samples import Sampler
    from cai_experiment.training.sft_trainer import SFTTraining

    with memory_errors(settings, rows, backend_of(settings, model)) as tried:
        sampler = Sampler(settings.sample_prompts, renderer)
        steps = total_steps(settings, len(rows))
        training = SFTTraining(settings, rows, steps, model, tokenizer, say, sampler=sampler, content=content)
        tried.note(training)
        if processes.is_first():
            write_json(settings.output_dir / dpo.SETTINGS, settings.identity())  # now that nothing more is refused
        return _run(training, dropped)


def _done_before(settings: DPOSettings, say: Callable[[str], None]) -> TrainResult | None:
    """The result of a fine-tuning that an earlier call ended, without a model; else the folder is made ready."""
    with processes.first_goes_ahead():
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        dpo.check_settings(settings)
        checkpoints.sweep(settings.output_dir)
        if not dpo.is_finished(settings.output_dir, say):
            return None
    result = dpo.finished(settings.output_dir)
    result.resumed_from = result.steps
    return result


def _run(training: Any, dropped: list[str]) -> TrainResult:
    """Train from where an interrupted call stopped to the end or to a limit, measured before and after."""
    settings = training.settings
    start = dpo.starting_point(settings, training.say)
    before = training.measure()
    stopped = training.run(start)
    if training.signal is not None:
        raise Interrupted(training.signal, "the same command resumes it")
    result = TrainResult(
        adapter_dir=settings.output_dir / "final", steps=training.step, history=training.history(), dropped=dropped,
        step0_margin=0.0, loss_before=before["loss"], loss_after=None, stopped=stopped, before=before,
        measured=min(len(training.rows), MEASURED_PAIRS), pairs=len(training.rows), total_steps=training.total,
        resumed_from=checkpoints.step_of(start) if start else 0, backend=training.backend,
        alarms=list(training.alarms.found.values()),
    )  # fmt: skip
    if stopped:
        result.adapter_dir = settings.output_dir / f"checkpoint-{training.step}"
    else:
        result.after = training.measure()
        result.loss_after = result.after["loss"]
        record = {"settings": settings.identity(), "result": result.to_json()}
        training.publish(result.adapter_dir, {dpo.RECORD: json.dumps(record, indent=1)})
    result.model = training.release()
    return result


def plain(model: Any) -> Any:
    """The causal LM without the adapter that SFT put into it, ready for DPO, which loads the adapter from its file."""
    found = model.unload() if hasattr(model, "peft_config") else model
    if hasattr(found, "for_training"):  # Unsloth; `release` had switched it to generation
        found.for_training()
    return found


def check_first(output_dir: Path, sft_first: bool) -> None:
    """Raise BadInputError if a run was begun with --sft-first and goes on without it, or the other way round."""
    began_with = any((output_dir / FOLDER / name).exists() for name in (dpo.SETTINGS, "final"))
    began_without = not began_with and (checkpoints.any_in(output_dir) or (output_dir / "final").exists())
    if began_with > sft_first or (sft_first and began_without):
        message = f"{show(output_dir)} was begun {'with' if began_with else 'without'} --sft-first"
        verb = "add" if began_with else "leave out"
        raise BadInputError(message, f"{verb} --sft-first, or start anew with --fresh (the old folder is kept)")


def summary(result: TrainResult, helpful: int) -> str:
    """One line for terminal and report: rows, share of helpful ones, steps, loss before and after.

    `helpful` counts rows of the whole, the overlong ones among them.
    """
    whole = result.pairs + len(result.dropped)
    rows = f"{whole} rows, {helpful / whole:.0%} of them helpful" if helpful else f"{whole} rows"
    dropped = f" ({len(result.dropped)} of them overlong and dropped)" if result.dropped else ""
    line = f"SFT: {result.steps} of {result.total_steps} steps on {rows}{dropped}"
    if result.loss_after is None:
        return line
    falls = "falls" if result.loss_falls else "DOES NOT FALL"
    return f"{line}; loss {falls}: {result.loss_before:.4f} -> {result.loss_after:.4f} nats a token"
