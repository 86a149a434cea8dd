"""Exports: the merge is PEFT's own sum, the answers are the adapter model's, and what is wrong is not published."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cai_experiment.engines.weights import weights_hash
from cai_experiment.errors import BadInputError, DiskError, EngineError
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.hardware import detect
from cai_experiment.scripts import export_model
from cai_experiment.scripts._common import run_main
from cai_experiment.training import checkpoints
from cai_experiment.training.export import adapters, gguf, hub, merge
from cai_experiment.training.export import answers as export_answers
from cai_experiment.training.export import check as export_check
from cai_experiment.training.export import publish as export
from cai_experiment.training.export import source as sources
from cai_experiment.training.export.source import Base, find_source

WHY = export_check.Prompts(("Why?",), ((1,),), (9,), SimpleNamespace(decode=str))
ROOT = Path(__file__).resolve().parents[1]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS = {"pairs": "10 with sha256 4c8621f5ef56646e", "steps": 6, "learning_rate": 1e-3, "beta": 0.1, "seed": 0}


def make_run(base: Path, run: Path, model_name: str, std: float = 0.02, **lora: Any) -> Path:
    """A run's folder as training leaves it, with a random LoRA that is not zero; gives its final/."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(1)
    config = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR, "task_type": "CAUSAL_LM"} | lora
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), LoraConfig(**config))
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    return publish_run(model, AutoTokenizer.from_pretrained(base), run, model_name)


def publish_run(model: Any, tokenizer: Any, run: Path, model_name: str) -> Path:
    aside = run / "final.tmp"
    model.save_pretrained(str(aside))
    tokenizer.save_pretrained(str(aside))
    (run / "settings.json").write_text(json.dumps(SETTINGS | {"model_name": model_name}))
    checkpoints.publish(aside, run / "final")
    return run / "final"


def naming_folders(export_folder: Path, *places: Path) -> list[str]:
    """Files of an export, all of which may be uploaded, that name a folder of this machine."""
    texts = {file.name: file.read_bytes() for file in export_folder.iterdir()}
    words = [f"{place}{end}".encode() for place in (*places, ROOT, Path.home()) for end in ('"', "/", " ", "`")]
    return [name for name, text in texts.items() if any(word in text for word in words)]


def sealed_again(folder: Path) -> None:
    """Make the manifest of a changed folder anew."""
    (folder / checkpoints.MANIFEST).unlink(missing_ok=True)
    aside = folder.with_name(f"{folder.name}.aside")
    folder.rename(aside)
    checkpoints.publish(aside, folder)


@pytest.fixture(scope="module")
def nano_runs(nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CHECKPOINT_DIR with the run "mvp": the shipped model with a random LoRA. Read it; copy it to export from it."""
    folder = tmp_path_factory.mktemp("checkpoints")
    make_run(nano_dir, folder / "mvp", "nano 4bit auto")
    return folder


@pytest.fixture(scope="module")
def merged(nano_runs: Path) -> Path:
    """The merged export of that run, made by the script."""
    assert call(nano_runs, "--to", "merged") == 0
    return nano_runs / "mvp" / "merged"


@pytest.fixture
def runs(nano_runs: Path, tmp_path: Path) -> Path:
    """A copy of the run alone, to write beside."""
    shutil.copytree(nano_runs / "mvp" / "final", tmp_path / "ck" / "mvp" / "final")
    shutil.copy(nano_runs / "mvp" / "settings.json", tmp_path / "ck" / "mvp")
    return tmp_path / "ck"


def call(runs: Path, *flags: str) -> int:
    """The script's exit code, as its user gets it."""
    argv = ["--checkpoint-dir", str(runs), "--data-dir", str(runs.parent / "data"), "--run", "mvp", *flags]
    return run_main(export_model.main, argv)


def beside(runs: Path) -> list[str]:
    return sorted(path.name for path in (runs / "mvp").iterdir() if path.name not in ("run.lock", "settings.json"))


# ---------------------------------------------------------------- merged


def greedy_texts(model: Any, tokenizer: Any) -> list[str]:
    """20 prompts answered by transformers' own generate, in one batch."""
    import torch

    tokenizer.padding_side = "left"
    chats = [[{"role": "user", "content": text}] for text in export_check.OWN_PROMPTS]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.inference_mode():
        ids = model.generate(**batch, do_sample=False, max_new_tokens=48)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :])


