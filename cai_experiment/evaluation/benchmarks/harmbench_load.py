"""HarmBench's classifier made ready: whether it can be had here, in which precision, in this process or on a server.

Whether it can be had is asked before the first answer is written; it is loaded when the target's memory is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.render import PromptTooLong, Renderer
from cai_experiment.engines.weights import check_folder, loading_error
from cai_experiment.errors import BadInputError, DiskError, EngineError, UserError
from cai_experiment.evaluation.benchmarks.harmbench_classifier import CLASSIFIER, OfficialClassifier, OfficialPrompt
from cai_experiment.models.disk import downloaded_gb, free_gb, hub_cache
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import Architecture, vram_gb, weights_gb

if TYPE_CHECKING:
    from cai_experiment.engines.base import Engine

REVISION = "bda705349d1144fa618770bea64d99ce54e3835b"  # of CLASSIFIER on the hub
NUMBERS = Architecture(40, 5120, 40, 40, 128, 13_824, 32_000, tied=False, attention_bias=False)  # Llama-2-13b
CONTEXT = 4096  # tokens of the longest prompt, where the model has room for it
ROW_TOKENS = 1024  # of a usual one: the template's 330, an answer of at most 512, now and then a context
# prompts at a time, the most that fits first: a token's keys and values take 0.8 MB, and 16 prompts fill a pass
SLOTS = {"cuda": (16, 4), "mps": (4,), "cpu": (16, 8)}
QUANTIZATIONS = {"cuda": ("bf16", "4bit"), "mps": ("bf16",), "cpu": ("fp32",)}
HUB_SECONDS = 15.0  # for one answer of the hub
INSTEAD = "or name a judge: --judge MODEL, or --judge URL of a server"
_SAMPLE = "[INST] <<SYS>>\nIs it so?\n<</SYS>>\n\n[GENERATION]:\n1 + 1 = 2. \n\nAnswer: [/INST]"


@dataclass(frozen=True, slots=True)
class ClassifierChoice:
    """What will be loaded. `place` is a folder, or CLASSIFIER."""

    place: str
    quantization: str
    slots: int
    numbers: Architecture

    @property
    def line(self) -> str:
        """For the terminal, before anything is generated."""
        size = weights_gb(self.numbers, self.quantization)
        return f"classifier {self.place} | {self.quantization}, {size:.1f} GB of weights, when the target has left"


def check_classifier(place: str | None, hardware: Hardware) -> ClassifierChoice:
    """The official classifier (None), or a folder that holds it, in the best precision that fits this machine.

    Raises BadInputError (another name, damaged files), EngineError (too little memory, no network), DiskError.
    """
    folder = Path(place).expanduser() if place else Path(CLASSIFIER)
    if folder.is_dir():
        check_folder(folder)
        return fitting(str(folder.resolve()), Architecture.from_config(folder), hardware)
    if place not in (None, CLASSIFIER):
        raise BadInputError(
            f"--classifier {place}: no such folder", f"use {CLASSIFIER}, a folder that holds it, {INSTEAD}"
        )
    choice = fitting(CLASSIFIER, NUMBERS, hardware)
    if not _is_downloaded():
        _check_hub()
        _check_disk()
    return choice


def fitting(place: str, numbers: Architecture, hardware: Hardware) -> ClassifierChoice:
    """The best precision and the most prompts at a time whose memory this machine has; EngineError if none has."""
    have = (hardware.vram_gb if hardware.kind == "cuda" else hardware.ram_gb) or None
    ways = [(q, slots) for q in QUANTIZATIONS[hardware.kind] for slots in SLOTS[hardware.kind]]
    for quantization, slots in ways:
        if have is None or vram_gb(numbers, quantization, ROW_TOKENS, slots) <= have:  # some GPUs do not say
            return ClassifierChoice(place, quantization, slots, numbers)
    least = vram_gb(numbers, ways[-1][0], ROW_TOKENS, ways[-1][1])
    raise EngineError(f"classifier {place} takes {least:.0f} GB of memory, and this machine has {have:g} GB",
                      f"run it on a GPU, {INSTEAD}")  # fmt: skip


def _is_downloaded() -> bool:
    """True if the download cache holds the pinned revision, whole."""
    try:
        check_folder(hub_cache() / f"models--{CLASSIFIER.replace('/', '--')}" / "snapshots" / REVISION)
    except BadInputError:
        return False
    return True


def _check_hub() -> None:
    import httpx
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(CLASSIFIER, "config.json", revision=REVISION), timeout=HUB_SECONDS)
    except (OSError, httpx.HTTPError) as error:  # the hub's own refusals are among them
        raise EngineError(
            f"classifier {CLASSIFIER} is not in the download cache, and the hub cannot be reached "
            f"({type(error).__name__})",
            f"connect to the internet once, give its folder with --classifier, {INSTEAD}",
        ) from None


def _check_disk() -> None:
    place, missing = hub_cache(), weights_gb(NUMBERS, "bf16") - downloaded_gb(CLASSIFIER)
    free = free_gb(place)
    if free < missing:
        raise DiskError(f"{place} has {free:.1f} GB free, and classifier {CLASSIFIER} takes {missing:.1f} GB",
                        f"make room there, {INSTEAD}")  # fmt: skip


# ---------------------------------------------------------------- loading


def load_classifier(choice: ClassifierChoice, prompt: OfficialPrompt, hardware: Hardware) -> OfficialClassifier:
    """The classifier in this process, at the pinned revision. Raises BadInputError, EngineError, DiskError."""
    from cai_experiment.engines.hf import HFEngine
    from cai_experiment.engines.load import LoadSettings, Plan, load_model
    from cai_experiment.models.choice import ModelChoice

    try:
        folder = choice.place if Path(choice.place).is_dir() else _snapshot()
        model_choice = ModelChoice(choice.place, folder, None, "base", "HarmBench's classifier")
        plan = Plan(model_choice, "hf", "", choice.quantization, hardware.kind)
        model, tokenizer, facts = load_model(plan, LoadSettings(model=folder))
    except UserError as error:
        raise type(error)(str(error).replace("--model", "--classifier"), INSTEAD) from error
    renderer = _renderer(tokenizer, model.config, model.generation_config)
    engine: Engine = HFEngine(model, tokenizer, renderer, choice.slots, facts)
    name = Path(choice.place).name if Path(choice.place).is_absolute() else choice.place  # for the report
    return OfficialClassifier(engine, tokenizer, prompt, name)


def _snapshot() -> str:
    from huggingface_hub import snapshot_download

    from cai_experiment.engines.vllm_load import LOADED_FILES

    try:
        folder = snapshot_download(CLASSIFIER, revision=REVISION, allow_patterns=list(LOADED_FILES))
    except Exception as error:  # of the hub, the network or the disk
        raise loading_error(CLASSIFIER, error) from error
    check_folder(Path(folder))
    return str(folder)


def classifier_on_server(url: str, place: str | None, prompt: OfficialPrompt, **options: Any) -> OfficialClassifier:
    """The classifier that a server serves, asked in the official format: token ids of its own tokenizer.

    `place` is a folder or hub id with that tokenizer (default: CLASSIFIER), and of several served models the one of
    that name is meant; `options` go to ServerEngine. Raises EngineError and BadInputError, one line each.
    """
    from cai_experiment.engines.server import ServerEngine
    from cai_experiment.engines.server_address import read_address
    from cai_experiment.engines.vllm_load import configs

    name = place or CLASSIFIER
    try:
        config, generation, tokenizer = configs(name)
    except (OSError, ValueError) as error:
        raise EngineError(
            f"the classifier at {read_address(url)[0]} is sent token ids, and the tokenizer of {name} is not to be had "
            f"({type(error).__name__})",
            "connect to the internet once, or give a folder that holds it with --classifier-tokenizer",
        ) from None
    renderer = _renderer(tokenizer, config, generation)
    try:
        engine = ServerEngine(url, None, renderer, **options)
    except BadInputError:  # it serves several: the one that is called as the tokenizer is
        engine = ServerEngine(url, name, renderer, **options)
    if engine.dialect.kind != "ids":
        engine.close()
        raise EngineError(
            f"--classifier {engine.client.url} takes no token ids, and the official format needs them",
            "serve it with vLLM, SGLang or llama.cpp, or have the judge say it: --classifier judge",
        )
    return OfficialClassifier(engine, tokenizer, prompt, f"{engine.dialect.model} at {engine.client.url}")


def _renderer(tokenizer: Any, config: Any, generation: Any) -> RawRenderer:
    ends = getattr(generation, "eos_token_id", None)
    eos = [ends] if isinstance(ends, int) else list(ends or ())
    return RawRenderer(
        tokenizer, min(getattr(config.get_text_config(), "max_position_embeddings", CONTEXT), CONTEXT), eos
    )


class RawRenderer(Renderer):
    """Takes a prompt as it stands, behind the tokenizer's begin token; no text of it becomes a special token."""

    def __init__(self, tokenizer: Any, max_length: int, eos_token_ids: Sequence[int] = ()) -> None:
        """As `Renderer`; raises EngineError if a harmless prompt has other ids than the tokenizer itself gives it."""
        super().__init__(tokenizer, "base", max_length, eos_token_ids)

    def prompt_ids(
        self, turns: Sequence[Turn], speak_as: str, examples: int | None = None, max_tokens: int = 0
    ) -> list[int]:
        """The ids of the turns' texts, nothing around them; PromptTooLong if they do not fit."""
        ids = [*self._start, *self.encode("".join(turn.text for turn in turns), False)]
        if len(ids) > self.max_length - max_tokens:
            raise PromptTooLong(
                f"prompt of {len(ids)} tokens and {max_tokens} new tokens do not fit in a context of {self.max_length}"
            )
        return ids

    def check(self) -> None:
        """See `__init__`."""
        if self.prompt_ids((Turn("question", _SAMPLE),), "verdict") != list(self.tokenizer(_SAMPLE).input_ids):
            raise EngineError("this tokenizer gives the classifier's prompt other tokens than ours", INSTEAD)
