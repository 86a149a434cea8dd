"""Presets, hardware detection, the choice of a model, and the arithmetic of memory against published figures."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from cai_experiment.errors import BadInputError
from cai_experiment.models import hardware, memory, plan, presets
from cai_experiment.models.hardware import PROFILES, Hardware
from cai_experiment.models.presets import PRESETS, resolve_model

POD, CPU = PROFILES["runpod_a100_80gb"], PROFILES["cpu"]


def cuda(vram_gb: float, name: str = "Tesla T4") -> Hardware:
    """A machine with one GPU."""
    return Hardware("test", "cuda", name, vram_gb, "4bit", ram_gb=32, cores=8)


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Returns a function that puts an nvidia-smi with the given rows and CUDA version on PATH."""

    def install(rows: str, cuda_line: str = "", driver: str = "580.1") -> None:
        file = tmp_path / "nvidia-smi"
        file.write_text(
            f'#!/bin/sh\ncase "$*" in\n*memory.total*) printf "{rows}" ;;\n*driver_version*) echo {driver} ;;\n'
            f"*) echo '{cuda_line}' ;;\nesac\n"
        )
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
        hardware._nvidia_smi.cache_clear()

    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    hardware._nvidia_smi.cache_clear()
    yield install
    hardware._nvidia_smi.cache_clear()


# ---------------------------------------------------------------- memory

PUBLISHED_PARAMETERS = {  # from the models' safetensors indexes on the hub
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
}


@pytest.mark.parametrize(("key", "count"), PUBLISHED_PARAMETERS.items())
def test_parameters_equal_the_published_counts(key: str, count: int) -> None:
    assert PRESETS[key].architecture.parameters == count


def test_parameters_equal_a_real_model(tiny_model_dir: Path) -> None:
    from transformers import AutoModelForCausalLM

    numbers = memory.Architecture.from_config(tiny_model_dir)
    assert numbers.parameters == AutoModelForCausalLM.from_pretrained(tiny_model_dir).num_parameters()


def test_memory_of_the_32b_model() -> None:
    numbers = PRESETS["qwen2.5-32b"].architecture
    assert memory.kv_bytes_per_token(numbers) == 256 * 1024
    assert memory.weights_gb(numbers, "bf16") == pytest.approx(65.5, abs=0.1)
    assert memory.weights_gb(numbers, "4bit") == pytest.approx(19.2, abs=0.3)  # the spec's 16 leaves out embeddings
    assert memory.vram_gb(numbers, "4bit", 4096, 8) == pytest.approx(19.2 + 8 * 4096 * 262_144 / 1e9, abs=0.3)
    assert memory.training_vram_gb(numbers, "4bit") < POD.vram_gb


def test_nf4_bytes_equal_bitsandbytes() -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit

    weights = torch.randn(512, 512)
    packed, state = quantize_4bit(weights, blocksize=64, compress_statistics=True, quant_type="nf4")
    constants = state.absmax.numel() * state.absmax.element_size() + state.state2.absmax.numel() * 4
    measured = (packed.numel() * packed.element_size() + constants) / weights.numel()
    assert memory.LINEAR_BYTES["4bit"] == pytest.approx(measured, rel=1e-3)


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64, "num_attention_heads": 4}))
    with pytest.raises(BadInputError, match=r"config\.json has no 'num_hidden_layers'"):
        memory.Architecture.from_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(BadInputError, match=r"config\.json cannot be read"):
        memory.Architecture.from_config(tmp_path)


# ---------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("machine", "key"),
    [
        (POD, "qwen2.5-32b"),
        (cuda(70), "qwen2.5-32b"),
        (cuda(40), "qwen2.5-32b"),
        (cuda(24), "qwen2.5-14b"),
        (cuda(15), "qwen2.5-7b"),
        (cuda(8), "qwen2.5-3b"),
        (cuda(2), "nano"),
        (CPU, "nano"),
        (Hardware("mac", "mps", "Apple silicon", 32, "bf16", 32, 8), "nano"),
    ],
)
def test_the_hardware_chooses_and_the_choice_fits(machine: Hardware, key: str) -> None:
    choice = resolve_model(None, machine)
    assert choice.name == key
    if machine.kind == "cuda" and key != "nano":
        assert machine.gpu_name in choice.reason
        assert choice.preset is not None and presets.qlora_need_gb(choice.preset) <= machine.vram_gb


