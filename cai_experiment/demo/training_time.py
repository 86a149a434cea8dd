"""How long a training will take: by this machine's earlier trainings of the demo with the same models, else by the
arithmetic of models/ (data sheets, assumed lengths). Either is about; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from cai_experiment.demo.training_job import JOB, PREFIX, Job
from cai_experiment.errors import UserError
from cai_experiment.models.choice import ModelChoice, numbers_of, resolve_model
from cai_experiment.models.hardware import Hardware, detect
from cai_experiment.models.plan import generation, pairs_seen, tokens_per_second
from cai_experiment.models.roles import tokens_by_role
from cai_experiment.models.serving import auto_engine
from cai_experiment.models.training_plan import TrainingWork, row_length
from cai_experiment.models.workload import Tokens, Workload
from cai_experiment.records.files import read_json, read_jsonl
from cai_experiment.training.data import HELD_OUT_SHARE
from cai_experiment.training.settings import METRICS

ROUNDS, WEIGHED = 2, 15  # of milestone mvp: rounds; principles that are weighed before a critique
BATCH, MOST_TOKENS = 8, 4096  # pairs a step, tokens of a row (train_dpo.py)
NANO_DRAWS = 1.2  # instructions a pair with the shipped model, whose gate passes more than others' (workload: 2)


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds of both parts, and the tokens that making the pairs writes."""

    generation: float
    training: float
    tokens: float

    @property
    def seconds(self) -> float:
        """Of both."""
        return self.generation + self.training


def estimate(data_dir: Path, generator: str, critic: str, examples: int, epochs: int) -> Estimate | None:
    """What a training will take, or None where a model's size or a GPU's speed is not known."""
    return measured(data_dir, generator, critic, examples, epochs) or by_plan(generator, critic, examples, epochs)


def machine() -> str:
    """What makes this machine's speed: its card or its cores."""
    hardware = detect()
    return f"{hardware.gpus} x {hardware.gpu_name}" if hardware.gpu_name else f"{hardware.kind}, {hardware.cores} cores"


# ---------------------------------------------------------------- by earlier trainings


def measured(data_dir: Path, generator: str, critic: str, examples: int, epochs: int) -> Estimate | None:
    """By the newest finished training here with these models, its start and its work reckoned apart."""
    here = machine()
    found = [job for job in jobs(data_dir) if job.stage == "finished"
             and (job.generator, job.critic, job.machine) == (generator, critic, here)]  # fmt: skip
    for job in found:
        try:
            return _like(job, examples, epochs)
        except (UserError, KeyError, TypeError, ZeroDivisionError):  # its files were changed or removed
            continue
    return None


def jobs(data_dir: Path) -> list[Job]:
    """The demo's trainings below a data folder that can be read, newest first."""
    found = []
    for path in data_dir.glob(f"{PREFIX}*/{JOB}"):
        try:
            found.append(Job.read(path))
        except UserError:
            continue
    return sorted(found, key=lambda job: job.begun, reverse=True)


def _like(job: Job, examples: int, epochs: int) -> Estimate:
    manifest = read_json(job.folder / "manifest.json")
    rows = read_jsonl(job.checkpoints / METRICS, repair=False)
    pairs, made = manifest["counts"]["accepted"], manifest["wall_seconds"]
    trained = sum(row["seconds"] for row in rows)
    starts = [max(0.0, job.seconds[part] - work) / job.calls[part]
              for part, work in (("generation", made), ("training", trained))]  # fmt: skip
    return Estimate(
        starts[0] + made / pairs * examples,
        starts[1] + trained / (pairs * job.epochs) * examples * epochs,
        manifest["tokens"]["completion"] / pairs * examples,
    )


# ---------------------------------------------------------------- by arithmetic


@lru_cache(maxsize=64)  # a hub model's size is fetched
def by_plan(generator: str, critic: str, examples: int, epochs: int) -> Estimate | None:
    """As `--plan` reckons it: a start of each script, tokens at the speed of this machine."""
    hardware = detect()
    try:
        choice, judge = (resolve_model(name, hardware, "") for name in (generator, critic))
        drawn = round(NANO_DRAWS * examples) + 1 if choice.path_or_id == judge.path_or_id and _is_own(choice) else None
        work = Workload(examples, ROUNDS, WEIGHED, drawn)
        made = _generation_hours(choice, judge, hardware, work)
        trained = _training_hours(choice, hardware, examples, epochs)
    except UserError:
        return None
    if made is None or trained is None:
        return None
    return Estimate(made * 3600, trained * 3600, Tokens.of(choice, work).written)


def _is_own(choice: ModelChoice) -> bool:
    return choice.preset is not None and choice.preset.is_local


def _generation_hours(choice: ModelChoice, judge: ModelChoice, hardware: Hardware, work: Workload) -> float | None:
    """One model by its engine's plan; of two, each at its own speed with its own tokens, one after the other."""
    engine = auto_engine(choice, hardware, None, False, False, lambda name: find_spec(name) is not None)
    part = generation(choice, hardware, engine.engine, engine.quantization, work)
    if choice.path_or_id == judge.path_or_id or part.hours is None:
        return part.hours
    once = Tokens.of(choice, work)
    hours = part.hours
    hours -= _hours(choice, hardware, part.rows, engine.quantization, engine.engine, (once.written, part.read))
    for model, tokens in zip((choice, judge), tokens_by_role(choice, work), strict=True):
        hours += _hours(model, hardware, part.rows, engine.quantization, engine.engine, tokens)
    return hours


def _hours(
    choice: ModelChoice, hardware: Hardware, rows: int, quantization: str, engine: str, tokens: tuple[int, int]
) -> float:
    speeds = tokens_per_second(numbers_of(choice), hardware, rows, quantization, engine)
    assert speeds is not None  # the card's speed was known before
    return (tokens[0] / speeds[0] + tokens[1] / speeds[1]) / 3600


def _training_hours(choice: ModelChoice, hardware: Hardware, examples: int, epochs: int) -> float | None:
    held_out = max(1, round(HELD_OUT_SHARE * examples)) if examples > 1 else 0
    pairs = examples - held_out
    steps = epochs * -(-pairs // BATCH)
    cuda = hardware.kind == "cuda"
    quantization = hardware.training_quantization
    backend = "fast" if not cuda else "unsloth" if quantization == "4bit" and find_spec("unsloth") else "trl"
    context = choice.preset.context if choice.preset else MOST_TOKENS
    measured = min(10, steps) * held_out  # the held-out pairs, at every tenth of the run
    work = TrainingWork(choice, hardware, backend, quantization, pairs, pairs_seen(pairs, steps, BATCH),
                        min(MOST_TOKENS, context), 1, measured=measured)  # fmt: skip
    work = TrainingWork(choice, hardware, backend, quantization, pairs, work.seen, min(row_length(work)[0], context), 1,
                        measured=measured)  # fmt: skip
    return work.part().hours
