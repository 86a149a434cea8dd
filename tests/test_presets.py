"""Presets against transformers' classes, bitsandbytes, PEFT and the first plans' figures; configs of hub ids."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.errors import EXIT_BAD_INPUT, EXIT_FAILURE, BadInputError, EngineError
from cai_experiment.models import configs, memory, seed_figures
from cai_experiment.models.families import COUNTED, Uncounted
from cai_experiment.models.families import MIXTURES as MIXTURES_COUNTED
from cai_experiment.models.memory import Architecture, weights_gb
from cai_experiment.models.presets import ALIASES, LADDER, PRESETS, TAGS, ModelPreset, get_model_preset
from cai_experiment.models.seed_figures import SEED_FIGURES, TOLERANCE

FAMILIES = ("qwen2.5-32b", "qwen3-8b", "llama-3.2-3b", "mistral-7b", "phi-2", "phi-3.5-mini", "phi-4-mini", "gemma-2b",
            "gemma-2-2b", "gemma-3-1b", "gpt2", "smollm3-3b")  # fmt: skip
LOOKS_BACK = "gemma-3-1b"  # 512 tokens, less than the context: hf's packed passes refuse it


def shrunk(key: str) -> ModelPreset:
    """A preset's family in four small layers; NF4's blocks of 64 divide every weight."""
    preset = PRESETS[key]
    numbers = preset.architecture
    shared = 4 if numbers.kv_heads == numbers.heads else 1 if numbers.kv_heads == 1 else 2
    size = 32 if numbers.head_size * numbers.heads == numbers.hidden else 48
    small = replace(
        numbers, layers=4, hidden=128, heads=4, kv_heads=shared, head_size=size, intermediate=384, vocab=320
    )
    return replace(preset, numbers=small)


def on_meta(config: Any) -> Any:
    """The model of a config without memory for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def quantisable(model: Any) -> int:
    """Weights of the layers that transformers' quantizer would replace by bitsandbytes' own."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = get_keys_to_not_convert(model)
    return sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    )


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("key", PRESETS)
def test_every_count_is_the_model_classes_own(key: str) -> None:
    """Parameters, what bitsandbytes would quantise, and the architecture that is read back from the config."""
    from cai_experiment.engines.random_weights import config_of

    preset, config = PRESETS[key], config_of(PRESETS[key])
    numbers, model = preset.architecture, on_meta(config)
    assert numbers.parameters == model.num_parameters() == (preset.published or model.num_parameters())
    assert numbers.linear_parameters == quantisable(model)
    assert Architecture.of(config.to_dict()) == numbers
    assert preset.flash_attention == (not numbers.capped) and model._supports_flash_attn
    assert config.max_position_embeddings == preset.context


@pytest.mark.parametrize("key", FAMILIES)
def test_adapters_and_quantised_bytes_are_pefts_and_bitsandbytes_own(key: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    from cai_experiment.engines.random_weights import random_model

    preset = shrunk(key)
    numbers = preset.architecture
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = random_model(preset, torch.bfloat16, "cpu", 0, nf4)
    constants = sum(
        p.quant_state.absmax.numel() + 4 * p.quant_state.state2.absmax.numel()
        for p in model.parameters()
        if hasattr(p, "quant_state")
    )
    held = sum(p.numel() * p.element_size() for p in model.parameters()) + constants
    rounding = 4 * len(numbers.linear_shapes) * numbers.layers  # of each layer the last block of constants is begun
    assert weights_gb(numbers, "4bit") * 1e9 == pytest.approx(held, abs=rounding)
    adapted = get_peft_model(random_model(preset, torch.float32, "cpu", 0, None),
                             LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))  # fmt: skip
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert memory.adapter_parameters(numbers, 4) == trained


SIZES: dict[str, int] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300,
}  # fmt: skip
OWN_HEADS = {"num_key_value_heads": 4, "head_dim": 16}  # kinds that know no other number and size of heads


@pytest.mark.parametrize("kind", sorted(COUNTED - set(MIXTURES_COUNTED) - {"gpt2"}))
def test_every_kind_that_is_said_to_be_counted_is_the_model_classes_own(kind: str) -> None:
    from transformers import AutoConfig

    sizes = SIZES | (OWN_HEADS if kind == "gpt_neox" else {})
    config = AutoConfig.for_model(kind, pad_token_id=0, eos_token_id=1, **sizes)
    numbers, model = Architecture.of(config.to_dict()), on_meta(config)
    assert (numbers.parameters, numbers.linear_parameters) == (model.num_parameters(), quantisable(model))
    assert numbers.about == ""


@pytest.mark.parametrize(
    ("name", "fields", "published"),
    [
        ("EleutherAI/pythia-1b", {"model_type": "gpt_neox", "hidden_size": 2048, "intermediate_size": 8192,
                                  "num_hidden_layers": 16, "num_attention_heads": 8, "vocab_size": 50_304,
                                  "tie_word_embeddings": False}, 1_011_781_632),
        ("bigcode/starcoder2-3b", {"model_type": "starcoder2", "hidden_size": 3072, "intermediate_size": 12_288,
                                   "num_hidden_layers": 30, "num_attention_heads": 24, "num_key_value_heads": 2,
                                   "vocab_size": 49_152, "use_bias": True}, 3_030_371_328),
    ],
)  # fmt: skip
def test_config_files_that_leave_out_defaults(name: str, fields: dict[str, Any], published: int) -> None:
    assert Architecture.of(fields).parameters == published


def test_other_kinds_are_said_to_be_about_right_or_refused() -> None:
    numbers = Architecture.of({**SIZES, "model_type": "brand_new"})
    assert numbers.about == "about, reckoned as Llama (brand_new)"
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"model_type": "bert", "type_vocab_size": 2}, "an encoder"),
        ({"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"]}, "an encoder"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "an encoder"),
        ({"model_type": "qwen3_5_text", "layer_types": ["linear_attention", "full_attention"]}, "no attention"),
        ({"model_type": "falcon_h1", "mamba_d_state": 256}, "no attention"),
        ({"model_type": "minicpm3", "kv_lora_rank": 256}, "latent attention"),
    )
    for fields, why in refused:
        with pytest.raises(Uncounted, match=why):
            Architecture.of({**SIZES, **fields})


def test_capped_scores_are_reckoned() -> None:
    """Eager attention holds 8 heads x 4,096 x 4,096 scores of Gemma 2 in 16 bit and their softmax in 32."""
    numbers = PRESETS["gemma-2-2b"].architecture
    more = memory.allowance_gb(numbers, "bf16") - memory.allowance_gb(replace(numbers, capped=False), "bf16")
    assert more == pytest.approx(8 * 4096**2 * 6 / 1e9)


def test_only_a_gpu_has_cudas_context() -> None:
    nano = PRESETS["nano"]
    assert nano.vram_gb("fp32") - nano.vram_gb("fp32", device="cpu") == pytest.approx(memory.CONTEXT_GB)
    assert nano.batch(0.4, "fp32", 128) == 0 < nano.batch(0.4, "fp32", 128, "cpu")


MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 32, "head_dim": 16},
}


@pytest.mark.parametrize("kind", MIXTURES)
def test_all_experts_of_a_mixture_are_counted(kind: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(
        kind, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, **MIXTURES[kind],
    )  # fmt: skip
    numbers, model = Architecture.of(config.to_dict()), on_meta(config)
    assert (numbers.parameters, numbers.linear_parameters) == (model.num_parameters(), quantisable(model))


def test_other_mixtures_are_refused(tmp_path: Path) -> None:
    fields = {"model_type": "deepseek_v3", "n_routed_experts": 256, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(BadInputError, match=r"config\.json: a mixture of experts \(deepseek_v3\)") as caught:
        configs.architecture_of(str(tmp_path))
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_the_language_model_of_a_larger_one_is_read() -> None:
    """gemma-3-4b's config.json, which leaves out what is as in the class; its text model has 3.88 billion."""
    from transformers import Gemma3TextConfig

    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34}
    numbers = Architecture.of({"model_type": "gemma3", "text_config": text})
    assert numbers.parameters == on_meta(Gemma3TextConfig(**{k: v for k, v in text.items() if k != "model_type"})
                                         ).num_parameters()  # fmt: skip
    assert numbers.parameters == pytest.approx(3.88e9, rel=0.001)


