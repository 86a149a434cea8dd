"""What an export starts from: the adapter of a run, the base that it was trained on, and prompts to hold both against.

The base is the one that the training recorded. Another name is refused, and other weights under its name are, since
LoRA added to another base of the same shape gives a model that runs, and is wrong.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.engines.load import LoadSettings, load_model, make_plan
from cai_experiment.engines.weights import check_folder, loading_error, weights_hash
from cai_experiment.errors import BadInputError, DiskError
from cai_experiment.models.choice import ModelChoice, resolve_model
from cai_experiment.models.hardware import detect
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.serving import disk_refusal
from cai_experiment.records.files import read_json, show
from cai_experiment.training import checkpoints, sft
from cai_experiment.training.data import HELD_OUT_SHARE, read_pairs, split_by_instruction
from cai_experiment.training.dpo import RECORD, SETTINGS
from cai_experiment.training.export.check import LONGEST_PROMPT, OWN_PROMPTS, PROMPTS, Prompts

BESIDE = ["*.json", "*.jinja", "*.txt", "*.model", "LICENSE*"]  # of a base on the hub: what stands beside the weights
UNKNOWN_LICENCE = "other"
RANDOM = "random weights, seed {}"


@dataclass(frozen=True, slots=True)
class Source:
    """An adapter to export. `settings` are the training's (DPOSettings.identity); `final` is its end, not a step."""

    run: str
    folder: Path
    settings: Mapping[str, Any]

    @property
    def is_sft(self) -> bool:
        """True for an adapter of SFT (--sft-first), which DPO has not touched."""
        return self.settings.get("loss") == sft.LOSS

    @property
    def name(self) -> str:
        """The adapter's folder within the run's: "final", "checkpoint-40", "sft/final"."""
        return f"{sft.FOLDER}/{self.folder.name}" if self.is_sft else self.folder.name

    @property
    def place(self) -> Path:
        """The run's folder; SFT has one of its own in it."""
        return self.folder.absolute().parents[1 if self.is_sft else 0]

    @property
    def final(self) -> bool:
        """True for the adapter at the end of training: what report.json speaks of. SFT's is it if no DPO followed."""
        return self.folder.name == "final" and not (self.is_sft and (self.place / SETTINGS).exists())

    @property
    def evaluated(self) -> bool:
        """True if the training part of report.json speaks of this adapter: train_dpo.py leaves a file that says so."""
        return self.final and (self.place / "evaluated").exists()

    @property
    def suffix(self) -> str:
        """What tells its exports' default folders from those of the run's end: "", "-checkpoint-40", "-sft"."""
        if self.final:
            return ""
        step = "" if self.folder.name == "final" else f"-{self.folder.name}"
        return f"-{sft.FOLDER}{step}" if self.is_sft else step

    @property
    def warm_start(self) -> Mapping[str, Any]:
        """training.json's settings of the SFT that this DPO went on from; {} if there was none."""
        path = self.place / sft.FOLDER / "final" / RECORD
        return _settings_in(path) if "start_adapter" in self.settings and path.is_file() else {}

    @property
    def model(self) -> tuple[str, str, str]:
        """(model, quantisation, layout) as the training recorded them; empty and "auto" where it did not."""
        words = str(self.settings.get("model_name") or "").rsplit(" ", 2)
        return (words[0], words[1], words[2]) if len(words) == 3 else ("", "", "auto")


@dataclass(frozen=True, slots=True)
class Base:
    """The base's files. `place` is what a user would name: a hub id or a folder; `revision` is a hub base's commit."""

    name: str
    place: str
    folder: Path
    revision: str | None
    licence: str
    choice: ModelChoice
    weights_sha256: str | None = None  # of a folder

    @property
    def facts(self) -> dict[str, Any]:
        """What export.json says of it. It is uploaded, so a folder is named by its hash, not by where it lies."""
        place = None if self.weights_sha256 else self.place
        names = ("base", "base_place", "base_revision", "base_weights_sha256")
        return dict(zip(names, (self.name, place, self.revision, self.weights_sha256), strict=True))

    @property
    def loadable(self) -> str:
        """What an engine loads it by: a hub id, so that 4 bit may take files quantised beforehand, or the folder."""
        return str(self.folder) if self.revision is None else self.place


