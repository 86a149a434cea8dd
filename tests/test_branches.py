"""Verdicts weighed by shared stems give what each prompt gives by itself; Unsloth's engine uses them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines import branches
from cai_experiment.engines.base import Prompt, Sampling
from cai_experiment.engines.common import Request
from cai_experiment.engines.load import LoadSettings, load_engine


def request(*ids: int) -> Request:
    prompt = Prompt(str(ids), (), "verdict", options=("A", "B"))
    return Request(prompt, np.array(ids, dtype=np.int32), (65, 66))


def test_groups_are_runs_with_a_common_stem() -> None:
    stem = tuple(range(40))
    rows = [request(*stem, 1, 2, 3), request(*stem, 4, 5), request(*stem), request(*range(90, 99)), request(7, 8)]
    found = [([len(r.ids) for r in run], length) for run, length in branches.groups(rows)]
    assert found == [([43, 42, 40], 38), ([9], 7), ([2], 0)]
    assert list(branches.groups([])) == []


def asked() -> list[Prompt]:
    """Verdicts of two examples in an odd order, of different lengths, and two spoken prompts between them."""
    prompts = []
    for example in range(2):
        stem = (Turn("instruction", f"How do I grow tomatoes on balcony {example}? " * 6), Turn("answer", "Water."))
        for number in range(5):
            turns = (*stem, Turn("question", "Does this break the rule? " + "Look well. " * number))
            prompts.append(Prompt(f"{example}/{number}", turns, "verdict", Sampling(0.0, 1), ("A", "B")))
        prompts.append(Prompt(f"{example}/said", stem[:1], "answer", Sampling(max_tokens=6)))
    return prompts


def test_unsloths_engine_reads_a_stem_once(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cai_experiment.engines.unsloth import UnslothEngine

    plain: Any = load_engine(LoadSettings(model=str(tiny_model_dir), engine="generate", device="cpu"))
    package = ModuleType("unsloth")  # the real one refuses to be imported without a GPU
    package.FastLanguageModel = SimpleNamespace(for_inference=lambda model: model)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", package)
    engine = UnslothEngine(plain.model, plain.tokenizer, plain.renderer, 12)
    expected = {c.id: c for c in plain.stream(asked())}
    found = {c.id: c for c in engine.stream(asked())}
    assert set(found) == set(expected)
    for name, completion in found.items():
        assert completion.logprobs == pytest.approx(expected[name].logprobs, abs=1e-4)
        assert (completion.text, completion.finish) == (expected[name].text, expected[name].finish)
    verdicts = [c for c in found.values() if c.logprobs]
    assert sum(c.computed_tokens for c in verdicts) < sum(c.prompt_tokens for c in verdicts) / 2
    rows = engine.choose(asked()[:3], ["A", "B"])
    assert rows == [pytest.approx(expected[f"0/{i}"].logprobs, abs=1e-4) for i in range(3)]


def test_plain_pairs_of_keys_and_values_are_taken_as_well(tiny_model_dir: Path) -> None:
    """Unsloth's forward gives the cache as a tuple of pairs."""
    import torch

    engine: Any = load_engine(LoadSettings(model=str(tiny_model_dir), engine="generate", device="cpu"))

    def forward(**kwargs: Any) -> Any:
        out = engine.model(**kwargs)
        out.past_key_values = tuple((layer.keys, layer.values) for layer in out.past_key_values.layers)
        return out

    class Pairs:
        device = torch.device("cpu")
        __call__ = staticmethod(forward)

    run = [request(*range(100, 130), 1, 2), request(*range(100, 130), 3, 4, 5)]
    with torch.inference_mode():
        pairs, own = branches.weigh(Pairs(), run, 30), branches.weigh(engine.model, run, 30)
        alone = [branches.weigh(engine.model, [r], 0)[0] for r in run]
    assert [c.logprobs for c in pairs] == [c.logprobs for c in own]
    for one, other in zip(own, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