def test_the_32b_preset_means_the_base_model_and_shorter_keys_the_instruct_models() -> None:
    assert (PRESETS["qwen2.5-32b"].hub_id, PRESETS["qwen2.5-32b"].kind) == ("Qwen/Qwen2.5-32B", "base")
    for key in ("qwen2.5-1.5b", "qwen2.5-3b", "qwen2.5-7b"):
        assert PRESETS[key].hub_id.endswith("-Instruct") and PRESETS[key].kind == "chat"


def test_names_hub_ids_and_folders(tiny_model_dir: Path) -> None:
    assert resolve_model("QWEN2.5-7B", CPU).path_or_id == "Qwen/Qwen2.5-7B-Instruct"
    assert resolve_model("Qwen/Qwen2.5-32B", CPU).kind == "base"
    assert resolve_model("some-org/some.model-1B", CPU).preset is None
    local = resolve_model(str(tiny_model_dir), CPU)
    assert (local.path_or_id, local.kind) == (str(tiny_model_dir), None)


def test_the_shipped_models_folder_is_its_preset(nano_dir: Path) -> None:
    choice = resolve_model(str(nano_dir), CPU)
    assert choice.preset is PRESETS["nano"]
    assert presets.numbers_of(choice).parameters < 5e6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen2.5-33b", "nearest: qwen2.5-3"),
        ("xyz", "known: nano, "),
        ("./no-such-folder", "no such folder"),
        ("a/b/c", "no such folder"),
    ],
)
def test_unknown_names_are_refused_with_what_is_near(name: str, message: str) -> None:
    with pytest.raises(BadInputError, match=message):
        resolve_model(name, CPU)


def test_folders_without_a_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"no config\.json"):
        resolve_model(str(tmp_path), CPU)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BadInputError, match="LoRA adapter"):
        resolve_model(str(tmp_path), CPU)


# ---------------------------------------------------------------- detection


