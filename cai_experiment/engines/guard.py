"""The guard: a second model that says whether an answer is safe to train on, and if not, in which category.

Three families: Llama Guard 3 ("safe", or "unsafe" and "S1,S5"), Qwen3Guard-Gen ("Safety: ...", "Categories: ...",
"Refusal: ..."), and the shipped model, which was taught Llama Guard's format. Whatever does not read exactly like that
is no verdict (`safe` is None) and is counted; nothing is guessed from half a reply.

    choice = check_guard(GuardSettings(), hardware)     # before the first token
    guard = load_guard(choice, hardware)                # when the generator has left
    for verdict in guard.judge(rows): ...
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, Protocol

from cai_experiment.constitution.prompts import Turn, ask_guard
from cai_experiment.engines.base import Completion, Engine, Prompt, Sampling
from cai_experiment.engines.guard_models import CONTEXT, GuardChoice, GuardSettings, check_guard
from cai_experiment.errors import UserError
from cai_experiment.models.hardware import Hardware

if TYPE_CHECKING:
    from cai_experiment.engines.render import Renderer
    from cai_experiment.models.choice import ModelChoice

__all__ = ["CATEGORY_WORDS", "Guard", "GuardChoice", "GuardSettings", "GuardVerdict", "check_guard", "load_guard"]

# Llama Guard 3's codes (the MLCommons taxonomy of hazards, arXiv 2404.12241, and one for code), in words for a table
CATEGORY_WORDS = {
    "S1": "violence and violent crime",
    "S2": "crime without violence",
    "S3": "sexual crime",
    "S4": "sexual abuse of children",
    "S5": "defamation",
    "S6": "risky expert advice",
    "S7": "private data",
    "S8": "copied work",
    "S9": "weapons of mass harm",
    "S10": "hate",
    "S11": "suicide and self-harm",
    "S12": "sexual content",
    "S13": "false claims about elections",
    "S14": "abuse of code tools",
}
QWEN_CATEGORIES = frozenset(
    {
        "Violent", "Non-violent Illegal Acts", "Sexual Content or Sexual Acts", "PII", "Suicide & Self-Harm",
        "Unethical Acts", "Politically Sensitive Topics", "Copyright Violation", "Jailbreak",
    }
)  # fmt: skip

Row = tuple[str, str, str]  # id, instruction, answer
Reading = tuple[bool | None, tuple[str, ...]]
UNPARSED: Reading = (None, ())


@dataclass(frozen=True, slots=True)
class GuardVerdict:
    """What the guard said of one answer. `safe` None: the reply `raw` is no verdict, or the engine failed (`error`)."""

    id: str
    safe: bool | None
    categories: tuple[str, ...]
    raw: str
    error: str = ""


class Guard(Protocol):
    """Anything that judges answers."""

    name: str
    first_line: str  # for the terminal

    def judge(self, rows: Iterable[Row]) -> Iterator[GuardVerdict]:
        """One verdict for each (id, instruction, answer), in any order; rows are taken as there is room for them."""
        ...

    def describe(self) -> dict[str, object]:
        """What the manifest records."""
        ...

    def close(self) -> None:
        """Give memory back."""
        ...


# ---------------------------------------------------------------- what a reply says


def read_llama_guard(reply: str) -> Reading:
    """(safe, categories) of Llama Guard 3's reply: "safe", or "unsafe" and a line of codes from S1 to S14."""
    if reply.strip() == "safe":
        return True, ()
    unsafe = re.fullmatch(r"unsafe\s*\n\s*(S\d+(?: ?, ?S\d+)*)", reply.strip())
    codes = tuple(dict.fromkeys(re.findall(r"S\d+", unsafe.group(1)))) if unsafe else ()
    return (False, codes) if codes and all(code in CATEGORY_WORDS for code in codes) else UNPARSED


def read_qwen3guard(reply: str) -> Reading:
    """(safe, categories) of Qwen3Guard-Gen's reply about a response; "Controversial" counts as unsafe (strict mode)."""
    lines = re.fullmatch(
        r"Safety: (Safe|Unsafe|Controversial) *\n+Categories: ([^\n]+?) *(?:\n+Refusal: (?:Yes|No))?", reply.strip()
    )
    if lines is None:
        return UNPARSED
    names = tuple(dict.fromkeys(lines.group(2).split(", ")))
    if lines.group(1) == "Safe":
        return (True, ()) if names == ("None",) else UNPARSED
    return (False, names) if QWEN_CATEGORIES.issuperset(names) else UNPARSED


@dataclass(frozen=True, slots=True)
class Family:
    """How a family of guards is asked, and how its reply is read. `max_tokens` is more than any whole reply has."""

    turns: Callable[[str, str], tuple[Turn, ...]]
    read: Callable[[str], Reading]
    max_tokens: int


def _conversation(instruction: str, answer: str) -> tuple[Turn, ...]:
    return (Turn("instruction", instruction), Turn("answer", answer))


FAMILIES = {
    "llama-guard": Family(_conversation, read_llama_guard, 64),  # fourteen codes with their commas
    "qwen3guard": Family(_conversation, read_qwen3guard, 128),
    "nano": Family(ask_guard, read_llama_guard, 16),
}


