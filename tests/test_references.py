"""The reference is the reference: the model it starts from, exactly; a cache that is damaged, and one that is wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.errors import EngineError
from cai_experiment.training import dpo
from cai_experiment.training.data import Pair
from cai_experiment.training.settings import DPOSettings, TrainResult

PAIRS = tuple(
    Pair(f"{i:06d}", ask_for_answer(f"How do I grow {plant}?" + " It is dry." * (i % 3)),
         f"Use a large pot for {plant}. Water it every morning.", f"Only a fool asks about {plant}.")
    for i, plant in enumerate(("tomatoes", "beans", "roses", "figs", "mint", "basil"))
)  # fmt: skip


def train(folder: Path, model_dir: Path, **changes: Any) -> TrainResult:
    """A training on PAIRS in folder/name/run, its references in folder/name/reference."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cai_experiment.engines.render import Renderer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    load = changes.pop("load", {"dtype": torch.float32})
    given = {"pairs": PAIRS, "output_dir": folder / changes.pop("run", "run"), "steps": 2, "learning_rate": 1e-3,
             "lora_r": 4, "lora_alpha": 8, "effective_batch": 3, "backend": "fast", "base": "tiny",
             **changes}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir, **load)
    return dpo.train(DPOSettings(**given), model, tokenizer, Renderer(tokenizer, "chat", 2048), lambda line: None)


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return {name: t.clone() for name, t in load_file(folder / "adapter_model.safetensors").items()}


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def taught(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that has been trained already, as SFT leaves one."""
    folder = tmp_path_factory.mktemp("taught")
    return train(folder, tiny_model_dir, steps=6, learning_rate=5e-3).adapter_dir


def only_file(folder: Path) -> Path:
    (found,) = (folder / "reference").iterdir()
    return found


@pytest.mark.parametrize("continued", [False, True])
def test_the_margin_before_the_first_step_is_0_and_with_a_cached_reference_nearly(
    tmp_path: Path, tiny_model_dir: Path, taught: Path, continued: bool
) -> None:
    start = taught if continued else None
    first = train(tmp_path, tiny_model_dir, start_adapter=start)
    assert first.step0_margin == first.before["chosen_reward"] == 0.0
    assert first.loss_before == pytest.approx(math.log(2), abs=1e-7) and first.loss_falls
    stamp = only_file(tmp_path).stat().st_mtime_ns
    again = train(tmp_path, tiny_model_dir, start_adapter=start, run="again", token_budget=40)
    assert only_file(tmp_path).stat().st_mtime_ns == stamp  # read, not written again
    assert 0 < abs(again.step0_margin) <= 1e-4 or again.step0_margin == 0.0
    assert apart(weights(first.adapter_dir), weights(again.adapter_dir)) < 1e-3


def test_the_reference_of_a_continued_training_is_its_start_and_not_the_model_without_it(
    tmp_path: Path, tiny_model_dir: Path, taught: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_experiment.training import fast_dpo

    class Wrong(fast_dpo.Reference):
        def __init__(self, *args: Any, fresh: bool) -> None:
            super().__init__(*args, fresh=True)

    monkeypatch.setattr(fast_dpo, "Reference", Wrong)
    with pytest.raises(EngineError, match="the reference is not the starting model") as caught:
        train(tmp_path, tiny_model_dir, start_adapter=taught)
    assert "\n" not in str(caught.value)


def test_a_torn_or_changed_cache_is_made_again_and_wrong_numbers_in_a_whole_one_are_refused(
    tmp_path: Path, tiny_model_dir: Path
) -> None:
    from safetensors.torch import load_file

    from cai_experiment.training.fast.reference import _write

    train(tmp_path, tiny_model_dir)
    place = only_file(tmp_path)
    whole = place.read_bytes()
    for number, damaged in enumerate((whole[:-9], whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:], b"")):
        place.write_bytes(damaged)
        result = train(tmp_path, tiny_model_dir, run=str(number))
        assert result.step0_margin == 0.0 and place.read_bytes() == whole
    _write(place, load_file(place)["logps"] + 0.5)  # its hash is right
    with pytest.raises(EngineError, match="stored log-probabilities of the reference are off") as caught:
        train(tmp_path, tiny_model_dir, run="wrong")
    assert "\n" not in str(caught.value) and "delete that folder" in str(caught.value)


def test_a_broken_mask_stops_before_the_first_step(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rejected tokens see chosen ones: a plain causal mask over the packed pair."""
    from cai_experiment.training.fast import packing

    attended = packing._attended

    def leaking(sizes: Any) -> Any:
        spread, place, mask = attended(sizes)
        return spread, place, mask | mask.new_ones(mask.shape[-2:]).tril()

    monkeypatch.setattr(packing, "_attended", leaking)
    with pytest.raises(EngineError, match=r"packed passes .* score pairs otherwise than the model: by .*--backend trl"):
        train(tmp_path, tiny_model_dir)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_the_key_changes_with_all_that_the_numbers_depend_on(
    tmp_path: Path, tiny_model_dir: Path, taught: Path
) -> None:
    import torch

    def files() -> int:
        return len(list((tmp_path / "reference").iterdir()))

    changes: list[dict[str, Any]] = [
        {}, {"base": "another"}, {"start_adapter": taught}, {"pairs": PAIRS[:5]}, {"load": {"dtype": torch.bfloat16}}
    ]  # fmt: skip
    for number, change in enumerate(changes):
        train(tmp_path, tiny_model_dir, run=str(number), steps=1, **change)
        assert files() == number + 1, change
    train(tmp_path, tiny_model_dir, run="same", steps=1, learning_rate=1e-4, seed=3, beta=0.3)  # not part of the key
    assert files() == len(changes)


def test_in_bfloat16_a_cached_reference_is_within_the_measured_noise(
    tmp_path: Path, tiny_model_dir: Path, record_property: Any
) -> None:
    import torch

    load = {"dtype": torch.bfloat16}
    first = train(tmp_path, tiny_model_dir, load=load)
    again = train(tmp_path, tiny_model_dir, load=load, run="again", token_budget=40)
    assert first.step0_margin == 0.0
    record_property("margin with a cached reference", again.step0_margin)
    assert abs(again.step0_margin) < 0.05


def test_trl_continues_an_adapter_with_a_frozen_copy_and_resumes_exactly(
    tmp_path: Path, tiny_model_dir: Path, taught: Path
) -> None:
    given = {"backend": "trl", "start_adapter": taught, "steps": 4, "save_every": 1, "batch_size": 3}
    whole = train(tmp_path, tiny_model_dir, run="whole", **given)
    assert whole.step0_margin == 0.0 and whole.loss_falls
    assert not list((tmp_path / "whole").glob("*/ref"))
    for _ in range(2):
        assert train(tmp_path, tiny_model_dir, run="cut", max_hours=0.0, **given).stopped
    resumed = train(tmp_path, tiny_model_dir, run="cut", **given)
    assert resumed.resumed_from == 2
    assert apart(weights(whole.adapter_dir), weights(resumed.adapter_dir)) == 0.0
    fast = train(tmp_path, tiny_model_dir, run="fast", **{**given, "backend": "fast"})
    assert fast.after["margin"] == pytest.approx(whole.after["margin"], abs=2e-3)


def test_4_bit_weights_train_on_a_cpu_within_5_percent_of_float32s_loss(
    tmp_path: Path, nano_dir: Path, record_property: Any
) -> None:
    import torch
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    given = {"steps": 6, "learning_rate": 2e-4, "sample_every": 100}
    full = train(tmp_path, nano_dir, run="full", **given)
    load = {"quantization_config": quantization, "device_map": "cpu"}
    four = train(tmp_path, nano_dir, run="four", load=load, **given)
    assert four.step0_margin == 0.0 and four.loss_falls
    record_property("loss in float32 and 4 bits", (full.loss_after, four.loss_after))
    assert four.loss_after == pytest.approx(full.loss_after, rel=0.05)