def test_detects_the_gpu_that_cuda_would_use(nvidia_smi, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi("NVIDIA A100-SXM4-80GB, 81920\\nNVIDIA L4, 23034\\n", "CUDA Version: 13.0")
    found = hardware.detect()
    assert (found.kind, found.gpu_name, found.vram_gb) == ("cuda", "NVIDIA A100-SXM4-80GB", 80.0)
    assert resolve_model(None, found).name == "qwen2.5-32b"
    assert found.gpus == 1  # the other is of another kind
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert hardware.detect().gpu_name == "NVIDIA L4"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert hardware.detect().kind == "cpu"


def test_gpus_alike_are_counted(nvidia_smi, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi("NVIDIA L4, 23034\\n" * 4, "CUDA Version: 13.0")
    assert hardware.detect().gpus == 4
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert hardware.detect().gpus == 2


def test_without_nvidia_smi_it_is_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    hardware._nvidia_smi.cache_clear()
    monkeypatch.setattr("platform.system", lambda: "Linux")
    found = hardware.detect()
    hardware._nvidia_smi.cache_clear()
    assert (found.kind, found.quantization, hardware.driver_problem()) == ("cpu", "fp32", "")
    assert found.ram_gb > 0 and found.cores >= 1


def test_old_drivers_are_named_by_cuda_version_or_by_driver(nvidia_smi) -> None:
    nvidia_smi("", "CUDA Version: 12.8")
    assert "CUDA 12.8" in hardware.driver_problem()
    nvidia_smi("", "CUDA UMD Version: 13.1")
    assert hardware.driver_problem() == ""
    nvidia_smi("", "no version here", driver="570.12")
    assert "570.12" in hardware.driver_problem()
    nvidia_smi("", "no version here", driver="580.65.06")
    assert hardware.driver_problem() == ""


def test_gpu_speed_reads_the_name_and_not_a_part_of_another() -> None:
    assert hardware.gpu_speed("NVIDIA A100-SXM4-80GB") == (2039, 312)
    assert hardware.gpu_speed("NVIDIA L40S") is None  # not an L4
    assert hardware.gpu_speed("NVIDIA GeForce RTX 4090") == (1008, 165)


# ---------------------------------------------------------------- plan


def test_plan_of_the_milestones_on_the_pod() -> None:
    choice = resolve_model(None, POD)
    mvp = plan.plan(choice, POD, "4bit", plan.Workload(100, 2, 800), 1.74)
    assert mvp.fits and (mvp.engine, mvp.rows_at_once) == ("unsloth", 16)
    assert mvp.hours is not None and mvp.hours < 3  # the spec's budget
    assert mvp.dollars == pytest.approx(mvp.hours * 1.74)
    numbers = PRESETS["qwen2.5-32b"].architecture
    one = plan.tokens_per_second(numbers, POD, 1, "bf16", "hf")
    many = plan.tokens_per_second(numbers, POD, plan.vllm_rows(numbers, POD, 65.5), "bf16", "vllm")
    assert one is not None and one[0] == pytest.approx(17.5, rel=0.06)  # the published figure it is scaled from
    assert many is not None and many[0] == pytest.approx(832, rel=0.25)  # published; reached by arithmetic alone


def test_plan_of_generation_engine_by_engine() -> None:
    """The figures of FACTS: 950 tokens a row, 5,000 rows on an A100 at 19 minutes or more, 76 hours one by one."""
    choice = resolve_model(None, POD)
    work = plan.Workload(2500, 2, 0, weighed=1)  # 5,000 rows drawn
    tokens = plan.Tokens.of(choice, work)
    assert tokens.written == 5000 * 950
    floor = plan.floor_hours(choice, POD, work)
    assert floor is not None and floor == pytest.approx(5000 * (950 + 740) * 2 * 32.76e9 / 312e12 / 3600, rel=0.01)
    lines = plan.generation_lines(choice, POD, work, 1.74)
    assert [line.split()[0] for line in lines] == ["hardware", "tokens", "vllm", "unsloth", "hf", "floor", "arithmetic"]
    hours = [plan.plan(choice, POD, q, work, 1.74, e).hours for e, q in (("vllm", "bf16"), ("hf", "4bit"))]
    assert floor < hours[0] < hours[1] < 76
    targeted = plan.Tokens.of(choice, plan.Workload(2500, 2, 0))
    assert targeted.read > 2 * tokens.read and targeted.written == tokens.written
    assert tokens.read <= tokens.read_by("vllm") < tokens.read_by("unsloth") < tokens.read_by("generate")
    small = plan.generation_lines(choice, PROFILES["rtx-4090"], work, 0)
    assert small[2].startswith("vllm") and small[2].endswith("DO NOT FIT")


def test_profiles_by_name() -> None:
    assert hardware.profile("H100-80GB").gpu_name == "NVIDIA H100 80GB HBM3"
    assert hardware.profile("runpod_a100_80gb").dollars_per_hour == 1.74
    assert all(hardware.gpu_speed(one.gpu_name) for one in PROFILES.values() if one.kind == "cuda")
    with pytest.raises(BadInputError, match=r"--hardware a100 is unknown; use one of .*a100-80gb"):
        hardware.profile("a100")


def test_plan_says_what_it_does_not_know() -> None:
    choice = resolve_model("qwen2.5-32b", CPU)
    unknown = plan.plan(choice, cuda(24, "Some GPU"), "4bit", plan.Workload(10, 2, 80), 0)
    assert unknown.hours is None and not unknown.fits
    assert any("unknown for this GPU" in line for line in unknown.lines())
    with pytest.raises(BadInputError, match="not known before it is downloaded"):
        plan.plan(resolve_model("org/name", CPU), POD, "4bit", plan.Workload(1, 1, 8), 0)
