"""Held-out pairs: separate from the training run's, as many instructions as asked, resumed, read, refused by name."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.engines.load import LoadSettings, load_engine
from cai_experiment.errors import BadInputError
from cai_experiment.milestones import MILESTONES
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.hardware import profile
from cai_experiment.pipeline.known import KnownTexts
from cai_experiment.records.files import read_jsonl, write_jsonl
from cai_experiment.records.manifest import Manifest
from cai_experiment.records.schema import Example
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._common import base_parser
from cai_experiment.scripts._generation import generate, generation_parser, run_settings
from cai_experiment.scripts._held_out import (
    add_held_out_flags,
    held_out_plan,
    held_out_questions,
    held_out_run,
    held_out_seed,
)

MVP = MILESTONES["mvp"]
N = 6


@pytest.fixture(scope="module")
def engine(nano_dir: Path) -> Any:
    """The shipped model."""
    return load_engine(LoadSettings("nano"))


@pytest.fixture(scope="module")
def finished(engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with a training run of two pairs and its held-out run; copy it, do not write into it."""
    data = tmp_path_factory.mktemp("finished")
    asked = ["--model", "nano", "--data-dir", str(data), "--count", "2", "--rounds", "1", "-v", "0"]
    args = generation_parser(None, "mvp").parse_args(asked)
    with RunFolder(data / "mvp") as folder:
        generate(args, run_settings(args, MVP), folder, engine, engine)
    held_out_run(flags(data), MVP, engine)
    return data


@pytest.fixture
def data(finished: Path, tmp_path: Path) -> Path:
    """Both runs, to work on."""
    return Path(shutil.copytree(finished, tmp_path / "data"))


def flags(data: Path, *more: str) -> argparse.Namespace:
    """The flags of a script that makes held-out pairs."""
    parser = base_parser("eval_model.py", "mvp")
    add_held_out_flags(parser)
    return parser.parse_args(["--model", "nano", "--data-dir", str(data), "--held-out", str(N), "-v", "1", *more])


def texts(data: Path, place: str = "mvp") -> list[str]:
    """The instructions of a run."""
    return [row["instruction"] for row in read_jsonl(data / place / "instructions.jsonl")]


def test_every_instruction_gets_its_pair_or_its_reason_and_settings_are_the_training_runs(data: Path) -> None:
    accepted, rejected = held_out_run(flags(data), MVP)  # reads: no model is loaded
    assert len(accepted) + len(rejected) == N and accepted
    assert not any(one.reject_reasons for one in accepted) and all(one.reject_reasons for one in rejected)
    assert held_out_questions(accepted, rejected) == texts(data, "mvp/held_out")
    then, now = (Manifest.read(data / name / "manifest.json") for name in ("mvp", "mvp/held_out"))
    assert now.finished and now.constitution == then.constitution and now.seed == held_out_seed(0) != then.seed
    same = then.settings.keys() - {"pairs", "max_draws", "exclude"}
    assert {name: now.settings[name] for name in same} == {name: then.settings[name] for name in same}
    assert now.settings["rounds"] == 1  # not the milestone's two


