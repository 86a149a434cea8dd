"""Every arm answers the same questions: the ensemble, each expert alone, the uniform mixture; and the router's choice.

All have the same decoding settings and the same random numbers, keyed by question and position. On a CPU in float32 an
answer depends on nothing else; elsewhere its last bits, and so a token that is nearly tied, on what is read together.
Run again from the start the same evaluation gives the same answers; one that went on may differ there.

Answers are kept in a journal by everything that decides them (question, arm, weights, settings): a killed evaluation
goes on, one with more questions keeps those that it has, and new heads cost the ensemble's answers alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from cai_experiment.ensemble.answers import NEXT_QUESTION
from cai_experiment.ensemble.decode import BATCH, DecodeSettings, decode, prompt_log_probs
from cai_experiment.ensemble.kept import Cost, Known, question_key, short_hash
from cai_experiment.ensemble.score import ENSEMBLE, RESERVED, UNIFORM
from cai_experiment.errors import EngineError

if TYPE_CHECKING:
    from cai_experiment.ensemble.decode import Counts, Spoken
    from cai_experiment.ensemble.experts import Expert
    from cai_experiment.ensemble.layout import Row
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads
    from cai_experiment.records.store import Journal

Mode = Literal["select", "mixture"]
# How a base model goes on that should have ended: what is read ends there too. Not headings: a solution may have some.
STOP = tuple(one for one in NEXT_QUESTION if "#" not in one)
PROMPTS = "router"  # the journal's name for log-probabilities of prompts
CHUNK = 64  # answers between two lines of the journal: what a kill costs at most
DIGITS = 3  # of the heads' weights in the journal


@dataclass(frozen=True, slots=True)
class Asking:
    """How every arm is asked."""

    mode: Mode = "select"
    max_new_tokens: int = 512
    temperature: float = 0.3
    seed: int = 42
    batch_size: int | None = None
    accelerate: bool = True
    only_ensemble: bool = False


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to answer; `key` is a hash of everything that decides its answers beside the question."""

    name: str
    settings: DecodeSettings
    key: str


@dataclass(slots=True)
class Asked:
    """What was said: {arm: answers in the questions' order}, each as the journal has it, and what it took.

    `prompt_log_probs`: each prompt's mean log-probability under each expert, [questions][experts]; None if the ensemble
    alone was asked.
    """

    answers: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    cost: dict[str, Cost] = field(default_factory=dict)
    prompt_log_probs: list[list[float]] | None = None

    @property
    def picks(self) -> list[int] | None:
        """The router's expert of each question: the one to whom the prompt is the least surprising."""
        if self.prompt_log_probs is None:
            return None
        return [max(range(len(row)), key=row.__getitem__) for row in self.prompt_log_probs]


# ---------------------------------------------------------------- the arms


def expert_names(model: MultiModelWithScalarHeads) -> list[str]:
    """The experts' names as arms; one that comes twice, or is an arm's own name, gets its number."""
    names = [expert.name for expert in model.experts]
    return [f"{name}#{i}" if names.count(name) > 1 or name in RESERVED else name for i, name in enumerate(names, 1)]


def arms(model: MultiModelWithScalarHeads, asking: Asking) -> list[Arm]:
    """The arms that are asked: the ensemble first, then each expert alone and the uniform mixture, unless the ensemble
    alone is wanted.
    """
    experts, heads = identities(model), headsshort_hash(model)
    found = [_arm(ENSEMBLE, asking, {"mode": asking.mode}, [*experts, heads])]
    if asking.only_ensemble:
        return found
    for place, name in enumerate(expert_names(model)):
        found.append(_arm(name, asking, {"mode": "single", "expert": place}, [experts[place]]))
    return [*found, _arm(UNIFORM, asking, {"mode": "uniform"}, experts)]


def other_mode(model: MultiModelWithScalarHeads, asking: Asking) -> Arm:
    """The ensemble in its other mode, for answers that an earlier evaluation may have left; its name is the mode."""
    other = "mixture" if asking.mode == "select" else "select"
    return _arm(other, asking, {"mode": other}, [*identities(model), headsshort_hash(model)])


def _arm(name: str, asking: Asking, own: Mapping[str, Any], weights: Sequence[Any]) -> Arm:
    settings = DecodeSettings(
        temperature=asking.temperature, max_new_tokens=asking.max_new_tokens, seed=asking.seed,
        accelerate=asking.accelerate, batch_size=asking.batch_size, **own,
    )  # fmt: skip
    decides = {
        "mode": own["mode"], "weights": weights, "temperature": asking.temperature, "seed": asking.seed,
        "max_new_tokens": asking.max_new_tokens, "stop": STOP,
        # the cost is another; the answers are the same on a CPU in float32, elsewhere nearly (see `blocks`)
        "accelerate": asking.accelerate and own["mode"] != "single",
    }  # fmt: skip
    return Arm(name, settings, short_hash(decides))


def identities(model: MultiModelWithScalarHeads) -> list[list[str]]:
    """What decides each expert's words: its weights, their precision, the kind of device."""

    def of(expert: Expert) -> str:
        return expert.weights if expert.weights.startswith("sha256:") else f"{expert.name} {expert.weights}"

    return [[of(expert), expert.precision, model.device.type] for expert in model.experts]