def find_source(run_folder: Path, checkpoint: str | None) -> Source:
    """The adapter of a run: final/, or the checkpoint named (`checkpoint-40`, `sft/final` or a path).

    After SFT alone it is sft/final; not where DPO has begun, whose adapter is wanted. BadInputError if not there.
    """
    folder, of_sft = run_folder / "final", run_folder / sft.FOLDER / "final"
    if checkpoint is not None:
        within = run_folder / checkpoint
        folder = within if within.is_dir() else Path(checkpoint)
    elif not folder.exists() and of_sft.is_dir() and not (run_folder / SETTINGS).exists():
        folder = of_sft
    if not folder.is_dir():
        known = sorted(path.name for path in run_folder.glob("checkpoint-*") if path.name.partition("-")[2].isdigit())
        known += [f"{sft.FOLDER}/final"] if of_sft.is_dir() else []
        step = f"name one with --checkpoint: {', '.join(known)}" if known else "train it first: train_dpo.py"
        raise BadInputError(f"{show(folder)}: no adapter there", step)
    path = folder / RECORD if (folder / RECORD).is_file() else folder.parent / SETTINGS
    settings = _settings_in(path) if path.is_file() else {}
    return Source(run_folder.name, folder, settings)


def _settings_in(path: Path) -> dict[str, Any]:
    """The settings that training.json or settings.json holds."""
    found = read_json(path)
    return dict(found.get("settings", {})) if path.name == RECORD else found


# ---------------------------------------------------------------- the base


def choose_base(source: Source, model: str | None) -> ModelChoice:
    """The base that was trained; `model` (--model) says where it lies. BadInputError if it is another one."""
    recorded = source.model[0]
    told = read_json(source.folder / "adapter_config.json").get("base_model_name_or_path") or ""
    if recorded in PRESETS and not told:  # PEFT writes where a model came from; random weights come from nowhere
        message = f"{show(source.folder)} was trained on random weights of {recorded}"
        raise BadInputError(message, f"add --random-weights {recorded}")
    if model is None:
        by_folder = recorded not in PRESETS and "/" not in recorded and Path(told).is_dir()  # its name does not find it
        name = told if by_folder else recorded or told
        if not name:
            raise BadInputError(f"{show(source.folder)} does not say what it was trained on", "say it with --model")
        choice = resolve_model(name, detect())
    else:
        choice = resolve_model(model, detect())
        if recorded and choice.name != recorded and choice.path_or_id != recorded:
            message = f"--model {model}: {show(source.folder)} was trained on {recorded}"
            raise BadInputError(message, "leave --model out, or name a folder that holds it under that name")
    _check_weights(source, choice)
    return choice


def _check_weights(source: Source, choice: ModelChoice) -> None:
    """Raise BadInputError for a folder whose weights are not those that the training recorded, if it recorded any."""
    place, then = Path(choice.path_or_id), source.settings.get("base_weights_sha256")
    if then is None or not place.is_dir():
        return
    check_folder(place)
    now = weights_hash(place)
    if now != then:
        message = f"{show(place)} holds other weights (sha256 {now[:12]}) than {show(source.folder)} was trained on"
        raise BadInputError(message, f"name a folder with those of sha256 {then[:12]} with --model")


def check_random(source: Source, preset: str) -> None:
    """Raise BadInputError if --random-weights `preset` speaks of an adapter that was trained on a real model."""
    known = {name for name in ("base_weights_sha256", "base_revision") if source.settings.get(name)}
    if known or source.model[0] not in ("", preset):
        message = f"--random-weights {preset}: {show(source.folder)} was trained on {source.model[0] or 'a real model'}"
        raise BadInputError(message, "leave --random-weights out, or name the preset that it was trained on")


def revision_of(source: Source, choice: ModelChoice) -> str | None:
    """The hub commit that was trained; None if it was not recorded, or is that of a sibling (Unsloth's 4-bit one)."""
    told = read_json(source.folder / "adapter_config.json").get("base_model_name_or_path")
    return source.settings.get("base_revision") if told == choice.path_or_id else None


