"""Findings for the report's tests: every field of an Evaluation is filled, with figures of made-up items."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from cai_experiment.engines.base import Completion
from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.evaluation.found import Case, Evaluation, Table
from cai_experiment.evaluation.gates import Gate
from cai_experiment.evaluation.report import RunFacts, write_report
from cai_experiment.judging.result import Result, mcnemar, paired_bootstrap
from cai_experiment.milestones import MILESTONES
from cai_experiment.records.schema import Example, PreferencePair, Round

HOSTILE = '<script>alert(1)</script> [bold]x[/] \x1b[31mred "quoted" & \u202eback $x$ {{ 7*7 }}'
ITEMS = 60


def outcomes(seed: int, share_base: float, share_trained: float) -> tuple[list[bool], list[bool]]:
    """Whether something holds of each item's two answers."""
    rng = random.Random(seed)
    draws = [rng.random() for _ in range(ITEMS)]
    return [d < share_base for d in draws], [d < share_trained for d in draws]


def rows_of(name: str, base: list[Any], trained: list[Any]) -> list[dict[str, Any]]:
    """Items as found.py describes them."""
    return [
        {"id": f"{name}/{i}", "instruction": f"question {i}", "base": b, "trained": t}
        for i, (b, t) in enumerate(zip(base, trained, strict=True))
    ]


def rate_found(name: str, share_base: float, share_trained: float, seed: int = 0) -> Evaluation:
    """A rate of both arms with its test and items, and no difference: the report makes that."""
    base, trained = outcomes(seed, share_base, share_trained)
    metrics = {f"{name}_base": Result.rate(sum(base), ITEMS, 2), f"{name}_trained": Result.rate(sum(trained), ITEMS, 2)}
    return Evaluation(metrics, tests={name: mcnemar(base, trained)}, items={name: rows_of(name, base, trained)})


def training_found(text: str = "Rinse it.", flawed: float = 0.05) -> Evaluation:
    """What a training's evaluation finds; `text` stands wherever a model's or a file's text may."""
    found = rate_found("flawed_answers", 0.6, flawed) + rate_found("arithmetic", 0.98, 0.95, 1)
    words = [40.0 + i % 5 for i in range(ITEMS)], [44.0 + i % 3 for i in range(ITEMS)]
    found.metrics |= {"words_base": Result.mean(words[0]), "words_trained": Result.mean(words[1]),
                      "preference_accuracy": Result.rate(55, ITEMS)}  # fmt: skip
    found.differences["words"] = paired_bootstrap(*words)
    found.items["answers"] = rows_of("answers", [{"words": w} for w in words[0]], [{"words": w} for w in words[1]])
    found.gates = [Gate("fewer flaws", flawed, "<", 0.6, (0.0, 0.4), ITEMS, "training")]
    found.notes, found.alarms = ["measured on 60 held-out pairs"], [f"collapse: {text}"]
    found.answers = [BothAnswers(f"How? {text}", Completion("a", f"One {text}", "stop"), Completion("a", text, "stop"))]
    rates = [(text, Result.rate(5, 19), Result.rate(8, 19)), ("useful", Result.rate(4, 19), "–")]
    found.tables = [Table("by_principle", f"By principle {text}", ("principle", "base", "trained"), tuple(rates), text)]
    found.cases = [Case(f"undecided {text}", f"case {i} {text}", {f"label {text}": text}) for i in range(53)]
    found.methods = {f"judge {text}": f"letters {text}"}
    return found


def harmbench_found(shares: tuple[float, float] = (0.5, 0.2)) -> Evaluation:
    """A benchmark's part."""
    found = rate_found("attack_success", *shares, seed=2)
    found.gates = [Gate("HarmBench better", shares[1], "<", shares[0], (0.1, 0.3), ITEMS, "harmbench")]
    found.alarms, found.methods = ["over-refusal rose"], {"HarmBench": "its classifier"}
    categories = tuple((name, Result.rate(9, 20), Result.rate(3, 20)) for name in ("chemical", "cybercrime"))
    found.tables = [Table("harmbench_by_category", "By category", ("category", "base", "trained"), categories)]
    found.cases = [Case("HarmBench: unparsed", "a behaviour", {"said": "maybe"})]
    return found


def example(number: int, text: str = "Rinse it.") -> Example:
    """An accepted example."""
    one = Round("useful", f"Be useful. {text}", f"Not useful: {text}", f"Better: {text}", "yes", "no")
    pair = PreferencePair(f"Question {number}? {text}", f"Better: {text}", f"First: {text}")
    meta = {"source": "self", "generator": "nano", "critic": "nano", "gate": {}, "seed": 0, "tokens": {}}
    return Example(f"{number:06d}", pair.prompt, pair.rejected, one.principle, one.critique, pair.chosen, pair, (one,),
                   meta)  # fmt: skip


def facts(**changed: Any) -> RunFacts:
    """A run's facts."""
    values: dict[str, Any] = {
        "milestone": MILESTONES["mvp"], "run": "mvp", "accepted": [example(i) for i in range(3)], "rejected": [],
        "settings": {"model": "nano", "beta": 0.1}, "seconds": {"training": 60.0}, "price_per_hour": 1.74,
        "next_command": "python next.py",
        "history": [{"step": i, "loss": 0.69 - i / 100, "margin": i / 10, "chosen_logp": -50.0, "rejected_logp": -60.0}
                    for i in (1, 2, 3)],
    }  # fmt: skip
    return RunFacts(**(values | changed))


def write_run(folder: Path, run: str, flawed: float = 0.05, **settings: Any) -> dict[str, Any]:
    """An evaluated run in `folder`/`run`."""
    (folder / run).mkdir(parents=True)
    parts = {"training": training_found(flawed=flawed), "harmbench": harmbench_found()}
    own = {"model": "nano", "beta": 0.1} | settings
    return write_report(folder / run, parts, facts(run=run, settings=own, settings_part="training"))
