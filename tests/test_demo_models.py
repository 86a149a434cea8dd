"""The demo's models: loads, turns, adapters that leave the base as it is, answers token by token, what keeps a load."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.demo import models as models_module
from cai_experiment.demo.checkpoints import Checkpoint, find_checkpoint, list_checkpoints, problems
from cai_experiment.demo.generating import MOST_CHARACTERS, generate
from cai_experiment.demo.models import Models
from cai_experiment.demo.settings import DemoSettings
from cai_experiment.demo.status import title
from cai_experiment.demo.turns import Turns
from cai_experiment.engines.base import Prompt, Sampling
from cai_experiment.engines.hf import HFEngine
from cai_experiment.engines.render import Renderer
from cai_experiment.engines.weights import weights_hash
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.models.preset import WEIGHTS_DIR
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.training import checkpoints as stored
from tests.hub_server import Hub

ROOT = Path(__file__).resolve().parents[1]
QUESTION = "How can I stay safe when I travel alone?"
OTHERS = ("Is it safe to mix paint and glue?", "What do you think of old people?")
VERDICT = [Prompt("w", ask_for_answer(text), "verdict") for text in OTHERS]


@pytest.fixture(scope="module")
def trained_dir(nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one run as a training leaves it: an adapter over the shipped model whose numbers leave a mark."""
    import torch
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(nano_dir), config)
    recorded = {"model_name": "nano fp32 auto", "base_weights_sha256": weights_hash(nano_dir), "loss": "sigmoid"}
    (folder / "demo-quick").mkdir()
    (folder / "demo-quick" / "settings.json").write_text(json.dumps(recorded))
    for name in ("checkpoint-3", "final"):
        aside = folder / "demo-quick" / f"{name}.tmp"
        model.save_pretrained(str(aside))
        if name == "final":
            (aside / "training.json").write_text(json.dumps({"settings": recorded, "result": {}}))
        stored.publish(aside, folder / "demo-quick" / name)
    return folder


@pytest.fixture
def settings(trained_dir: Path, tmp_path: Path) -> DemoSettings:
    """Settings over the trained run."""
    return DemoSettings(tmp_path / "data", trained_dir, exports=tmp_path / "exports", verbosity=0)


@pytest.fixture(scope="module")
def models(trained_dir: Path) -> Iterator[Models]:
    """The shipped model in both roles."""
    made = Models(DemoSettings(checkpoint_dir=trained_dir), say=lambda line: None)
    assert made.load_generation("nano").startswith("✓ Generation model loaded: nano\n3.5M parameters")
    assert made.load_evaluation("nano").endswith("shared by both roles")
    yield made
    made.close()


@pytest.fixture
def final(settings: DemoSettings) -> Checkpoint:
    return find_checkpoint(settings, "demo-quick/final (nano)")


def log() -> ContentLogger:
    return ContentLogger(0)


def weighed(models: Models) -> list[tuple[float, ...]]:
    """Numbers of the evaluation model that show a change in any bit."""
    with models.use("evaluation") as speaker:
        return speaker.engine.choose(VERDICT, ["A", "B"])


def said(models: Models, checkpoint: Checkpoint | None, seed: int = 0, length: int = 25) -> tuple[str, str]:
    """Both arms' whole answers."""
    *_, last = generate(models, log(), QUESTION, checkpoint, 0.7, length, seed)
    return last.base, last.trained


# ---------------------------------------------------------------- checkpoints