def facts_of(choice: ModelChoice | None, seed: int, revision: str | None) -> dict[str, Any]:
    """Of `Base.facts` what is known before anything is downloaded or made; no choice: random weights of `seed`."""
    if choice is None:
        return {"base_place": RANDOM.format(seed)}
    place = Path(choice.path_or_id)
    if place.is_dir():
        return {"base": choice.name, "base_place": None, "base_weights_sha256": weights_hash(place)}
    known = {} if revision is None else {"base_revision": revision}
    return {"base": choice.name, "base_place": choice.path_or_id, **known}


@contextmanager
def base_files(
    choice: ModelChoice | None,
    random_weights: str | None,
    seed: int,
    near: Path,
    weights: bool = True,
    revision: str | None = None,
) -> Iterator[Base]:
    """The base as files: a folder, a download (16-bit, whatever it was trained in), or random weights written `near`.

    `weights` False downloads configs and tokenizer alone: an adapter's export loads what its training loaded.
    `revision` is the hub's commit; None: the newest.

    Raises what loading raises, and DiskError before a download that the disk does not hold.
    """
    if random_weights is not None:
        with tempfile.TemporaryDirectory(prefix="random-base.", dir=near) as made:
            yield _random_base(random_weights, seed, Path(made))
        return
    assert choice is not None
    licence = choice.preset.licence if choice.preset else UNKNOWN_LICENCE
    place = Path(choice.path_or_id)
    if place.is_dir():
        check_folder(place)
        yield Base(choice.name, choice.path_or_id, place, None, licence, choice, weights_hash(place))
        return
    folder = _downloaded(choice, weights, revision)
    yield Base(choice.name, choice.path_or_id, folder, folder.name, licence, choice)


def _downloaded(choice: ModelChoice, weights: bool, revision: str | None) -> Path:
    """The folder of a hub model's files, 16-bit weights among them, downloaded if not there; its name is the commit."""
    from huggingface_hub import snapshot_download

    if weights and (refusal := disk_refusal(choice, "bf16")):
        step = "make room, or set HF_HOME to a larger disk"
        raise DiskError(f"--model {choice.name}: {refusal} (a merge needs the 16-bit files)", step)
    try:
        files = [*BESIDE, *(["*.safetensors"] if weights else [])]
        folder = Path(snapshot_download(choice.path_or_id, revision=revision, allow_patterns=files))
    except Exception as error:
        raise loading_error(choice.name, error) from error
    if weights:
        check_folder(folder)
    return folder


def _random_base(preset: str, seed: int, folder: Path) -> Base:
    """The random weights that a training with --random-weights had before they were quantised, as files."""
    hardware = detect()
    precision = "bf16" if hardware.kind == "cuda" else "fp32"  # what 4 bit is made from on this device
    settings = LoadSettings(random_weights=preset, seed=seed, quantization=precision, engine="hf")
    plan = make_plan(settings, hardware)
    model, tokenizer, _ = load_model(plan, settings)
    with checkpoints.disk_errors(folder):
        model.save_pretrained(str(folder), max_shard_size="4GB")
        tokenizer.save_pretrained(str(folder))
    return Base(plan.choice.name, RANDOM.format(seed), folder, None, UNKNOWN_LICENCE, plan.choice)


# ---------------------------------------------------------------- prompts


def instructions_of(pairs_file: Path, seed: int) -> list[str]:
    """A run's instructions: held-out ones first, then those trained on; none if the run's pairs are not there."""
    if not pairs_file.is_file():
        return []
    kept, held_out = split_by_instruction(read_pairs(pairs_file), seed, HELD_OUT_SHARE)
    return [pair.turns[0].text for pair in (*held_out, *kept) if len(pair.turns) == 1]


def prompts_for(instructions: Sequence[str], renderer: Any) -> Prompts:
    """The first PROMPTS instructions, filled up from OWN_PROMPTS, as bare prompts; longer than LONGEST_PROMPT: not."""
    found: dict[str, tuple[int, ...]] = {}
    for text in (*instructions, *OWN_PROMPTS):
        ids = tuple(renderer.bare_prompt_ids(text))
        if text not in found and len(ids) <= LONGEST_PROMPT and len(found) < PROMPTS:
            found[text] = ids
    return Prompts(tuple(found), tuple(found.values()), tuple(renderer.stop_token_ids), renderer.tokenizer)
