"""Training's edges: flags and checkpoints refused before loading, memory that runs out, odd tokenizers and layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.milestones import MILESTONES
from cai_experiment.models.memory import Architecture
from cai_experiment.models.presets import PRESETS, ModelPreset
from cai_experiment.scripts import _training, test_single, train_dpo
from cai_experiment.scripts._common import run_main
from cai_experiment.training import checkpoints, dpo
from cai_experiment.training.data import Pair, TokenPair, tokenize_pairs
from cai_experiment.training.plumbing import is_plumbing, label, plumbing_pairs
from cai_experiment.training.settings import DPOSettings, TrainResult

PAIRS = tuple(
    Pair(f"{i:06d}", ask_for_answer(f"How do I grow {plant}?"), f"Use a large pot for {plant}. Water it every morning.",
         f"Only a fool asks about {plant}.")
    for i, plant in enumerate(("tomatoes", "beans", "roses", "figs"))
)  # fmt: skip


def settings_for(folder: Path, **changes: Any) -> DPOSettings:
    return DPOSettings(**{"pairs": PAIRS, "output_dir": folder, "steps": 1, "learning_rate": 1e-3, **changes})


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


@pytest.fixture
def model(tiny_model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_dir)


def train(settings: DPOSettings, model: Any, tokenizer: Any, said: list[str] | None = None) -> TrainResult:
    from cai_experiment.engines.render import Renderer

    heard = [] if said is None else said
    return dpo.train(settings, model, tokenizer, Renderer(tokenizer, "chat", 2048), heard.append)


# ---------------------------------------------------------------- refused, and what a refusal leaves behind


def test_a_refused_call_does_not_stand_in_the_way_of_the_corrected_one(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    with pytest.raises(BadInputError, match=r"--batch-size 3 does not divide .* of 8 pairs; .* --batch-size 2"):
        train(settings_for(tmp_path, batch_size=3), model, tokenizer)
    with pytest.raises(BadInputError, match="longer than 5 tokens"):
        train(settings_for(tmp_path, max_length=5), model, tokenizer)
    assert not (tmp_path / dpo.SETTINGS).exists()
    assert train(settings_for(tmp_path, effective_batch=12), model, tokenizer).steps == 1  # 8 does not divide 12
    with pytest.raises(BadInputError, match="effective_batch 12 -> 8"):
        train(settings_for(tmp_path), model, tokenizer)


def test_settings_without_any_checkpoint_are_not_held_against_a_call(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_experiment.training.run import Training

    with monkeypatch.context() as patch:
        patch.setattr(Training, "measure", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):  # after the settings were written, before any checkpoint
            train(settings_for(tmp_path, beta=0.5), model, tokenizer)
    kept = json.loads((tmp_path / dpo.SETTINGS).read_text())
    assert kept["beta"] == 0.5 and "batch_size" not in kept
    dpo.check_settings(settings_for(tmp_path, beta=0.2))
    (tmp_path / "checkpoint-1").mkdir()
    with pytest.raises(BadInputError, match=r"beta 0\.5 -> 0\.2"):
        dpo.check_settings(settings_for(tmp_path, beta=0.2))


def test_other_weights_under_the_same_name_are_refused_and_unknown_ones_are_not(tmp_path: Path) -> None:
    def on(**known: Any) -> DPOSettings:
        said = json.dumps({"model": "nano", "quantization": "fp32", **known}) if known else ""
        return settings_for(tmp_path, base=said)

    def left_by(settings: DPOSettings) -> None:
        (tmp_path / dpo.SETTINGS).write_text(json.dumps(settings.identity()))

    (tmp_path / "checkpoint-1").mkdir()
    for name, other in (("weights_sha256", "b" * 64), ("revision", "b" * 40), ("random_seed", 7)):
        left_by(on(**{name: "a"}))
        assert json.loads((tmp_path / dpo.SETTINGS).read_text())[f"base_{name}"] == "a"
        dpo.check_settings(on(**{name: "a"}))
        dpo.check_settings(on())  # before the model is loaded
        with pytest.raises(BadInputError, match=f"other settings: base_{name} 'a' -> {other!r}; use those again"):
            dpo.check_settings(on(**{name: other}))
    left_by(on())  # as earlier versions
    assert not [name for name in json.loads((tmp_path / dpo.SETTINGS).read_text()) if name.startswith("base")]
    dpo.check_settings(on(weights_sha256="a"))
    dpo.check_settings(settings_for(tmp_path, base="a key alone"))


@pytest.mark.parametrize(("backend", "first", "then"), [("trl", {"batch_size": 4}, {"batch_size": 1}),
                                                     ("fast", {}, {"token_budget": 100})])  # fmt: skip
def test_another_size_of_passes_resumes(
    tmp_path: Path, tiny_model_dir: Path, tokenizer: Any, backend: str, first: Any, then: Any
) -> None:
    from transformers import AutoModelForCausalLM

    def step(**changes: Any) -> TrainResult:
        plain = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
        return train(settings_for(tmp_path, steps=2, effective_batch=4, backend=backend, **changes), plain, tokenizer)

    assert step(**first, max_hours=0.0).stopped
    result = step(**then)
    assert (result.steps, result.resumed_from) == (2, 1) and [row["step"] for row in result.history] == [1, 2]


def published(folder: Path, name: str, files: tuple[str, ...]) -> Path:
    """A folder of made-up files, written as a checkpoint is."""
    aside = folder / f"{name}.tmp"
    aside.mkdir(parents=True)
    for file in files:
        (aside / file).write_text(f"{name} {file}")
    checkpoints.publish(aside, folder / name)
    return folder / name


def test_flags_and_named_checkpoints_are_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_training, "load_for_training", lambda args: pytest.fail("a model was loaded"))
    rows = tmp_path / "mine.jsonl"
    rows.write_text(json.dumps({"prompt": "Why?", "chosen": "So.", "rejected": "No."}) + "\n")
    folder = tmp_path / "checkpoints" / "mine"

    def fails(*flags: str) -> str:
        places = ["--data-dir", str(tmp_path / "data"), "--checkpoint-dir", str(folder.parent), "--model", "nano"]
        assert run_main(train_dpo.main, ["--pairs", str(rows), *places, *flags]) == 2
        said = capsys.readouterr().err.strip()
        assert "\n" not in said
        return said

    assert "--batch-size 16 does not divide" in fails("--batch-size", "16")
    assert "--early-stop needs held-out pairs" in fails("--early-stop", "2")
    assert not folder.exists()
    assert "no such checkpoint folder" in fails("--resume", str(folder / "checkpoint-1"))
    whole = published(folder, "checkpoint-1", checkpoints.TRAINING_FILES)
    assert "--fresh moves" in fails("--resume", str(whole), "--fresh") and whole.exists()
    assert "not a folder named checkpoint-<step>" in fails(
        "--resume", str(published(tmp_path, "other", checkpoints.TRAINING_FILES))
    )
    published(folder, "final", (*checkpoints.ADAPTER_FILES, dpo.RECORD))
    said = fails("--resume", str(whole))
    assert "is finished" in said and "--fresh" in said and str(whole) in said
    (whole / "optimizer.pt").write_text("other")
    assert "checkpoint-1 is damaged: optimizer.pt" in fails("--resume", str(whole))


def test_resume_is_not_ignored_by_a_finished_training(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    train(settings_for(tmp_path), model, tokenizer)
    with pytest.raises(BadInputError, match=r"checkpoint-1: the training in .* is finished"):
        train(settings_for(tmp_path, resume=tmp_path / "checkpoint-1"), model, tokenizer)


# ---------------------------------------------------------------- memory


def test_memory_that_runs_out_in_training_names_what_was_tried_and_what_helps(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from cai_experiment.training.memory_errors import memory_errors
    from cai_experiment.training.trl_dpo import PairTrainerAdditions

    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    monkeypatch.setattr(PairTrainerAdditions, "compute_loss", full)
    with pytest.raises(EngineError, match=r"with 4 pairs a pass, the longest of \d+ tokens; --batch-size 1 needs less"):
        train(settings_for(tmp_path, batch_size=4, backend="trl"), model, tokenizer)
    row = TokenPair("a", [1] * 50, [2] * 30, [3] * 50)
    for fresh in ("", " --fresh"):
        if fresh:
            (tmp_path / "checkpoint-1").mkdir()
        words = f"with 1 pair a pass, the longest of 100 tokens; train_dpo.py --max-length 50{fresh} drops"
        with pytest.raises(EngineError, match=words), memory_errors(settings_for(tmp_path, batch_size=1), [row], "trl"):
            raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="another"), memory_errors(settings_for(tmp_path), [row], "trl"):
        raise RuntimeError("another")


def test_memory_that_runs_out_in_packed_passes_names_their_tokens(
    tmp_path: Path, model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from cai_experiment.training.fast_dpo import FastTrainer
    from cai_experiment.training.memory_errors import memory_errors

    def full(self: Any, *args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")

    monkeypatch.setattr(FastTrainer, "training_step", full)
    words = r"with passes of 3000 tokens, the longest answer with its prompt of \d+; --token-budget 1500 needs less"
    with pytest.raises(EngineError, match=words):
        train(settings_for(tmp_path, token_budget=3000, backend="fast"), model, tokenizer)
    row = TokenPair("a", [1] * 50, [2] * 30, [3] * 50)
    words = "passes of as many tokens as memory seemed to hold, .* of 100; --token-budget 200 needs less"
    with pytest.raises(EngineError, match=words), memory_errors(settings_for(tmp_path), [row], "fast"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(EngineError, match=r"of 100, 7 layers recomputed; train_dpo.py --max-length 50 drops"), \
            memory_errors(settings_for(tmp_path), [row], "fast") as tried:  # fmt: skip
        tried.tokens, tried.recomputed_layers = 100, 7
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_scoring_halves_its_rows_when_memory_runs_out(model: Any, tokenizer: Any) -> None:
    import torch

    from cai_experiment.engines.render import Renderer
    from cai_experiment.evaluation.preference import completion_logps

    kept, _ = tokenize_pairs(PAIRS, Renderer(tokenizer, "chat", 2048), 2048)
    rows = [(pair.prompt_ids, ids) for pair in kept for ids in (pair.chosen_ids, pair.rejected_ids)]
    expected, tried = completion_logps(model, rows), []

    class Small:
        """The model on a device that holds `most` rows at a time."""

        def __init__(self, most: int) -> None:
            self.most, self.parameters = most, model.parameters

        def __call__(self, input_ids: Any, **kwargs: Any) -> Any:
            tried.append(len(input_ids))
            if len(input_ids) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return model(input_ids=input_ids, **kwargs)

    assert completion_logps(Small(3), rows) == pytest.approx(expected, abs=1e-3)
    assert tried == [8, 4, 2, 2, 2, 2]
    with pytest.raises(EngineError, match=r"one answer of \d+ tokens.*--no-eval"):
        completion_logps(Small(0), rows)


# ---------------------------------------------------------------- tokenizers and layers of other families


def test_a_tokenizer_without_a_pad_token_trains(tmp_path: Path, model: Any, tokenizer: Any) -> None:
    from cai_experiment.training.trl_dpo import pad_id

    rows = [TokenPair("a", [5], [7, 9], [8, 9])]
    assert pad_id(tokenizer, rows) == tokenizer.pad_token_id
    tokenizer.pad_token = None
    assert tokenizer.pad_token_id is None and pad_id(tokenizer, rows) == 9
    result = train(settings_for(tmp_path), model, tokenizer)
    assert result.step0_margin == 0.0 and result.loss_falls


def test_fused_layers_are_adapted_all(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, bos_token_id=None,
                        eos_token_id=None)  # fmt: skip
    result = train(settings_for(tmp_path), Phi3ForCausalLM(config), tokenizer)
    names = [name for name, _ in result.model.named_parameters() if "lora_" in name]
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name in names}
    assert adapted == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} and result.loss_falls


def test_auto_trains_what_fast_does_not_with_trl_and_says_so(tmp_path: Path, tokenizer: Any) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4, n_positions=512, bos_token_id=None,
                        eos_token_id=None)  # fmt: skip
    said: list[str] = []
    result = train(settings_for(tmp_path, backend="auto"), GPT2LMHeadModel(config), tokenizer, said)
    assert any(line.startswith("backend trl: fast does not train gpt2 (layers that it does not know)") for line in said)
    names = [name for name, _ in result.model.named_parameters() if "lora_" in name]
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in names} == {"c_attn", "c_proj", "c_fc"}
    assert result.step0_margin == 0.0 and result.loss_falls


# ---------------------------------------------------------------- random weights


def test_fixed_pairs_are_whole_and_named(tmp_path: Path) -> None:
    pairs = plumbing_pairs(10)
    assert len({pair.instruction for pair in pairs}) == 10 and plumbing_pairs(1) == pairs[:1]
    assert all(450 < len(text) < 550 for pair in pairs for text in (pair.chosen, pair.rejected))
    assert is_plumbing(pairs) and not is_plumbing(PAIRS) and not is_plumbing([])
    assert label(pairs[:1]).startswith("random weights: a fixed pair, to exercise the code")
    args = train_dpo.parser().parse_args(["--random-weights", "nano"])
    assert len(_training.own_pairs(args, MILESTONES["batch"], tmp_path)) == 10
    with pytest.raises(BadInputError):  # a model of real weights has pairs of its own, or none
        _training.own_pairs(train_dpo.parser().parse_args([]), MILESTONES["batch"], tmp_path)


def test_milestone_0_on_random_weights_in_4_bit_comes_to_its_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = Architecture(2, 128, 4, 2, 32, 256, 700, tied=False)
    monkeypatch.setitem(PRESETS, "toy", ModelPreset("toy", "nobody/toy", "base", numbers, 2048, "none", "tests"))
    rows = tmp_path / "rows.txt"
    rows.write_text("How do I grow beans?\n")
    flags = ["--random-weights", "toy", "--quantization", "4bit", "--instructions", str(rows), "--max-tokens-answer",
             "6", "--data-dir", str(tmp_path / "data"), "--checkpoint-dir", str(tmp_path / "checkpoints")]  # fmt: skip
    assert run_main(test_single.main, flags) == 3  # no gate on words can pass
    said = capsys.readouterr().out
    assert "random weights: a fixed pair, to exercise the code" in said and "trained 1 of 1 steps on 1 pairs" in said
    report = json.loads((tmp_path / "data/single/report.json").read_text())
    assert report["counts"]["accepted"] == 0 and is_plumbing(plumbing_pairs(1))
    training = {gate["name"]: gate["passed"] for gate in report["gates"] if gate["part"] == "training"}
    assert training == {"step-0 margin is 0": True, "loss is finite": True}
    assert report["notes"][0] == label(plumbing_pairs(1))
    assert report["cost"]["peak_gpu_gb"] == {"generation": None, "training": None}
    monkeypatch.setattr("cai_experiment.scripts._milestone.load_engines", lambda args: pytest.fail("loaded again"))
    assert run_main(test_single.main, flags) == 3  # finished: the report again
