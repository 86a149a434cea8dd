"""Suite dpo with --gpu: tokens a second, memory and the share of the card's FLOP/s of fast, TRL and Unsloth in one run.

Each arm trains in a process of its own, on the same made-up pairs of token ids in the lengths of the usual work, then
on one pair whose rows are both of 4,096 tokens, for the memory. --random-weights gives the architecture of a preset,
nothing to download; Unsloth's loader cannot make such, so its arm needs --model, real weights. --tiny shrinks the
architecture for a dry run, on a CPU too.

Run by bench.py as: python _bench_dpo_gpu.py ARM OUT SETTING-AS-JSON
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import BadInputError
from cai_experiment.models.choice import ModelChoice, resolve_model
from cai_experiment.models.hardware import Hardware, detect, gpu_speed
from cai_experiment.models.memory import GB
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.training_plan import Lengths, TrainingWork
from cai_experiment.scripts._bench_figures import Figure, Report, Say
from cai_experiment.scripts._bench_gpu import shrunk
from cai_experiment.scripts._bench_process import peak_bytes, run_child
from cai_experiment.scripts._bench_setting import setting_of

ARMS = ("fast", "trl", "unsloth")
BATCH, WARM_STEPS, STEPS = 8, 2, 4
SMALLEST_VOCABULARY = 500  # --tiny has 512 tokens
USUAL = (100, 300, 120)  # tokens: prompt, answer, of which a revision repeats so many
LONGEST, TINY_LENGTH = 4096, 256
SECONDS = 1800  # for an arm, loading included
WITHIN = 0.1  # planned memory of the measured

Setting = dict[str, Any]


def on_card(args: argparse.Namespace, say: Say) -> Report:
    """All figures; an arm that could not run is null, with the reason."""
    hardware = detect()
    if hardware.kind != "cuda" and not args.tiny:
        raise BadInputError("--gpu: this machine has no CUDA GPU", "add --tiny for a dry run on the CPU")
    if args.tiny and not args.random_weights:
        raise BadInputError("--tiny shrinks an architecture", "give its preset by --random-weights")
    setting = {
        "random_weights": args.random_weights, "model": args.model, "quantization": args.quantization or "4bit",
        "tiny": args.tiny, "seed": args.seed, "longest": TINY_LENGTH if args.tiny else LONGEST,
    }  # fmt: skip
    found: dict[str, dict[str, float]] = {}
    reasons: dict[str, str] = {}
    for arm in ARMS:
        if arm == "unsloth" and (args.random_weights or hardware.kind != "cuda"):
            reasons[arm] = "Unsloth loads real weights on CUDA only: give --model"
            continue
        try:
            found[arm] = _measured(arm, setting)
            say(f"{arm}: {found[arm]['tokens_per_second']:,.0f} tokens/s, {found[arm]['peak_gb']:.1f} GB at most")
        except RuntimeError as error:
            reasons[arm] = str(error)
            say(reasons[arm])
    choice = _choice(setting, hardware)
    figures = [figure for arm in ARMS for figure in _of_arm(arm, found.get(arm), reasons.get(arm, ""), choice, hardware,
                                                            setting)]  # fmt: skip
    return Report(_ratios(found, reasons) + figures, setting_of(args, BATCH * STEPS) | setting)


def _measured(arm: str, setting: Setting) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "arm.json"
        command = [sys.executable, str(Path(__file__).resolve()), arm, str(out), json.dumps(setting)]
        run_child(command, {}, f"the arm {arm}", SECONDS)
        return dict(json.loads(out.read_text(encoding="utf-8")))


# ---------------------------------------------------------------- figures


def _ratios(found: dict[str, dict[str, float]], reasons: dict[str, str]) -> list[Figure]:
    """fast over each of the others."""
    figures = []
    for rival, target in (("unsloth", 1.3), ("trl", None)):
        arms = {arm: found[arm]["tokens_per_second"] for arm in ("fast", rival) if arm in found}
        value = arms["fast"] / arms[rival] if len(arms) == 2 else None
        reason = reasons.get(rival) or reasons.get("fast", "")
        figures.append(Figure(f"fast_over_{rival}", value, target, None, arms, reason="" if value else reason))
    return figures


def _of_arm(
    arm: str, found: dict[str, float] | None, reason: str, choice: ModelChoice, hardware: Hardware, setting: Setting
) -> list[Figure]:
    """Speed, its share of the card's FLOP/s, and memory as planned and as measured."""
    names = (f"tokens_per_second_{arm}", f"share_of_flops_{arm}", f"planned_over_measured_memory_{arm}")
    if found is None:
        return [Figure(name, None, None, None, reason=reason) for name in names]
    lengths = tuple(Lengths(len(p), len(c), len(r), shared) for p, c, r, shared in _usual_pairs(setting["seed"]))
    pairs, quantization, longest = BATCH * STEPS, setting["quantization"], setting["longest"]
    work = TrainingWork(choice, hardware, arm, quantization, pairs, pairs, longest, lengths=lengths)
    per_pair = work.numbers.parameters * work.tokens_a_pair() * work.flops_a_token()
    flops, speed = per_pair * pairs / found["seconds"], gpu_speed(hardware.gpu_name)
    share = None if speed is None else flops / (speed[1] * 1e12)
    planned = replace(work, lengths=()).parts().total / GB
    measured, no_card = found["peak_gb"], "" if hardware.kind == "cuda" else "memory of the card alone is planned here"
    limit, unknown = share and found["tokens_per_second"] / share, "" if speed else "no data sheet figure"
    return [
        Figure(names[0], found["tokens_per_second"], None, limit, {"seconds_a_step": found["seconds"] / STEPS}),
        Figure(names[1], share, None, 1.0, {"tflops": flops / 1e12}, reason=unknown),
        Figure(names[2], None if no_card else planned / measured, None, 1.0,
               {"planned_gb": planned, "measured_gb": measured}, reason=no_card),
    ]  # fmt: skip


