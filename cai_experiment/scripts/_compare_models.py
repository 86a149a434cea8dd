"""What compare_models.py does: which models, which instructions, loading them in turn, and what is written."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.principles import Constitution, load_constitution
from cai_experiment.errors import BadInputError, UserError
from cai_experiment.models.choice import ModelChoice, numbers_of, resolve_model
from cai_experiment.models.hardware import Hardware, detect, profile
from cai_experiment.models.presets import NANO_DIR, PRESETS
from cai_experiment.nano import is_nano
from cai_experiment.pipeline.instruct import Instruction, example_id
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.records.files import read_json, read_jsonl, show, write_jsonl
from cai_experiment.records.manifest import FRESH, Manifest, Session, open_manifest
from cai_experiment.scripts._inputs import rows_of
from cai_experiment.scripts._judge import identity, is_url, load_judge, renamed, shown

if TYPE_CHECKING:
    from cai_experiment.comparison.said import Said
    from cai_experiment.comparison.usage import Usage
    from cai_experiment.evaluation.harm.labelled import Sets
    from cai_experiment.judging.judge import Judge

RULES, SECOND_NANO = "rules", "nano-b"
WORLD, GENERAL = "questions of the shipped model's world, held out", "general questions (judging/known_answers.jsonl)"
OF_MODELS = {"--model": "--models"}


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


# ---------------------------------------------------------------- who and what


def wanted(args: argparse.Namespace) -> Wanted:
    """Models and instructions; nothing is loaded. Raises BadInputError for a name that means nothing, with the nearest
    ones, for one model twice, and for bad files.
    """
    hardware = profile(args.hardware) if args.hardware else detect()
    asked = args.models or default_models(hardware)
    names: dict[str, str] = {}
    choices: dict[str, ModelChoice] = {}
    for name in (one for one in asked if one.lower() != RULES):
        choice = _resolved(name, hardware)
        label = shown(choice.name)
        if label in names:
            raise BadInputError(f"--models: {names[label]} and {name} are both called {label}",
                                "name each model once; folders need different last parts")  # fmt: skip
        names[label], choices[label] = name, choice
    if args.judge is not None and not is_url(args.judge) and shown(args.judge).lower() in map(str.lower, names):
        raise _no_judge(args.judge)
    if not names:
        raise BadInputError("--models names no model beside the rules", "e.g. --models nano,nano-b,rules")
    truth = all(is_nano(choice.path_or_id) for choice in choices.values())
    rows, source = _instructions(args, truth)
    constitution = load_constitution(args.constitution)
    return Wanted(names, choices, len(names) < len(asked), rows, source, constitution)


def _no_judge(name: str) -> BadInputError:
    return BadInputError(f"--judge {name} is one of the compared models, and no independent judge", "name another")


def default_models(hardware: Hardware) -> tuple[str, ...]:
    """Without a GPU both shipped models, whose truth is known; with one what the hardware allows and the next smaller
    preset of a kind with it: a critic that costs half as much is the usual question. And the rules.
    """
    second = SECOND_NANO if SECOND_NANO in PRESETS else str(NANO_DIR.with_name(SECOND_NANO))
    best = resolve_model(None, hardware).preset
    if hardware.kind != "cuda" or best is None or best.is_local:
        print("no --models: the shipped models, whose world's truth is known, and the rules")
        return "nano", second, RULES
    size = best.architecture.parameters
    smaller = [one for one in PRESETS.values() if not one.is_local and one.architecture.parameters < size]
    same = [one for one in smaller if one.key.split("-")[0] == best.key.split("-")[0]] or smaller
    if not same:
        return best.key, RULES
    neighbour = max(same, key=lambda one: one.architecture.parameters)
    print(f"no --models: {best.key}, what the hardware allows, its smaller neighbour {neighbour.key}, and the rules")
    return best.key, neighbour.key, RULES


def _resolved(name: str, hardware: Hardware) -> ModelChoice:
    try:
        return resolve_model(name, hardware)
    except UserError as error:
        raise type(error)(renamed(str(error), OF_MODELS)) from error


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


# ---------------------------------------------------------------- the run


def run(args: argparse.Namespace, path: Path, wanted: Wanted) -> None:
    """Compare in `path` (locked); a finished comparison is shown. Raises what loading and speaking raise."""
    from rich.console import Console

    from cai_experiment.comparison.page import HTML, JSON
    from cai_experiment.comparison.screen import print_comparison

    place = path / "manifest.json"
    before = Manifest.read(place) if place.exists() else None
    manifest = _manifest(args, wanted, before)
    finished = before is not None and before.finished and before.settings.get("count") == len(wanted.instructions)
    if finished and (path / JSON).exists() and before is not None:
        from cai_experiment.records.manifest import check_same_settings

        check_same_settings(before, manifest, show(place))
        print("the comparison is finished; a larger --count extends it")
    else:
        _Run(args, path, wanted, open_manifest(place, manifest)).all()
    print_comparison(read_json(path / JSON), Console(highlight=False))
    print(f"page: {show(path / HTML)}")


def _manifest(args: argparse.Namespace, wanted: Wanted, before: Manifest | None) -> Manifest:
    stages = StageSettings()
    settings = {
        "models": list(wanted.names), "rules": wanted.rules, "count": len(wanted.instructions),
        "instructions": wanted.source, "judge": args.judge and shown(args.judge), "judge_model": args.judge_model,
        "precision": args.quantization, "layout": args.format, "asked_engine": args.engine,
        "max_tokens_answer": stages.max_tokens_answer, "max_tokens_critique": stages.max_tokens_critique,
    }  # fmt: skip
    known = {} if before is None else before.models
    return Manifest(settings, args.seed, known, {"file": args.constitution.name, "sha256": wanted.constitution.sha256})


class _Run:
    """One call of the script on a run's folder."""

    def __init__(self, args: argparse.Namespace, path: Path, wanted: Wanted, manifest: Manifest) -> None:
        from cai_experiment.comparison.said import Said
        from cai_experiment.comparison.usage import Usage
        from cai_experiment.evaluation.harm.labelled import shipped_sets

        self.args, self.path, self.wanted, self.manifest = args, path, wanted, manifest
        self.said: Said = Said(path / "said")
        self.usage: Usage = Usage(path / "usage.jsonl")
        self.sets: Sets = shipped_sets()
        for label, facts in manifest.models.items():
            if label in wanted.names:
                self.said.meet(label, str(facts["identity"]))

    def all(self) -> None:
        """Everything that is missing, then the files; what was spent stands in the manifest however it ends."""
        write_jsonl(self.path / "instructions.jsonl", (
            {"id": one.id, "instruction": one.text, "source": one.source} for one in self.wanted.instructions
        ))  # fmt: skip
        began = time.monotonic()
        try:
            self._compare()
            self.manifest.finished = True
        finally:
            counts = {"instructions": len(self.wanted.instructions), "models": len(self.wanted.names)}
            spent = Session(counts, {}, time.monotonic() - began, self.args.price_per_hour)
            self.manifest = self.manifest.after(spent)
            self.manifest.write(self.path / "manifest.json")
            self.said.close()
            self.usage.journal.close()

    def _compare(self) -> None:
        from cai_experiment.comparison.cells import Cell
        from cai_experiment.comparison.work import Work

        names, stages = list(self.wanted.names), StageSettings(seed=self.args.seed)
        cells = [
            Cell(generator, critic, one, self.wanted.constitution.principles, stages)
            for one in self.wanted.instructions
            for generator, critic in product(names, names)
        ]
        work = Work(names, cells, self.sets, self.said, self._load, self.args.verbosity)
        work.run()
        rows = [cell.row(self.wanted.truth) for cell in cells]
        fit, notes = self._judged(rows)
        self._write(rows, work, fit, notes)

    def _load(self, label: str) -> Any:
        """A model's engine, counted; known from then on by its weights. Raises BadInputError for other weights."""
        from cai_experiment.comparison.usage import LOADED, Metered, start_of_memory
        from cai_experiment.engines.load import LoadSettings, load_engine

        args, began = self.args, time.monotonic()
        start_of_memory()
        try:
            engine = load_engine(LoadSettings(
                self.wanted.names[label], args.format, args.quantization, args.batch_size, args.engine,
                seed=args.seed, trains_after=False,
            ))  # fmt: skip
        except UserError as error:
            raise type(error)(f"{label}: {renamed(str(error), OF_MODELS)}") from error
        self.usage.add(label, LOADED, seconds=round(time.monotonic() - began, 4))
        if self.args.verbosity:
            print(renamed(engine.first_line, OF_MODELS), flush=True)
        facts = {**engine.describe(), "identity": identity(engine)}
        known = self.manifest.models.setdefault(label, facts)
        if any(known.get(name) != facts.get(name) for name in ("identity", "engine")):
            engine.close()
            raise BadInputError(f"{show(self.path)}: {label} has other weights, engine or precision than before", FRESH)
        self.manifest.write(self.path / "manifest.json")
        self.said.meet(label, str(facts["identity"]))
        return Metered(engine, label, self.usage)

    def _judged(self, rows: list[dict[str, Any]]) -> tuple[bool, list[str]]:
        """(is there a judge that is fit, what is to be said of it); writes its word into the rows."""
        if self.args.judge is None:
            alone = "no judge: rightness and repair are each critic's own judgement; --judge names an independent one"
            return False, [] if self.wanted.truth else [alone]
        from cai_experiment.comparison.judged import fitness_of, judge_rows
        from cai_experiment.evaluation.arms import Remembering

        judge: Judge = load_judge(self.args)
        try:
            label = f"judge {judge.name}"
            if judge.name in self.wanted.names:
                raise _no_judge(judge.name)
            remembered = self.said.meet(label, identity(judge.engine))
            judge.engine = Remembering(judge.engine, remembered, "judge")
            fit = fitness_of(judge, self.wanted.truth, self.args.seed)
            if fit.is_fit:
                judge_rows(judge, rows, {one.id: one for one in self.wanted.constitution.principles})
            told = "" if fit.is_fit else ": nothing that it says counts"
            return fit.is_fit, [f"judge {judge.name}: {fit.line}{told}"]
        finally:
            judge.engine.close()

    def _write(self, rows: list[dict[str, Any]], work: Any, fit: bool, notes: list[str]) -> None:
        """items/, tables/, figures/, the page, and comparison.json last."""
        from cai_experiment.comparison.page import write_comparison
        from cai_experiment.comparison.result import Found, result_of
        from cai_experiment.comparison.usage import usage_of
        from cai_experiment.evaluation.detection import compare, measure
        from cai_experiment.evaluation.harm_model import RulesDetector
        from cai_experiment.records.files import make_folder

        measured = {label: work.detection(label) for label in self.wanted.names}
        if self.wanted.rules:
            measured[RULES] = measure(RulesDetector(), self.sets)
        make_folder(self.path / "items")
        write_jsonl(self.path / "items" / "cells.jsonl", rows)
        for name, items in compare(list(measured.values()), self.sets).items.items():
            write_jsonl(self.path / "items" / f"{name}.jsonl", items)
        usage = {
            label: usage_of(self.usage, label, self.args.price_per_hour, self.manifest.models[label])
            for label in self.wanted.names
        }
        by = "truth" if self.wanted.truth else "judge" if fit else "itself"
        found = Found(list(self.wanted.names), rows, measured, self.sets, by, usage, self.args.seed, notes)  # type: ignore[arg-type]
        write_comparison(self.path, result_of(found), rows)


