"""Suite scale: generate_full.py to its end over N examples and over a tenth of them, without the guard.

Each run is a process of its own (this file again, run as a script), which says at its end what memory and time it took.
The small run is made before and after the large one, so that what the machine does meanwhile falls on both.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

if not __package__:  # run as a file: import from this checkout, whatever the current folder
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from cai_experiment.errors import EXIT_NO_GO, EXIT_OK
from cai_experiment.records.manifest import Manifest
from cai_experiment.scripts._bench_figures import Figure, Report, Say
from cai_experiment.scripts._bench_process import peak_bytes, run_child
from cai_experiment.scripts._bench_setting import setting_of

ROWS, SHARE = 5000, 10
SECONDS = 24 * 3600.0  # of one run
TARGET = 1.10
MB = 1e6


@dataclass(frozen=True, slots=True)
class Cost:
    """What a run took. Memory is the whole process's, with its report; seconds are those of making the examples."""

    examples: float
    peak_bytes: float
    wall_seconds: float
    cpu_seconds: float


def scale(args: argparse.Namespace, say: Say) -> Report:
    """Peak memory and seconds an example of the large run over those of the small one."""
    rows = args.rows or ROWS
    few = max(1, rows // SHARE)
    costs: list[Cost] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        flags = ["--model", args.model or "nano", "--engine", "hf", "--no-guard", "--principles", args.principles,
                 "--seed", str(args.seed), "--data-dir", str(folder), "-v", "0"]  # fmt: skip
        flags += ["--batch-size", str(args.batch_size)] if args.batch_size else []
        try:
            flags += ["--instructions", str(_questions(folder, flags, rows, args.seed))]
            for number, count in enumerate((few, rows, few)):
                asked = [*flags, "--run", f"run-{number}", "--count", str(count)]
                cost = _in_a_process(folder / f"cost-{number}.json", asked, args.threads)
                say(f"{count} examples: {cost.wall_seconds:,.0f} s, {cost.peak_bytes / MB:,.0f} MB at most")
                costs.append(cost)
        except RuntimeError as error:
            return Report(_unmeasured(few, rows, str(error)), setting_of(args, rows))
        engine = Manifest.read(folder / "run-1" / "manifest.json").models["generator"]
    small = Cost(*(mean(pair) for pair in zip(_numbers(costs[0]), _numbers(costs[2]), strict=True)))
    return Report(figures(small, costs[1], few, rows, costs), setting_of(args, rows, engine))


def figures(small: Cost, large: Cost, few: int, rows: int, costs: Sequence[Cost] = ()) -> list[Figure]:
    """Both runs as figures. Other load on the machine moves the processor's seconds less than the wall's.

    `costs` are the three runs in their order: small, large, small.
    """
    memory, wall, cpu, bytes_more = _names(few, rows)
    more = (large.peak_bytes - small.peak_bytes) / (large.examples - small.examples)
    peaks = {f"mb_{few}": small.peak_bytes / MB, f"mb_{rows}": large.peak_bytes / MB}

    def rounds(figure: Callable[[Cost], float], unit: str = "") -> dict[str, list[float]]:
        each = [figure(cost) for cost in costs]
        return {f"{unit}{few}": each[::2], f"{unit}{rows}": each[1::2]}

    def per_example(name: str, target: float | None, seconds: Callable[[Cost], float]) -> Figure:
        arms = {f"{few}": seconds(small) / small.examples, f"{rows}": seconds(large) / large.examples}
        each = rounds(lambda cost: seconds(cost) / cost.examples)
        return Figure(name, arms[f"{rows}"] / arms[f"{few}"], target, 1.0, arms, at_most=True, rounds=each)

    megabytes = rounds(lambda cost: cost.peak_bytes / MB, "mb_")
    return [
        Figure(memory, large.peak_bytes / small.peak_bytes, TARGET, 1.0, peaks, at_most=True, rounds=megabytes),
        per_example(wall, TARGET, lambda cost: cost.wall_seconds),
        per_example(cpu, None, lambda cost: cost.cpu_seconds),
        Figure(bytes_more, more, None, 0.0, {"examples_more": large.examples - small.examples}, at_most=True),
    ]


def _names(few: int, rows: int) -> tuple[str, str, str, str]:
    end = f"{rows}_over_{few}"
    return (f"memory_{end}", f"seconds_per_example_{end}", f"cpu_seconds_per_example_{end}", "bytes_an_example")


def _unmeasured(few: int, rows: int, reason: str) -> list[Figure]:
    targets = (TARGET, TARGET, None, None)
    return [Figure(name, None, target, None, {f"{few}": None, f"{rows}": None}, at_most=True, reason=reason)
            for name, target in zip(_names(few, rows), targets, strict=True)]  # fmt: skip


def _numbers(cost: Cost) -> tuple[float, ...]:
    return tuple(asdict(cost).values())


def _questions(folder: Path, flags: Sequence[str], rows: int, seed: int) -> Path:
    """A file of `rows` questions of the shipped model's world, none of which the run will refuse.

    It refuses what it will be measured on; so this asks the run's own work list.
    """
    from cai_experiment.milestones import MILESTONES
    from cai_experiment.nano.world import compose_question
    from cai_experiment.pipeline.work_list import WorkList
    from cai_experiment.scripts._generation import generation_parser, run_settings

    chance, path = random.Random(f"scale/{seed}"), folder / "questions.txt"
    texts: dict[str, None] = {}
    while len(texts) < 2 * rows + 100:
        texts[compose_question(chance, held_out=False).text] = None
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    asked = generation_parser(None, "full").parse_args([*flags, "--instructions", str(path)])
    work = WorkList(run_settings(asked, MILESTONES["full"]))
    found = [one.text for one in (work.next() for _ in range(rows)) if one is not None]
    if len(found) < rows:
        raise RuntimeError(f"only {len(found)} of {len(texts)} questions may be used")
    path.write_text("\n".join(found) + "\n", encoding="utf-8")
    return path


# ---------------------------------------------------------------- one run


def _in_a_process(result: Path, flags: Sequence[str], threads: int) -> Cost:
    """generate_full.py with `flags` in a fresh process. RuntimeError if it does not come to its end."""
    env = {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    run_child([sys.executable, str(Path(__file__).resolve()), str(result), *flags], env, "generate_full.py failed",
              SECONDS, (EXIT_OK, EXIT_NO_GO))  # fmt: skip
    return Cost(**json.loads(result.read_text(encoding="utf-8")))


def main(argv: Sequence[str]) -> int:
    """Run generate_full.py with all arguments but the first, which names the file for what it took."""
    from cai_experiment.scripts import _milestone, generate_full
    from cai_experiment.scripts._common import run_main

    generate = _milestone.generate
    taken: dict[str, float] = {}

    def watched(*given: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        result = generate(*given)
        taken.update(wall_seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)
        taken["examples"] = result.drawn
        return result

    _milestone.generate = watched  # type: ignore[assignment]
    code = run_main(generate_full.main, argv[1:])
    if code in (EXIT_OK, EXIT_NO_GO):
        Path(argv[0]).write_text(json.dumps({**taken, "peak_bytes": peak_bytes()}), encoding="utf-8")
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