def test_nothing_of_the_training_run_leaks(data: Path, engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first = texts(data, "mvp/held_out")
    shutil.rmtree(data / "mvp" / "held_out")
    rows = read_jsonl(data / "mvp" / "instructions.jsonl")  # now training had seen half of them, or nearly
    near = [first[0], first[1].upper().rstrip("?") + " ???", f"{first[2]} Please."]
    seen = [{"id": f"x{number}", "instruction": text, "source": "self"} for number, text in enumerate(near)]
    write_jsonl(data / "mvp" / "instructions.jsonl", [*rows, *seen])
    accepted, rejected = held_out_run(flags(data), MVP, engine, trained_on=[first[3]])
    second = held_out_questions(accepted, rejected)
    assert len(second) == N and not set(first[:4]) & set(second) and set(first[4:]) <= set(second)
    known = KnownTexts([*texts(data), *near, first[3]])
    assert [text for text in second if known.add(text)] == []  # nor any near another one
    said = capsys.readouterr().out
    assert f"{len(accepted)} of {N} instructions gave a pair" in said and "in_or_near_the_training_run 4" in said


class Breaking:
    """The engine, until it has given so many completions; then the user presses Ctrl-C."""

    def __init__(self, engine: Any, after: int) -> None:
        self._engine, self._left = engine, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def stream(self, prompts: Any) -> Iterator[Any]:
        for completion in self._engine.stream(prompts):
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
            yield completion


def lines(examples: tuple[list[Example], list[Example]]) -> list[Example]:
    return [*examples[0], *examples[1]]


def test_a_stopped_run_resumes_and_can_grow(data: Path, engine: Any) -> None:
    unbroken = lines(held_out_run(flags(data), MVP))
    shutil.rmtree(data / "mvp/held_out")
    with pytest.raises(KeyboardInterrupt):
        held_out_run(flags(data), MVP, Breaking(engine, 40))
    assert len(read_jsonl(data / "mvp/held_out/journal.jsonl")) == 40
    assert lines(held_out_run(flags(data), MVP, engine)) == unbroken
    more = lines(held_out_run(flags(data, "--held-out", str(N + 1)), MVP, engine))
    assert len(more) == N + 1 and all(one in more for one in unbroken)


def test_fewer_than_a_finished_run_has_are_its_first(data: Path) -> None:
    fewer = held_out_run(flags(data, "--held-out", "3"), MVP)
    assert held_out_questions(*fewer) == texts(data, "mvp/held_out")[:3]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda data: (data / "mvp/manifest.json").unlink(), "holds no run"),
        (lambda data: edit(data, lambda m: m["settings"].update(rounds=2)), "rounds was 1, now 2"),
        (lambda data: edit(data, lambda m: m["models"]["critic"].update(weights_sha256="0" * 64)), "critic.weights"),
        (lambda data: edit(data, lambda m: m["constitution"].update(sha256="0" * 64)), "is not the constitution"),
        (lambda data: write_jsonl(data / "mvp/instructions.jsonl", [{"instruction": "Why?"}]), "other training instr"),
    ],
)  # fmt: skip
def test_what_has_changed_is_named(data: Path, change: Any, named: str) -> None:
    change(data)
    with pytest.raises(BadInputError, match=named):
        held_out_run(flags(data), MVP)


def edit(data: Path, change: Any) -> None:
    """Change the training run's manifest."""
    place = data / "mvp/manifest.json"
    manifest = json.loads(place.read_text(encoding="utf-8"))
    change(manifest)
    place.write_text(json.dumps(manifest), encoding="utf-8")


def test_another_model_is_refused_before_anything_is_written(data: Path, engine: Any) -> None:
    edit(data, lambda manifest: manifest["models"]["generator"].update(weights_sha256="0" * 64))
    shutil.rmtree(data / "mvp/held_out")
    with pytest.raises(BadInputError, match="generator's weights_sha256 was 0000"):
        held_out_run(flags(data), MVP, engine)
    assert not (data / "mvp/held_out/journal.jsonl").exists()


def test_instructions_of_a_file_are_used_once_each_and_never_the_training_runs(
    data: Path, engine: Any, tmp_path: Path
) -> None:
    file = tmp_path / "mine.txt"
    first = texts(data, "mvp/held_out")
    own = [first[0], f"{first[0]}?", first[1]]
    file.write_text("\n".join([*own, texts(data)[0]]), encoding="utf-8")
    shutil.rmtree(data / "mvp/held_out")
    accepted, rejected = held_out_run(flags(data, "--held-out-instructions", str(file)), MVP, engine)
    found = held_out_questions(accepted, rejected)
    assert len(found) == 2 and own[2] in found and set(found) <= set(own)


def test_random_weights_get_fixed_examples(data: Path) -> None:
    accepted, rejected = held_out_run(flags(data, "--random-weights", "qwen2.5-0.5b"), MVP)
    assert accepted and not rejected
    assert len({one.instruction for one in accepted}) == len(accepted)


def test_the_plan_reckons_it_as_generation_does(data: Path) -> None:
    shutil.rmtree(data / "mvp/held_out")
    args = flags(data, "--plan", "--hardware", "a100-80gb", "--held-out", "200")
    hardware = profile("a100-80gb")
    parts, needs, said = held_out_plan(args, MVP, resolve_model(None, hardware), hardware)
    assert len(parts) == len(needs) == 1 and parts[0].engine == "vllm" and 0.1 < (parts[0].hours or 0.0) < 1
    assert said[0].startswith("held-out    200 instructions, 1 rounds") and "vllm, bf16" in said[1]
