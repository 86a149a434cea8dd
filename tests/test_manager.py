"""Two models by role: loaded where they fit, shared where they are one, really freed; and how the scripts load them."""

from __future__ import annotations

import gc
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from cai_experiment.engines import load, pair
from cai_experiment.engines import manager as manager_module
from cai_experiment.engines.context_note import context_note
from cai_experiment.engines.load import LoadSettings, make_plan
from cai_experiment.engines.manager import MultiModelManager
from cai_experiment.engines.pair import pairing
from cai_experiment.engines.placing import Free, place
from cai_experiment.engines.render import Renderer
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.roles import CONFIGURATIONS, generators_share, need_gb, vllm_shares
from tests.conftest import build_tiny_tokenizer

CPU = Hardware("this machine", "cpu", "", 0, "fp32", 16, 2)
CARD = Hardware("this machine", "cuda", "NVIDIA A100-SXM4-80GB", 80, "4bit", 117, 16)
ONLY_CPU = LoadSettings(device="cpu", batch_size=16)


def rss_mb() -> float:
    """Resident memory of this process in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.fixture(scope="module")
def big_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Qwen2 of some 300 MB in float32."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("big")
    build_tiny_tokenizer(folder)
    config = Qwen2Config(vocab_size=600, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5,
                         num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
                         bos_token_id=None, eos_token_id=2, pad_token_id=0)  # fmt: skip
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(0.01)
    model.tie_weights()
    model.save_pretrained(folder)
    return folder


def test_unloading_gives_the_memory_back(big_dir: Path, tiny_model_dir: Path) -> None:
    manager = MultiModelManager(settings=ONLY_CPU)
    ok, _ = manager.load_generation_model(str(tiny_model_dir))  # torch's own buffers, once
    assert ok
    manager.engines()
    manager.unload_all()
    gc.collect()
    size, before = (big_dir / "model.safetensors").stat().st_size / 1e6, rss_mb()
    assert size > 280
    ok, message = manager.load_evaluation_model(str(big_dir))
    assert ok, message
    manager.engines()  # the engine's own copies and its cache of freed memory as well
    held = rss_mb() - before
    assert held > 0.8 * size
    assert manager.get_status_info()["total_memory_gb"] == pytest.approx(size / 1e3, rel=0.01)
    manager.unload_evaluation_model()
    assert held - (rss_mb() - before) >= 0.8 * size
    assert manager.get_status_info()["total_memory_gb"] == 0


def test_one_model_in_both_roles_is_loaded_once_and_freed_when_both_have_let_go(
    nano_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    real = manager_module.load_model

    def counted(plan: Any, settings: Any) -> Any:
        loads.append(plan.choice.name)
        return real(plan, settings)

    monkeypatch.setattr(manager_module, "load_model", counted)
    manager = MultiModelManager(settings=ONLY_CPU)
    ok, message = manager.load_evaluation_model("nano")
    assert ok and message.startswith("Evaluation model loaded: nano, 3.5M parameters, 0.0"), message
    ok, message = manager.load_generation_model(str(nano_dir))  # the same files by another name
    assert ok and "shared by both roles" in message and loads == ["nano"]
    info = manager.get_status_info()
    assert info["shared"] and info["total_memory_gb"] == info["evaluation_model"]["memory_gb"] > 0
    assert info["device"] == "cpu" and info["free_ram_gb"] > 0 and info["generation_model"]["parameters"] > 1e6
    generator, critic = manager.engines()
    assert generator is critic
    manager.unload_evaluation_model()
    assert manager.get_generation_model()[0] is not None
    with pytest.raises(EngineError, match="no evaluation model is loaded; call load_evaluation_model"):
        manager.get_evaluation_model()
    manager.unload_generation_model()
    with pytest.raises(EngineError, match="no model is loaded"):
        manager.engines()


def test_two_models_have_two_engines(nano_dir: Path, tiny_model_dir: Path) -> None:
    said: list[str] = []
    manager = MultiModelManager(settings=ONLY_CPU, say=said.append)
    assert manager.load_generation_model("nano")[0] and manager.load_evaluation_model(str(tiny_model_dir))[0]
    generator, critic = manager.engines()
    assert generator is not critic and "nano" in generator.first_line and tiny_model_dir.name in critic.first_line
    assert said[0].startswith("model nano") and said[1].startswith("critic: model ")
    assert manager.get_evaluation_model()[0] is not manager.get_generation_model()[0]
    manager.unload_all()


@pytest.mark.parametrize(
    ("key", "says"),
    [("nanoo", "unknown preset; nearest: nano"), ("./nowhere", "no such folder"), ("nobody/no-such-model", "cache")],
)
def test_a_users_mistake_is_one_line_and_keeps_what_is_loaded(nano_dir: Path, key: str, says: str) -> None:
    manager = MultiModelManager(settings=ONLY_CPU)
    ok, message = manager.load_generation_model(key)
    assert not ok and says in message and "\n" not in message
    ok, message = manager.load_configuration("duel")
    assert not ok and "nearest: dual" in message


def test_a_load_that_fails_half_way_leaves_nothing_behind(big_dir: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in big_dir.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    config["intermediate_size"] = 2048  # found when its weights are put in
    (broken / "config.json").write_text(json.dumps(config))
    manager, before = MultiModelManager(settings=ONLY_CPU), rss_mb()
    ok, message = manager.load_evaluation_model(str(broken))
    assert not ok and "cannot be loaded" in message and "\n" not in message
    assert rss_mb() - before < 60
    assert manager.get_status_info()["evaluation_model"] is None


# ---------------------------------------------------------------- where it goes


def placed(key: str, free: Free, **settings: Any) -> Any:
    wanted = LoadSettings(model=key, engine="hf", **settings)
    return place(wanted, make_plan(wanted, CARD), free, CARD)


def test_what_misses_the_gpu_goes_to_the_cpu_and_says_by_how_much() -> None:
    assert placed("qwen2.5-7b", Free(20, 60)).note == ""
    found = placed("qwen2.5-7b", Free(4, 60))
    assert found.plan.device == "cpu" and found.plan.quantization == "fp32" and found.settings.device == "cpu"
    need = need_gb(PRESETS["qwen2.5-7b"].architecture, "4bit", "cuda")
    assert f"{need:.1f} GB needed in 4-bit NF4, 4.0 free: {need - 4:.1f} too little" in found.note
    assert placed("qwen2.5-7b", Free(4, 20)).plan.quantization == "bf16"  # half as large
    assert placed("qwen2.5-7b", Free(4, 10), quantization="4bit").plan.quantization == "4bit"


def test_it_is_refused_only_where_the_ram_lacks_too_and_a_smaller_one_that_fits_is_offered() -> None:
    with pytest.raises(EngineError) as caught:
        placed("qwen2.5-32b", Free(8, 8))
    line = str(caught.value)
    assert "RAM:" in line and "\n" not in line
    offered = PRESETS[line.split("take --model ")[1].split(",")[0]]
    assert need_gb(offered.architecture, "4bit", "cuda") <= 8 or need_gb(offered.architecture, "fp32", "cpu") <= 8


def test_the_generator_has_most_of_what_both_models_weights_leave() -> None:
    def share(generator: str, critic: str) -> float:
        return generators_share(PRESETS[generator].architecture, PRESETS[critic].architecture)

    assert 0.5 < share("qwen2.5-7b", "qwen2.5-7b") < share("qwen2.5-32b", "qwen2.5-7b") < 1
    assert generators_share(PRESETS["nano"].architecture, None) == 0.5


def test_two_vllms_share_the_gpu_by_need_or_are_refused_with_the_figures() -> None:
    def shares(generator: str, critic: str) -> Any:
        return vllm_shares(resolve_model(generator, CARD), resolve_model(critic, CARD), CARD, "bf16")

    found = shares("qwen2.5-14b", "qwen2.5-7b")
    assert found.generator > found.critic > 0 and found.generator + found.critic == pytest.approx(0.92, abs=1e-3)
    refused = shares("qwen2.5-32b", "qwen2.5-14b").refused
    assert "two vLLMs need" in refused and "qwen2.5-32b" in refused and "usable" in refused


@pytest.fixture
def on_a_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "is_installed", lambda package: True)
    monkeypatch.setattr("cai_experiment.models.serving.free_gb", lambda place: 500.0)


@pytest.mark.parametrize(
    ("generator", "critic", "trains", "how", "why"),
    [
        ("qwen2.5-14b", "qwen2.5-7b", False, "vllm", ""),
        ("qwen2.5-32b", "qwen2.5-14b", False, "here", "two vLLMs need"),
        ("qwen2.5-7b", "nobody/unknown", False, "here", "vllm does not take"),
        ("qwen2.5-7b", "qwen2.5-3b", True, "here", ""),
    ],
)
def test_how_two_models_are_served_on_a_gpu(
    on_a_pod: None, generator: str, critic: str, trains: bool, how: str, why: str
) -> None:
    settings = LoadSettings(model=generator, trains_after=trains)
    found = pairing(settings, replace(settings, model=critic), CARD)
    assert found.how == how and why in found.why


def test_two_vllms_that_were_asked_for_and_do_not_fit_are_refused_with_the_flags_that_work(on_a_pod: None) -> None:
    settings = LoadSettings(model="qwen2.5-32b", trains_after=False, engine="vllm")
    with pytest.raises(BadInputError, match=r"two vLLMs need .* use --engine hf --quantization 4bit"):
        pairing(settings, replace(settings, model="qwen2.5-14b"), CARD)


def test_each_vllm_is_started_with_its_share(on_a_pod: None, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    started: list[LoadSettings] = []

    def load_engine(settings: LoadSettings) -> Any:
        started.append(settings)
        if len(started) == 2:
            raise EngineError("no")
        return SimpleNamespace(first_line=said[-1].split(" | 6")[0], close=lambda: closed.append(True))

    closed: list[bool] = []
    monkeypatch.setattr(pair, "detect", lambda: CARD)
    monkeypatch.setattr(pair, "load_engine", load_engine)
    monkeypatch.setattr(pair, "check_files", lambda plan, settings: False)
    settings = LoadSettings(model="qwen2.5-14b", trains_after=False)
    with pytest.raises(EngineError, match="no"):
        pair.load_pair(settings, replace(settings, model="qwen2.5-7b"), said.append)
    assert closed == [True]  # no child is left behind
    shares = [one.memory_share or 0.0 for one in started]
    assert sum(shares) == pytest.approx(0.92, abs=1e-3) and f"{shares[0]:.0%} of the GPU's memory" in said[0]


def plan_of(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    from cai_experiment.scripts._milestone import run_milestone

    assert run_milestone("", "mvp", ["--plan", *flags]) == 0
    return capsys.readouterr().out


def test_the_plan_counts_each_model_by_its_own_size(capsys: pytest.CaptureFixture[str]) -> None:
    card = ("--hardware", "a100-80gb", "--generator")
    small = plan_of(capsys, *card, "qwen2.5-14b", "--critic", "qwen2.5-7b")
    assert "two vLLMs" in small and "30.5" not in small and "15.2 GB of weights" in small
    large = plan_of(capsys, *card, "qwen2.5-32b", "--critic", "qwen2.5-14b")
    assert "hf in one process" in large and "two vLLMs need" in large
    none = plan_of(capsys, "--hardware", "t4-16gb", "--generator", "qwen2.5-7b", "--critic", "qwen2.5-14b")
    assert "so the critic is on the CPU, whose memory lacks" in none and "none: it does not fit" in none
    assert "critic" not in plan_of(capsys, *card, "qwen2.5-14b", "--critic", "qwen2.5-14b").split("training")[0]


def test_the_plan_of_two_models_has_no_line_of_an_engine_that_will_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    card = ("--hardware", "a100-80gb", "--generator", "qwen2.5-32b", "--critic")
    said = plan_of(capsys, *card, "qwen2.5-14b")
    (first,) = [line for line in said.splitlines() if line.startswith("generation")]
    assert "hf in one process, 4bit" in first and "two vLLMs need" in first and "taken by auto" not in said
    assert "times as long as qwen2.5-32b in both roles" in said and "in vllm, bf16: vllm does not serve" in said
    dual = plan_of(capsys, "--hardware", "t4-16gb", "--roles", "dual")  # phi-2 keeps twelve times as much for a token
    assert int(dual.split("critic qwen")[1].split(" of weights, ")[1].split()[0]) > 1
    unknown = plan_of(capsys, *card, "nobody/unknown")
    assert "both models in one process: hf, 4bit" in unknown and "vllm, bf16: 65" not in unknown
    with pytest.raises(BadInputError, match=r"--engine vllm: two vLLMs need"):
        plan_of(capsys, *card, "qwen2.5-14b", "--engine", "vllm")


def test_a_smaller_critic_is_offered_by_the_flag_that_named_it(capsys: pytest.CaptureFixture[str]) -> None:
    from cai_experiment.scripts import test_batch

    def offer(*flags: str) -> tuple[str, str]:
        assert test_batch.main(["--plan", "--hardware", "colab_free_t4", *flags]) == 0
        said = capsys.readouterr().out
        return said.split("   or ")[1].split(":")[0], said

    flag, said = offer("--generator", "qwen2.5-14b", "--critic", "qwen2.5-7b")
    assert flag.startswith("--critic ") and "DOES NOT FIT" in said and "or --generator qwen2.5-3b" in said
    assert test_batch.main(["--plan", "--hardware", "colab_free_t4", "--generator", "qwen2.5-14b", *flag.split()]) == 0
    assert "on the CPU" not in capsys.readouterr().out
    assert offer("--generator", "qwen2.5-14b", "--model", "qwen2.5-7b")[0].startswith("--model ")
    assert offer("--model", "qwen2.5-32b", "--critic", "qwen2.5-7b")[0].startswith("--model ")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--roles", "dual", "--critic", "nano"], "--roles dual names both models, and so does --critic"),
        (["--roles", "dual", "--server", "http://127.0.0.1:9"], "and so does --server"),
        (["--roles", "duel"], "nearest: dual"),
    ],
)
def test_roles_and_what_does_not_go_with_them(flags: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BadInputError, match=says):
        plan_of(capsys, *flags)
    assert "qwen2-1.5b-instruct" in plan_of(capsys, "--hardware", "a100-80gb", "--roles", "dual")


def test_generator_and_critic_each_do_their_part_and_meta_names_both(nano_dir: Path, tmp_path: Path) -> None:
    from cai_experiment.scripts import generate_mvp

    flags = ["--generator", "nano", "--critic", "nano-b", "--count", "2", "--rounds", "1", "-v", "0"]
    code = generate_mvp.main([*flags, "--data-dir", str(tmp_path), "--checkpoint-dir", str(tmp_path / "c")])
    assert code in (0, 3)
    rows = [json.loads(line) for line in (tmp_path / "mvp" / "pairs.jsonl").read_text().splitlines()]
    metas = [row["meta"] for row in rows]
    assert metas and all(m["generator"].startswith("nano@") and m["critic"].startswith("nano-b@") for m in metas)


def test_a_context_that_is_too_short_for_the_chain_is_said(nano_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(nano_dir)
    assert context_note("nano", Renderer(tokenizer, "chat", 2048), 500, 300) == ""
    line = context_note("gpt2-xl", Renderer(tokenizer, "base", 1024), 500, 300)
    assert "context of 1,024 tokens does not hold" in line and "--max-tokens-answer" in line
    assert "worked examples fit" in line and "\n" not in line


def test_auto_takes_generate_where_packed_passes_do_not_serve_the_model_and_says_why(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    build_tiny_tokenizer(tmp_path)
    config = MistralConfig(vocab_size=600, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1, sliding_window=64, eos_token_id=2,
                           max_position_embeddings=512, bos_token_id=None, pad_token_id=0)  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    settings = LoadSettings(model=str(tmp_path), device="cpu", layout="chat")
    engine: Any = load.load_engine(settings)
    assert engine.name == "generate"
    assert "engine generate (hf: MistralForCausalLM looks back 64 tokens" in engine.first_line
    assert "--engine generate" not in engine.first_line
    with pytest.raises(EngineError, match="use --engine generate"):
        load.load_engine(replace(settings, engine="hf"))


def test_configurations_name_presets() -> None:
    for one in CONFIGURATIONS.values():
        assert {one.evaluation, one.generation} <= PRESETS.keys()
