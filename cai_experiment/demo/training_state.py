"""What a training's job and files say: its stage, how far it is, one line for people."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cai_experiment.demo.training_job import Job, Stage
from cai_experiment.demo.training_view import TrainingView
from cai_experiment.observe.progress import duration

AT_WORK: tuple[Stage, ...] = ("generating", "training")
EVEN_SHARE = 0.6  # of making the pairs, where no time is known
NEARLY = 0.97  # of a part, until its end is seen
LAST_STEPS = 10  # whose mean time is that of those to come
GONE = "its process is gone (it was killed, or the machine was restarted); everything finished so far is kept"


@dataclass(frozen=True, slots=True)
class TrainingState:
    """What the tab shows. `done` of `total` are of the stage (pairs, then steps), `fraction` (0 to 1) is of all of it.

    `html` fields are finished markup. `line` is one line for people, an error and the command that goes on included.
    """

    run: str = ""
    stage: Stage = "none"
    done: int = 0
    total: int = 0
    fraction: float = 0.0
    line: str = "No training yet."
    pairs_html: str = ""
    plot_html: str = ""
    log_html: str = ""
    can_stop: bool = False
    can_resume: bool = False


def state_of(job: Job, view: TrainingView, held: bool, verbosity: int) -> TrainingState:
    """The state of a training whose view is fresh; `held`: somebody is at work."""
    stage: Stage = "stopped" if job.stage in AT_WORK and not held else job.stage
    at_work = stage in AT_WORK
    trains = job.generated and (view.step > 0 or job.stage == "training")
    done, total = (view.step, view.total_steps) if trains else (min(view.pairs, job.examples), job.examples)
    fraction = 1.0 if stage == "finished" else _fraction(job, view, trains)
    can_resume = not at_work and stage != "finished"
    return TrainingState(
        job.run, stage, done, total, fraction, _words(job, view, stage, fraction, done, total, trains),
        view.pairs_html(), view.plot_html(wait=not at_work), view.log_html(verbosity),
        can_stop=at_work and not job.stopping, can_resume=can_resume,
    )  # fmt: skip


def _share(job: Job) -> float:
    """The share of making the pairs in the whole time."""
    whole = job.expected.get("generation", 0.0) + job.expected.get("training", 0.0)
    return job.expected["generation"] / whole if whole else EVEN_SHARE


def _fraction(job: Job, view: TrainingView, trains: bool) -> float:
    """How far it is: of the pairs by what is written of the tokens expected, since many pairs end at once."""
    share = _share(job)
    if trains:
        return share + (1 - share) * min(NEARLY, view.step / view.total_steps if view.total_steps else 0.0)
    if job.generated:
        return share
    expected = job.expected.get("tokens", 0.0)
    written = view.tokens / expected if expected else 0.0
    return share * min(NEARLY, max(view.pairs / job.examples, written))


def _words(
    job: Job, view: TrainingView, stage: Stage, fraction: float, done: int, total: int, trains: bool
) -> str:
    if stage == "finished":
        return f"{job.run} {job.line}; compare it on the Impact tab"
    if stage in ("stopped", "failed"):
        line = GONE if job.stage in AT_WORK else job.line
        at = f" at {done}/{total} {'steps' if trains else 'pairs'}" if done and total else ""
        return f"{job.run} {stage}{at}: {line}; Resume goes on from here, or in a terminal: {job.command()}"
    if job.stopping:
        return f"{job.run} is stopping: what is finished is kept"
    if stage == "generating" and view.pairs >= job.examples:
        return f"{job.run}: {view.pairs}/{job.examples} pairs are made, their report is being written"
    if stage == "generating":
        return _line(job, f"making pairs, {done}/{total}" if view.tokens else f"loading {_name(job)}", view, fraction)
    if not view.step:
        return _line(job, f"loading {_name(job)} to train it", view, fraction)
    row = view.steps[view.step]
    told = f"training, step {done}/{total} · loss {row['loss']:.4f} · margin {row['margin']:+.4f}"
    return _line(job, told, view, fraction)


def _line(job: Job, told: str, view: TrainingView, fraction: float) -> str:
    """With tokens a second and the time left, as far as they are known."""
    speed, left = _pace_of_training(job, view) if view.step else _pace_of_pairs(job, view, fraction)
    parts = [f"{job.run}: {told}"]
    parts += [f"{speed:,.0f} tokens/s"] if speed >= 1 else []
    parts += [f"about {duration(left)} left"] if left is not None else []
    return " · ".join(parts)


def _pace_of_training(job: Job, view: TrainingView) -> tuple[float, float | None]:
    """(tokens a second, seconds left) by the last steps."""
    rows = [view.steps[step] for step in sorted(view.steps)[-LAST_STEPS:]]
    seconds = sum(row["seconds"] for row in rows) or 1e-3
    left = (view.total_steps - view.step) * seconds / len(rows) if view.total_steps else None
    return sum(row["tokens"] for row in rows) / seconds, left


def _pace_of_pairs(job: Job, view: TrainingView, fraction: float) -> tuple[float, float | None]:
    """(tokens a second, seconds left) by what was expected at the start, corrected by the speed seen."""
    speed, expected = view.tokens_per_second() if not job.generated else 0.0, job.expected
    if not expected:
        return speed, None
    if job.generated:
        return speed, expected["training"]
    missing = expected["tokens"] * (1 - fraction / _share(job))
    made = missing / speed if speed >= 1 else expected["generation"] * (1 - fraction / _share(job))
    return speed, made + expected["training"]


def _name(job: Job) -> str:
    """The model's name; of a folder its last part."""
    return Path(job.generator).name if Path(job.generator).is_absolute() else job.generator
