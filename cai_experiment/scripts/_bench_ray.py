"""Two Ray actors against one: the same rows through the same pipeline, one thread an actor."""

from __future__ import annotations

import argparse
from dataclasses import replace

from cai_experiment.scripts._bench_figures import Figure, Say, interleaved, medians, timed
from cai_experiment.scripts._bench_generation import WARM_ROWS, Chain

ROWS = 200


def two_over_one(args: argparse.Namespace, chain: Chain, say: Say) -> Figure:
    """Rows a second with two actors over those with one; loading the models is excluded."""
    from cai_experiment.engines.load import LoadSettings
    from cai_experiment.pipeline.distributed import LOCAL, ray_engines

    settings = LoadSettings(model=args.model, engine="hf", batch_size=args.batch_size, seed=args.seed)
    rows = replace(chain, instructions=chain.instructions[:ROWS])
    few = replace(chain, instructions=chain.instructions[: 2 * WARM_ROWS])

    def run(actors: int) -> float:
        engine, _ = ray_engines(LOCAL, settings, actors=actors)
        try:
            few.pipeline(engine)  # untimed: each actor's first passes
            return timed(lambda: len(rows.instructions) * bool(rows.pipeline(engine)))
        finally:
            engine.close()

    rounds = interleaved({"one_actor": lambda: run(1), "two_actors": lambda: run(2)}, args.repeats, say)
    speeds = medians(rounds)
    return Figure("ray_two_over_one", speeds["two_actors"] / speeds["one_actor"], 1.5, 2.0, speeds, rounds=rounds)