# ---------------------------------------------------------------- the table


def test_the_table_is_sound() -> None:
    ids = [preset.hub_id for preset in PRESETS.values()]
    assert len(set(ids)) == len(ids)
    assert not set(ALIASES) & set(PRESETS) and set(ALIASES.values()) <= set(PRESETS)
    for preset in PRESETS.values():
        assert preset.tags and preset.tags <= set(TAGS) and preset.good_at and preset.long_context, preset.key
        assert preset.kind in ("base", "chat")
        assert re.fullmatch("main|[0-9a-f]{40}", preset.revision)
        assert preset.gated == preset.hub_id.startswith(("meta-llama/", "google/", "mistralai/"))
        sibling = f"unsloth/{preset.hub_id.rpartition('/')[2]}-bnb-4bit"
        assert preset.four_bit.lower() in ("", sibling.lower())
    assert [PRESETS[key].gated for key in LADDER] == [False] * 6


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct"),
        ("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("QWEN2.5-7B-Base", "Qwen/Qwen2.5-7B"),
        ("qwen2.5-32b", "Qwen/Qwen2.5-32B"),
        ("qwen2.5-32b-instruct", "Qwen/Qwen2.5-32B-Instruct"),
        ("microsoft/phi-2", "microsoft/phi-2"),
        ("qwen3-4b-instruct-2507", "Qwen/Qwen3-4B-Instruct-2507"),
    ],
)
def test_names_mean_what_the_plans_say(name: str, hub_id: str) -> None:
    assert get_model_preset(name).hub_id == hub_id


