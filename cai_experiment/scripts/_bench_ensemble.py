"""Suite ensemble: accelerated decoding against the loop that runs every expert at every token, on one lean pass.

One answer at a time. The plain loop is timed in two arithmetics: in the exact one, whose tokens the accelerated texts
must equal, and in the one that is fastest for a single row; the speedup is over the faster of the two. Beside other
work on the machine give --threads 1: two threads wait for each other. `limit` is what the measured times of steps and
blocks allow at best, if every drafted token were accepted.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.scripts._bench_figures import Figure, Report, Rounds, Say, interleaved, medians
from cai_experiment.scripts._bench_setting import setting_of

if TYPE_CHECKING:
    from cai_experiment.ensemble.decode import Counts, DecodeSettings, Spoken
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads

ROWS, NEW_TOKENS, SEEN = 200, 120, 3  # SEEN: rounds of one length from which its mean time is believed
HEADS = Path("model_outputs")
TARGETS = {("select", 0.0): 1.5, ("mixture", 0.7): 1.3}
OTHERS = (("select", 0.7), ("mixture", 0.0))
BATCH = 16
PLAIN_BATCH = "on a CPU blocks are off at 3 rows or more, so both arms take plain steps until the last two rows"


@dataclass
class Bench:
    """The prompts and what was said to them last, by setting and arm."""

    model: MultiModelWithScalarHeads
    prompts: list[list[int]]
    seed: int
    said: dict[tuple[str, float, str], tuple[list[Spoken], Counts]] = field(default_factory=dict)

    def settings(self, mode: str, temperature: float, arm: str) -> DecodeSettings:
        """Of one arm: plain_exact, plain_fastest, accelerated, or these in batches."""
        from cai_experiment.ensemble.decode import DecodeSettings

        name, _, batch = arm.partition("_batch_")
        return DecodeSettings(
            mode=mode, temperature=temperature, max_new_tokens=NEW_TOKENS, seed=self.seed,
            accelerate=name == "accelerated", exact=name != "plain_fastest", batch_size=int(batch or 1),
        )  # fmt: skip

    def speed(self, mode: str, temperature: float, arm: str) -> float:
        """Decode all prompts once; tokens a second."""
        from cai_experiment.ensemble.decode import decode

        keys = [str(index) for index in range(len(self.prompts))]
        spoken, counts = decode(self.model, self.prompts, self.settings(mode, temperature, arm), keys)
        self.said[mode, temperature, arm] = spoken, counts
        return counts.tokens / counts.seconds

    def identical(self, mode: str, temperature: float, arm: str = "accelerated") -> int:
        """Prompts to which both arms said the same tokens, in all of them."""
        plain, fast = self.said[mode, temperature, "plain_exact"][0], self.said[mode, temperature, arm][0]
        return sum(one.ids == other.ids for one, other in zip(plain, fast, strict=True))

    def limit(self, mode: str, temperature: float) -> float | None:
        """Seconds of a plain step over the fewest seconds a token that blocks of one length take."""
        plain = [self.said[mode, temperature, arm][1] for arm in ("plain_exact", "plain_fastest")]
        steps = min(counts.rounds[1, 1][1] / counts.rounds[1, 1][0] for counts in plain)
        rounds = self.said[mode, temperature, "accelerated"][1].rounds
        blocks = [seconds / number / n for (_, n), (number, seconds) in rounds.items() if n > 1 and number >= SEEN]
        return steps / min(blocks) if blocks else None


def ensemble(args: argparse.Namespace, say: Say) -> Report:
    """All figures, over `--rows` prompts of the four shipped sets."""
    rows = args.rows or ROWS
    bench = load(args.model, rows, args.seed)
    say(f"{', '.join(bench.model.names)}: {rows} prompts, at most {NEW_TOKENS} tokens each, threads: {args.threads}")
    warm = replace(bench, prompts=bench.prompts[:2], said={})
    figures, shown = [], {}
    for (mode, temperature), target in TARGETS.items():
        arms = [
            "plain_exact",
            "plain_fastest",
            "accelerated",
            f"plain_exact_batch_{BATCH}",
            f"accelerated_batch_{BATCH}",
        ]
        for arm in arms:
            warm.speed(mode, temperature, arm)
        say(f"{mode}, temperature {temperature:g}: tokens a second")
        rounds = interleaved({arm: _timing(bench, mode, temperature, arm) for arm in arms}, args.repeats, say)
        figures += speedups(bench, mode, temperature, target, rounds, args.threads)
        shown[mode] = bench.said[mode, temperature, "accelerated"][1]
    for mode, temperature in OTHERS:
        for arm in ("plain_exact", "accelerated"):
            bench.speed(mode, temperature, arm)
    pairs = [*TARGETS, *OTHERS]
    equal = {f"{mode}_{temperature:g}": bench.identical(mode, temperature) / rows for mode, temperature in pairs}
    for mode, temperature in TARGETS:
        same = bench.identical(mode, temperature, f"accelerated_batch_{BATCH}")
        equal[f"{mode}_{temperature:g}_batch_{BATCH}"] = same / rows
    figures.append(Figure("tokens_identical", min(equal.values()), 1.0, 1.0, equal))
    passes = {mode: counts.passes_per_token for mode, counts in shown.items()}
    figures.append(Figure("passes_per_token", passes["select"], None, 1.0, passes, at_most=True))
    accepted = {mode: counts.acceptance for mode, counts in shown.items()}
    figures.append(Figure("acceptance", accepted["select"], None, 1.0, accepted))
    return Report(figures, setting_of(args, rows))


def load(heads: str | None, rows: int, seed: int) -> Bench:
    """The trained ensemble and its prompts, equally many of each shipped set. Raises BadInputError without heads."""
    from cai_experiment.ensemble.data import SHIPPED_DATASETS, load_rows
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads

    model = MultiModelWithScalarHeads.from_pretrained(None, heads or HEADS)
    each = -(-rows // len(SHIPPED_DATASETS))
    sets = [load_rows(name, "test", each, seed) for name in SHIPPED_DATASETS]
    mixed = [row for together in zip(*sets, strict=True) for row in together][:rows]
    return Bench(model, [model.encode(row.prompt) for row in mixed], seed)


def speedups(
    bench: Any, mode: str, temperature: float, target: float, rounds: Rounds, threads: int = 1
) -> list[Figure]:
    """Of one rule: alone over the faster plain arm, and in batches over the plain loop in batches."""
    speeds = medians(rounds)
    plain = max(speeds["plain_exact"], speeds["plain_fastest"])
    suffix = "" if mode == "select" else f"_{mode}"
    batch: Mapping[str, float] = {arm: speed for arm, speed in speeds.items() if "batch" in arm}
    alone = {arm: speed for arm, speed in speeds.items() if "batch" not in arm}
    limit = bench.limit(mode, temperature)
    ratio = batch[f"accelerated_batch_{BATCH}"] / batch[f"plain_exact_batch_{BATCH}"]
    said = {"threads": float(threads)}
    batch_note = PLAIN_BATCH if bench.model.device.type == "cpu" else ""
    value = alone["accelerated"] / plain
    return [
        Figure(f"speedup_vs_run_all{suffix}", value, target, limit, alone | said, rounds=rounds),
        Figure(f"speedup_vs_run_all{suffix}_batch_{BATCH}", ratio, None, None, {**batch, **said}, note=batch_note),
    ]


def _timing(bench: Bench, mode: str, temperature: float, arm: str) -> Any:
    return lambda: bench.speed(mode, temperature, arm)
