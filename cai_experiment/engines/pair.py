"""Generator and critic as two models on one machine: which engines, how they share the GPU, in which order they load.

On CUDA, for generation alone: two vLLM processes whose fixed shares of the GPU (models/roles.py) add up to what one
takes. Where those do not fit, and where one of the models is trained afterwards: both in this process through the hf
engine, in 4 bit unless told otherwise; the critic goes to the CPU if the GPU does not hold both. Not through Unsloth
unless it is asked for: it replaces parts of transformers' classes, for every model of this process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cai_experiment.engines.at_hand import check_files
from cai_experiment.engines.load import LoadSettings, Plan, load_engine, make_plan
from cai_experiment.engines.manager import MultiModelManager
from cai_experiment.errors import BadInputError
from cai_experiment.models.choice import is_ensemble
from cai_experiment.models.hardware import Hardware, detect
from cai_experiment.models.roles import Shares, vllm_shares

if TYPE_CHECKING:
    from cai_experiment.engines.base import Engine

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pairing:
    """How two models are served. `how`: "apart" (a server or an ensemble is one of them, and each is loaded by itself),
    "vllm" (two processes, `shares`) or "here" (one process).
    """

    how: str
    shares: Shares | None = None
    why: str = ""  # not two vLLMs, though asked for generation alone on a GPU


def pairing(settings: LoadSettings, other: LoadSettings, hardware: Hardware) -> Pairing:
    """Decide; nothing is loaded. Raises BadInputError for two vLLMs that were asked for and do not fit."""
    plans = [make_plan(one, hardware) for one in (settings, other)]
    kinds = [plan.engine for plan in plans]
    if "server" in kinds or any(is_ensemble(plan.choice) for plan in plans):
        return Pairing("apart")
    if kinds == ["vllm", "vllm"]:
        shares = vllm_shares(plans[0].choice, plans[1].choice, hardware, plans[0].quantization)
        if not shares.refused:
            return Pairing("vllm", shares)
        if settings.engine == "vllm":
            raise BadInputError(f"--engine vllm: {shares.refused}",
                                "use --engine hf --quantization 4bit, or one model for both")  # fmt: skip
        return Pairing("here", why=shares.refused)
    if "vllm" in kinds:
        refused = plans[1 - kinds.index("vllm")]
        return Pairing("here", why=f"vllm does not take {refused.choice.name} ({refused.why})")
    return Pairing("here")


def load_pair(settings: LoadSettings, other: LoadSettings, say: Say) -> tuple[Engine, Engine]:
    """(generator, critic), each announced to `say` before it is loaded. Raises UserError, one line."""
    hardware = detect()
    pair = pairing(settings, other, hardware)
    for one in (settings, other):  # what the second lacks is said before the first is loaded
        check_files(make_plan(one, hardware), one)
    if pair.how == "here":
        return _here(settings, other, pair.why, say)
    settings, other = _beside_ensemble(settings, other, hardware)
    shares: tuple[float | None, float | None] = (None, None)
    if pair.shares is not None:
        shares = pair.shares.generator, pair.shares.critic
    roles = [("", replace(settings, memory_share=shares[0])), ("critic: ", replace(other, memory_share=shares[1]))]
    critic_first = is_ensemble(make_plan(other, hardware).choice)  # hf takes rows by the memory that it finds free
    first = _load(*roles[critic_first], hardware, say)
    try:
        second = _load(*roles[not critic_first], hardware, say)
    except BaseException:
        first.close()  # its process must not outlive the failure
        raise
    return (second, first) if critic_first else (first, second)


def _beside_ensemble(
    settings: LoadSettings, other: LoadSettings, hardware: Hardware
) -> tuple[LoadSettings, LoadSettings]:
    """Both as they are, but that a model beside an ensemble, whose experts are here, is in this process as well: vLLM
    takes the GPU for itself.
    """
    plans = [make_plan(one, hardware) for one in (settings, other)]
    if not any(is_ensemble(plan.choice) for plan in plans):
        return settings, other
    found = [
        replace(one, engine="hf") if one.engine == "auto" and plan.engine in ("vllm", "unsloth") else one
        for one, plan in zip((settings, other), plans, strict=True)
    ]
    return found[0], found[1]


def _load(role: str, settings: LoadSettings, hardware: Hardware, say: Say) -> Engine:
    plan: Plan = make_plan(settings, hardware)
    share = "" if settings.memory_share is None else f" | {settings.memory_share:.0%} of the GPU's memory"
    if plan.engine != "server":  # which asks the server what it serves
        say(f"{role}{plan.first_line}{share}")
    engine = load_engine(settings)
    if engine.first_line != plan.first_line:
        say(f"{role}{engine.first_line}")
    return engine


def _here(settings: LoadSettings, other: LoadSettings, why: str, say: Say) -> tuple[Engine, Engine]:
    """Both in this process. The generator goes first: it is the one that keeps the GPU, and may be trained."""
    if why:
        say(f"two models: {why}")
    manager = MultiModelManager(say=say)
    try:
        held = manager.load("generation", settings), manager.load("evaluation", other)
        generator, critic = manager.engines()
    except BaseException:
        manager.unload_all()
        raise
    for role, engine, loaded in (("", generator, held[0]), ("critic: ", critic, held[1])):
        if engine.first_line != loaded.placed.plan.first_line:
            say(f"{role}{engine.first_line}")
    return generator, critic