@pytest.mark.parametrize(
    ("name", "near"),
    [("qwen2.5-8b", "qwen2.5-3b"), ("lama-3.2-3b-instruct", "llama-3.2-3b-instruct"), ("zzz", "known: nano,")],
)
def test_unknown_names_are_refused_with_the_nearest(name: str, near: str) -> None:
    with pytest.raises(BadInputError, match=re.escape(near)) as caught:
        get_model_preset(name)
    assert caught.value.exit_code == EXIT_BAD_INPUT and str(caught.value).startswith(f"{name} is no preset; ")


def test_nano_b_is_the_shipped_kind_with_other_weights(nano_dir: Path) -> None:
    nano, other = PRESETS["nano"], PRESETS["nano-b"]
    assert other.architecture == nano.architecture and other.training == nano.training and other.is_local
    own, weights = (Path(preset.hub_id) / "model.safetensors" for preset in (nano, other))
    assert own.stat().st_size == weights.stat().st_size and own.read_bytes() != weights.read_bytes()


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("figure", SEED_FIGURES, ids=lambda f: f"{f.key}-{f.what}")
def test_the_plans_figures_hold_or_the_difference_is_explained(figure: seed_figures.SeedFigure) -> None:
    assert (abs(figure.off) <= TOLERANCE) == (figure.reason == ""), f"{figure.off:+.1%}: {figure.reason}"