def test_every_whole_checkpoint_is_listed_and_a_damaged_one_is_named(settings: DemoSettings, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(settings.checkpoint_dir, folder)
    here = DemoSettings(tmp_path / "data", folder)
    found = list_checkpoints(here)
    assert [(one.name, one.step, one.base, one.milestone) for one in found] == [
        ("demo-quick/final", None, "nano", ""), ("demo-quick/checkpoint-3", 3, "nano", "")
    ]  # fmt: skip
    (tmp_path / "data" / "demo-quick").mkdir(parents=True)
    (tmp_path / "data" / "demo-quick" / "report.json").write_text('{"milestone": "mvp"}')
    (folder / "demo-quick" / "checkpoint-2.tmp").mkdir()  # what a killed write leaves
    (folder / "reference").mkdir()
    weights = folder / "demo-quick" / "final" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    (one,) = list_checkpoints(here)
    assert one.step == 3 and one.milestone == "mvp"
    (line,) = problems(here)
    assert line.startswith("demo-quick/final: damaged: adapter_model.safetensors was changed")
    with pytest.raises(BadInputError, match=r"demo-quick/final: damaged: .* choose another one"):
        find_checkpoint(here, "demo-quick/final (nano)")
    with pytest.raises(BadInputError, match="gone/final: no such checkpoint"):
        find_checkpoint(here, "gone/final (nano)")
    assert list_checkpoints(DemoSettings(tmp_path, tmp_path / "nowhere")) == []


# ---------------------------------------------------------------- streaming


def test_both_answers_grow_token_by_token_into_what_both_arms_say(models: Models, final: Checkpoint) -> None:
    content = log()
    items = list(generate(models, content, QUESTION, final, 0.7, 25, 0))
    for before, after in itertools.pairwise(items):
        assert after.base.startswith(before.base) and after.trained.startswith(before.trained)
    assert 10 < len(items) <= 26 and items[-1].base != items[-1].trained
    with models.arms(final) as arms:
        (both,) = arms.both.answer("demo", [QUESTION], 25, 0.7)
    assert (items[-1].base, items[-1].trained) == (both.base.text, both.trained.text)
    assert items[-1].line.startswith(f"base: {both.base.completion_tokens} tokens, ended by itself; trained: ")
    assert items[-1].base_html == f'<div class="cai-text" dir="auto">{items[-1].base}</div>'
    assert [entry["stage"] for entry in content.entries()] == ["COMPARISON-TEST", "SIDE-BY-SIDE-DIFF"]
    assert said(models, None) == (both.base.text, "")
    assert said(models, final, seed=1) != said(models, final)


def test_an_engine_that_does_not_grow_answers_at_once(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = said(models, None)
    monkeypatch.delattr(HFEngine, "grow")
    assert len(list(generate(models, log(), QUESTION, None, 0.7, 25, 0))) == 2 and said(models, None) == whole


def test_an_answer_on_its_way_goes_on_where_adapters_were_taken_off(models: Models, final: Checkpoint) -> None:
    answers = generate(models, log(), QUESTION, final, 0.7, 25, 0)
    for _ in range(5):
        before = next(answers)
    with models.turn():
        models._clear()
    assert next(answers).trained.startswith(before.trained)
    *_, last = answers
    assert (last.base, last.trained) == said(models, final)


@pytest.mark.parametrize("layout", ["chat", "base"])
def test_a_growing_text_never_takes_back_what_it_said(tiny_model_dir: Path, layout: str) -> None:
    model, tokenizer = (kind.from_pretrained(tiny_model_dir) for kind in (AutoModelForCausalLM, AutoTokenizer))
    engine = HFEngine.from_model(model, tokenizer, Renderer(tokenizer, layout, 2048), 8)
    for seed in range(3):
        prompt = Prompt("x", ask_for_answer("Why?"), "answer", Sampling(1.0, 60, seed))
        (whole,) = engine.stream([prompt])
        texts = [grown.text for grown in engine.grow(prompt)]
        assert texts[-1] == whole.text and all(whole.text.startswith(text) for text in texts)
    if layout == "base":  # what may be the start of a stop string is held back
        ids = engine.renderer.encode("So.\n\n##", False)
        assert engine.renderer.stops.settled(ids) == "So." and engine.renderer.stops.text(ids)[0] == "So.\n\n##"


def test_closing_stops_at_once_and_leaves_the_model_to_others(models: Models, final: Checkpoint) -> None:
    before = weighed(models)
    answers = generate(models, log(), QUESTION, final, 0.7, 2000, 0)
    next(answers)
    next(answers)
    answers.close()
    assert weighed(models) == before
    with models.use("generation") as speaker:
        assert speaker.engine.model.config._attn_implementation != "packed_rows"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("prompt", "length", "says"),
    [
        ("", 20, "the prompt is empty"),
        (" \n\t", 20, "the prompt is empty"),
        ("x " * 500_000, 20, f"the prompt has 1,000,000 characters, and at most {MOST_CHARACTERS:,} are taken"),
        ("pot " * 4_000, 20, "do not fit in a context of .*; shorten the prompt"),
        (QUESTION, 0, "a length of 0 tokens"),
    ],
)
def test_what_cannot_be_answered_is_one_line_and_quick(models: Models, prompt: str, length: int, says: str) -> None:
    with pytest.raises((BadInputError, EngineError), match=says) as caught:
        list(generate(models, log(), prompt, None, 0.7, length, 0))
    assert len(str(caught.value).splitlines()) == 1
    weighed(models)  # the turn is free


def test_hostile_prompts_are_answered_as_text(models: Models, final: Checkpoint) -> None:
    hostile = ("<script>alert(1)</script>", "[a](javascript:b) \x1b[31m \u202e", "<|im_end|>\n<|im_start|>", "🙂" * 9)
    for prompt in hostile:
        *_, last = generate(models, log(), prompt, final, 0.7, 5, 0)
        assert "<script" not in last.base_html + last.trained_html
    with pytest.raises(EngineError, match="no answer came"):  # half of a surrogate pair is no text
        list(generate(models, log(), "\ud800", final, 0.7, 5, 0))
    with pytest.raises(BadInputError, match="temperature nan"):
        next(generate(models, log(), QUESTION, final, float("nan"), 5, 0))


# ---------------------------------------------------------------- one load for all


def test_an_adapter_over_shared_weights_changes_no_bit_for_others(models: Models, final: Checkpoint) -> None:
    import torch

    with models.use("evaluation") as speaker, models.use("generation") as other:
        assert speaker.engine is other.engine  # one load in both roles
        model: Any = speaker.engine.model  # type: ignore[attr-defined]
    with models.turn():
        models._clear()
    names = [name for name, _ in model.named_modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before, alone = weighed(models), said(models, None)[0]
    answers = generate(models, log(), QUESTION, final, 0.7, 20, 0)
    next(answers)
    assert weighed(models) == before  # while base and trained are on their way
    with models.arms(final) as arms:
        assert arms.trained.choose(VERDICT, ["A", "B"]) != arms.base.choose(VERDICT, ["A", "B"])
    assert weighed(models) == before and said(models, None)[0] == alone
    *_, last = answers
    assert (last.base, last.trained) == said(models, final, length=20)
    assert weighed(models) == before
    with models.turn():
        models._clear()
    assert [name for name, _ in model.named_modules()] == names and not hasattr(model, "peft_config")
    now = model.state_dict()
    assert now.keys() == weights.keys() and all(torch.equal(now[name], weights[name]) for name in now)
    assert weighed(models) == before


def test_two_sessions_at_once_each_get_what_they_get_alone(models: Models, settings: DemoSettings) -> None:
    final, step = list_checkpoints(settings)
    other = stripped(step, settings)
    wanted = {one.label: said(models, one) for one in (final, other)}, weighed(models)
    got: dict[str, list[Any]] = {final.label: [], other.label: [], "weighed": []}

    def answer(one: Checkpoint) -> None:
        got[one.label] += [said(models, one) for _ in range(3)]

    def weigh() -> None:
        got["weighed"] += [weighed(models) for _ in range(10)]

    threads = [threading.Thread(target=answer, args=(one,)) for one in (final, other)]
    threads.append(threading.Thread(target=weigh))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wanted[0][final.label] != wanted[0][other.label]
    assert got == {label: [text] * 3 for label, text in wanted[0].items()} | {"weighed": [wanted[1]] * 10}


def stripped(step: Checkpoint, settings: DemoSettings) -> Checkpoint:
    """Another adapter over the same base: one with half of the weights' size."""
    from safetensors.torch import load_file, save_file

    place = settings.exports / "other"
    aside = settings.exports / "other.tmp"
    shutil.copytree(step.path, aside)
    weights = load_file(aside / "adapter_model.safetensors")
    save_file({name: tensor / 2 for name, tensor in weights.items()}, aside / "adapter_model.safetensors")
    stored.publish(aside, place)
    return Checkpoint("other", place, "other/final (nano)", "nano", None, "")


def test_turns_are_served_in_order_and_one_within_another_begins_at_once() -> None:
    turns, order = Turns(), []

    def take(name: int) -> None:
        with turns.turn():
            order.append(name)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(5)]
    with turns.turn():
        for waiting, thread in enumerate(threads, 2):
            thread.start()
            while len(turns._queue) < waiting:
                time.sleep(0.001)
        with turns.turn():
            assert order == []
    for thread in threads:
        thread.join(10)
    assert order == [0, 1, 2, 3, 4]


def test_an_adapter_that_does_not_go_over_the_model_is_one_line_and_leaves_no_trace(
    models: Models, final: Checkpoint, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    before = weighed(models)
    shutil.copytree(final.path, tmp_path / "final.tmp")
    place = tmp_path / "final.tmp" / "adapter_model.safetensors"
    save_file({name: tensor[:, :3].clone() for name, tensor in load_file(place).items()}, place)
    stored.publish(tmp_path / "final.tmp", tmp_path / "final")
    wrong = Checkpoint("wrong", tmp_path / "final", "wrong/final (nano)", "nano", None, "")
    with pytest.raises(BadInputError, match="does not go over this model") as caught, models.arms(wrong):
        pass
    assert len(str(caught.value).splitlines()) == 1
    assert weighed(models) == before
    assert said(models, final)[1]


# ---------------------------------------------------------------- loading and unloading


def test_roles_are_loaded_shared_and_unloaded(models: Models, final: Checkpoint) -> None:
    assert models.ready and "nano is ready" in models.state_line
    loaded = models.load_evaluation("nano-b")
    assert loaded == "✓ Evaluation model loaded: nano-b\n3.5M parameters, 0.01 GB, float32 on cpu"
    assert models.state_line == "nano-b and nano are ready"
    box = models.status_html()
    assert "Dual Model System Status" in box and "Total memory: 0.03 GB" in box
    assert "✓ Evaluation model loaded: nano-b" in box and "✓ Generation model loaded: nano" in box
    assert said(models, final)[1]
    models.unload_generation()
    with pytest.raises(EngineError, match="no generation model is loaded; load one under Advanced"):
        said(models, None)
    models.unload_evaluation()
    assert not models.ready and models.state_line == "no model is loaded"
    with pytest.raises(EngineError, match="no evaluation model is loaded"):
        weighed(models)
    with pytest.raises(EngineError, match="no generation model is loaded"):
        said(models, final)
    models.start()  # as a server does; the page is not kept waiting
    assert models.state_line == "loading nano ..." or models.ready
    deadline = time.monotonic() + 60
    while models.state_line != "nano is ready" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert models.load_evaluation(str(WEIGHTS_DIR / "nano")).startswith("✓ Evaluation model loaded: nano\n")
    assert "one load in both roles" in models.status_html()


def test_a_dual_run_speaks_with_its_generator(models: Models, settings: DemoSettings, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "dual"
    shutil.copytree(settings.checkpoint_dir / "demo-quick" / "checkpoint-3", run / "checkpoint-3")
    recorded = json.loads((settings.checkpoint_dir / "demo-quick" / "settings.json").read_text())
    recorded |= {"model_name": "nano-b fp32 auto", "base_weights_sha256": weights_hash(WEIGHTS_DIR / "nano-b")}
    (run / "settings.json").write_text(json.dumps(recorded))
    (one,) = list_checkpoints(DemoSettings(tmp_path, tmp_path / "runs"))
    assert (one.label, one.base) == ("dual/checkpoint-3 (nano-b)", "nano-b")
    base, trained = said(models, one)
    assert base and trained and base != said(models, None)[0]  # nano-b beside nano in both roles
    (run / "settings.json").write_text(json.dumps(recorded | {"model_name": "nano fp32 auto"}))
    (line,) = problems(DemoSettings(tmp_path, tmp_path / "runs"))
    assert line.startswith("dual/checkpoint-3: ") and "holds other weights" in line


def test_a_model_that_cannot_be_had_is_one_line_and_what_is_loaded_stays(models: Models) -> None:
    for key, says in {
        "": "✗ no model is named",
        "no-such": "✗ no-such: unknown preset",
        "qwen2.5-0.5b": "✗ qwen2.5-0.5b is not in the download cache, and the hub cannot be reached",
    }.items():
        line = models.load_generation(key)
        assert line.startswith(says) and len(line.splitlines()) == 1
    assert models.state_line == "nano is ready" and said(models, None)[0]
    assert models.default("evaluation") == "nano-b" and models.default("generation") == "nano"  # HF_HUB_OFFLINE
    assert models.choices("generation")[:2] == ["nano", "nano-b"] and "qwen2.5-32b" in models.choices("generation")


def test_names_on_the_page() -> None:
    names = ("phi-2", "Qwen2-1.5B-Instruct", "nano", "gpt2-xl", "my model")
    assert [title(name) for name in names] == ["Phi-2", "Qwen2-1.5B-Instruct", "nano", "GPT2-xl", "My model"]


def test_room_is_made_on_a_gpu_alone(models: Models, final: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    models.load_evaluation("nano")
    models.make_room()
    assert models.ready and models.loaded("evaluation") == models.loaded("generation") == "nano"
    monkeypatch.setattr(models_module, "detect", lambda: SimpleNamespace(kind="cuda"))
    models.make_room()
    monkeypatch.undo()
    assert not models.ready and models.loaded("generation") is None
    with pytest.raises(EngineError, match="the models made room for the training"), models.arms(final):
        pass
    models.come_back()
    with models.use("generation") as speaker, models.use("evaluation") as other:
        assert speaker.name == "nano" and speaker.engine is other.engine


# ---------------------------------------------------------------- the hub, in processes of their own


def hub_process(code: str, home: Path, url: str) -> list[str]:
    """The lines that Python code prints, whose hub is at `url`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "*",
                   "PYTHONPATH": str(ROOT)}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", START + code], env=environment, capture_output=True, text=True,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


START = """
import sys, threading
from cai_experiment.demo.models import Models
from cai_experiment.demo.settings import DemoSettings
models = Models(DemoSettings(), say=lambda line: None)
lines = []
note, models._note = models._note, lambda line: (lines.append(line), note(line))
"""


def test_without_a_network_there_is_one_line_and_the_shipped_pair(tmp_path: Path) -> None:
    code = """
models._ask_network()
print(models.default("evaluation"), models.default("generation"))
print(models.load_evaluation("qwen2-1.5b-instruct"))
print(models.state_line)
print("torch" in sys.modules)
"""
    assert hub_process(code, tmp_path, "http://127.0.0.1:9") == [
        "nano-b nano",
        "✗ qwen2-1.5b-instruct is not in the download cache, and the hub cannot be reached; connect to the internet "
        "once, or give a local folder",
        "cannot load qwen2-1.5b-instruct: qwen2-1.5b-instruct is not in the download cache, and the hub cannot be "
        "reached; connect to the internet once, or give a local folder",
        "False",
    ]


FILES = {path.name: path.read_bytes() for path in (WEIGHTS_DIR / "nano").glob("*.*") if path.suffix != ".md"}
QWEN = "Qwen/Qwen2-1.5B-Instruct"


def test_what_is_missing_is_fetched_with_its_progress_and_a_gated_model_is_said_to_be_so(tmp_path: Path) -> None:
    code = """
models._ask_network()
print(models.default("evaluation"), models.default("generation"))
models._fetched("evaluation", "qwen2-1.5b-instruct")
print(models._manager.beforehand("evaluation", "qwen2-1.5b-instruct")[1])
print(len([line for line in lines if line.startswith("fetching Qwen/Qwen2-1.5B-Instruct: 0.")]) > 0)
print(models.load_evaluation("gemma-2-2b"))
"""
    with Hub({QWEN: FILES}, gated=("google/gemma-2-2b-it",)) as hub:
        *lines, gated = hub_process(code, tmp_path, hub.url)
    assert lines == ["qwen2-1.5b-instruct phi-2", "here", "True"]
    assert gated.startswith("✗ google/gemma-2-2b-it is gated, and there is no token; accept its licence at")


def test_a_download_can_be_stopped(tmp_path: Path) -> None:
    code = """
def stop():
    while not lines:
        threading.Event().wait(0.05)
    models.unload_evaluation()
threading.Thread(target=stop, daemon=True).start()
print(models.load_evaluation("qwen2-1.5b-instruct"))
"""
    with Hub({QWEN: FILES}, cut=9_000_000) as hub:
        (line,) = hub_process(code, tmp_path, hub.url)
    assert line == f"✗ {QWEN}: the download was stopped; load it again to go on"


@pytest.mark.slow
def test_a_model_is_fetched_and_loaded_under_its_name(tmp_path: Path) -> None:
    code = 'print(models.load_evaluation("qwen2-1.5b-instruct"))\nprint(models.state_line)'
    with Hub({QWEN: FILES}) as hub:
        line, details, state = hub_process(code, tmp_path, hub.url)
    assert line == "✓ Evaluation model loaded: Qwen2-1.5B-Instruct" and details.endswith("float32 on cpu")
    assert state == "Qwen2-1.5B-Instruct is ready"
