"""What eval_model.py evaluates: a trained adapter on its base, in memory while it is needed; and the judge."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.found import ITEMS_FOLDER
from cai_experiment.milestones import SCRIPTS
from cai_experiment.records.files import read_json, show
from cai_experiment.scripts import _training
from cai_experiment.scripts._judge import is_url, load_judge, shown
from cai_experiment.training import dpo, sft
from cai_experiment.training.data import Pair, read_pairs
from cai_experiment.training.settings import adapter_sha256

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings
    from cai_experiment.evaluation.arms import Remembered, Speakers
    from cai_experiment.judging.judge import Judge

SAID = "said.jsonl"  # what both arms answered, so that a killed evaluation goes on


@dataclass(frozen=True, slots=True)
class Trained:
    """A finished training: its adapter, the adapter that DPO started from, and what it was trained on."""

    adapter: Path
    reference: Path | None
    settings: dict[str, Any]
    history: list[dict[str, Any]]
    pairs: list[Pair]
    backend: str = ""  # that trained it

    @property
    def sha256(self) -> str:
        """Hash of the adapter's weights: what a report's figures are of."""
        return adapter_sha256(self.adapter)


def finished_training(args: argparse.Namespace) -> Trained:
    """The training of --run. Raises BadInputError that names the next command where there is none."""
    folder = args.checkpoint_dir / args.run
    named = "" if args.run == args.milestone else f" --run {args.run}"
    train = f"{SCRIPTS}train_dpo.py --milestone {args.milestone}{named}"
    if args.adapter is None and not (folder / "final").is_dir():
        raise BadInputError(f"{show(folder)} holds no trained adapter (final/)", f"train first: {train}")
    adapter = args.adapter or folder / "final"
    settings = read_json(folder / "settings.json") if (folder / "settings.json").exists() else {}
    alone = adapter.parent.name == sft.FOLDER
    started = folder / sft.FOLDER / "final"
    reference = started if "start_adapter" in settings and not alone and args.adapter is None else None
    made = dpo.finished(folder) if args.adapter is None and (adapter / dpo.RECORD).exists() else None
    pairs = args.pairs or args.data_dir / args.run / "pairs.jsonl"
    if not pairs.exists():
        raise BadInputError(f"{show(pairs)} is not there", "name the pairs that were trained on with --pairs")
    said = ([], "") if made is None else (made.history, made.backend)
    return Trained(adapter, reference, settings, said[0], read_pairs(pairs), said[1])


def check_base(trained: Trained, engine: Any) -> None:
    """Raise BadInputError if the adapter was trained on other weights than those that are loaded.

    A hub's revision says nothing where Unsloth trained on its own quantised copy, and another engine evaluates.
    """
    known = json.loads(_training.base_of(engine) or "{}")
    same_files = (trained.backend == "unsloth") == (engine.name == "unsloth")
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
        from cai_experiment.evaluation.arms import Remembered

        if self._remembered is None:
            whose = json.dumps([_training.base_of(self.engine), self.trained.sha256])
            self._remembered = Remembered(self.args.data_dir / self.args.run / ITEMS_FOLDER / SAID, whose)
        return self._remembered

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
        from cai_experiment.judging.judge import Judge

        if self.args.judge is None:
            base = self.speakers().base()
            return Judge(base, f"{shown(str(self.described()['model']))}, the base model")
        if self._judge is None or max_length is not None:
            self._close_judge()
            if not is_url(self.args.judge):
                self.free()
            self._judge = load_judge(self.args, max_length)
        return self._judge

    def _close_judge(self) -> None:
        if self._judge is not None:
            self._judge.engine.close()
            self._judge = None

    def free(self) -> None:
        """Give the target's memory back."""
        if self.engine is not None:
            self.facts = self.described()
            self.engine.close()
        self.engine = self.model = None

    def close(self) -> None:
        """Give all memory back."""
        self.free()
        self._close_judge()
        if self._remembered is not None:
            self._remembered.journal.close()