def test_memory_grows_with_what_it_depends_on() -> None:
    for preset in PRESETS.values():
        needs = [preset.vram_gb(quantization) for quantization in ("4bit", "8bit", "bf16", "fp32")]
        assert needs == sorted(needs), preset.key
        assert preset.vram_gb("4bit", 2048, 8) > preset.vram_gb("4bit", 2048, 1) < preset.vram_gb("4bit", 4096, 1)
        assert preset.vram_gb("4bit", 512) < preset.training_vram_gb("4bit", 512) or preset.is_local
        assert preset.max_tokens == 500 or preset.key.startswith("gpt2")


def test_gemmas_vocabulary_costs_training_what_it_should() -> None:
    """Logits of two rows of 1,024 tokens over 256,000 words in float32 are 2.1 GB, and DPO holds several copies."""
    gemma, llama = PRESETS["gemma-2b"], PRESETS["llama-3.2-1b"]
    logits = 2 * 1024 * (gemma.architecture.vocab - llama.architecture.vocab) * 4 / 1e9
    assert gemma.training_vram_gb() - llama.training_vram_gb() > 3 * logits


@pytest.mark.parametrize("key", ["nano", "qwen2.5-7b", "qwen2.5-32b", "gemma-2-2b"])
def test_a_recommended_batch_fits_and_twice_of_it_does_not(key: str) -> None:
    preset = PRESETS[key]
    for have in (0.1, 8.0, 24.0, 80.0):
        for batch, need in ((preset.batch, preset.vram_gb), (preset.training_batch, preset.training_vram_gb)):
            rows = batch(have, "4bit", 1024)
            assert rows == 0 or need("4bit", 1024, rows) <= have
            assert rows == 256 or need("4bit", 1024, max(1, 2 * rows)) > have


@pytest.mark.slow
@pytest.mark.parametrize("key", ["llama-3.2-3b", "qwen3-8b", "phi-3.5-mini", "phi-2", "gemma-2b", "gemma-2-2b",
                                 "gemma-3-1b", "gpt2"])  # fmt: skip
def test_other_families_train_in_the_planned_memory(key: str, tmp_path: Path) -> None:
    """TRL's DPO of the shrunk family, as tests/test_training_memory.py measures Qwen2's."""
    import torch
    from test_training_memory import LONG, WITHIN, the_pass, token_pairs, train, watched

    from cai_experiment.engines.random_weights import random_model
    from cai_experiment.models.training_memory import Arithmetic, TrainingMemory

    preset = shrunk(key)
    preset = replace(preset, numbers=replace(preset.architecture, vocab=2048))
    rows = token_pairs(*LONG)
    with watched() as peak:
        train(tmp_path, "trl", rows, random_model(preset, torch.float32, "cpu", 0, None))
    numbers = preset.architecture
    form = Arithmetic.of("trl", "fp32", "cpu", numbers)
    planned = TrainingMemory(numbers, "trl", form).parts(the_pass("trl", rows), 0).total
    assert planned == pytest.approx(peak[0], rel=WITHIN)


# ---------------------------------------------------------------- random weights of every family


@pytest.mark.parametrize("key", FAMILIES)
def test_random_weights_of_every_family_speak(key: str) -> None:
    """hf's packed passes give the words of `generate`, or refuse the family with the flag that helps."""
    import torch

    from cai_experiment.constitution.prompts import Turn
    from cai_experiment.engines.base import Prompt, Sampling
    from cai_experiment.engines.generate import GenerateEngine
    from cai_experiment.engines.hf import HFEngine
    from cai_experiment.engines.random_weights import byte_tokenizer, random_model
    from cai_experiment.engines.render import Renderer

    preset = shrunk(key)
    model = random_model(preset, torch.float32, "cpu", 3, None)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert model.num_parameters() == preset.parameters
    tokenizer = byte_tokenizer("<|im_end|>")
    renderer = Renderer(tokenizer, "chat", min(preset.context, 4096))
    prompts = [Prompt(str(n), (Turn("instruction", "Why? " * n),), "answer", Sampling(0, 8)) for n in (1, 40)]

    def texts(engine: Any) -> dict[str, tuple[str, str]]:
        return {found.id: (found.text, found.error) for found in engine.stream(iter(prompts))}

    plain = texts(GenerateEngine.from_model(model, tokenizer, renderer))
    assert {error for _, error in plain.values()} == {""}
    if key == LOOKS_BACK:
        with pytest.raises(EngineError, match=r"looks back 512 tokens.*use --engine generate"):
            HFEngine.from_model(model, tokenizer, renderer)
    else:
        assert texts(HFEngine.from_model(model, tokenizer, renderer)) == plain


