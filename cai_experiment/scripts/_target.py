"""What eval_model.py evaluates: a trained adapter on its base, in memory while it is needed; and the judge."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.found import ITEMS_FOLDER
from cai_experiment.milestones import MILESTONES, SCRIPTS
from cai_experiment.records.files import read_json, show
from cai_experiment.scripts import _training
from cai_experiment.scripts._judge import identity, is_url, load_judge, shown
from cai_experiment.training import dpo, sft
from cai_experiment.training.data import Pair, read_pairs
from cai_experiment.training.plumbing import is_plumbing, label
from cai_experiment.training.settings import TrainResult, adapter_sha256

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings
    from cai_experiment.evaluation.arms import Remembered, Speakers
    from cai_experiment.judging.judge import Judge

SAID, JUDGED = "said.jsonl", "judged.jsonl"  # what arms and judge said, so that a killed evaluation goes on


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished training: its adapter, the adapter that DPO started from, and what it was trained on."""

    adapter: Path
    sha256: str  # of the adapter's weights: what a report's figures are of
    reference: Path | None
    settings: dict[str, Any]
    pairs: list[Pair]
    result: TrainResult | None  # None for a checkpoint, and for an adapter from elsewhere

    @property
    def notes(self) -> list[str]:
        """What training has to say in every later report: alarms, dropped pairs, where it started."""
        found = [] if self.result is None else list(self.result.alarms)
        if self.result is not None and self.result.dropped:
            found.append(f"{len(self.result.dropped)} overlong pairs were dropped, not cut")
        if self.reference is not None:
            found.append("DPO started from an adapter of SFT: implicit rewards are against it, answers before are the "
                         "base model's")  # fmt: skip
        if not self.settings:
            found.append("which weights the adapter was trained on is not known here: the base was not checked")
        return [*found, *([label(self.pairs)] if is_plumbing(self.pairs) else [])]


def finished_training(args: argparse.Namespace) -> Trained:
    """The training of --run. Raises BadInputError that names the next command where there is none."""
    adapter = args.adapter or _final(args)
    home = adapter.parent  # the training's folder, of a checkpoint as well
    settings = read_json(home / "settings.json") if (home / "settings.json").exists() else {}
    reference = home / sft.FOLDER / "final" if "start_adapter" in settings else None
    if reference is not None and not reference.is_dir():
        raise BadInputError(f"{show(reference)} is not there, and {show(adapter)} was trained on from it",
                            "put it back beside the adapter")  # fmt: skip
    made = dpo.finished(home) if adapter.name == "final" and (adapter / dpo.RECORD).exists() else None
    return Trained(adapter, adapter_sha256(adapter), reference, settings, _pairs(args), made)


def _final(args: argparse.Namespace) -> Path:
    """The run's own adapter: DPO's, or that of SFT alone."""
    folder = args.checkpoint_dir / args.run
    for place in (folder / "final", folder / sft.FOLDER / "final"):
        if place.is_dir():
            return place
    named = "" if args.run == args.milestone else f" --run {args.run}"
    train = f"{SCRIPTS}train_dpo.py --milestone {args.milestone}{named}"
    raise BadInputError(f"{show(folder)} holds no trained adapter (final/)", f"train first: {train}")


def _pairs(args: argparse.Namespace) -> list[Pair]:
    """What it was trained on. BadInputError if the file is not there."""
    pairs = args.pairs or args.data_dir / args.run / "pairs.jsonl"
    if args.pairs is None and args.random_weights is not None:
        return list(_training.own_pairs(args, MILESTONES[args.milestone], pairs.parent))
    if not pairs.exists():
        raise BadInputError(f"{show(pairs)} is not there", "name the pairs that were trained on with --pairs")
    return read_pairs(pairs)


def check_base(trained: Trained, engine: Any) -> None:
    """Raise BadInputError if the adapter was trained on other weights than those that are loaded.

    A hub's revision says nothing where Unsloth trained on its own quantised copy, and another engine evaluates.
    """
    known = json.loads(_training.base_of(engine) or "{}")
    backend = "" if trained.result is None else trained.result.backend
    same_files = (backend == "unsloth") == (engine.name == "unsloth")
    for name in ("weights_sha256", "random_seed", *(["revision"] if same_files else [])):
        then = trained.settings.get(f"base_{name}")
        if then is not None and known.get(name) is not None and then != known[name]:
            raise BadInputError(
                f"{show(trained.adapter)} was trained on other weights ({name} {then}) than {known['model']} has",
                "name the model that it was trained on with --model",
            )