def headsshort_hash(model: MultiModelWithScalarHeads) -> str:
    """sha256 of the heads' weights, name by name."""
    whole = hashlib.sha256()
    for name, value in sorted(model.heads.state_dict().items()):
        whole.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return whole.hexdigest()[:16]


# ---------------------------------------------------------------- asking


def ask(
    model: MultiModelWithScalarHeads, rows: Sequence[Row], asking: Asking, journal: Journal,
    told: Callable[[int, int], None] = lambda answers, tokens: None,
) -> Asked:  # fmt: skip
    """Let every arm answer every question; what the journal already has is kept.

    `told(answers, tokens)` is called as tokens come, with the answers that the journal has and this session's tokens.
    Raises EngineError if a model fails, DiskError without room.
    """
    known = Known(journal)
    asked, keys = Asked(), [question_key(row) for row in rows]
    wanted = arms(model, asking)
    done, tokens = known.count(wanted, rows), 0

    def on_token(index: int, token: int, expert: int) -> None:
        nonlocal tokens
        tokens += 1
        told(done, tokens)

    for arm in wanted:
        for chunk in _chunks([i for i, key in enumerate(keys) if key not in known.of(arm)], asking):
            _answer(model, arm, [(keys[i], rows[i]) for i in chunk], journal, known, on_token)
            done += len(chunk)
            told(done, tokens)
        _collect(asked, arm, keys, known)
    other = other_mode(model, asking)
    if all(key in known.of(other) for key in keys):
        _collect(asked, other, keys, known)
    if not asking.only_ensemble:
        asked.prompt_log_probs = _routed(model, rows, keys, asking, journal, known)
    return asked


def _chunks(places: Sequence[int], asking: Asking) -> Iterator[Sequence[int]]:
    size = max(CHUNK, asking.batch_size or 0)
    return (places[start : start + size] for start in range(0, len(places), size))


def _collect(asked: Asked, arm: Arm, keys: Sequence[str], known: Known) -> None:
    asked.answers[arm.name] = [known.of(arm)[key] for key in keys]
    asked.cost[arm.name] = known.cost(arm, keys)


def _answer(
    model: MultiModelWithScalarHeads, arm: Arm, asked: Sequence[tuple[str, Row]], journal: Journal, known: Known,
    on_token: Callable[[int, int, int], None],
) -> None:  # fmt: skip
    """A chunk of questions through one arm, as one line of the journal."""
    import torch

    keys = [key for key, _ in asked]
    prompts = [model.encode(row.prompt) for _, row in asked]
    try:
        spoken, counts = decode(model, prompts, arm.settings, keys, stop=STOP, on_token=on_token)
    except torch.OutOfMemoryError:
        raise _too_much(arm.name, arm.settings.batch_size or BATCH) from None
    line = {
        "arm": arm.key, "name": arm.name, "counts": _counts(counts),
        "answers": {key: _said(one, arm) for key, one in zip(keys, spoken, strict=True)},
    }  # fmt: skip
    journal.append(line)
    known.take(line)


def _too_much(name: str, size: int, what: str = "answers") -> EngineError:
    step = f"use --batch_size {size // 2}" if size > 1 else "use --precision 4bit"
    return EngineError(f"{name}: out of memory with {size} {what} at a time", f"{step} (finished answers are kept)")


def _said(spoken: Spoken, arm: Arm) -> dict[str, Any]:
    """One answer, as the journal has it."""
    said = {"text": spoken.text, "finish": spoken.finish, "ids": list(spoken.ids), "experts": list(spoken.experts)}
    if arm.settings.mode in ("select", "mixture"):
        said["pi"] = [[round(float(one), DIGITS) for one in row] for row in spoken.pi]
    return said


def _counts(counts: Counts) -> dict[str, Any]:
    return {
        "tokens": counts.tokens, "seconds": counts.seconds, "passes": counts.row_passes, "drafted": counts.drafted,
        "accepted": counts.accepted,
    }  # fmt: skip


def _routed(
    model: MultiModelWithScalarHeads, rows: Sequence[Row], keys: Sequence[str], asking: Asking, journal: Journal,
    known: Known,
) -> list[list[float]]:  # fmt: skip
    """Each prompt's mean log-probability under each expert."""
    import torch

    size = asking.batch_size or BATCH
    arm = short_hash([PROMPTS, identities(model)])
    have = known.answers.setdefault(arm, {})
    for chunk in _chunks([i for i, key in enumerate(keys) if key not in have], asking):
        try:
            values = prompt_log_probs(model, [model.encode(rows[i].prompt) for i in chunk], size).tolist()
        except torch.OutOfMemoryError:
            raise _too_much(PROMPTS, size, "prompts") from None
        line = {"arm": arm, "name": PROMPTS, "answers": {keys[i]: row for i, row in zip(chunk, values, strict=True)}}
        journal.append(line)
        known.take(line)
    return [have[key] for key in keys]