def test_the_merged_model_and_the_reloaded_adapter_give_the_same_greedy_text_on_20_prompts(
    merged: Path, nano_runs: Path, nano_dir: Path
) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged)
    whole: Any = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    plain: Any = AutoModelForCausalLM.from_pretrained(nano_dir, dtype=torch.float32)
    without = greedy_texts(plain, tokenizer)
    adapted = greedy_texts(PeftModel.from_pretrained(plain, str(nano_runs / "mvp" / "final")).eval(), tokenizer)
    assert len(adapted) == 20 and len(set(adapted)) > 10
    assert greedy_texts(whole, tokenizer) == adapted
    assert adapted != without, "the adapter says nothing of its own: the test would show nothing"
    assert whole.lm_head.weight is whole.model.embed_tokens.weight, "tied embeddings stay tied"
    checkpoints.verify(merged, ("config.json", "generation_config.json", "tokenizer.json", export.RECORD))
    record = json.loads((merged / export.RECORD).read_text())
    assert record["dtype"] == "fp16" and record["check"]["prompts"] == 20 and record["check"]["same_text"] == 20


def rslora_with_patterns(base: Path, folder: Path) -> Path:
    return make_run(base, folder, f"{base.name} fp32 auto", use_rslora=True, rank_pattern={"q_proj": 3, "down_proj": 5},
                    alpha_pattern={"k_proj": 40}, layers_to_transform=[0, 1])  # fmt: skip


def read(final: Path, base: Path) -> adapters.Adapter:
    from transformers import AutoConfig

    return adapters.read_adapter(final, AutoConfig.from_pretrained(base))


def test_the_merge_is_pefts_own_sum_rounded_once_in_every_file(tiny_model_dir: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"  # in several files
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    model.save_pretrained(str(base), max_shard_size="150KB")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(str(base))
    assert len(list(base.glob("*.safetensors"))) > 1
    final = rslora_with_patterns(base, tmp_path / "mvp")
    adapter = read(final, base)
    peft: Any = PeftModel.from_pretrained(model, str(final)).merge_and_unload()
    for dtype, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        out = tmp_path / dtype
        merge.merge(base, adapter, out, dtype)
        assert merge.verify(base, adapter, out, dtype) == len({p.data_ptr() for p in peft.parameters()})
        written: Any = AutoModelForCausalLM.from_pretrained(out)
        assert written.dtype == kind
        for (name, ours), theirs in zip(written.state_dict().items(), peft.state_dict().values(), strict=True):
            assert torch.equal(ours, theirs.to(kind)), name


def flipped(tensors: dict[str, Any]) -> None:
    """The values of one tensor the other way round: shapes and sizes stay right."""
    name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name] = -tensors[name]


