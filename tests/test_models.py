"""Presets, hardware detection, the choice of a model, and the arithmetic of memory against published figures."""

from __future__ import annotations

import json
import random
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest

from cai_experiment import milestones
from cai_experiment.constitution.principles import DEFAULT_CONSTITUTION, load_constitution
from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines import load
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.render import Renderer
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.models import choice as choice_module
from cai_experiment.models import disk, hardware, memory, plan, serving, training_memory, workload
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.hardware import PROFILES, Hardware
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.training_plan import Lengths, TrainingWork
from cai_experiment.models.workload import Tokens, Workload
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.stages import ExampleStages, StageSettings
from cai_experiment.records.manifest import Manifest
from cai_experiment.scripts import (
    _plan,
    _plan_parts,
    doctor,
    eval_model,
    generate_full,
    generate_mvp,
    test_batch,
    test_single,
    train_dpo,
)
from cai_experiment.scripts._common import run_main

Planned = Callable[..., dict[str, str]]

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
    assert training_memory.training_vram_gb(numbers, "4bit") < POD.vram_gb


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
        (cuda(8), "qwen2.5-1.5b"),  # the 3B's licence forbids commercial use
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
        assert choice.preset is not None and choice_module.qlora_need_gb(choice.preset) <= machine.vram_gb


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
    assert choice_module.numbers_of(choice).parameters < 5e6


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
    assert hardware.gpu_speed("NVIDIA L40S") == (864, 362)  # not an L4
    assert hardware.gpu_speed("NVIDIA A100-SXM4-40GB") == (1555, 312)  # its memory is slower than the 80 GB card's
    assert hardware.gpu_speed("NVIDIA A10") is None
    assert hardware.gpu_speed("NVIDIA GeForce RTX 4090") == (1008, 165)


# ---------------------------------------------------------------- disk


def test_disk_counts_what_is_downloaded_and_adds_up_what_lies_on_one_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for name, size in (("Qwen--Qwen2.5-32B", 3000), ("unsloth--Qwen2.5-32B-bnb-4bit", 2000),
                       ("unsloth--Qwen2.5-32B-Instruct-bnb-4bit", 5000)):  # fmt: skip
        blobs = tmp_path / f"models--{name}" / "blobs"
        blobs.mkdir(parents=True)
        (blobs / "part").write_bytes(b"x" * size)
    assert disk.downloaded_gb("Qwen/Qwen2.5-32B") == 3e-6
    choice = resolve_model(None, POD)
    assert (serving.here_gb(choice, "bf16"), serving.here_gb(choice, "4bit")) == (3e-6, 2e-6)  # its own names alone
    assert serving.missing_gb(choice, "4bit") == pytest.approx(19.2, abs=0.1)
    one = disk.room([(tmp_path / "not" / "yet", 1.0), (tmp_path, 2.0)])
    assert [(place, need) for place, need, _ in one] == [(tmp_path / "not" / "yet", 3.0)]
    # adapters of rank 32 in float32: two checkpoints and one in work with Adam's moments, and the final adapter
    assert disk.checkpoints_gb(PRESETS["qwen2.5-32b"].architecture) == pytest.approx(268.4e6 * 4 * 10 / 1e9, rel=1e-3)


def test_4_bit_weights_are_the_siblings_unless_the_16_bit_ones_are_whole_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    choice = resolve_model(None, POD)
    whole, sibling = ("Qwen/Qwen2.5-32B", "bf16"), ("unsloth/Qwen2.5-32B-bnb-4bit", "4bit")
    assert serving.files_for(choice, "unsloth", "4bit") == sibling
    assert serving.files_for(choice, "hf", "bf16") == serving.files_for(choice, "vllm", "bf16") == whole
    assert serving.files_for(choice, "hf", "4bit") == serving.files_for(choice, "hf", "4bit", here=False) == sibling
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert serving.files_for(choice, "hf", "4bit") == whole, "FSDP shards no bytes"
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    assert serving.files_for(resolve_model("org/name", POD), "hf", "4bit") == ("org/name", "bf16")

    def downloads(hub_id: str, size: int) -> None:
        blobs = tmp_path / f"models--{hub_id.replace('/', '--')}" / "blobs"
        blobs.mkdir(parents=True)
        with (blobs / "part").open("wb") as file:
            file.truncate(size)  # sparse

    downloads(whole[0], 65_000_000_000)
    assert serving.files_for(choice, "hf", "4bit") == whole, "nothing is to be fetched"
    assert serving.files_for(choice, "hf", "4bit", here=False) == sibling
    downloads(sibling[0], 19_300_000_000)
    assert serving.files_for(choice, "hf", "4bit") == sibling, "what a run began with it goes on with"