# ---------------------------------------------------------------- an arm, in its own process


def _choice(setting: Setting, hardware: Hardware) -> ModelChoice:
    if setting["random_weights"] is None:
        return resolve_model(setting["model"], hardware)
    preset = PRESETS[setting["random_weights"]]
    preset = shrunk(preset) if setting["tiny"] else preset
    return ModelChoice(f"random:{preset.key}", preset.hub_id, preset, preset.kind, "random weights")


def _load(arm: str, setting: Setting) -> tuple[Any, Any]:
    from cai_experiment.engines.load import LoadSettings, load_model, make_plan

    settings = LoadSettings(
        model=setting["model"], quantization=setting["quantization"], engine="unsloth" if arm == "unsloth" else "hf",
        random_weights=setting["random_weights"], seed=setting["seed"], max_length=setting["longest"],
    )  # fmt: skip
    plan = make_plan(settings, detect())
    if setting["tiny"]:
        plan = replace(plan, choice=replace(plan.choice, preset=_choice(setting, detect()).preset))
    model, tokenizer, _ = load_model(plan, settings)
    if arm == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(model)
    return model, tokenizer


def _usual_pairs(seed: int) -> list[tuple[list[int], list[int], list[int], int]]:
    """BATCH * (WARM_STEPS + STEPS) of (prompt, chosen, rejected, tokens that both answers begin with)."""
    source = random.Random(seed)
    prompt, answer, shared = USUAL

    def ids(least: int, most: int) -> list[int]:
        return [source.randrange(10, SMALLEST_VOCABULARY) for _ in range(source.randint(least, most))]

    found = []
    for _ in range(BATCH * (WARM_STEPS + STEPS)):
        begin = ids(shared // 2, shared * 3 // 2)
        chosen, rejected = ([first, *ids(answer // 3, answer)] for first in (1, 2))  # they part at their first token
        found.append((ids(prompt // 2, prompt * 3 // 2), begin + chosen, begin + rejected, len(begin)))
    return found


def _child(arm: str, out: str, as_json: str) -> None:
    """Measure one arm and write what came of it."""
    import torch

    setting: Setting = json.loads(as_json)
    model, tokenizer = _load(arm, setting)
    pairs, longest = _usual_pairs(setting["seed"]), setting["longest"]
    tokens = sum(2 * len(p) + len(c) + len(r) for p, c, r, _ in pairs) * STEPS / (WARM_STEPS + STEPS)
    seconds, adapted = _train(arm, setting, model, tokenizer, [pair[:3] for pair in pairs])
    model = adapted.unload()
    del adapted
    gc.collect()  # the trainer is a ring, with the optimizer's moments in it
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    half = longest - USUAL[0]
    rows = [([5] * USUAL[0], [6] * (half - 1) + [1], [7] * (half - 1) + [1])]
    _train(arm, setting, model, tokenizer, rows, steps=2)  # in the second the optimizer's moments are there
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_bytes()
    found = {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_gb": peak / GB}
    Path(out).write_text(json.dumps(found), encoding="utf-8")


def _clock() -> Any:
    """A callback that notes when each step ended, in `ends`."""
    import torch
    from transformers import TrainerCallback  # after Unsloth, which must be imported first

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.ends: list[float] = []

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends.append(time.perf_counter())

    return Clock()


def _train(
    arm: str, setting: Setting, model: Any, tokenizer: Any, rows: Sequence[tuple[list[int], ...]], steps: int = 0
) -> tuple[float, Any]:
    """(seconds of STEPS steps, the model with its adapter): the product's own trainers, no checkpoints.

    The warm steps' time is left out, the share of the reference that these steps need is in: one epoch.
    """
    from cai_experiment.training.backends import build_trainer
    from cai_experiment.training.data import TokenPair
    from cai_experiment.training.settings import DPOSettings

    clock, pairs = _clock(), [TokenPair(str(i), *row) for i, row in enumerate(rows)]
    total = steps or WARM_STEPS + STEPS
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOSettings((), Path(folder) / "run", steps=total, backend=arm, max_length=setting["longest"],
                               seed=setting["seed"])  # fmt: skip
        trainer = build_trainer(arm, settings, pairs, (), total, model, tokenizer, clock)
        trainer.check_start()
        trainer.args.save_strategy = "no"
        trainer.train()
    seconds = 0.0 if steps else clock.ends[-1] - clock.ends[WARM_STEPS - 1]
    reference = getattr(trainer, "reference_seconds", 0.0) * STEPS / (WARM_STEPS + STEPS)
    return seconds + reference, trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)


if __name__ == "__main__":
    _child(*sys.argv[1:])