# ---------------------------------------------------------------- the target


def load_settings(args: argparse.Namespace) -> LoadSettings:
    """How base and adapter are loaded: by transformers, whose batches hold many answers, unless --engine unsloth."""
    from cai_experiment.engines.load import LoadSettings

    engine = "unsloth" if args.engine == "unsloth" else "hf"
    return LoadSettings(
        args.model, args.format, args.quantization, args.batch_size, engine, seed=args.seed,
        random_weights=args.random_weights, max_length=args.max_length,
    )  # fmt: skip


class Target:
    """Base and trained model in memory, loaded when first asked for; its memory can be given back to a judge."""

    def __init__(self, args: argparse.Namespace, trained: Trained) -> None:
        self.args, self.trained = args, trained
        self.engine: Any = None
        self.model: Any = None
        self.facts: dict[str, Any] = {}
        self._remembered: Remembered | None = None
        self._judge: Judge | None = None
        self._verdicts: Remembered | None = None

    def speakers(self) -> Speakers:
        """The model with its adapter. Raises BadInputError if it is not the adapter's base."""
        from cai_experiment.engines.load import load_engine
        from cai_experiment.evaluation.arms import Speakers

        if self.model is None:
            if not is_url(self.args.judge):
                self._close_judge()
            self.engine = load_engine(load_settings(self.args))
            print(self.engine.first_line, flush=True)
            check_base(self.trained, self.engine)
            model, _ = self.engine.release_for_training()
            self.model = dpo.load_adapter(model, self.trained.adapter)
            if hasattr(self.model, "for_inference"):  # Unsloth
                self.model.for_inference()
        engine = self.engine
        return Speakers(self.model, engine.tokenizer, engine.renderer, type(engine).from_model)

    def remembered(self) -> Remembered:
        """What both arms have said in earlier calls."""
        if self._remembered is None:
            renderer = self.speakers().renderer
            whose = [_training.base_of(self.engine), self.trained.sha256, renderer.layout, renderer.max_length]
            self._remembered = self._file(SAID, json.dumps(whose))
        return self._remembered

    def _file(self, name: str, whose: str) -> Remembered:
        from cai_experiment.evaluation.arms import Remembered

        return Remembered(self.args.data_dir / self.args.run / ITEMS_FOLDER / name, whose)

    def described(self) -> dict[str, Any]:
        """What the report says of the model."""
        if self.engine is None:
            return self.facts
        loaded = self.engine.describe()
        return {name: loaded.get(name) for name in ("model", "engine", "quantization")}

    def judge(self, max_length: int | None = None) -> Judge:
        """The judge of --judge, in the target's place if it needs the memory; else the base model.

        `max_length` is the context that its questions take, if more than usual.
        """
        from cai_experiment.evaluation.arms import Remembering
        from cai_experiment.judging.judge import Judge

        if self.args.judge is None:
            base = Remembering(self.speakers().base(), self.remembered(), "judge")
            return Judge(base, f"{shown(str(self.described()['model']))}, the base model")
        if self._judge is None or max_length is not None:
            self._close_judge()
            if not is_url(self.args.judge):
                self.free()
            self._judge = load_judge(self.args, max_length)
            self._verdicts = self._file(JUDGED, identity(self._judge.engine))
            self._judge.engine = Remembering(self._judge.engine, self._verdicts, "judge")
        return self._judge

    def _close_judge(self) -> None:
        if self._judge is not None:
            self._judge.engine.close()
            self._judge = None
        if self._verdicts is not None:
            self._verdicts.journal.close()

    def free(self) -> None:
        """Give the target's memory back."""
        if self.engine is None:
            return
        self.facts = self.described()
        engine, self.engine, self.model = self.engine, None, None  # first, or `close` finds the weights in use
        engine.close()
        del engine
        gc.collect()  # PEFT's model and its base hold each other
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()

    def close(self) -> None:
        """Give all memory back."""
        self.free()
        self._close_judge()
        if self._remembered is not None:
            self._remembered.journal.close()