@pytest.mark.parametrize("read_back", [True, False])
def test_a_corrupted_merge_is_refused_and_nothing_is_published(
    runs: Path, read_back: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = merge.save

    def wrong(tensors: dict[str, Any], path: Path) -> None:
        flipped(tensors)
        save(tensors, path)

    monkeypatch.setattr(merge, "save", wrong)
    if not read_back:  # as if the weights could not be told from right ones: then the answers must tell
        monkeypatch.setattr(merge, "verify", lambda *_: 50)
    assert call(runs, "--to", "merged") == 1
    said = capsys.readouterr().err
    if read_back:
        assert "model.layers.1.mlp.down_proj.weight" in said and "is not base + LoRA" in said
    else:
        assert "does not say what the adapter model says: on prompt " in said
        assert "which the adapter model prefers" in said and "rms" in said and "nothing was published" in said
    assert beside(runs) == ["final"]


def test_the_difference_to_the_4_bit_model_is_that_of_its_quantisation(
    merged: Path, nano_runs: Path, nano_dir: Path
) -> None:
    choice = resolve_model("nano", detect())
    base = Base("nano", str(nano_dir), nano_dir, None, "apache-2.0", choice)
    prompts = export_answers.prompts_of(base, ["How do I store an axe?"], "auto")
    assert prompts.texts[0] == "How do I store an axe?" and len(prompts.ids) == export_check.PROMPTS
    whole = export_answers.answers_of(merged, export_answers.Precision("cpu", "fp32"), prompts)
    in_4_bit = export_answers.answers_in_4bit(base, nano_runs / "mvp" / "final", prompts, whole)
    assert in_4_bit.tokens == whole.tokens
    found = export_check.compare(whole, in_4_bit, "fp16", "fp32", 4, prompts)
    assert found.rms_difference > 10 * found.rms_limit and 0 < found.mean_kl < 1
    assert found.same_text < 20 and "limit" not in found.line(limits=False)


def test_a_differing_token_passes_only_where_the_adapter_model_is_undecided() -> None:
    import torch

    torch.manual_seed(0)
    right = torch.randn(6, 500) * 2
    right[:, 7] = 12.0
    for gap, passes in ((0.004, True), (0.4, False)):
        logits = right.clone()
        logits[3, 8] = 12.0 - gap
        shown = logits + torch.randn(6, 500) * 0.002
        shown[3, 8] = shown[3, 7] + 0.001  # the other token wins by a hair
        found = export_check.compare(
            export_check.Answers([[7] * 6], [logits]), export_check.Answers([[7] * 6], [shown]), "bf16", "bf16", 4, WHY
        )
        assert (found.ties, bool(found.problem)) == (int(passes), not passes), found
    assert "on prompt 1 ('Why?') token 4 is '[8]' (token 8) and not '[7]' (token 7)" in found.problem
    with pytest.raises(EngineError, match="nothing was published"):
        export_check.refuse(found, "the export")


def test_logits_that_are_not_numbers_are_refused() -> None:
    import torch

    right = torch.randn(2, 50)
    tokens = right.argmax(-1).tolist()
    broken = right.clone()
    broken[1, (tokens[1] + 1) % 50] = float("inf")
    found = export_check.compare(
        export_check.Answers([tokens], [right]), export_check.Answers([tokens], [broken]), "bf16", "bf16", 4, WHY
    )
    assert "token 2 is" in found.problem and "logits differ by inf rms" in found.problem


# ---------------------------------------------------------------- for vLLM


def test_the_adapter_for_vllm_answers_as_the_trained_one_and_names_its_command(
    runs: Path, nano_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(runs, "--to", "adapter") == 0  # in 4 bit, as its training recorded
    out = runs / "mvp" / "adapter"
    assert f"vllm serve {nano_dir} --enable-lora --max-lora-rank 8 --lora-modules mvp={out}" in capsys.readouterr().out
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "nano" and config["target_modules"] == sorted(LINEAR)
    record = json.loads((out / export.RECORD).read_text())
    assert record["check"]["max_difference"] == 0.0 and record["check"]["same_text"] == 20
    card = (out / export.CARD).read_text()
    assert "`vllm serve BASE --enable-lora --max-lora-rank 8 --lora-modules NAME=<this folder>` (BASE is the" in card
    assert not naming_folders(out, nano_dir, runs)
    assert call(runs, "--to", "adapter", "--push", "me/x", "--dry-run") == 0
    record |= {"serve": "vllm serve ..."}  # as earlier versions wrote it, with the user's folders
    (out / export.RECORD).write_text(json.dumps(record))
    sealed_again(out)
    assert call(runs, "--to", "adapter", "--push", "me/x", "--dry-run") == 2


def test_patterns_become_one_rank_and_one_scaling_for_vllm(tiny_model_dir: Path, tmp_path: Path) -> None:
    import torch

    adapter = read(rslora_with_patterns(tiny_model_dir, tmp_path / "mvp"), tiny_model_dir)
    tensors, config = adapters.uniform(adapter)
    assert config["r"] == 8 and not config.get("rank_pattern") and not config.get("alpha_pattern")
    scaling = config["lora_alpha"] / config["r"] ** 0.5  # what vLLM computes with use_rslora
    for name, layer in adapter.layers.items():
        a, b = (tensors[f"{adapters.PREFIX}{name}{which}"] for which in (adapters.A, adapters.B))
        assert (a.shape[0], b.shape[1]) == (8, 8)
        assert torch.allclose(b @ a * scaling, layer.delta(), rtol=1e-5, atol=1e-7), name
    assert adapters.vllm_command("b/m", "x", "folder", 33).split()[4:6] == ["--max-lora-rank", "64"]
    with pytest.raises(BadInputError, match="no LoRA of rank 513"):
        adapters.vllm_command("b/m", "x", "folder", 513)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"peft_type": "IA3"}, "not LORA"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    runs: Path, change: dict, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    final = runs / "mvp" / "final"
    config = json.loads((final / "adapter_config.json").read_text()) | change
    (final / "adapter_config.json").write_text(json.dumps(config))
    sealed_again(final)
    assert call(runs, "--to", "merged") == 2
    assert says in capsys.readouterr().err
    assert beside(runs) == ["final"]


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's own, of the same thing
def test_lora_on_tied_embeddings_is_refused(tiny_model_dir: Path, tmp_path: Path, target: str) -> None:
    final = make_run(tiny_model_dir, tmp_path / "mvp", "", target_modules=[target])
    with pytest.raises(BadInputError, match=f"{target}.* cannot be exported"):
        read(final, tiny_model_dir)


def test_damage_other_bases_and_flags_that_do_not_go_together_are_refused(
    runs: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(says: str, *flags: str) -> None:
        assert call(runs, *flags) == 2
        assert says in capsys.readouterr().err

    refused("was trained on nano", "--to", "merged", "--model", str(tiny_model_dir))
    refused("--push me: not of the form", "--to", "merged", "--push", "me")
    refused("--public is for --push", "--to", "merged", "--public")
    refused("q8_0 is a GGUF type", "--to", "merged", "--dtype", "q8_0")
    refused("no adapter there", "--to", "merged", "--checkpoint", "checkpoint-7")
    refused("no adapter there; train it first", "--to", "merged", "--run", "other")
    (runs / "mvp" / "merged").mkdir()
    refused("add --fresh to move it aside", "--to", "merged")
    with pytest.raises(DiskError, match="the export needs"):
        export.check_space(tmp_path / "a" / "b", shutil.disk_usage(tmp_path).total)
    (runs / "mvp" / "final" / "adapter_model.safetensors").write_bytes(b"x")
    refused("is damaged: adapter_model.safetensors", "--to", "merged", "--fresh")
    assert [name.partition(".")[0] for name in beside(runs)] == ["final", "merged"]
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(BadInputError, match="quantised beforehand"):
        merge.base_dtype(base)


def test_a_base_of_another_shape_or_with_other_names_is_refused(
    nano_dir: Path, tiny_model_dir: Path, runs: Path
) -> None:
    adapter = read(runs / "mvp" / "final", nano_dir)
    with pytest.raises(BadInputError, match=r"q_proj\.weight is|holds no tensor|weight is"):
        merge.check_layers(tiny_model_dir, adapter)


def test_a_base_with_other_weights_than_were_trained_is_refused(
    runs: Path, nano_dir: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def trained_on(**known: Any) -> None:
        path = runs / "mvp" / "settings.json"
        path.write_text(json.dumps(SETTINGS | {"model_name": "nano 4bit auto"} | known))

    trained_on(base_weights_sha256="0" * 64)
    assert call(runs, "--to", "merged") == 2
    said = capsys.readouterr().err
    assert "holds other weights" in said and "sha256 000000000000 with --model" in said
    assert call(runs, "--to", "merged", "--random-weights", "nano") == 2
    assert "was trained on nano; leave --random-weights out" in capsys.readouterr().err
    trained_on(base_weights_sha256=weights_hash(nano_dir))
    assert sources.choose_base(find_source(runs / "mvp", None), None).name == "nano"
    assert beside(runs) == ["final"]


def test_the_hub_revision_that_was_trained_is_the_one_downloaded(
    runs: Path, nano_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    asked: list[Any] = []

    def download(place: str, **how: Any) -> str:
        asked.append((place, how["revision"]))
        return str(nano_dir)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(sources, "disk_refusal", lambda *_: "")
    config = runs / "mvp" / "final" / "adapter_config.json"
    place = "Qwen/Qwen2.5-0.5B-Instruct"
    for told, revision in ((place, "a" * 40), ("unsloth/a-sibling", None)):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": told}))
        settings = {"model_name": f"{place} 4bit auto", "base_revision": "a" * 40}
        source = sources.Source("mvp", runs / "mvp" / "final", settings)
        choice = resolve_model(place, detect())
        with sources.base_files(choice, None, 0, tmp_path, revision=sources.revision_of(source, choice)) as base:
            assert asked.pop() == (place, revision) and base.facts["base_place"] == place


# ---------------------------------------------------------------- interrupted


def stopped_while_checking(runs: Path, number: int) -> int:
    """The exit code of an export that gets this signal when its weights are written and not yet read back."""
    code = (
        "import os\nfrom cai_experiment.scripts import _common, export_model\n"
        "from cai_experiment.training.export import merge\n"
        f"merge.verify = lambda *_: os.kill(os.getpid(), {int(number)})\n"
        f"argv = ['--checkpoint-dir', {str(runs)!r}, '--run', 'mvp', '--to', 'merged']\n"
        "raise SystemExit(_common.run_main(export_model.main, argv))"
    )
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode


@pytest.mark.slow
def test_kill_9_leaves_no_half_export_and_the_same_command_then_makes_it(runs: Path) -> None:
    assert stopped_while_checking(runs, signal.SIGKILL) == -signal.SIGKILL
    assert beside(runs) == ["final", "merged.tmp"]
    assert call(runs, "--to", "merged") == 0
    assert beside(runs) == ["final", "merged"]


def test_an_interruption_leaves_nothing_aside(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(merge, "verify", interrupt)
    (runs / "mvp" / "merged.tmp").mkdir()
    (runs / "mvp" / "merged.tmp" / "half").touch()  # as a killed call leaves it
    (runs / "mvp" / "merged.tmp" / export.MARK).touch()
    assert call(runs, "--to", "merged") == 130
    assert beside(runs) == ["final"]


def test_a_folder_that_no_export_made_is_not_deleted(tmp_path: Path) -> None:
    out, theirs = tmp_path / "model", tmp_path / "model.tmp"
    theirs.mkdir()
    with export.aside_of(out) as aside:  # empty: as a call that was killed at once leaves it
        assert aside == theirs and (aside / export.MARK).is_file()
    assert not theirs.exists()
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    with pytest.raises(BadInputError, match="no export made it; move it away"), export.aside_of(out):
        pass
    assert (theirs / "config.json").exists()
    (theirs / export.RECORD).write_text('{"adapter_sha256": "1"}')  # killed just before the rename
    with export.aside_of(out) as aside:
        assert [file.name for file in aside.iterdir()] == [export.MARK]
    theirs.symlink_to(tmp_path)
    with pytest.raises(BadInputError, match="is in the way"), export.aside_of(out):
        pass


@pytest.mark.slow
def test_a_signal_leaves_nothing_aside(runs: Path) -> None:
    assert stopped_while_checking(runs, signal.SIGTERM) == 143
    assert beside(runs) == ["final"]


# ---------------------------------------------------------------- random weights


def test_a_training_on_random_weights_is_exported_with_the_same_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    from cai_experiment.engines.load import LoadSettings, load_model, make_plan

    settings = LoadSettings(random_weights="nano", seed=0, quantization="fp32", engine="hf")
    model, tokenizer, _ = load_model(make_plan(settings, detect()), settings)
    peft: Any = get_peft_model(model, LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    publish_run(peft, tokenizer, tmp_path / "mvp", "nano fp32 auto")
    assert call(tmp_path, "--to", "merged") == 2
    assert "add --random-weights nano" in capsys.readouterr().err
    assert call(tmp_path, "--to", "merged", "--random-weights", "nano") == 0
    assert beside(tmp_path) == ["final", "merged"]
    from safetensors import safe_open

    with safe_open(tmp_path / "mvp" / "merged" / "model.safetensors", "pt") as file:
        kept = file.get_tensor("model.embed_tokens.weight")
    assert torch.equal(kept, model.get_input_embeddings().weight), "the same random base"


# ---------------------------------------------------------------- GGUF


CONVERTER = '''
"""Stands in for llama.cpp's converter: the same command line, a real GGUF file of Qwen2's architecture."""
import json, os, sys
from pathlib import Path
if os.environ.get("BREAK") == "import":
    raise ModuleNotFoundError("No module named 'sentencepiece'")
import gguf, torch
from safetensors.torch import load_file
folder, out, kind = Path(sys.argv[1]), sys.argv[3], sys.argv[5]
config = json.loads((folder / "config.json").read_text())
writer = gguf.GGUFWriter(out, "qwen2")
writer.add_block_count(config["num_hidden_layers"])
writer.add_context_length(config["max_position_embeddings"])
writer.add_embedding_length(config["hidden_size"])
writer.add_feed_forward_length(config["intermediate_size"])
writer.add_head_count(config["num_attention_heads"])
writer.add_head_count_kv(config["num_key_value_heads"])
writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
writer.add_vocab_size(config["vocab_size"])
table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
types = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
    values = tensor.float().numpy()
    if os.environ.get("BREAK") == "values" and name.endswith("layers.1.mlp.up_proj.weight"):
        values = values.copy()
        values[3, 5] += 0.01
    type_ = getattr(gguf.GGMLQuantizationType, types[kind] if values.ndim > 1 else "F32")
    data = values if type_.name == "F32" else gguf.quantize(values, type_)
    if os.environ.get("BREAK") == "missing" and name.endswith("norm.weight"):
        continue
    writer.add_tensor(table.get_name(name, (".weight", ".bias")), data, raw_dtype=type_)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
'''


@pytest.fixture
def llama_cpp(tmp_path: Path) -> Path:
    """A folder with a stand-in for llama.cpp's converter; without the package gguf tests skip, and fail under CI."""
    try:
        import gguf as _  # noqa: F401
    except ModuleNotFoundError:
        if os.environ.get("CI"):
            pytest.fail("the package gguf is not installed: pip install gguf")
        pytest.skip("the package gguf is not installed: GGUF exports are not tried")
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(CONVERTER)
    return folder


@pytest.fixture
def runs_with_merged(merged: Path, runs: Path) -> Path:
    shutil.copytree(merged, runs / "mvp" / "merged")
    return runs


@pytest.mark.parametrize("kind", ["fp16", pytest.param("q8_0", marks=pytest.mark.slow)])
def test_a_gguf_file_holds_the_merged_weights_and_says_what_the_adapter_model_says(
    runs_with_merged: Path, llama_cpp: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--to", "gguf", "--llama-cpp", str(llama_cpp), *(["--dtype", kind] if kind == "q8_0" else [])]
    assert call(runs_with_merged, *flags) == 0, capsys.readouterr().err
    record = json.loads((runs_with_merged / "mvp" / "gguf" / export.RECORD).read_text())
    assert record["file"] == f"mvp-{kind}.gguf" and record["tensors"] == record["tensors_compared"] == 50
    assert record["check"]["prompts"] == 20 and record["check"]["same_text"] >= 18
    assert beside(runs_with_merged) == ["final", "gguf", "merged"]


@pytest.mark.parametrize(
    ("broken", "says"),
    [("values", "blk.1.ffn_up.weight"), ("missing", "lacks"), ("import", "pip install sentencepiece")],
)
def test_a_gguf_file_that_is_not_the_model_is_refused(
    runs_with_merged: Path,
    llama_cpp: Path,
    broken: str,
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("BREAK", broken)
    assert call(runs_with_merged, "--to", "gguf", "--llama-cpp", str(llama_cpp)) == 1
    assert says in capsys.readouterr().err
    assert beside(runs_with_merged) == ["final", "merged"]


def test_a_missing_converter_says_what_to_install(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(gguf.VARIABLE, raising=False)
    assert call(runs, "--to", "gguf") == 2
    assert "git clone" in capsys.readouterr().err
    assert call(runs, "--to", "gguf", "--llama-cpp", str(tmp_path)) == 2
    assert "holds no convert_hf_to_gguf.py" in capsys.readouterr().err
    assert beside(runs) == ["final"]


# ---------------------------------------------------------------- hub


REPORT = {
    "verdict": "no-go",
    "gates": [
        {"name": "accepted pairs", "value": 100, "threshold": 100.0, "interval": None, "n": 180, "passed": True,
         "rule": ">=", "part": "generation"},
        {"name": "harmful answers", "value": 0.031, "threshold": 0.05, "interval": [0.012, 0.07], "n": 120,
         "passed": True, "rule": "<=", "part": "training"},
        {"name": "loss falls", "value": None, "threshold": 1.0, "interval": None, "n": 0, "passed": False,
         "rule": ">=", "part": "training"},
    ],
    "metrics": {"revision_preferred": {"value": 0.951, "n": 102, "interval": [0.89, 0.979], "unparsed": 0}},
    "notes": ["2 overlong pairs were dropped, not cut"],
}  # fmt: skip


def write_pairs(file: Path, chosen: str = "With care.") -> tuple[str, str]:
    """Twelve pairs; what training says of the share that it takes, and the file's hash."""
    from cai_experiment.training.data import HELD_OUT_SHARE, pairs_sha256, read_pairs, split_by_instruction

    rows = [{"prompt": f"How do I mend {i} chairs?", "chosen": chosen, "rejected": "No."} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kept, held_out = split_by_instruction(read_pairs(file), 0, HELD_OUT_SHARE)
    assert held_out
    return f"{len(kept)} with sha256 {pairs_sha256(kept)[:16]}", hashlib.sha256(file.read_bytes()).hexdigest()


def after_sft(runs: Path) -> Path:
    """Make a run's training one of SFT alone, as --sft-share 1 leaves it; gives its adapter."""
    run = runs / "mvp"
    settings = json.loads((run / "settings.json").read_text())
    settings |= {"loss": "sft", "pairs": "6 with sha256 00c0ffee00c0ffee", "epochs": 2.0, "learning_rate": 1e-4}
    (run / "sft").mkdir()
    (run / "final").rename(run / "sft" / "final")
    (run / "settings.json").unlink()
    (run / "sft" / "final" / "training.json").write_text(json.dumps({"settings": settings, "result": {}}))
    sealed_again(run / "sft" / "final")
    return run / "sft" / "final"


def test_after_sft_alone_its_adapter_is_exported_and_the_card_says_so(runs: Path) -> None:
    adapter, data = after_sft(runs), runs.parent / "data" / "mvp"
    data.mkdir(parents=True)
    described = {"training": {"sft_helpful": 1, "sft_pairs": "6 with sha256 00c0ffee00c0ffee"}}
    (data / "report.json").write_text(json.dumps(REPORT | {"settings": described}))
    (runs / "mvp" / "evaluated").touch()
    assert call(runs, "--to", "adapter") == 0
    assert beside(runs) == ["adapter", "evaluated", "sft"]
    text = (runs / "mvp" / "adapter" / export.CARD).read_text()
    for part in ("LoRA fine-tuned (SFT)", "no DPO", "epochs: 2.0", "rows: 6 with sha256 00c0", "| harmful answers |",
                 "helpful answers among SFT's rows: 1 of 6", "made from: sft/final of", "- sft\n"):  # fmt: skip
        assert part in text, f"{part!r} is not in\n{text}"
    assert "beta" not in text and "arXiv 2305.18290" not in text
    assert find_source(runs / "mvp", None).folder == adapter
    (runs / "mvp" / "settings.json").write_text("{}")  # DPO has begun
    with pytest.raises(BadInputError, match="name one with --checkpoint: sft/final"):
        find_source(runs / "mvp", None)
    source = find_source(runs / "mvp", "sft/final")
    assert (source.suffix, source.final, source.evaluated) == ("-sft", False, False)


def test_the_card_of_dpo_after_sft_names_both(runs: Path) -> None:
    from cai_experiment.training.export.model_card import model_card

    shutil.copytree(runs / "mvp" / "final", runs / "kept")
    settings = json.loads((runs / "mvp" / "settings.json").read_text())
    after_sft(runs)
    shutil.move(runs / "kept", runs / "mvp" / "final")
    (runs / "mvp" / "settings.json").write_text(json.dumps(settings | {"start_adapter": "ab" * 32}))
    source = find_source(runs / "mvp", None)
    assert source.folder == runs / "mvp" / "final" and source.suffix == ""
    facts = {"base": "nano", "base_place": None, "base_revision": None, "adapter_sha256": "0"}
    text = model_card(source, "apache-2.0", {"kind": "merged", **facts}, None, None)
    assert "fine-tuned (SFT) on revised answers, then trained by DPO" in text
    assert "SFT first: rows 6 with sha256 00c0ffee00c0ffee, 2 epochs at 0.0001" in text and "beta: 0.1" in text


def test_the_card_states_base_licence_data_settings_gates_and_figures(runs_with_merged: Path) -> None:
    from cai_experiment.training.export.model_card import card_maker, model_card

    data = runs_with_merged.parent / "data" / "mvp"
    data.mkdir(parents=True)
    (data / "report.json").write_text(json.dumps(REPORT))
    known, digest = write_pairs(data / "pairs.jsonl")
    settings = runs_with_merged / "mvp" / "settings.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"pairs": known}))
    source = find_source(runs_with_merged / "mvp", None)
    (runs_with_merged / "mvp" / "evaluated").touch()
    record = json.loads((runs_with_merged / "mvp" / "merged" / export.RECORD).read_text())
    record |= {
        "base": "qwen2.5-32b",
        "base_place": "Qwen/Qwen2.5-32B",
        "base_revision": "1818d35814b8319459f4bd55ed1ac8709630f003",
    }
    text = card_maker(source, "apache-2.0", data)(record)
    for part in (
        "base_model: Qwen/Qwen2.5-32B", "license: apache-2.0", "base_model_relation: finetune", "revision 1818d358",
        f"sha256 of the pairs file: {digest}", f"pairs: {known} (of what was trained on)", "beta: 0.1", "by DPO",
        "| harmful answers | 0.031 | <= 0.05 | 0.012 to 0.07 | 120 |",
        "| loss falls | not measured | >= 1 |  | 0 | NOT passed |", "revision preferred | 0.951 | 0.89 to 0.979 | 102",
        "no-go", "2 overlong pairs", "same greedy text on 20",
    ):  # fmt: skip
        assert part in text, f"{part!r} is not in\n{text}"
    (runs_with_merged / "mvp" / "evaluated").unlink()  # trained anew: the report speaks of the training before
    text = card_maker(source, "apache-2.0", data)(record)
    assert "This model was not evaluated. Of its pairs:" in text and "| accepted pairs | 100 |" in text
    assert "harmful answers" not in text and "revision preferred" not in text and "no-go" not in text
    write_pairs(data / "pairs.jsonl", "Another answer.")  # --pairs OTHER was trained
    text = card_maker(source, "apache-2.0", data)(record)
    assert f"pairs: {known}" in text and "pairs file" not in text
    other = model_card(source, "qwen-research", record | {"check": None}, None, None)
    assert "license: other" in other and "license_name: qwen-research" in other and "no report" in other


class Hub(BaseHTTPRequestHandler):
    """A hub that takes one commit: create, describe, ask how to upload, commit."""

    private = True
    got: dict[str, Any]

    def reply(self, value: object, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        info = {"id": "me/x", "modelId": "me/x", "private": self.private, "sha": "0" * 40, "siblings": [], "tags": []}
        self.reply(info if "/api/models/me/x" in self.path else {})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("/repos/create"):
            self.got["create"] = json.loads(body)
            self.reply({"url": "http://127.0.0.1/me/x", "id": "me/x"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.reply({"files": files})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.got.setdefault("files", set()).update(line["value"]["path"] for line in lines if line["key"] == "file")
            self.reply({"success": True, "commitUrl": "http://127.0.0.1/me/x/commit/1", "commitOid": "1" * 40})
        else:
            self.reply({})

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub_server() -> Iterator[tuple[str, dict[str, Any]]]:
    Hub.got, Hub.private = {}, True
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", Hub.got
    server.shutdown()
    server.server_close()


def push(runs: Path, address: str, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "cai_experiment/scripts/export_model.py"), "--checkpoint-dir", str(runs),
               "--to", "merged", "--push", "me/x", *flags]  # fmt: skip
    environment = os.environ | {
        "HF_ENDPOINT": address,
        "HF_TOKEN": "hf_x",
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_an_export_is_pushed_whole_with_its_card_and_private(
    runs_with_merged: Path, hub_server: tuple[str, dict[str, Any]]
) -> None:
    address, got = hub_server
    dry = push(runs_with_merged, address, "--dry-run")
    assert dry.returncode == 0 and "model.safetensors" in dry.stdout and "nothing sent" in dry.stdout, dry.stderr
    assert not got
    done = push(runs_with_merged, address)
    assert done.returncode == 0, done.stderr
    asked = got["create"]
    assert "private" in (asked.get("visibility"), "private" if asked.get("private") else "")
    assert (asked["organization"], asked["name"]) == ("me", "x")
    assert got["files"] >= {
        "README.md",
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "export.json",
        "files.json",
    }
    Hub.private = False
    refused = push(runs_with_merged, address)
    assert refused.returncode == 2 and "public; add --public" in refused.stderr, refused.stderr


def test_only_the_export_that_is_asked_for_is_pushed(
    runs_with_merged: Path, nano_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--to", "merged", "--push", "me/x", "--dry-run"]
    assert call(runs_with_merged, *flags, "--dtype", "fp16") == 0
    assert call(runs_with_merged, *flags, "--dtype", "fp32") == 2
    assert "is not the export asked for; add --fresh" in capsys.readouterr().err
    out = runs_with_merged / "mvp" / "merged"
    record = json.loads((out / export.RECORD).read_text())
    assert record["base_place"] is None and len(record["base_weights_sha256"]) == 64
    assert not naming_folders(out, nano_dir, runs_with_merged)
    (out / export.RECORD).write_text(json.dumps(record | {"base_weights_sha256": "0" * 64}))  # another base's
    sealed_again(out)
    assert call(runs_with_merged, *flags) == 2
    assert "is not the export asked for; add --fresh" in capsys.readouterr().err


def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(EngineError, match=r"the hub cannot be reached .*; the same command goes on") as caught:
        hub.push(tmp_path, "me/x", public=False)
    assert type(caught.value.__cause__).__name__ == "ConnectError"  # httpx's, which is no OSError


def test_a_hub_name_is_checked_before_anything_is_loaded() -> None:
    for name in ("me", "me/", "/x", "me/x/y", "../x"):
        with pytest.raises(BadInputError, match="not of the form"):
            hub.check_name(name)
    hub.check_name("me/qwen2.5-32b_cai")