# ---------------------------------------------------------------- the plan


def plan(args: argparse.Namespace, wanted: Wanted) -> list[str]:
    """Memory and hours at most; nothing is loaded."""
    from cai_experiment.models.memory import vram_gb
    from cai_experiment.models.plan import in_words, tokens_per_second

    hardware = profile(args.hardware) if args.hardware else detect()
    count, models, stages = len(wanted.instructions), len(wanted.names), StageSettings()
    tokens = count * (stages.max_tokens_answer * (1 + models) + stages.max_tokens_critique * models)
    lines = [f"work        {count} instructions, {models * models} cells of generator and critic; at most "
             f"{tokens:,} tokens a model, each loaded about three times"]  # fmt: skip
    hours: float | None = 0.0
    for label, choice in wanted.choices.items():
        numbers, precision = numbers_of(choice), args.quantization or hardware.training_quantization
        lines.append(f"model       {label}, {precision}: {vram_gb(numbers, precision, 4096):.1f} GB a conversation of "
                     "4,096 tokens")  # fmt: skip
        speed = tokens_per_second(numbers, hardware, args.batch_size or 8, precision, "hf")
        hours = None if hours is None or speed is None else hours + tokens / speed[0] / 3600
    words = in_words(hours, (hours or 0.0) * args.price_per_hour)
    return [*lines, f"time        {words} at most, by arithmetic; loading, verdicts and download come on top"]