# ---------------------------------------------------------------- hub ids, against a real local server


HUB: dict[str, tuple[int, dict[str, str], bytes]] = {  # model -> status, headers, body, as huggingface.co answers
    "good/model": (200, {}, json.dumps({
        "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
        "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 512,
    }).encode()),
    "good/broken": (200, {}, b"<html>"),
    "good/strange": (200, {}, b'{"model_type": "clip", "projection_dim": 512}'),
    "good/gated": (401, {"X-Error-Code": "GatedRepo"}, b""),
    "good/no-config": (404, {"X-Error-Code": "EntryNotFound"}, b""),
    "good/busy": (503, {}, b""),
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """Answers /ORG/NAME/resolve/REVISION/config.json."""

    def do_GET(self) -> None:
        """One answer of HUB, or that there is no such repository or revision."""
        _, org, name, _, revision, _ = self.path.split("/")
        missing = (404, {"X-Error-Code": "RevisionNotFound" if revision != "main" else "RepoNotFound"}, b"")
        status, headers, body = HUB.get(f"{org}/{name}", missing) if revision == "main" else missing
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing on stderr."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """`architecture_of` that asks a local hub, with an empty cache; `token`: as the environment has it."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    configs._fetched.cache_clear()
    yield configs.architecture_of
    server.shutdown()
    configs._fetched.cache_clear()


def test_numbers_come_from_the_hubs_config_alone(hub: Callable[..., Any], tmp_path: Path) -> None:
    numbers = hub("good/model")
    assert (numbers.layers, numbers.head_size, numbers.tied, numbers.model_type) == (2, 16, False, "llama")
    assert configs.context_of("good/model") == 512
    assert not (tmp_path / "hub").exists(), "a lone config.json would look like a download that was begun"


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("good/gated", "good/gated is gated, and there is no token; accept its licence at https://huggingface.co/good/gated"
                       ", then export HF_TOKEN="),
        ("good/none", "good/none: the hub has no such model; check the name; private ones need export HF_TOKEN="),
        ("good/no-config", "its repository holds no config.json"),
        ("good/broken", "its config.json cannot be read"),
        ("good/strange", "its config.json has no 'num_attention_heads'"),
        ("not/a/hub/id", "is no hub id"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_give_is_one_line(hub: Callable[..., Any], place: str, message: str) -> None:
    with pytest.raises(BadInputError) as caught:
        hub(place)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert caught.value.exit_code == EXIT_BAD_INPUT


def test_a_gated_model_with_a_token_and_a_revision_that_is_not_there(
    hub: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BadInputError, match="the hub has no revision 'abc' of it"):
        hub("good/model", "abc")
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(BadInputError, match="this token's account may not read it"):
        hub("good/gated")


def test_no_network_and_offline_are_failures_of_one_line(
    hub: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    with pytest.raises(EngineError, match="the hub cannot be asked for it"):
        hub("good/busy")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EngineError, match=r"refused.*check the network") as caught:
        hub("good/model")
    assert caught.value.exit_code == EXIT_FAILURE
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(EngineError, match="HF_HUB_OFFLINE is set; unset it"):
        hub("good/model")


def test_a_config_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    folder, commit = tmp_path / "models--good--model", "a" * 40
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    (folder / "snapshots" / commit / "config.json").write_bytes(HUB["good/model"][2])
    assert configs.architecture_of("good/model").layers == 2
