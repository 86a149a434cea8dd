"""The run of compare_models.py: loading the models in turn, the judge, and what is written."""

from __future__ import annotations

import argparse
import time
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError, UserError
from cai_experiment.observe.content_logger import CONTENT_LOG, ContentLogger
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.records.files import read_json, show, write_jsonl
from cai_experiment.records.manifest import FRESH, Manifest, Session, open_manifest
from cai_experiment.scripts._compare_wanted import RULES, Wanted, layouts, no_judge, twin_of
from cai_experiment.scripts._ensemble import make_ensemble
from cai_experiment.scripts._judge import identity, load_judge, renamed, shown

if TYPE_CHECKING:
    from cai_experiment.comparison.said import Said
    from cai_experiment.comparison.usage import Usage
    from cai_experiment.evaluation.harm.labelled import Sets
    from cai_experiment.judging.judge import Judge

OF_MODELS = {"--model": "--models"}


def run(args: argparse.Namespace, path: Path, wanted: Wanted) -> None:
    """Compare in `path` (locked); a finished comparison is shown. Raises what loading and speaking raise; what an
    engine failed at is left unfinished, so that the same command asks it again.
    """
    from rich.console import Console

    from cai_experiment.comparison.page import HTML, JSON
    from cai_experiment.comparison.screen import print_comparison

    place = path / "manifest.json"
    before = Manifest.read(place) if place.exists() else None
    manifest = _manifest(args, wanted, before)
    failed = 0
    finished = before is not None and before.finished and before.settings.get("count") == len(wanted.instructions)
    if finished and (path / JSON).exists() and before is not None:
        from cai_experiment.records.manifest import check_same_settings

        check_same_settings(before, manifest, show(place))
        print("the comparison is finished; a larger --count extends it")
    else:
        failed = _Run(args, path, wanted, open_manifest(place, manifest)).all()
    print_comparison(read_json(path / JSON), Console(highlight=False))
    print(f"page: {show(path / HTML)}")
    if failed:
        print(f"{failed} cells or verdicts failed in the engine: not finished, the same command asks them again")


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

    def all(self) -> int:
        """Everything that is missing, then the files; what was spent stands in the manifest however it ends. Gives how
        many cells and verdicts on labelled texts the engines failed at.
        """
        write_jsonl(self.path / "instructions.jsonl", (
            {"id": one.id, "instruction": one.text, "source": one.source} for one in self.wanted.instructions
        ))  # fmt: skip
        began = time.monotonic()
        try:
            failed = self._compare()
            self.manifest.finished = not failed
            return failed
        finally:
            counts = {"instructions": len(self.wanted.instructions), "models": len(self.wanted.names)}
            spent = Session(counts, {}, time.monotonic() - began, self.args.price_per_hour)
            self.manifest = self.manifest.after(spent)
            self.manifest.write(self.path / "manifest.json")
            self.said.close()
            self.usage.journal.close()

    def _compare(self) -> int:
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
        self._write(rows, work, fit, [*notes, *layouts(self.manifest.models, self.wanted.names)])
        return sum(work.failures.values()) + sum(row["fault"] == "engine_error" for row in rows)

    def _load(self, label: str) -> Any:
        """A model's engine, counted; known from then on by its weights. Raises BadInputError for other weights."""
        from cai_experiment.comparison.usage import LOADED, Metered, start_of_memory
        from cai_experiment.engines.load import LoadSettings, load_engine

        args, began = self.args, time.monotonic()
        start_of_memory()
        try:
            engine = load_engine(LoadSettings(
                self.wanted.names[label], args.format, args.quantization, args.batch_size, args.engine,
                seed=args.seed, trains_after=False, ensemble=make_ensemble,
            ))  # fmt: skip
        except UserError as error:
            raise type(error)(f"{label}: {renamed(str(error), OF_MODELS)}") from error
        self.usage.add(label, LOADED, seconds=round(time.monotonic() - began, 4))
        if self.args.verbosity:
            print(renamed(engine.first_line, OF_MODELS), flush=True)
        facts = {**engine.describe(), "identity": identity(engine)}
        known = self.manifest.models.setdefault(label, facts)
        if (twin := twin_of(label, facts, self.manifest.models)) is not None:
            engine.close()
            raise BadInputError(f"--models: {twin} and {label} have the same weights", "name each model once")
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
        from cai_experiment.comparison.judged import agreement, fitness_of, judge_rows
        from cai_experiment.evaluation.arms import Remembering

        judge: Judge = load_judge(self.args)
        try:
            label = f"judge {judge.name}"
            facts = judge.engine.describe()
            if judge.name in self.wanted.names or twin_of("", facts, self.manifest.models):
                raise no_judge(judge.name)
            remembered = self.said.meet(label, identity(judge.engine))
            judge.engine = Remembering(judge.engine, remembered, "judge")
            fit = fitness_of(judge, self.wanted.truth, self.args.seed)
            if fit.is_fit:
                judge_rows(judge, rows, {one.id: one for one in self.wanted.constitution.principles})
            told = "" if fit.is_fit else ": nothing that it says counts"
            beside = agreement(rows) if fit.is_fit and self.wanted.truth else []
            return fit.is_fit, [f"judge {judge.name}: {fit.line}{told}", *beside]
        finally:
            judge.engine.close()

    def _write(self, rows: list[dict[str, Any]], work: Any, fit: bool, notes: list[str]) -> None:
        """items/, tables/, figures/, the page, and comparison.json last."""
        from cai_experiment.comparison.content import tell_cells
        from cai_experiment.comparison.page import write_comparison
        from cai_experiment.comparison.result import Found, result_of
        from cai_experiment.comparison.usage import usage_of
        from cai_experiment.evaluation.content import tell
        from cai_experiment.evaluation.detection import compare, measure
        from cai_experiment.evaluation.harm_model import RulesDetector
        from cai_experiment.records.files import make_folder

        measured = {label: work.detection(label) for label in self.wanted.names}
        if self.wanted.rules:
            measured[RULES] = measure(RulesDetector(), self.sets)
        make_folder(self.path / "items")
        write_jsonl(self.path / "items" / "cells.jsonl", rows)
        seen = compare(list(measured.values()), self.sets)
        for name, items in seen.items.items():
            write_jsonl(self.path / "items" / f"{name}.jsonl", items)
        with ContentLogger(self.args.verbosity, self.path / CONTENT_LOG) as log:
            tell_cells(log, rows)
            tell(log, seen)
        usage = {
            label: usage_of(self.usage, label, self.args.price_per_hour, self.manifest.models[label],
                            self.wanted.weights_gb(label, self.manifest.models[label]))
            for label in self.wanted.names
        }  # fmt: skip
        by = "truth" if self.wanted.truth else "judge" if fit else "itself"
        found = Found(list(self.wanted.names), rows, measured, self.sets, by, usage, self.args.seed, notes)  # type: ignore[arg-type]
        write_comparison(self.path, result_of(found), rows)