class EngineGuard:
    """A guard that speaks through an engine, greedily and in the engine's batches."""

    def __init__(self, engine: Engine, choice: GuardChoice, owned: bool) -> None:
        """`owned`: the engine was loaded for the guard alone and is closed with it."""
        self.engine, self.choice, self.owned = engine, choice, owned
        self.family = FAMILIES[choice.family]
        self.name = choice.name
        with_whom = f"engine {engine.name}" if owned else f"the generator's engine {engine.name}"
        self.first_line = f"guard {choice.name} | {with_whom} | {choice.reason}"

    def judge(self, rows: Iterable[Row]) -> Iterator[GuardVerdict]:
        """See `Guard.judge`. A row that the engine fails on comes back with its `error` and stops no other."""
        for completion in self.engine.stream(self._prompt(*row) for row in rows):
            yield self._verdict(completion)

    def _prompt(self, id: str, instruction: str, answer: str) -> Prompt:
        greedy = Sampling(temperature=0.0, max_tokens=self.family.max_tokens)
        return Prompt(id, self.family.turns(instruction, answer), "verdict", greedy)

    def _verdict(self, completion: Completion) -> GuardVerdict:
        whole = completion.finish == "stop"  # a reply that was cut off is none
        safe, categories = self.family.read(completion.text) if whole else UNPARSED
        return GuardVerdict(completion.id, safe, categories, completion.text, completion.error)

    def describe(self) -> dict[str, object]:
        """What the manifest records: the engine's facts, and the family."""
        return {**self.engine.describe(), "guard": self.choice.family}

    def close(self) -> None:
        """Close the engine, unless it is the generator's."""
        if self.owned:
            self.engine.close()


# ---------------------------------------------------------------- loading


def load_guard(
    wanted: GuardSettings | GuardChoice, hardware: Hardware, shared_engine: Engine | None = None
) -> EngineGuard:
    """Load the guard; a choice that `check_guard` made is not made again.

    `shared_engine` is used, not loaded anew, where the guard is the shipped model and the engine holds it. Raises
    BadInputError and EngineError, one line each.
    """
    choice = wanted if isinstance(wanted, GuardChoice) else check_guard(wanted, hardware)
    if choice.family == "nano" and shared_engine is not None and shared_engine.describe().get("model") == "nano":
        return EngineGuard(shared_engine, choice, owned=False)
    try:
        engine = _load_shipped(choice) if choice.family == "nano" else _load(choice, hardware)
    except UserError as error:
        raise type(error)(str(error).replace("--model", "--guard"), "or use --no-guard") from error
    return EngineGuard(engine, choice, owned=True)


def _load_shipped(choice: GuardChoice) -> Engine:
    from cai_experiment.engines.load import LoadSettings, load_engine

    settings = LoadSettings(model=choice.place, quantization=choice.quantization, batch_size=choice.slots, engine="hf")
    return load_engine(settings)


def _load(choice: GuardChoice, hardware: Hardware) -> Engine:
    """The engine over the guard's weights, with the guard's own template."""
    from cai_experiment.models.choice import ModelChoice

    model_choice = ModelChoice(choice.name, choice.place, None, "chat", choice.reason)
    if choice.engine == "vllm":
        return _load_vllm(choice, model_choice)
    from cai_experiment.engines.hf import HFEngine
    from cai_experiment.engines.load import LoadSettings, Plan, load_model

    plan = Plan(model_choice, "hf", "", choice.quantization, hardware.kind)
    model, tokenizer, facts = load_model(plan, LoadSettings(model=choice.place))
    renderer = _renderer(tokenizer, model.config, model.generation_config)
    return HFEngine(model, tokenizer, renderer, choice.slots, facts)


def _load_vllm(choice: GuardChoice, model_choice: ModelChoice) -> Engine:
    from cai_experiment.engines.vllm import VLLMEngine, VLLMSettings
    from cai_experiment.engines.vllm_load import configs, fetch
    from cai_experiment.engines.weights import loading_error, weights_hash

    try:
        folder = fetch(model_choice)
        config, generation, tokenizer = configs(str(folder))
    except UserError:
        raise
    except Exception as error:
        raise loading_error(choice.name, error) from error
    facts: dict[str, object] = {"model": choice.name, "quantization": choice.quantization}
    local = str(folder) == choice.place
    facts |= {"weights_sha256": weights_hash(folder)} if local else {"revision": folder.name}  # a snapshot's name
    renderer = _renderer(tokenizer, config, generation)
    return VLLMEngine(VLLMSettings(str(folder), slots=choice.slots), tokenizer, renderer, facts)


def _renderer(tokenizer: Any, config: Any, generation_config: Any) -> Renderer:
    from cai_experiment.engines.guard_render import GuardRenderer

    ends = getattr(generation_config, "eos_token_id", None)
    eos = [ends] if isinstance(ends, int) else list(ends or ())
    return GuardRenderer(tokenizer, min(config.get_text_config().max_position_embeddings, CONTEXT), eos)
