"""Suite equality: the same greedy texts from engine hf, from a server and, where there is CUDA, from vLLM.

The prompts are those of the chain (answers, critiques and revisions in the share in which they come). float32 is to
be equal to the last text; in bfloat16, where the order of a sum decides close calls, the share is reported.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import UserError
from cai_experiment.models.hardware import detect
from cai_experiment.scripts._bench_chain import instructions_for, lockstep, stage_settings
from cai_experiment.scripts._bench_figures import Figure, Report, Say
from cai_experiment.scripts._bench_setting import setting_of

PROMPTS = 50
PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}  # as it is called in a figure's name: as it is loaded

Texts = dict[str, Completion]


def equality(args: argparse.Namespace, say: Say) -> Report:
    """The share of equal texts of each engine at each precision. A target is there for float32 alone."""
    prompts: list[Prompt] = []
    found: list[Figure] = []
    facts: dict[str, object] = {}
    for precision, quantization in PRECISIONS.items():
        target = 1.0 if precision == "float32" else None
        engine = _load(args, "hf", quantization)
        say(engine.first_line)
        facts = engine.describe()
        prompts = prompts or _prompts(args, engine, args.rows or PROMPTS)
        texts = _speak(engine, prompts)
        found.append(compared(f"equal_texts_server_{precision}", texts, _from_a_server(engine, prompts), target))
        engine.close()
        found.append(_vllm(args, f"equal_texts_vllm_{precision}", quantization, prompts, texts, target, say))
    facts |= {"engine": "hf, server, vllm", "dtype": ", ".join(PRECISIONS), "quantization": None}
    return Report(found, setting_of(args, len(prompts), facts))


def compared(name: str, ours: Texts, theirs: Texts, target: float | None) -> Figure:
    """The share of prompts whose text and end are the same. A failed completion is equal to nothing."""
    same = [id for id, one in ours.items() if one.finish != "error"
            and (one.text, one.finish) == (theirs[id].text, theirs[id].finish)]  # fmt: skip
    arms = {"equal": len(same), "prompts": len(ours), "tokens": sum(one.completion_tokens for one in ours.values())}
    return Figure(name, len(same) / len(ours), target, 1.0, arms)


def _load(args: argparse.Namespace, engine: str, quantization: str) -> Any:
    from cai_experiment.engines.load import LoadSettings, load_engine

    return load_engine(LoadSettings(
        model=args.model or "nano", engine=engine, quantization=quantization, batch_size=args.batch_size,
        seed=args.seed, trains_after=False,
    ))  # fmt: skip


def _prompts(args: argparse.Namespace, engine: Any, count: int) -> list[Prompt]:
    """`count` spoken prompts of the chain, evenly from all its stages, to be answered greedily."""
    asked: list[Prompt] = []

    def complete(prompts: list[Prompt]) -> list[Completion]:
        asked.extend(prompt for prompt in prompts if not prompt.options)
        return list(engine.stream(prompts))

    lockstep(instructions_for(count, args.seed), stage_settings(args.seed, "random"), complete)
    chosen = [asked[place * len(asked) // count] for place in range(count)]
    return [replace(prompt, sampling=replace(prompt.sampling, temperature=0.0)) for prompt in chosen]


def _speak(engine: Any, prompts: Sequence[Prompt]) -> Texts:
    return {completion.id: completion for completion in engine.stream(prompts)}


def _from_a_server(engine: Any, prompts: Sequence[Prompt]) -> Texts:
    """The same weights behind HTTP, spoken to by the server engine."""
    from cai_experiment.engines.server import ServerEngine
    from cai_experiment.scripts._bench_server import NAME, GreedyServer

    model, tokenizer = engine.release_for_training()  # with the attention that transformers gave it
    with GreedyServer(model, tokenizer, engine.renderer.max_length) as server:
        client = ServerEngine(server.url, NAME, engine.renderer, concurrency=4)
        try:
            return _speak(client, prompts)
        finally:
            client.close()


def _vllm(
    args: argparse.Namespace, name: str, quantization: str, prompts: Sequence[Prompt], texts: Texts,
    target: float | None, say: Say,
) -> Figure:  # fmt: skip
    """vLLM's share; without CUDA or vLLM there is none, and nothing is missed."""
    nothing = {"equal": None, "prompts": float(len(prompts))}
    if detect().kind != "cuda" or find_spec("vllm") is None:
        why = "this machine has no CUDA GPU" if detect().kind != "cuda" else "vllm is not installed"
        return Figure(name, None, None, 1.0, nothing, reason=why)
    try:
        engine = _load(args, "vllm", quantization)
    except UserError as error:
        return Figure(name, None, target, 1.0, nothing, reason=str(error))
    say(engine.first_line)
    try:
        return compared(name, texts, _speak(engine, prompts), target)
    finally:
        engine.close()
