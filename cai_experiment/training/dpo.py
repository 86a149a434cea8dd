"""DPO: train a LoRA adapter on preference pairs (arXiv 2305.18290), resumably, with its own sanity checks.

    result = train(DPOSettings(pairs, output_dir, steps=100), model, tokenizer, renderer)

The reference is the model with its adapter switched off, so before the first step every margin is exactly 0 and the
loss is log 2; `train` measures that and refuses to go on otherwise. This file imports no torch; `run.py` does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError, EngineError, Interrupted
from cai_experiment.observe.content_logger import CONTENT_LOG, ContentLogger
from cai_experiment.records.files import read_json, show, write_json
from cai_experiment.records.store import Journal
from cai_experiment.training import checkpoints, processes
from cai_experiment.training.data import TokenPair, tokenize_pairs
from cai_experiment.training.settings import MEASURED_PAIRS, METRICS, DPOSettings, TrainResult, check_flags, total_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cai_experiment.engines.render import Renderer

# bitsandbytes warns, on some CPUs, that an optional kernel is not there; this file is imported before it
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

RECORD = "training.json"  # settings and result, beside the final adapter
SETTINGS = "settings.json"


# ---------------------------------------------------------------- training


def train(
    settings: DPOSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    renderer: Renderer,
    say: Callable[[str], None] = print,
    content: ContentLogger | None = None,
) -> TrainResult:
    """Train, or go on where an interrupted call stopped; a finished training is loaded, not repeated.

    `model` is the plain causal LM (4-bit, 8-bit, bf16 or float32); the adapter is put into it, and `result.model`
    is it with the adapter, ready to generate. Files in `settings.output_dir`: checkpoint-N/, final/, metrics.jsonl.
    Answers to `settings.sample_prompts` go to the log `content`, or else to content_log.jsonl in that folder.

    Raises BadInputError (changed settings, a flag or checkpoint that cannot be used, no usable pair), EngineError (a
    margin that is not 0 before the first step, a loss or gradient that is not finite, no memory), DiskError, and
    Interrupted on SIGINT, SIGTERM or SIGHUP, after the checkpoint of the current step was written.
    """
    check_flags(settings)
    say = say if processes.is_first() else _silent
    processes.start()
    if (done := _done_before(settings, model, say)) is not None:
        return done
    limit = min(settings.max_length, renderer.max_length)
    rows, dropped = tokenize_pairs(settings.pairs, renderer, limit)
    if dropped:
        say(f"{len(dropped)} of {len(settings.pairs)} pairs are longer than {limit} tokens and were dropped, not cut")
    held_out = _held_out_rows(settings, renderer, limit, say)
    from cai_experiment.training.backends import backend_of
    from cai_experiment.training.memory_errors import memory_errors
    from cai_experiment.training.run import Training
    from cai_experiment.training.samples import Sampler

    sampler = Sampler(settings.sample_prompts, renderer)
    own_log = content is None and sampler.prompts
    log = ContentLogger(0, settings.output_dir / CONTENT_LOG) if own_log else nullcontext(content)
    with log as content, memory_errors(settings, rows, backend_of(settings, model)) as tried:
        steps = total_steps(settings, len(rows))
        training = Training(settings, rows, steps, model, tokenizer, say, held_out, sampler, content)
        tried.note(training)
        if processes.is_first():
            write_json(settings.output_dir / SETTINGS, settings.identity())  # now that nothing more is refused
        return _run(training, dropped)


def _done_before(
    settings: DPOSettings, model: PreTrainedModel, say: Callable[[str], None]
) -> TrainResult | None:
    """The result of a training that an earlier call ended, with its model; else the folder is made ready."""
    with processes.first_goes_ahead():
        settings.output_dir.mkdir(parents=True, exist_ok=True)
        check_settings(settings)
        checkpoints.sweep(settings.output_dir)
        is_done = is_finished(settings.output_dir, say)
    if not is_done:
        return None
    if settings.resume is not None:
        raise _nothing_to_resume(settings.resume, settings.output_dir)
    result = finished(settings.output_dir)
    result.resumed_from = result.steps
    result.model = load_adapter(model, settings.output_dir / "final")
    return result


def _silent(line: str) -> None:
    """What other processes than the first say."""


def _held_out_rows(
    settings: DPOSettings, renderer: Renderer, limit: int, say: Callable[[str], None]
) -> list[TokenPair]:
    """The held-out pairs that are measured while training: the first MEASURED_PAIRS that are not too long."""
    if not settings.held_out:
        return []
    try:
        rows, dropped = tokenize_pairs(settings.held_out, renderer, limit)
    except BadInputError:
        rows, dropped = [], [pair.id for pair in settings.held_out]
    if dropped:
        say(f"{len(dropped)} of {len(settings.held_out)} held-out pairs are longer than {limit} tokens: not measured")
    if settings.early_stop is not None and not rows:
        raise BadInputError("--early-stop has no held-out pair to measure", "use a larger --max-length")
    return rows[:MEASURED_PAIRS]


def _run(training: Any, dropped: list[str]) -> TrainResult:
    """Train from where an interrupted call stopped to the end or to a limit, measured before and after."""
    settings = training.settings
    start = starting_point(settings, training.say)
    before = training.measure()
    _check_step0(before, training.trainer.margin_tolerance)
    stopped = training.run(start)
    if training.signal is not None:
        raise Interrupted(training.signal, "the same command resumes it")
    result = TrainResult(
        adapter_dir=settings.output_dir / "final", steps=training.step, history=training.history(), dropped=dropped,
        step0_margin=before["margin"], loss_before=before["loss"], loss_after=None, stopped=stopped, before=before,
        measured=min(len(training.rows), MEASURED_PAIRS), pairs=len(training.rows), total_steps=training.total,
        resumed_from=checkpoints.step_of(start) if start else 0, backend=training.backend, early=training.early,
    )  # fmt: skip
    if stopped:
        result.adapter_dir = settings.output_dir / f"checkpoint-{training.step}"
        result.alarms = list(training.alarms.found.values())
    else:
        _finish(training, result, training.say)
    result.model = training.release()
    return result


def _finish(training: Any, result: TrainResult, say: Callable[[str], None]) -> None:
    """Measure after training, raise the alarm if due, and publish the final adapter with its record."""
    result.best_step = training.take_best()
    result.held_out = _measured_at(result.history, result.best_step)
    result.after = training.measure()
    result.loss_after = result.after["loss"]
    result.alarms = list(training.alarms.found.values())
    fall = result.before["chosen_logp"] - result.after["chosen_logp"]
    if fall > 0:
        result.alarms.append(
            f"ALARM: the mean log-probability of chosen answers fell by {fall:.3g} nats (from "
            f"{result.before['chosen_logp']:.2f} to {result.after['chosen_logp']:.2f}): compare answers before and "
            "after; a lower --learning-rate or a higher --beta holds the model closer to where it was"
        )
        say(result.alarms[-1])
    record = {"settings": training.settings.identity(), "result": result.to_json()}
    training.publish(result.adapter_dir, {RECORD: json.dumps(record, indent=1)})


def _measured_at(history: list[dict[str, Any]], step: int) -> dict[str, float]:
    """What was measured on the held-out pairs after a step; nothing if nothing was."""
    row = next((row for row in history if row["step"] == step), {})
    return {name.removeprefix("held_out_"): value for name, value in row.items() if name.startswith("held_out_")}


def _check_step0(before: dict[str, float], tolerance: float) -> None:
    """Before the first step policy and reference are the same numbers: refuse any other reference.

    `tolerance` is 0, or what rounding may do to a reference that another pass has computed.
    """
    if any(abs(before[name]) > tolerance for name in ("margin", "chosen_reward", "rejected_reward")):
        message = f"the reference is not the starting model: the margin before the first step is {before['margin']!r}"
        raise EngineError(message, "train from the model itself, without an adapter in it")


def starting_point(settings: DPOSettings, say: Callable[[str], None]) -> Path | None:
    """The checkpoint to resume from: the named one, else the newest whole one, else None."""
    found: Path | None
    if settings.resume is not None:
        found = checkpoints.named(settings.resume)
        checkpoints.step_of(found)  # it must be one of training's
    else:
        found, skipped = checkpoints.newest_whole(settings.output_dir)
        for line in skipped:
            say(line)
    if found is not None:
        say(f"resuming from {show(found)}")
    return found


# ---------------------------------------------------------------- what stands on disk


def check_resume(checkpoint: Path, output_dir: Path) -> None:
    """Raise BadInputError for a named checkpoint that cannot be resumed from; before anything is loaded."""
    checkpoints.step_of(checkpoints.named(checkpoint))
    if _problem_of_final(output_dir) is None:
        raise _nothing_to_resume(checkpoint, output_dir)


def _nothing_to_resume(checkpoint: Path, output_dir: Path) -> BadInputError:
    message = f"--resume {show(checkpoint)}: the training in {show(output_dir)} is finished"
    return BadInputError(
        message, "leave --resume out to use it, or train anew with --fresh (the old folder is kept, under a new name)"
    )


def check_settings(settings: DPOSettings) -> None:
    """Stop with the difference if a checkpoint or final adapter was made with other settings."""
    path = settings.output_dir / SETTINGS
    made = checkpoints.any_in(settings.output_dir) or (settings.output_dir / "final").exists()
    if not made or not path.exists():
        return
    changed = settings.changes_since(read_json(path))
    if changed:
        message = f"{show(settings.output_dir)} was trained with other settings: {', '.join(changed)}"
        raise BadInputError(message, "use those again, or start anew with --fresh (the old folder is kept)")


def is_finished(output_dir: Path, say: Callable[[str], None] = print) -> bool:
    """True if `output_dir` holds a final adapter that verifies; a damaged one is set aside as final.bad."""
    problem = _problem_of_final(output_dir)
    if problem:
        final = output_dir / "final"
        aside = final.with_name("final.bad")
        while aside.exists():
            aside = aside.with_name(aside.name + "-")
        final.rename(aside)
        say(f"{show(final)} is damaged ({problem}): moved to {aside.name}, and made again from the last checkpoint")
    return problem is None


def _problem_of_final(output_dir: Path) -> str | None:
    """None if the final adapter is there and verifies, "" if there is none, else what is wrong with it."""
    final = output_dir / "final"
    if not final.exists():
        return ""
    try:
        checkpoints.verify(final, (*checkpoints.ADAPTER_FILES, RECORD))
    except checkpoints.Damaged as reason:
        return str(reason)
    return None


def finished(output_dir: Path) -> TrainResult:
    """The result of a finished training, without its model. Raises BadInputError if there is none."""
    final = output_dir / "final"
    record = read_json(final / RECORD, "train first: train_dpo.py")["result"]
    return TrainResult(adapter_dir=final, history=Journal(output_dir / METRICS).rows(), **record)


def load_adapter(model: PreTrainedModel, adapter_dir: Path) -> Any:
    """`model` with a verified adapter on top, in evaluation mode. BadInputError (exit code 2) if it is damaged."""
    from peft import PeftModel

    checkpoints.named(adapter_dir, checkpoints.ADAPTER_FILES)
    return PeftModel.from_pretrained(model, str(adapter_dir)).eval()


def summary(result: TrainResult) -> list[str]:
    """Lines for the terminal: what was trained, and whether the loss fell."""
    lines = [f"trained {result.steps} of {result.total_steps} steps on {result.pairs} pairs"]
    if result.dropped:
        lines[0] += f" ({len(result.dropped)} overlong pairs dropped)"
    if result.early:
        lines.append(f"ended early: {result.early}")
    if result.held_out:
        lines.append(
            f"held-out pairs: margin {result.held_out['margin']:+.4f}, accuracy {result.held_out['accuracy']:.2f}, "
            f"loss {result.held_out['loss']:.4f}"
        )
    if result.best_step not in (0, result.steps):
        lines.append(f"the final adapter is that of step {result.best_step}, with the best held-out margin")
    if result.loss_after is not None:
        falls = "falls" if result.loss_falls else "DOES NOT FALL"
        lines.append(
            f"loss {falls}: {result.loss_before:.4f} -> {result.loss_after:.4f} over the same {result.measured} "
            f"training pairs; margin 0 -> {result.after['margin']:.4f}; adapter in {show(result.adapter_dir)}"
        )
    return lines
