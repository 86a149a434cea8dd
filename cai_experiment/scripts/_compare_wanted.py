"""Who is compared by compare_models.py, on what; nothing is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cai_experiment.constitution.principles import Constitution, load_constitution
from cai_experiment.errors import BadInputError
from cai_experiment.models.choice import ModelChoice, resolve_model
from cai_experiment.models.hardware import Hardware, detect, profile
from cai_experiment.models.memory import weights_gb
from cai_experiment.models.presets import NANO_DIR, PRESETS, ModelPreset
from cai_experiment.models.serving import known_numbers
from cai_experiment.nano import is_nano
from cai_experiment.pipeline.instruct import Instruction, example_id
from cai_experiment.records.files import read_jsonl
from cai_experiment.scripts._inputs import rows_of
from cai_experiment.scripts._judge import is_url, shown

RULES, SECOND_NANO = "rules", "nano-b"
WORLD, GENERAL = "questions of the shipped model's world, held out", "general questions (judging/known_answers.jsonl)"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Who is compared, on what. `truth`: all are of the shipped kind, whose world knows every flaw."""

    names: Mapping[str, str]  # a model's name in the tables -> the user's words for it
    choices: Mapping[str, ModelChoice]
    rules: bool
    instructions: Sequence[Instruction]
    source: str
    constitution: Constitution

    @property
    def truth(self) -> bool:
        """True if the written world's truth is known of every answer."""
        return bool(self.choices) and all(is_nano(choice.path_or_id) for choice in self.choices.values())

    def weights_gb(self, label: str, facts: Mapping[str, Any]) -> float | None:
        """A model's by arithmetic, in the precision that was loaded; None where the numbers are not at hand."""
        numbers, precision = known_numbers(self.choices[label]), facts.get("quantization")
        return None if numbers is None or not precision else weights_gb(numbers, str(precision))


def twin_of(label: str, facts: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Another of the loaded models with the same weights in the same precision and layout, by the engines' facts."""
    names = ("weights_sha256", "quantization", "layout")
    if facts.get(names[0]) is None:
        return None
    same = (one for one, its in known.items() if all(its.get(name) == facts.get(name) for name in names))
    return next((one for one in same if one != label), None)


def layouts(known: Mapping[str, Mapping[str, Any]], labels: Iterable[str]) -> list[str]:
    """Base models against chat models: that is to be said."""
    found = {label: known[label].get("layout") for label in labels}
    if len(set(found.values())) < 2:
        return []
    said = ", ".join(f"{label} {layout}" for label, layout in found.items())
    return [f"the models are asked in different layouts ({said}): differences are of kind, too"]


def wanted(args: argparse.Namespace) -> Wanted:
    """Models and instructions. Raises BadInputError for a name that means nothing, with the nearest ones, for one model
    twice, for a judge that is compared, and for bad files.
    """
    hardware = hardware_of(args)
    asked = args.models or default_models(hardware)
    names: dict[str, str] = {}
    choices: dict[str, ModelChoice] = {}
    for name in (one for one in asked if one.lower() != RULES):
        choice = resolve_model(name, hardware, "--models", ensembles=True)
        label = shown(choice.name)
        for other, known in choices.items():
            if label == other or choice.path_or_id == known.path_or_id:
                raise BadInputError(f"--models: {names[other]} and {name} are both called {label}",
                                    "name each model once; folders need different last parts")  # fmt: skip
        names[label], choices[label] = name, choice
    if not names:
        raise BadInputError("--models names no model beside the rules", "e.g. --models nano,nano-b,rules")
    _check_judge(args, choices, hardware)
    truth = all(is_nano(choice.path_or_id) for choice in choices.values())
    rows, source = _instructions(args, truth)
    return Wanted(names, choices, len(names) < len(asked), rows, source, load_constitution(args.constitution))


def hardware_of(args: argparse.Namespace) -> Hardware:
    """The machine that --hardware names, else this one."""
    return profile(args.hardware) if args.hardware else detect()


def _check_judge(args: argparse.Namespace, choices: Mapping[str, ModelChoice], hardware: Hardware) -> None:
    if args.judge is None or is_url(args.judge):
        return
    judge = resolve_model(args.judge, hardware, "--judge", ensembles=True)
    if shown(judge.name) in choices or judge.path_or_id in (choice.path_or_id for choice in choices.values()):
        raise no_judge(args.judge)


def no_judge(name: str) -> BadInputError:
    """A judge that is one of the compared models."""
    return BadInputError(f"--judge {name} is one of the compared models, and no independent judge", "name another")


def default_models(hardware: Hardware) -> tuple[str, ...]:
    """Without a GPU both shipped models, whose truth is known; with one what the hardware allows and the next smaller
    preset of the same family and kind (base or chat), so that size is all that differs: a critic that costs half as
    much is the usual question. And the rules.
    """
    second = SECOND_NANO if SECOND_NANO in PRESETS else str(NANO_DIR.with_name(SECOND_NANO))
    best = resolve_model(None, hardware).preset
    if hardware.kind != "cuda" or best is None or best.is_local:
        print("no --models: the shipped models, whose world's truth is known, and the rules")
        return "nano", second, RULES
    neighbour = _neighbour(best)
    if neighbour is None:
        print(f"no --models: {best.key}, what the hardware allows, and the rules; no preset is smaller")
        return best.key, RULES
    kinds = f"both {best.kind}" if best.kind == neighbour.kind else f"{best.kind} against {neighbour.kind}"
    print(f"no --models: {best.key}, what the hardware allows, {neighbour.key}, its next smaller neighbour ({kinds}), "
          "and the rules")  # fmt: skip
    return best.key, neighbour.key, RULES


def _neighbour(best: ModelPreset) -> ModelPreset | None:
    """The largest smaller preset: of the same family and kind, else of the family, else of the kind, else any."""
    smaller = [one for one in PRESETS.values() if not one.is_local and one.parameters < best.parameters]
    if not smaller:
        return None

    def near(one: ModelPreset) -> tuple[bool, bool, int]:
        return one.key.split("-")[0] == best.key.split("-")[0], one.kind == best.kind, one.parameters

    return max(smaller, key=near)


def _instructions(args: argparse.Namespace, truth: bool) -> tuple[Sequence[Instruction], str]:
    """(at most --count instructions, where they are from)."""
    if args.instructions is not None:
        rows, source = rows_of(args.instructions, args.field)
        if len(rows) < args.count:
            print(f"{args.instructions.name} holds {len(rows)} instructions: all are used")
        return rows[: args.count], source
    if truth:
        from cai_experiment.nano.world import held_out_questions

        texts, source = held_out_questions(args.count, args.seed), WORLD
    else:
        from cai_experiment.judging.fitness import KNOWN_ANSWERS

        known = read_jsonl(KNOWN_ANSWERS, repair=False)
        texts, source = [str(row["question"]) for row in known][: args.count], GENERAL
        print(f"no --instructions: {len(texts)} {GENERAL}; your own say more")
    return [Instruction(example_id(place), text, source) for place, text in enumerate(texts)], source