def test_weights_that_were_quantised_beforehand_are_loaded(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sibling's weights are what transformers makes of the model's own while it loads them."""
    settings = load.LoadSettings(model=str(tiny_model_dir), engine="hf", quantization="4bit", device="cpu")
    made = load.make_plan(settings, CPU)
    here, _, _ = load.load_model(made, settings)
    here.save_pretrained(tmp_path / "sibling")
    config = tmp_path / "sibling" / "config.json"  # as published: bfloat16, whatever the device
    said = '"bnb_4bit_compute_dtype": "{}"'
    config.write_text(config.read_text().replace(said.format("float32"), said.format("bfloat16")))
    monkeypatch.setattr(load, "files_for", lambda *_: (str(tmp_path / "sibling"), "4bit"))
    model, tokenizer, _ = load.load_model(made, settings)
    assert "bfloat16" in config.read_text() and model.model.layers[0].mlp.up_proj.compute_dtype is model.dtype
    ids = tokenizer("How do I grow tomatoes?", return_tensors="pt").input_ids
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert model(ids).logits.allclose(here(ids).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("free", "states", "says"),
    [
        (20.0, ["FAIL", "warn"], "generation takes the 4-bit weights"),
        (40.0, ["ok", "warn"], "generation takes the 4-bit weights"),
        (80.0, ["ok", "warn"], "make room before guard and training"),
        (
            120.0,
            ["ok", "ok"],
            "66 bf16 weights for vLLM + 16 M3's guard + 19 4-bit weights + 12 checkpoints and data: fits",
        ),
    ],
)
def test_doctor_shows_the_disk_for_both_kinds_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, states: list[str], says: str
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(disk, "free_gb", lambda place: free)
    monkeypatch.setattr(serving, "free_gb", lambda place: free)
    rows = list(doctor.disk_rows(tmp_path, resolve_model(None, POD), POD))
    assert [row.state for row in rows] == states
    assert "19 4-bit weights + 12 checkpoints" in rows[0].value and says in rows[1].value


# ---------------------------------------------------------------- plan


def test_plan_of_generation_on_the_pod() -> None:
    """The figures of FACTS: 950 tokens a row, 5,000 rows on an A100 at 19 minutes or more, 76 hours one by one."""
    choice = resolve_model(None, POD)
    work = Workload(2500, 2, weighed=1)  # 5,000 rows drawn
    tokens = Tokens.of(choice, work)
    assert tokens.written == 5000 * 950 and tokens == Tokens.of(choice, Workload(1, 2, 1, drawn=5000))
    floor = plan.floor_hours(choice, POD, work)
    assert floor is not None
    assert floor == pytest.approx((tokens.written + tokens.read) * 2 * 32.76e9 / 312e12 / 3600, rel=0.01)
    vllm, hf = (plan.generation(choice, POD, e, q, work) for e, q in (("vllm", "bf16"), ("hf", "4bit")))
    assert vllm.hours is not None and hf.hours is not None
    assert floor < min(vllm.hours, hf.hours) and max(vllm.hours, hf.hours) < 76
    assert workload.SHORTLIST == milestones.SHORTLIST
    targeted = Tokens.of(choice, Workload(2500, 2))
    assert targeted.read > 1.5 * tokens.read and targeted.written == tokens.written
    for one in (tokens, targeted):
        assert one.read < one.read_by("vllm") < one.read_by("unsloth") < one.read_by("generate") == one.sent
    numbers = PRESETS["qwen2.5-32b"].architecture
    one = plan.tokens_per_second(numbers, POD, 1, "bf16", "hf")
    many = plan.tokens_per_second(numbers, POD, plan.vllm_rows(numbers, POD, 65.5), "bf16", "vllm")
    assert one is not None and one[0] == pytest.approx(17.5, rel=0.06)  # the published figure it is scaled from
    assert many is not None and many[0] == pytest.approx(832, rel=0.25)  # published; reached by arithmetic alone


WORDS = ("time", "year", "people", "way", "day", "man", "thing", "life", "child", "world", "school", "state")


def spoken(prompt: Prompt, tokens: int) -> Completion:
    """About so many tokens of words; to a verdict prompt, that nothing is broken."""
    if prompt.options:
        yes_first = prompt.id.endswith("yes_first")
        return Completion(prompt.id, "", "stop", logprobs=(-2.0, -0.1) if yes_first else (-0.1, -2.0))
    draw = random.Random(prompt.id)
    return Completion(prompt.id, " ".join(draw.choice(WORDS) for _ in range(tokens)), "stop")


def prompts_of(rounds: int, principles: Any) -> Iterator[tuple[Prompt, Completion]]:
    """All prompts of one example, answered at the lengths that the plan assumes."""
    constitution = load_constitution(DEFAULT_CONSTITUTION).principles
    instruction = Instruction("000000", "How do I keep a pot of basil alive in a dark kitchen?", "self")
    steps = ExampleStages(instruction, constitution, StageSettings(rounds, principles)).steps()
    asked = next(steps)
    while asked:
        done = [spoken(p, workload.CRITIQUE_TOKENS if p.speak_as == "critique" else workload.ANSWER_TOKENS)
                for p in asked]  # fmt: skip
        yield from zip(asked, done, strict=True)
        try:
            asked = steps.send({one.id: one for one in done})
        except StopIteration:
            return


def counted(renderer: Renderer, rounds: int, principles: Any) -> tuple[int, int, int, int]:
    """(prompts, their tokens, distinct ones of the prefix tree, those that vLLM's blocks do not hold) of an example,
    less what it has spoken and the worked examples, which all rows share."""
    tree: set[int] = set()
    held: set[int] = set()  # whole blocks, by their prefix
    prompts = sent = written = computed = 0
    size = workload.KV_BLOCK
    for prompt, completion in prompts_of(rounds, principles):
        ids, said = renderer.prompt_ids(prompt.turns, prompt.speak_as), renderer.encode(completion.text, False)
        sums = list(accumulate((*ids, *said), lambda before, token: hash((before, token)), initial=0))[1:]
        blocks = next(n for n in range(len(ids)) if size * (n + 1) >= len(ids) or sums[size * (n + 1) - 1] not in held)
        computed += len(ids) - size * blocks
        held.update(sums[size - 1 : len(sums) - 1 : size])
        tree.update(sums[: len(ids)])
        prompts, sent, written = prompts + 1, sent + len(ids), written + len(said)
    turns = (Turn("instruction", "Why?"),)
    worked = len(renderer.prompt_ids(turns, "answer")) - len(renderer.prompt_ids(turns, "answer", examples=0))
    return prompts, sent, len(tree) - written - worked, computed - worked


@pytest.mark.parametrize(("rounds", "weighed"), [(2, 15), (1, 15), (2, 1)])
def test_the_tokens_of_a_plan_are_those_of_an_example(shared_data: Path, rounds: int, weighed: int) -> None:
    """Counted over our constitution, prompts and stages in Qwen2's vocabulary, in the base layout.

    Half a block a prompt is what vLLM loses on average; prompts of one example lose alike, so that one may lose less.
    """
    from transformers import AutoTokenizer

    renderer = Renderer(AutoTokenizer.from_pretrained(shared_data / "qwen2_tokenizer"), "base", 4096)
    prompts, sent, tree, blocks = counted(renderer, rounds, "targeted" if weighed > 1 else "random")
    tokens = Tokens.of(resolve_model(None, POD), Workload(1, rounds, weighed, drawn=1))
    assert tokens.prompts == pytest.approx(prompts, abs=2)
    assert tokens.read == pytest.approx(tree, rel=0.08)
    assert tokens.sent == pytest.approx(sent, rel=0.15)
    assert 0 < blocks - tree <= prompts * (workload.KV_BLOCK - 1)
    assert tokens.read_by("vllm") - tokens.read == tokens.prompts * workload.KV_BLOCK // 2


def test_actors_divide_the_hours_and_not_the_dollars() -> None:
    choice, work = resolve_model(None, POD), Workload(5000, 2)
    alone, eight = (
        plan.generation(choice, POD, "vllm", "bf16", work, 65.5, actors=n, machines=n) for n in (1, 8)
    )  # fmt: skip
    start = plan.start_hours(POD, 65.5)
    assert alone.hours is not None and eight.hours is not None and eight.machine_hours is not None
    assert eight.hours - start == pytest.approx((alone.hours - start) / 8)
    assert eight.machine_hours == pytest.approx(alone.hours + 7 * start)  # every pod is started
    assert (10 / 60) < start < (20 / 60)  # docs/SCALING.md: 10 to 20 minutes


def dpo(machine: Hardware = POD, backend: str = "unsloth", **changes: Any) -> TrainingWork:
    """Three epochs over 4,000 pairs of the 32B model in 4 bit."""
    choice = resolve_model("qwen2.5-32b", machine)
    return replace(TrainingWork(choice, machine, backend, "4bit", 4000, 12_000, 2048), **changes)


def test_plan_of_training_by_the_published_limits() -> None:
    """FACTS: an A100 is limited to 1,220, 1,626 and 2,440 tokens a second at 8, 6 and 4 FLOPs a parameter and token
    (of 32e9 parameters; the model has 32.8e9)."""
    known = (Lengths(100, 250, 250),)
    for backend, flops, limit in (("unsloth", 8, 1220), ("fast", 4, 2440)):
        work = dpo(backend=backend, lengths=known)
        assert work.flops_a_token() == flops
        assert work.limit() / work.flops_a_token() / work.numbers.parameters == pytest.approx(limit, rel=0.03)  # type: ignore[operator]
    unsloth, fast = dpo(lengths=known), dpo(backend="fast", lengths=known)
    assert unsloth.tokens == 12_000 * 2 * 350 and fast.tokens == 12_000 * 598
    assert fast.hours() < 0.5 * unsloth.hours()  # type: ignore[operator]
    assert unsloth.part().memory_gb == pytest.approx(19.2 + 4.3 + 0.5 + 2 * 350 * 152_064 * 4 * 3.2 / 1e9, abs=0.4)
    assert dpo(pairs=8, seen=8).part(loaded=True).hours < plan.START_HOURS["cuda"]  # type: ignore[operator]
    assert not dpo(PROFILES["rtx-4090"], max_length=1024).fits


def test_tokens_of_a_pair_by_backend() -> None:
    """fast computes the trunk once; TRL pads both rows to the longest of the pass."""
    both = (Lengths(10, 20, 30, shared=5), Lengths(10, 60, 50))
    assert dpo(backend="fast", lengths=both).tokens_a_pair() == (53 + 118) / 2
    assert dpo(backend="trl", lengths=both, at_once=1).tokens_a_pair() == (80 + 140) / 2
    assert dpo(backend="trl", lengths=both, at_once=2).tokens_a_pair() == 140


def test_sft_takes_one_row_a_pair_and_no_reference() -> None:
    known = (Lengths(100, 250, 250, 249),)
    for backend, flops in (("unsloth", 6), ("fast", 4)):
        work, both = dpo(backend=backend, lengths=known, is_sft=True), dpo(backend=backend, lengths=known)
        assert work.flops_a_token() == flops and work.parts().total <= both.parts().total
        assert work.tokens_a_pair() == pytest.approx(350, abs=1)
        assert work.flops() == pytest.approx(work.numbers.parameters * 350 * (12_000 * flops + 2 * 200 * 2), rel=0.01)
    alone = dpo(is_sft=True)  # lengths are not known
    assert alone.tokens_a_pair() == pytest.approx(dpo().tokens_a_pair() / 2)


def test_held_out_pairs_that_are_measured_on_the_way_are_reckoned() -> None:
    for backend, forward in (("unsloth", 4), ("fast", 2)):
        work = dpo(backend=backend, lengths=(Lengths(100, 250, 250),))
        more = replace(work, measured=2000).flops() - work.flops()
        assert more == pytest.approx(work.numbers.parameters * work.tokens_a_pair() * 2000 * forward)


def test_what_helps_where_training_does_not_fit() -> None:
    small = PROFILES["a100-40gb"]
    told = dpo(small, "trl", max_length=4096, at_once=2).remedies()
    assert told[0].startswith("--max-length")
    assert told[-1].startswith("--model qwen2.5-3b")  # the logits of four rows of 4,096 tokens alone take 28 GB
    for line in told:  # each alone makes it fit
        assert float(re.findall(r"\((.*) GB\)", line)[0]) <= small.vram_gb
    bf16 = dpo(POD, "trl", quantization="bf16", max_length=4096)
    assert any("--quantization 4bit" in line for line in bf16.remedies())
    assert any(line.startswith("no --token-budget") for line in dpo(backend="fast", token_budget=60_000).remedies())


def test_an_epochs_last_step_takes_what_is_left() -> None:
    assert plan.pairs_seen(1, 1, 8) == 1
    assert plan.pairs_seen(10, 10, 8) == 50  # steps of 8 and 2
    assert plan.pairs_seen(4000, 1500, 8) == 12_000


def test_profiles_by_name() -> None:
    assert hardware.profile("H100-80GB").gpu_name == "NVIDIA H100 80GB HBM3"
    assert hardware.profile("runpod_a100_80gb").dollars_per_hour == 1.74
    assert all(hardware.gpu_speed(one.gpu_name) for one in PROFILES.values() if one.kind == "cuda")
    assert all(one.price_from for one in PROFILES.values() if one.dollars_per_hour)
    with pytest.raises(BadInputError, match=r"--hardware a100 is unknown; nearest: .*a100-80gb"):
        hardware.profile("a100")


def test_plan_says_what_it_does_not_know() -> None:
    choice = resolve_model("qwen2.5-32b", CPU)
    unknown = plan.generation(choice, cuda(24, "Some GPU"), "hf", "4bit", Workload(10, 2))
    assert unknown.hours is None and unknown.fits and "unknown for this GPU" in plan.in_words(unknown.hours, None)
    with pytest.raises(EngineError, match=r"^org/name: its config\.json is not in .*(HF_HUB_OFFLINE|network)"):
        plan.generation(resolve_model("org/name", CPU), POD, "hf", "4bit", Workload(1, 1))


# ---------------------------------------------------------------- --plan, as a user sees it


@pytest.fixture
def planned(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Runs a script with --plan and further flags on a laptop; gives what it says, line by line under its names."""
    monkeypatch.delenv("RUNPOD_POD_ID", raising=False)
    monkeypatch.setattr(_plan, "detect", lambda: CPU)

    def plan_of(script: Any, *flags: str) -> dict[str, str]:
        places = ["--data-dir", str(tmp_path / "data"), "--checkpoint-dir", str(tmp_path / "checkpoints")]
        assert run_main(script.main, ["--plan", *flags, *places]) == 0
        found: dict[str, str] = {}
        name = ""
        for said in capsys.readouterr().out.splitlines():
            name = said[:12].strip() or name
            found[name] = f"{found[name]}\n{said[12:]}" if name in found else said[12:]
        assert not any(tmp_path.iterdir())
        return found

    return plan_of


def test_a_laptops_plan_for_the_pod(planned: Planned) -> None:
    told = planned(generate_full, "--hardware", "a100-80gb")
    assert told["model"].startswith("qwen2.5-32b (base) | NVIDIA A100-SXM4-80GB has 80 GB")
    assert "$1.74 an hour (the spec's price" in told["hardware"]
    engines = told["generation"].splitlines()
    assert engines[0].startswith("vllm, bf16: 65.5 GB of weights, 47 rows at a time") and "hours, $" in engines[0]
    assert [line.split(",")[0] for line in engines[2:4]] == ["or unsloth", "or hf"]
    assert told["size"].startswith("5,182 pairs, 182 of them to spare for the guard, from about 10,364 instructions")
    assert "meta-llama/Llama-Guard-3-8B" in told["guard"] and "3,005,560 tokens read" in told["guard"]
    assert "1,500 steps of up to 8 pairs, 8,400,000 tokens" in told["training"]
    assert told["disk"] == "111.9 GB: 65.5 generator + 16.1 guard + 19.2 4bit to train + 10.7 checkpoints + 0.3 records"
    assert told["budget"].startswith("5+ hours, $8.70 for milestone 3")

    def dollars(text: str) -> float:
        return float(re.findall(r"\$(\d+\.\d\d)", text)[0])

    parts = sum(dollars(part) for part in (engines[0], told["guard"], told["training"], told["evaluation"]))
    assert dollars(told["total"]) == pytest.approx(parts, abs=0.02)
    assert "for the pod" not in told["budget"]
    free = planned(generate_full, "--hardware", "a100-80gb", "--price-per-hour", "0")
    assert "$" not in free["total"] and "no price" in free["hardware"]


README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_readmes_budgets_are_the_plans(planned: Planned) -> None:
    """Every planned figure of the table stands in the plan of the pod, and the other way round."""
    text = README.read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]

    def cost(told: str) -> str:
        return re.findall(r"about [\d.]+ (?:hours?|minutes?), \$[\d.]+\d", told)[0]

    pod = ("--hardware", "a100-80gb")
    plans = {"M0": test_single, "M1": test_batch, "M2": generate_mvp, "M3": generate_full}
    found = {name: planned(script, *pod) for name, script in plans.items()}
    for name, told in found.items():
        row = next(line for line in rows if line.startswith(f"| {name} "))
        assert row.split("|")[-2].strip() == told["total"], name
    for part in ("generation", "guard", "training", "evaluation"):
        cells = next(line for line in rows if line.startswith(f"| {part} ")).split("|")[2:4]
        planned_costs = [cost(found[name][part]) if part in found[name] else "none" for name in ("M2", "M3")]
        assert [cell.strip() for cell in cells] == planned_costs, part
    fast = planned(train_dpo, "--milestone", "full", *pod, "--backend", "fast")["training"]
    assert f"`--backend fast`\nplans training at {cost(fast)}" in text
    assert "this plan is 7.7 hours over it" in found["M3"]["budget"] and "the whole is 7.7 hours over 5" in text
    assert "over it" not in found["M2"]["budget"]
    cells = next(line for line in rows if line.startswith("| full evaluation ")).split("|")[2:4]
    full = [planned(eval_model, "--milestone", name, *pod)["total"] for name in ("mvp", "full")]
    assert [cell.strip() for cell in cells] == full


def test_the_small_milestones_load_once(planned: Planned) -> None:
    told = planned(test_single, "--hardware", "h200")
    assert told["generation"].startswith("unsloth, 4bit") and "vllm" not in told["generation"]
    assert told["training"].startswith("in the same load, unsloth, 4bit: 1 step of up to 8 pairs, 700 tokens")
    assert "30 minutes, $0.87" in told["budget"]


def test_training_is_planned_before_there_are_pairs(planned: Planned) -> None:
    told = planned(train_dpo, "--milestone", "mvp", "--hardware", "a100-40gb", "--max-length", "2048")
    assert "unsloth, 4bit: 100 steps of up to 8 pairs" in told["training"]
    assert "memory: 34.8 GB of 40 GB; 1 pair at a time, rows of up to 2,048 tokens" in told["training"]
    assert "20 held-out pairs scored" in told["evaluation"] and "2-3 hours, $5.22" in told["budget"]
    longer = planned(train_dpo, "--milestone", "mvp", "--hardware", "a100-40gb", "--no-eval", "--max-length", "4096")
    assert "DOES NOT FIT" in longer["training"] and "fits with --max-length 2048" in longer["training"]
    assert "hours" not in longer["training"] and longer["total"] == "none: it does not fit"
    assert "evaluation" not in longer


def test_the_warm_start_is_part_of_the_plan(planned: Planned) -> None:
    def dollars(told: str) -> float:
        return float(re.findall(r"\$([\d.]+\d)", told)[0])

    flags = ("--milestone", "mvp", "--hardware", "a100-80gb", "--sft-first")
    told = planned(train_dpo, *flags)
    assert told["sft"].startswith("train_dpo.py, unsloth, 4bit: 15 steps of up to 8 rows, 42,000 tokens")
    assert told["training"].startswith("in the same load, unsloth, 4bit: 100 steps of up to 8 pairs")
    parts = sum(dollars(told[part]) for part in ("sft", "training", "evaluation"))
    assert dollars(told["total"]) == pytest.approx(parts, abs=0.02)
    alone = planned(train_dpo, *flags, "--sft-share", "1")
    assert "30 steps of up to 8 rows" in alone["sft"] and "training" not in alone


def test_training_is_planned_by_the_lengths_of_real_pairs(planned: Planned, tmp_path: Path) -> None:
    """By the tokenizer where its file is at hand, else by letters; pairs that are too long are left out."""
    pairs = tmp_path.parent / f"{tmp_path.name}.jsonl"
    row = {"prompt": "How do I grow beans?", "chosen": "Use a pot. " * 20, "rejected": "Use a pan. " * 30}
    pairs.write_text(json.dumps(row) + "\n")
    own = planned(train_dpo, "--pairs", str(pairs))["training"]
    assert "fast, fp32: 1 step" in own and "(counted by its tokenizer)" in own
    pod = planned(train_dpo, "--pairs", str(pairs), "--hardware", "a100-80gb")["training"]
    assert "(reckoned as 4 letters a token)" in pod
    assert "194 tokens" in pod  # two rows of 5 + 8 tokens of prompt, 83 + 1 of the longer answer


def test_a_plan_without_hardware_is_this_machines_and_names_the_way_to_the_pods(planned: Planned) -> None:
    own = planned(generate_full)
    assert own["model"].startswith("nano") and own["budget"].endswith("for the pod: --plan --hardware a100-80gb")
    assert "free at" in own["disk"]
    big = planned(generate_full, "--model", "qwen2.5-32b")
    assert "DOES NOT FIT" in big["generation"] and big["total"] == "none: it does not fit"


def test_ray_server_and_random_weights_are_planned(planned: Planned) -> None:
    ray = planned(generate_full, "--hardware", "h100-80gb", "--ray", "10.0.0.2:6379", "--ray-actors", "8")
    assert "on each of 8 actors" in ray["generation"]
    served = planned(generate_full, "--hardware", "a100-80gb", "--server", "http://127.0.0.1:8000/v1")
    assert "the server's" in served["generation"] and "$" not in served["generation"]
    assert "500,000 requests" in served["generation"] and "and the server's share" in served["total"]
    random = planned(generate_mvp, "--hardware", "a100-80gb", "--random-weights", "qwen2.5-32b")
    assert "generator" not in random["disk"] and "or unsloth" not in random["generation"]


def test_all_gpus_of_a_machine_are_paid_for(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """--price-per-hour is the machine's: vLLM takes all eight GPUs by itself, hf one, and the bill is for eight."""
    pod = replace(POD, name="this machine", gpus=8)
    monkeypatch.setattr(_plan, "detect", lambda: pod)
    monkeypatch.setattr(_plan_parts, "find_spec", lambda name: True)
    monkeypatch.setattr(serving, "free_gb", lambda place: 500.0)
    told = planned(generate_full, "--price-per-hour", str(8 * 1.74), "--model", "qwen2.5-32b")
    assert "8 x NVIDIA" in told["hardware"] and "$13.92 an hour for all 8 GPUs" in told["hardware"]
    hours, dollars = re.findall(r"about (\d+\.\d) hours, \$(\d+\.\d\d)", told["generation"])[-1]  # hf's
    assert float(dollars) == pytest.approx(float(hours) * 13.92, rel=0.02)
    time, price = re.findall(r"about (\d+) minutes, \$(\d+\.\d\d)", told["generation"])[0]
    assert float(price) == pytest.approx(float(time) / 60 * 13.92, rel=0.02)


def test_a_pods_price_is_that_of_all_its_gpus(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNPOD_POD_ID", "abc")
    for gpus, price in ((1, "$1.74 an hour"), (8, "$13.92 an hour for all 8 GPUs")):
        pod = replace(POD, name="this machine", gpus=gpus)
        monkeypatch.setattr(_plan, "detect", lambda pod=pod: pod)
        monkeypatch.setattr("cai_experiment.models.hardware.detect", lambda pod=pod: pod)
        assert price in planned(generate_mvp, "--model", "qwen2.5-32b")["hardware"]


def test_pairs_to_spare_are_planned_where_the_run_makes_them(planned: Planned) -> None:
    """As _turns.make_guarded does: none where the guard needs no room, or where every row is used anyway."""
    pod = ("--hardware", "a100-80gb", "--count", "1000")
    assert "1,043 pairs, 43 of them to spare" in planned(generate_full, *pod)["size"]
    for flags in (("--no-guard",), ("--server", "http://127.0.0.1:8000/v1"), ("--model", "nano")):
        assert planned(generate_full, *pod, *flags)["size"].startswith("1,000 pairs from")
    llama = ("--model", "nano", "--guard", "meta-llama/Llama-Guard-3-8B")
    assert planned(generate_full, *pod, *llama)["size"].startswith("1,043 pairs")


def test_an_addition_that_was_made_already_is_not_planned_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mvp"
    folder.mkdir()

    def size(pairs: int, extended: list[int], accepted: int, reported: int) -> str:
        counts = {"accepted": accepted}
        Manifest({"pairs": pairs}, 0, {}, {}, extended=extended, counts=counts).write(folder / "manifest.json")
        (folder / "report.json").write_text(json.dumps({"settings": {"generation": {"pairs": reported}}}))
        assert run_main(generate_mvp.main, ["--plan", "--add", "50", "--data-dir", str(tmp_path)]) == 0
        return next(line[12:] for line in capsys.readouterr().out.splitlines() if line.startswith("size"))

    assert size(100, [], 100, 100).startswith("50 pairs from about 100 instructions")
    assert size(150, [100], 130, 100).startswith("20 pairs from about 40 instructions")
    done = size(150, [100], 150, 150)
    assert done.startswith("none: ") and "was extended already: 100 -> 150 pairs; --count 200 makes 50 more" in done


def test_a_plan_with_ray_is_the_run_that_ray_makes(planned: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    """pipeline.distributed gives a 32B model four of eight small cards: two actors."""
    monkeypatch.setattr(_plan, "detect", lambda: replace(PROFILES["rtx-4090"], name="this machine", gpus=8))
    monkeypatch.setattr(_plan_parts, "find_spec", lambda name: True)
    monkeypatch.setattr(serving, "free_gb", lambda place: 500.0)
    told = planned(generate_full, "--ray", "local", "--model", "qwen2.5-32b")["generation"].splitlines()
    assert told[0].startswith("vllm, bf16") and "on each of 2 actors," in told[0]
    small = planned(generate_full, "--ray", "local", "--model", "qwen2.5-7b")["generation"]
    assert "vllm, bf16" in small and "on each of 8 actors," in small
    many = planned(generate_full, "--ray", "10.0.0.2:6379", "--ray-actors", "6", "--model", "qwen2.5-32b")
    assert "on each of 6 actors on 3 machines," in many["generation"]
    shipped = planned(generate_full, "--ray", "local", "--model", "nano")["generation"]
    assert f"on each of {PROFILES['rtx-4090'].cores} actors" in shipped


def test_a_plan_names_the_flags_of_a_much_faster_engine(planned: Planned) -> None:
    faster = "much faster by this plan: --engine hf --quantization 4bit"
    assert faster in planned(generate_full, "--hardware", "l40s", "--model", "qwen2.5-32b")["generation"]
    assert "much faster" not in planned(generate_full, "--hardware", "a100-80gb")["generation"]
