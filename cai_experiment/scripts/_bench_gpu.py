"""Suite generation with --gpu: speed and memory of the chain on a card, against the card's bandwidth and FLOP limits.

With --random-weights the architecture is a preset's own and the words are noise, so every completion runs to its last
token and plain words of the same number of tokens stand in its place in the conversation. Those are computed
anew, where a real model's own words lie in the cache already: the figure is on the careful side.

Engine hf is watched pass by pass. vLLM and Unsloth are not: for them the fewest passes and reads are counted that their
slots allow, so their share of the bandwidth is at least the one that is shown.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import BadInputError
from cai_experiment.models.choice import numbers_of
from cai_experiment.models.hardware import Hardware, detect, gpu_speed
from cai_experiment.models.memory import GB, Architecture, kv_bytes_per_token, weights_gb
from cai_experiment.models.presets import ModelPreset
from cai_experiment.models.workload import ANSWER_TOKENS, CRITIQUE_TOKENS
from cai_experiment.scripts._bench_chain import instructions_for, stage_settings
from cai_experiment.scripts._bench_figures import Figure, Report, Say
from cai_experiment.scripts._bench_generation import WARM_ROWS, Chain
from cai_experiment.scripts._bench_process import peak_bytes
from cai_experiment.scripts._bench_setting import setting_of
from cai_experiment.scripts._bench_watch import Passes, Recorded, fewest_passes, watched_passes

if TYPE_CHECKING:
    from cai_experiment.engines.load import Plan

ROWS_A_SLOT = 2
TINY_ROWS, TINY_TOKENS, TINY_CONTEXT = 2, 8, 1536
FILLER = "and so it goes on with one plain word after the other until the last of them is said "


@dataclass
class Worded:
    """An engine of random weights whose completions read as words: as many tokens as it spoke."""

    engine: Any

    def __post_init__(self) -> None:
        self.name, self.first_line, self.renderer = self.engine.name, self.engine.first_line, self.engine.renderer
        self.width, self.elsewhere = self.engine.width, self.engine.elsewhere
        self._filler = self.renderer.encode(FILLER * 40, False)

    def describe(self) -> dict[str, object]:
        """The engine's own."""
        return self.engine.describe()

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """As the engine does it, with other words."""
        for completion in self.engine.stream(prompts):
            words = self.renderer.tokenizer.decode(self._filler[: completion.completion_tokens])
            yield replace(completion, text=words, finish="stop") if completion.completion_tokens else completion


def on_card(args: argparse.Namespace, say: Say) -> Report:
    """Tokens a second, peak memory, and the shares of what the card's data sheet allows."""
    hardware = detect()
    if hardware.kind != "cuda" and not args.tiny:
        raise BadInputError("--gpu: this machine has no CUDA GPU", "add --tiny for a dry run on the CPU")
    engine, plan = _load(args, hardware)
    say(engine.first_line)
    rows = args.rows or (TINY_ROWS if args.tiny else ROWS_A_SLOT * slots_of(engine))
    stages = stage_settings(args.seed, args.principles)
    if args.random_weights:
        answer, critique = (TINY_TOKENS, TINY_TOKENS) if args.tiny else (ANSWER_TOKENS, CRITIQUE_TOKENS)
        stages = replace(stages, max_tokens_answer=answer, max_tokens_critique=critique)
    chain = Chain(engine, instructions_for(rows, args.seed), stages, plan.choice.path_or_id)
    _run(replace(chain, instructions=chain.instructions[:WARM_ROWS]), bool(args.random_weights))  # untimed
    runs = []
    for number in range(args.repeats):
        runs.append(_run(chain, bool(args.random_weights)))
        say(f"round {number + 1} of {args.repeats}: {runs[-1].tokens_per_second:,.1f} tokens/s")
    peak, setting = _peak_gb(hardware, plan.engine), setting_of(args, rows, engine.describe())
    engine.close()
    middle = median(run.tokens_per_second for run in runs)
    run = min(runs, key=lambda one: abs(one.tokens_per_second - middle))
    found = figures(run, numbers_of(plan.choice), plan.quantization, hardware, peak)
    rounds = {"tokens_per_second": [run.tokens_per_second for run in runs]}
    return Report([replace(found[0], rounds=rounds), *found[1:]], setting)


def slots_of(engine: Any) -> int:
    """How many rows an engine speaks for at a time."""
    own = engine.settings if engine.name == "vllm" else engine
    return own.batch_size if engine.name == "unsloth" else own.slots


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of the chain took, and what it made the card read and compute."""

    seconds: float
    spoken: int  # completion tokens
    computed: int  # prompt tokens that no cache held
    weighed: int  # prompts with options: each needs the head once
    passes: int  # of hf; of another engine the fewest possible, and so the reads
    cached_tokens_read: int

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens a second."""
        return self.spoken / self.seconds


