"""What run_investigation.py does: the sandbox, the manifest, the sessions, and what is printed of them."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cai_experiment.errors import BadInputError
from cai_experiment.investigations.compare import (
    COMPARISON,
    MODEL_COMPARISON,
    MODELS,
    compare_conditions,
    compare_models,
    model_folder,
    print_conditions,
    print_models,
)
from cai_experiment.investigations.conditions import CONDITIONS, Document, read_documents
from cai_experiment.investigations.run import Investigation, is_finished, session_folder, turns_done
from cai_experiment.investigations.session import SessionSettings
from cai_experiment.models.choice import ModelChoice, resolve_model
from cai_experiment.models.hardware import Hardware, detect
from cai_experiment.observe.content_logger import CONTENT_LOG, TEXTS, ContentLogger
from cai_experiment.observe.screen import SHOWN, escaped, shortened
from cai_experiment.records.files import make_folder, show
from cai_experiment.records.manifest import FRESH, Manifest, Session, check_same_settings, open_manifest
from cai_experiment.records.store import RunFolder
from cai_experiment.scripts._investigation_model import chosen_model, compared_models, load, named_by, turns_of

ROLE = "investigator"
Watch = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Documents:
    """Both sets, whole."""

    heritage: Sequence[Document]
    other: Sequence[Document]

    def sha256(self) -> str:
        """Of all names and texts."""
        digest = hashlib.sha256()
        for one in (*self.heritage, *self.other):
            digest.update(f"{one.name}\0{one.text}\0".encode())
        return digest.hexdigest()


def documents_of(args: argparse.Namespace) -> Documents:
    """The documents that the flags name. Raises BadInputError."""
    return Documents(read_documents(args.documents), read_documents(args.other_documents))


# ---------------------------------------------------------------- sandbox


def sandbox_tier(args: argparse.Namespace) -> str:
    """The tier to run code in; prints it with its limits. Raises UserError where none works.

    It is "" where no code is to run: what is finished can be shown on a machine without a sandbox.
    """
    if not _is_work_left(args):
        return ""
    from cai_experiment.investigations.sandbox import Sandbox, strongest

    tier = strongest(unsafe_local=args.unsafe_local)
    print(Sandbox(tier).first_line, flush=True)
    return tier


def _is_work_left(args: argparse.Namespace) -> bool:
    """False if all that is asked for is finished. Raises BadInputError for a model's wrong name, told first."""
    run, hardware = args.data_dir / args.run, detect()
    names: list[str | None] = [chosen_model(args, hardware)[0]]
    folders = [session_folder(run, *one) for one in asked_sessions(args)]
    if args.compare is not None:
        compared = compared_models(args, hardware)
        names, folders = [*compared], [model_folder(run, name) for name in compared]
    if args.random_weights is None:
        for name in names:
            resolve_model(name, hardware, named_by(args))
    return args.fresh or not all(is_finished(folder) for folder in folders)


# ---------------------------------------------------------------- conditions


