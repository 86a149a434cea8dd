"""Before a load: what lies in the cache, what the hub says, in whose words; and which of two models was named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.at_hand import reworded, whole_in_cache
from cai_experiment.engines.base import Prompt, Sampling
from cai_experiment.engines.load import LoadSettings, make_plan
from cai_experiment.engines.manager import MultiModelManager
from cai_experiment.engines.placing import Free, place
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.presets import PRESETS
from cai_experiment.models.recommend import RANKED
from cai_experiment.models.roles import ON_CPU, need_gb, smaller_preset
from cai_experiment.scripts._inputs import chosen_model, named

ROOT = Path(__file__).resolve().parents[1]
CPU = Hardware("this machine", "cpu", "", 0, "fp32", 16, 2)
CARD = Hardware("this machine", "cuda", "NVIDIA A100-SXM4-80GB", 80, "4bit", 117, 16)
COMMIT = "a" * 40


def without_network(cache: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """A process of its own whose hub is a port at which nobody listens."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "CAI_MODEL", "AGI_MODEL_NAME")
    }
    environment = {**kept, "HF_HUB_CACHE": str(cache), "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0",
                   "NO_PROXY": "*", "PYTHONPATH": str(ROOT)}  # fmt: skip
    return subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def cached(nano_dir: Path, tmp_path: Path) -> Path:
    """A cache that holds the shipped model as good/nano, as the hub would have left it."""
    folder = tmp_path / "hub" / "models--good--nano"
    shutil.copytree(nano_dir, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "blobs").mkdir()
    return tmp_path / "hub"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "Qwen/Qwen2.5-0.5B-Instruct"], "--model qwen2.5-0.5b is not in the download cache"),
        (["--model", "nano", "--critic", "nobody/none"], "--critic nobody/none is not in the download cache"),
        (["--roles", "dual"], "--roles dual: phi-2 is not in the download cache"),
    ],
)
def test_no_network_is_one_line_at_once(tmp_path: Path, flags: list[str], says: str) -> None:
    places = ["--data-dir", str(tmp_path / "d"), "--checkpoint-dir", str(tmp_path / "c")]
    done = without_network(tmp_path / "hub", "cai_experiment/scripts/test_single.py", *flags, *places)
    assert done.returncode == 1
    assert done.stderr.startswith(says) and done.stderr.count("\n") == 1, done.stderr
    assert "hub cannot be reached; connect to the internet once" in done.stderr


def test_a_model_that_is_whole_in_the_cache_loads_without_a_network_and_asks_nothing(cached: Path) -> None:
    code = ("from cai_experiment.engines.load import LoadSettings, load_engine\n"
            "print(load_engine(LoadSettings('good/nano', device='cpu')).describe()['revision'])")  # fmt: skip
    done = without_network(cached, "-c", code)
    assert done.stdout.strip() == COMMIT, done.stderr
    assert "thrown while requesting" not in done.stderr and "Retrying" not in done.stderr


def test_what_is_missing_in_the_cache_is_seen(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(cached))
    folder = cached / "models--good--nano"
    snapshot = folder / "snapshots" / COMMIT
    assert whole_in_cache("good/nano", "main") and whole_in_cache("good/nano", COMMIT)
    assert not whole_in_cache("good/nano", "b" * 40) and not whole_in_cache("good/other", "main")
    piece = folder / "blobs" / "x.incomplete"
    piece.touch()
    assert not whole_in_cache("good/nano", "main") and whole_in_cache("good/nano", "main", weights=False)
    piece.unlink()
    (snapshot / "tokenizer.json").rename(snapshot / "kept")
    assert not whole_in_cache("good/nano", "main") and whole_in_cache("good/nano", "main", tokenizer=False)
    (snapshot / "kept").rename(snapshot / "tokenizer.json")
    weights = snapshot / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert not whole_in_cache("good/nano", "main")


# ---------------------------------------------------------------- a failed load


def test_three_loads_that_fail_keep_the_model_that_was_there(nano_dir: Path, tmp_path: Path) -> None:
    manager = MultiModelManager(settings=LoadSettings(device="cpu", batch_size=4))
    assert manager.load_generation_model("nano")[0]
    before = manager.get_generation_model()
    broken = tmp_path / "broken"
    shutil.copytree(nano_dir, broken)
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"intermediate_size": ', '"intermediate_size": 1'))
    for key, says in (
        ("qwen2.5-32b", "does not fit"),
        ("nobody/none", "is not in the download cache"),
        (str(broken), "cannot be loaded"),  # found when its weights are put in
    ):
        ok, message = manager.load_generation_model(key)
        assert not ok and says in message and "--model" not in message, message
    ok, message = manager.load_configuration("dual")
    assert not ok and manager.get_status_info()["evaluation_model"] is None
    assert manager.get_generation_model() == before
    engine: Any = manager.engines()[0]
    prompt = Prompt("a", (Turn("instruction", "What is an apple?"),), "answer", Sampling(0, 12))
    assert engine.describe()["model"] == "nano" and next(iter(engine.stream([prompt]))).text
    manager.unload_all()