def figures(run: Run, numbers: Architecture, quantization: str, hardware: Hardware, peak_gb: float) -> list[Figure]:
    """A run held against the card: every pass reads all weights and the keys and values of its conversations, each
    once; a token costs two operations a weight of the blocks, and of the head where one is drawn. Attention itself is
    left out, and so is the last layer's feed-forward part for prompt tokens, of which engine hf computes but the read.
    """
    read = run.passes * weights_gb(numbers, quantization) * GB
    read += run.cached_tokens_read * kv_bytes_per_token(numbers, quantization)
    heads = numbers.vocab * numbers.hidden * (run.spoken + run.weighed)
    skipped = 3 * numbers.hidden * numbers.intermediate * max(0, run.computed - run.weighed)
    flops = 2 * (numbers.linear_parameters * (run.spoken + run.computed) - skipped + heads)
    arms = {"seconds": run.seconds, "completion_tokens": run.spoken, "computed_prompt_tokens": run.computed,
            "passes": run.passes}  # fmt: skip
    speed = gpu_speed(hardware.gpu_name)
    have = hardware.vram_gb if hardware.kind == "cuda" else hardware.ram_gb
    memory = Figure("peak_memory_gb", peak_gb, None, have, {"weights": weights_gb(numbers, quantization)})
    if speed is None:
        reason = f"no data sheet figures for {hardware.gpu_name or 'a CPU'}"
        shares = [Figure(name, None, None, 1.0, reason=reason) for name in ("share_of_bandwidth", "share_of_flops")]
        return [Figure("tokens_per_second", run.tokens_per_second, None, None, arms), memory, *shares]
    bandwidth, peak_flops = speed[0] * GB, speed[1] * 1e12
    best = run.spoken / max(read / bandwidth, flops / peak_flops)
    return [
        Figure("tokens_per_second", run.tokens_per_second, None, best, arms),
        memory,
        Figure("share_of_bandwidth", read / run.seconds / bandwidth, None, 1.0,
               {"gb_per_second": read / run.seconds / GB, "card_gb_per_second": speed[0]}),
        Figure("share_of_flops", flops / run.seconds / peak_flops, None, 1.0,
               {"tflops": flops / run.seconds / 1e12, "card_tflops": speed[1]}),
    ]  # fmt: skip


def _run(chain: Chain, worded: bool) -> Run:
    recorded = Recorded(chain.engine)
    with watched_passes() as passes:
        started = time.perf_counter()
        chain.pipeline(Worded(recorded) if worded else recorded)
        seconds = time.perf_counter() - started
    return _as_run(seconds, recorded, passes)


def _as_run(seconds: float, recorded: Recorded, passes: Passes) -> Run:
    done = recorded.completions
    if not passes.occupancy.passes:  # not engine hf
        passes = fewest_passes(done, slots_of(recorded.engine))
    return Run(
        seconds, sum(c.completion_tokens for c in done), sum(c.computed_tokens for c in done),
        sum(bool(c.logprobs) for c in done), passes.occupancy.passes, passes.cached_tokens_read,
    )  # fmt: skip


def _load(args: argparse.Namespace, hardware: Hardware) -> tuple[Any, Plan]:
    """(engine, the plan it was loaded by); --tiny shrinks the preset of --random-weights."""
    from cai_experiment.engines.load import LoadSettings, load_model, make_plan, make_renderer

    own = "4bit" if args.random_weights and args.engine == "hf" else None
    settings = LoadSettings(
        model=args.model, quantization=args.quantization or own, batch_size=args.batch_size, engine=args.engine,
        seed=args.seed, random_weights=args.random_weights, tokenizer=args.tokenizer,
        max_length=TINY_CONTEXT if args.tiny else None, trains_after=False,
    )  # fmt: skip
    plan = make_plan(settings, hardware)
    if args.tiny:
        if plan.choice.preset is None or not args.random_weights:
            raise BadInputError("--tiny shrinks an architecture", "give its preset by --random-weights")
        name = f"{plan.choice.name}, shrunk"
        plan = replace(plan, choice=replace(plan.choice, name=name, preset=shrunk(plan.choice.preset)))
    engine: Any
    if plan.engine == "vllm":
        from cai_experiment.engines import vllm_load

        one_card = replace(hardware, gpus=1)  # the figures are one card's
        engine = vllm_load.load(plan.choice, plan.quantization, settings, one_card)
    else:
        model, tokenizer, facts = load_model(plan, settings)
        renderer = make_renderer(model, tokenizer, plan.choice, settings)
        engine = _class_of(plan.engine)(model, tokenizer, renderer, args.batch_size, facts)
    engine.first_line = plan.first_line
    return engine, plan


def _class_of(engine: str) -> Any:
    if engine == "unsloth":
        from cai_experiment.engines.unsloth import UnslothEngine

        return UnslothEngine
    from cai_experiment.engines.hf import HFEngine

    return HFEngine


def shrunk(preset: ModelPreset) -> ModelPreset:
    """The preset with two layers of a few narrow heads: the same code runs, in seconds on a CPU."""
    numbers = preset.architecture
    kv_heads = 2
    heads = kv_heads * (numbers.heads // numbers.kv_heads)
    hidden = 32 * heads  # a multiple of NF4's block of 64
    small = Architecture(2, hidden, heads, kv_heads, 32, 2 * hidden, 512, numbers.tied)
    return replace(preset, numbers=small)


def _peak_gb(hardware: Hardware, engine: str) -> float:
    """The most memory that was held: on the card as torch allocated it, for vLLM (whose process takes its share when it
    starts) as nvidia-smi sees it; without a card this process's own."""
    if hardware.kind != "cuda":
        return peak_bytes() / GB
    if engine == "vllm":
        asked = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        used = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        return max(map(int, used.split())) * 2**20 / GB  # of several cards: the one at work
    import torch

    return torch.cuda.max_memory_allocated() / GB