def asked_sessions(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(condition, repeat) of each session that the flags ask for, in their order."""
    conditions = CONDITIONS if args.condition == "all" else (args.condition,)
    return [(condition, repeat) for repeat in range(args.repeats) for condition in conditions]


def investigation(
    args: argparse.Namespace, model: str, engine: Any, documents: Documents, tier: str
) -> Investigation:  # fmt: skip
    """The sessions' shared part, as the flags have it."""
    from cai_experiment.investigations.sandbox import Sandbox

    settings = SessionSettings(turns_of(args), args.reply_tokens, args.temperature, args.seed, args.finish_phrase)
    return Investigation(
        model, engine, lambda serve: Sandbox(tier, serve=serve), documents.heritage, documents.other, args.style,
        settings,
    )  # fmt: skip


def _manifest(args: argparse.Namespace, documents: Documents, models: dict[str, Any]) -> Manifest:
    """What decides the sessions. The sandbox's tier does not: each session's summary says which it ran in."""
    names = ("style", "reply_tokens", "max_tokens", "temperature", "finish_phrase")
    settings = {name: getattr(args, name) for name in names}
    settings |= {"task_turns": turns_of(args), "documents": documents.sha256()}
    return Manifest(settings, args.seed, models, {"file": "", "sha256": ""})


def investigate(args: argparse.Namespace, folder: RunFolder, documents: Documents, tier: str) -> None:
    """Run what is not finished of the conditions asked for, then compare all that are."""
    asked = asked_sessions(args)
    left = [one for one in asked if not is_finished(session_folder(folder.path, *one))]
    hardware, path = detect(), folder.path / "manifest.json"
    name, why = chosen_model(args, hardware)
    if why:
        print(why)
    if not left:
        _check_finished(args, path, documents, resolve_model(name, hardware, named_by(args)))
        print("all sessions asked for are finished")
    else:
        _run_all(args, folder.path, left, documents, tier, name, hardware)
    from rich.console import Console

    print_conditions(compare_conditions(folder.path), Console(highlight=False))
    print(f"read {show(session_folder(folder.path, *asked[0]) / 'conversation.md')}; {show(folder.path / COMPARISON)}")
    if args.condition != "all":
        print("next: the other conditions with --condition all")


def _check_finished(args: argparse.Namespace, path: Path, documents: Documents, choice: ModelChoice) -> None:
    """Raise BadInputError if the finished sessions are of other settings or another model; nothing is loaded."""
    old = Manifest.read(path)
    check_same_settings(old, _manifest(args, documents, old.models), show(path))
    was = old.models[ROLE].get("model")
    if args.random_weights is None and was != choice.name:
        raise BadInputError(f"{show(path)} has model {was}, now {choice.name}", f"use the old model, or {FRESH}")


def _run_all(
    args: argparse.Namespace, run: Path, left: Sequence[tuple[str, int]], documents: Documents, tier: str,
    name: str | None, hardware: Hardware,
) -> None:  # fmt: skip
    began = time.monotonic()
    engine = load(args, name, hardware)
    try:
        facts = engine.describe()
        manifest = open_manifest(run / "manifest.json", _manifest(args, documents, {ROLE: facts}))
        manifest = manifest.after_loading(time.monotonic() - began, args.price_per_hour)
        shared = investigation(args, str(facts["model"]), engine, documents, tier)
        _say_left_out(shared, dict.fromkeys(condition for condition, _ in left))
        for condition, repeat in left:
            manifest = _one_session(args, run, shared, condition, repeat, manifest, tier)
        replace(manifest, finished=True).write(run / "manifest.json")
    finally:
        engine.close()


def _one_session(
    args: argparse.Namespace, run: Path, shared: Investigation, condition: str, repeat: int, manifest: Manifest,
    tier: str,
) -> Manifest:  # fmt: skip
    """Run one session; gives the manifest with what this process spent on it, also written where it is stopped."""
    folder, began, spent = session_folder(run, condition, repeat), time.monotonic(), {"read": 0, "written": 0}
    label = condition if not repeat else f"{condition}, repeat {repeat + 1}"
    done, was = turns_done(folder)
    if done:
        other = f" in {tier} (it was {escaped(was)})" if was not in ("", tier) else ""
        print(f"{label}: goes on after turn {done}{other}", flush=True)
    counts = dict(manifest.counts)
    try:
        with ContentLogger(args.verbosity, run / CONTENT_LOG) as log:
            summary = shared.run(folder, condition, repeat, watch=counting(spent, watching(label, log)))
        counts["sessions"] = counts.get("sessions", 0) + 1
        say_end(label, summary)
    finally:
        manifest = manifest.after(Session(counts, spent, time.monotonic() - began, args.price_per_hour))
        manifest.write(run / "manifest.json")
    return manifest


def _say_left_out(shared: Investigation, conditions: Iterable[str]) -> None:
    """Which documents the context is too short for; BadInputError if no document of a condition fits."""
    for condition in conditions:
        heritage, other = shared.document_sets(condition)
        shown = other if condition == "wrong" else heritage
        if condition != "none" and shown.left_out:
            left = ", ".join(shown.left_out)
            print(
                f"{condition}: {len(shown.chosen)} documents fit a third of the context; left out: {left}", flush=True
            )


# ---------------------------------------------------------------- two models


def compare(args: argparse.Namespace, folder: RunFolder, documents: Documents, tier: str) -> None:
    """Two models, one after the other in memory, on the architecture task."""
    hardware = detect()
    names = compared_models(args, hardware)
    place, began, spent = folder.path / MODELS, time.monotonic(), {"read": 0, "written": 0}
    make_folder(place)
    path = place / "manifest.json"
    models = Manifest.read(path).models if path.is_file() else {}
    manifest = open_manifest(path, _manifest(args, documents, models))

    def one(name: str) -> Investigation:
        engine = load(args, name, hardware)
        models[name] = engine.describe()
        return investigation(args, name, engine, documents, tier)

    def watch(name: str) -> Watch:
        return counting(spent, watching(name, log))

    from rich.console import Console

    with ContentLogger(args.verbosity, folder.path / CONTENT_LOG) as log:
        compared = compare_models(folder.path, names, one, watch)
    print_models(compared, Console(highlight=False))
    counts = {"models": len(names)}
    manifest = manifest.after(Session(counts, spent, time.monotonic() - began, args.price_per_hour))
    replace(manifest, models=models, finished=True).write(path)
    print(f"whole conversations: {show(folder.path / MODEL_COMPARISON)}")


# ---------------------------------------------------------------- the terminal


def watching(label: str, log: ContentLogger) -> Watch:
    """A watcher that prints a line for each turn, and tells the content log what was said."""

    def watch(row: dict[str, Any]) -> None:
        if log.verbosity:
            print(turn_line(label, row), flush=True)
        facts = {"session": label, "turn": row["turn"] + 1, "task": row["task"], TEXTS: [row["text"]]}
        shown = SHOWN if log.verbosity < 3 else 100_000  # a turn is long, and level 3 is asked for to read it
        log.log_stage(f"INVESTIGATION-TURN {row['turn'] + 1}", f'{label}:\n"{row["text"]}"', facts, truncate=shown)

    return watch


def counting(spent: dict[str, int], watch: Watch) -> Watch:
    """`watch`, and the turn's tokens added to `spent`."""

    def counted(row: dict[str, Any]) -> None:
        for name in spent:
            spent[name] += row[name]
        watch(row)

    return counted


def turn_line(label: str, row: dict[str, Any]) -> str:
    """A turn in one line: seconds, tokens, blocks run, errors, notes."""
    ran = [one for one in row["blocks"] if one["ran"]]
    errors = [one["error"] for one in ran if one["error"]]
    parts = [f"{escaped(label)} turn {row['turn'] + 1}", row["task"], f"{row['seconds']:.1f} s",
             f"{row['written']} tokens", f"{len(ran)} block{'' if len(ran) == 1 else 's'}"]  # fmt: skip
    parts += [f"{len(errors)} failed ({escaped(shortened(errors[-1], 60))})"] if errors else []
    parts += [f"{len(row['notes'])} notes"] if row["notes"] else []
    return " | ".join(parts)


def say_end(label: str, summary: dict[str, Any]) -> None:
    """How a session ended."""
    ends = ", ".join(f"{one['task']}: {one['finish']}" for one in summary["tasks"])
    arrived = summary["documents_arrive_in_turn"]
    documents = f"; documents arrived in turn {arrived}" if arrived else ""
    if summary["condition"] != "none" and not arrived:
        documents = "; the documents never arrived, no room was left: this is a session without documents"
    print(f"{label} ended after {summary['turns']} turns ({ends}){documents}", flush=True)