def test_what_does_not_fit_beside_the_old_model_takes_its_place_and_says_what_is_lost(
    nano_dir: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(nano_dir, broken)
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"intermediate_size": ', '"intermediate_size": 1'))
    free = [Free(0.0, 9.0)]
    manager = MultiModelManager(settings=LoadSettings(device="cpu"), free=lambda kind: free[0])
    assert manager.load_generation_model("nano")[0]
    nano = manager.get_status_info()["generation_model"]["memory_gb"]
    numbers = PRESETS["nano"].architecture
    free[0] = Free(0.0, need_gb(numbers, "fp32", "cpu") - nano / 2)
    ok, message = manager.load_generation_model("nano-b")  # fits once nano is gone
    assert ok and message.startswith("Generation model loaded: nano-b"), message
    free[0] = Free(0.0, 0.001)
    ok, message = manager.load_generation_model("nano")
    assert not ok and "does not fit" in message
    assert manager.get_status_info()["generation_model"]["name"] == "nano-b"


# ---------------------------------------------------------------- in whose words


def test_errors_speak_of_what_named_the_model() -> None:
    line = "--model x does not fit; take --model y, which fits (--model-length stays)"
    assert reworded(line, "--critic") == "--critic x does not fit; take --critic y, which fits (--model-length stays)"
    assert reworded(line, "") == "x does not fit; take model y, which fits (--model-length stays)"
    assert reworded(line, "--roles dual:").startswith("--roles dual: x does not fit; take model y")
    assert reworded(line, "--model", False).startswith("x does not fit; take --model y")
    settings = LoadSettings("nope", said="--generator")
    with pytest.raises(BadInputError, match=r"^--generator nope: unknown preset"):
        make_plan(settings, CPU)
    wanted = LoadSettings("qwen2.5-32b", said="--critic")
    with pytest.raises(EngineError, match=r"^--critic qwen2.5-32b does not fit .* take --critic qwen2.5-0.5b, which"):
        place(wanted, make_plan(wanted, CPU), Free(0, 8), CPU)


def flags(**given: str | None) -> Namespace:
    nothing = dict.fromkeys(("model", "generator", "critic", "roles", "server", "random_weights"))
    return Namespace(**{**nothing, "trains_after": False, **given})


def test_a_generator_alone_is_the_critic_too_unless_something_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAI_MODEL", raising=False)
    monkeypatch.delenv("AGI_MODEL_NAME", raising=False)
    alone = named(flags(generator="nano"))
    assert alone[0] is alone[1] and alone[0] == ("nano", "--generator")
    assert named(flags(generator="nano", model="nano-b")) == (("nano", "--generator"), ("nano-b", "--model"))
    assert named(flags(critic="nano")) == ((None, "--model"), ("nano", "--critic"))
    assert named(flags(generator="a", critic="b", roles="dual")) == (("a", "--roles dual:"), ("b", "--roles dual:"))
    assert chosen_model(flags(generator="nano-b"), CARD, critic=True).name == "nano-b"
    with pytest.raises(BadInputError, match=r"^--critic nope: unknown preset"):
        chosen_model(flags(critic="nope"), CARD, critic=True)
    monkeypatch.setenv("CAI_MODEL", "nano-b")
    assert named(flags(generator="nano")) == (("nano", "--generator"), (None, "--model"))


def test_the_critic_that_was_not_named_is_said(
    nano_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cai_experiment.scripts._generation import generation_parser, load_engines

    monkeypatch.delenv("CAI_MODEL", raising=False)
    monkeypatch.delenv("AGI_MODEL_NAME", raising=False)
    args = generation_parser("", "mvp").parse_args(["--generator", "nano-b"])
    generator, critic = load_engines(args)
    assert generator is critic
    out = capsys.readouterr().out
    assert "--generator nano-b" in out and "critic: the generator itself; --critic names another" in out


# ---------------------------------------------------------------- what is offered instead


@pytest.mark.parametrize("gb", [0.3, 2, 8, 14, 24, 60])
def test_what_is_offered_is_recommended_free_and_fits(gb: float) -> None:
    large = PRESETS["qwen2.5-32b"].architecture
    allowed = {one.key for one in RANKED} | {"nano"}
    here = smaller_preset(large, {"cpu": ("fp32", gb)}, trains=False)
    assert here is not None and here.key in ON_CPU and need_gb(here.architecture, "fp32", "cpu") <= gb
    card = smaller_preset(large, {"cuda": ("4bit", gb), "cpu": ("fp32", 4)}, trains=True)
    assert card is not None and card.key in allowed and not card.gated
    if gb >= 14:
        assert card.key == "qwen2.5-14b"
    assert smaller_preset(PRESETS["nano"].architecture, {"cpu": ("fp32", gb)}, trains=False) is None


def test_a_load_of_one_of_two_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    from cai_experiment.engines.pair import load_pair

    nano, other = LoadSettings("nano", said="--generator"), LoadSettings("nobody/none", said="--critic")
    told: list[str] = []
    with pytest.raises(EngineError, match=r"^--critic nobody/none is not in the download cache"):
        load_pair(nano, replace(other, device="cpu"), told.append)
    assert told == []  # nothing was loaded before it was known


@pytest.mark.parametrize(("engine", "says"), [("hf", True), ("auto", False)])  # Unsloth itself computes in float16
def test_the_plan_says_where_bfloat16_is_emulated(engine: str, says: bool, capsys: pytest.CaptureFixture[str]) -> None:
    from cai_experiment.scripts._milestone import run_milestone

    asked = ["--plan", "--hardware", "colab_free_t4", "--model", "qwen2.5-1.5b", "--engine", engine]
    assert run_milestone("", "single", asked) == 0
    assert ("Tesla T4 only emulates bfloat16: training is slower" in capsys.readouterr().out) == says
