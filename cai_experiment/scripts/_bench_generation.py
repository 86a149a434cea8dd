"""Suite generation: the pipeline against a plain `generate` loop, against distilabel, and against its own engine.

Useful tokens per second are the completion tokens of the chain over wall seconds, loading excluded. The arms draw their
own texts from the same model, instructions and temperatures, so tokens, not rows, are what is compared.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.models.choice import numbers_of, resolve_model
from cai_experiment.models.hardware import detect
from cai_experiment.models.memory import Architecture
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.runner import run_pipeline
from cai_experiment.pipeline.settings import RunSettings
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._bench_chain import instructions_for, lockstep, stage_settings
from cai_experiment.scripts._bench_figures import Figure, Report, Rounds, Say, interleaved, medians, timed
from cai_experiment.scripts._bench_setting import setting_of
from cai_experiment.scripts._bench_watch import Recorded, computed_over_tree, watched_passes

ROWS = 400
WARM_ROWS = 2
SHARE_AT_BATCH_1 = 8  # one row in so many: tokens a second do not depend on the number of rows there
DISTILABEL = {"distilabel_one_process": 1, "distilabel_two_processes": 2}  # arm: processes
# What the pipeline is held against: the target, and the arms, of which the fastest counts.
RIVALS = {"generate_batch16": (4.0, ("generate_batch16",)), "generate_batch1": (12.0, ("generate_batch1",)),
          "distilabel": (4.0, tuple(DISTILABEL))}  # fmt: skip


@dataclass
class Chain:
    """The work that every arm does: these instructions through these stages."""

    engine: Any  # HFEngine
    instructions: tuple[Instruction, ...]
    stages: StageSettings
    model: str
    unmeasured: dict[str, str] = field(default_factory=dict)  # arm: why it gave no figure

    def pipeline(self, engine: Any = None) -> int:
        """The milestone's own code in a folder that is thrown away: journal, gate, files. Gives completion tokens."""
        count = len(self.instructions)
        settings = RunSettings(count, count, self.stages, instructions=self.instructions, seed=self.stages.seed)
        speaker = engine or self.engine
        with (
            tempfile.TemporaryDirectory() as path,
            RunFolder(Path(path) / "run") as folder,
            ContentLogger(0, folder.path / "content_log.jsonl") as logger,
            Progress(count, "rows", 0) as progress,
        ):
            result = run_pipeline(settings, folder, speaker, speaker, load_constitution(), logger, progress)
        return result.tokens["completion"]

    def plain(self, batch: int, share: int = 1) -> int:
        """A loop over stages of transformers' `generate` over one row in `share`."""
        from cai_experiment.scripts._bench_plain import PlainGenerate

        model, tokenizer = self.engine.release_for_training()  # with the attention that transformers gave it
        speak = PlainGenerate(model, tokenizer, self.engine.renderer, batch)
        return lockstep(self.instructions[: max(1, len(self.instructions) // share)], self.stages, speak)

    def cold(self, work: Callable[[], int]) -> Callable[[], float]:
        """`work` as tokens a second; texts that an earlier round has tokenised are forgotten first."""

        def run() -> float:
            self.engine.renderer.encode.cache_clear()
            return timed(work)

        return run


def generation(args: argparse.Namespace, say: Say) -> Report:
    """All figures of the suite; the flags of bench.py say of what."""
    from cai_experiment.engines.load import LoadSettings, load_engine

    rows = args.rows or ROWS
    settings = LoadSettings(model=args.model, engine="hf", batch_size=args.batch_size, seed=args.seed)
    engine: Any = load_engine(settings)  # HFEngine: its slots and weights are looked at
    say(engine.first_line)
    choice = resolve_model(args.model, detect())
    stages = stage_settings(args.seed, args.principles)
    chain = Chain(engine, instructions_for(rows, args.seed), stages, choice.path_or_id)
    recorded = Recorded(engine)
    with watched_passes() as passes:
        chain.pipeline(recorded)  # counts, and warms up pipeline and engine
    _warm_up(chain)
    say(f"{rows} rows, {len(recorded.prompts):,} prompts, {passes.occupancy.passes:,} passes, {engine.slots} slots")
    rounds = interleaved(_arms(args, chain, recorded), args.repeats, say)
    speeds = medians(rounds)
    found = speedups(chain, rounds, _ideal_speed(numbers_of(choice), recorded))
    over_tree, arms = computed_over_tree(recorded)
    over_engine = speeds["pipeline"] / speeds["engine"]
    full, ours = passes.occupancy, ("pipeline", "engine")
    found += [
        Figure("prefill_over_prefix_tree", over_tree, 1.05, 1.0, arms, at_most=True),
        Figure("pipeline_over_engine", over_engine, 0.95, 1.0, {arm: speeds[arm] for arm in ours},
               rounds={arm: rounds[arm] for arm in ours}),
        Figure("slot_occupancy", full.share, 0.95, 1.0, full.arms(), reason=full.reason),
    ]  # fmt: skip
    setting = setting_of(args, rows, engine.describe())
    engine.close()
    if args.ray:
        from cai_experiment.scripts._bench_ray import two_over_one

        found.append(two_over_one(args, chain, say))
    return Report(found, setting)


def _arms(args: argparse.Namespace, chain: Chain, recorded: Recorded) -> dict[str, Callable[[], float]]:
    """What is timed, by name; each call gives tokens a second."""
    prompts = list(recorded.prompts)
    arms = {
        "pipeline": chain.cold(chain.pipeline),
        "engine": chain.cold(lambda: sum(c.completion_tokens for c in chain.engine.stream(prompts))),
        "generate_batch16": chain.cold(lambda: chain.plain(16)),
        "generate_batch1": chain.cold(lambda: chain.plain(1, SHARE_AT_BATCH_1)),
    }
    if args.no_distilabel:
        chain.unmeasured.update(dict.fromkeys(DISTILABEL, "--no-distilabel"))
        return arms
    return arms | {arm: _distilabel(args, chain, arm) for arm in DISTILABEL}


def _warm_up(chain: Chain) -> None:
    """A few rows of the plain arms, untimed: what torch and transformers do once is not theirs alone to pay."""
    few = replace(chain, instructions=chain.instructions[:WARM_ROWS])
    few.plain(16)
    few.plain(1)


def _distilabel(args: argparse.Namespace, chain: Chain, arm: str) -> Callable[[], float]:
    """One of distilabel's arms (it warms up by itself); once it has failed it is left out, with its reason."""
    from cai_experiment.scripts._bench_distilabel import Distilabel

    distilabel = Distilabel(
        args.cache_dir, chain.model, len(chain.instructions), args.threads, chain.stages, DISTILABEL[arm],
        chain.engine.describe()["dtype"],
    )  # fmt: skip

    def run() -> float:
        if arm not in chain.unmeasured:
            try:
                return distilabel.tokens_per_second()
            except RuntimeError as error:
                chain.unmeasured[arm] = str(error)
        return math.nan

    return run


def speedups(chain: Chain, rounds: Rounds, ideal: float) -> list[Figure]:
    """The pipeline over each rival's fastest arm; null where an arm failed, since it might have been the fastest."""
    speeds, found = medians(rounds), []
    ours = speeds["pipeline"]
    for rival, (target, arms) in RIVALS.items():
        name, failed = f"speedup_vs_{rival}", [arm for arm in arms if arm in chain.unmeasured]
        shown = {"pipeline": ours} | {arm: None if arm in failed else speeds[arm] for arm in arms}
        each = {arm: rounds[arm] for arm in shown if arm in rounds}
        if failed:
            found.append(Figure(name, None, target, None, shown, reason=chain.unmeasured[failed[0]], rounds=each))
        else:
            best = max(speeds[arm] for arm in arms)
            found.append(Figure(name, ours / best, target, ideal / best, shown, rounds=each))
    return found


def _ideal_speed(numbers: Architecture, recorded: Recorded) -> float:
    """Tokens a second if nothing but each prefix-tree token's matrix products were to be done, at the machine's best.

    The machine's best is measured, on one large product. Attention and sampling are left out: it is an upper limit. Of
    the last layer a prompt token whose logits nobody reads needs keys and values alone.
    """
    _, tree = computed_over_tree(recorded)
    spoken = sum(completion.completion_tokens for completion in recorded.completions)
    asked = tree["prefix_tree_tokens_not_spoken"]
    unread = max(0.0, asked - len(recorded.prompts))
    blocks = numbers.linear_parameters * (asked + spoken) - unread * _last_layer_unread(numbers)
    heads = numbers.vocab * numbers.hidden * (spoken + sum(bool(prompt.options) for prompt in recorded.prompts))
    return spoken / (2 * (blocks + heads) / _matrix_flops())


def _last_layer_unread(numbers: Architecture) -> float:
    """Weights of one block but for those that make its keys and values."""
    keys = 2 * numbers.hidden * numbers.kv_heads * numbers.head_size
    return numbers.linear_parameters / numbers.layers - keys


def _matrix_flops(size: int = 1024) -> float:
    """Floating-point operations a second of a float32 product, size x size: the best of a few."""
    import torch

    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)
