"""Unsloth needs a GPU even to be imported, so our calls are held against its argument names, read from its source.

`unsloth_arguments.json` holds the names of the pinned version; where unsloth is installed, its own source is compared.
To record another version: python tests/test_unsloth.py FOLDER_OF_UNSLOTH > tests/unsloth_arguments.json
"""

from __future__ import annotations

import ast
import errno
import inspect
import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cai_experiment.errors import DiskError, EngineError
from cai_experiment.models.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
RECORD = Path(__file__).with_name("unsloth_arguments.json")
FUNCTIONS = (  # file, name, and the class or function that it stands in
    ("models/loader.py", "from_pretrained", "FastLanguageModel"),
    ("models/loader.py", "for_inference", "FastLanguageModel"),
    ("models/loader.py", "for_training", "FastLanguageModel"),
    ("models/llama.py", "get_peft_model", "FastLlamaModel"),  # FastLanguageModel's hands all arguments on to it
    ("models/llama.py", "_CausalLM_fast_forward", "CausalLM_fast_forward"),  # the forward that it gives Qwen2
)
ENVIRONMENT = ("UNSLOTH_DISABLE_STATISTICS", "UNSLOTH_COMPILE_LOCATION")
MAPPED = "unsloth/Qwen2.5-32B-bnb-4bit"
FOUR_BIT = "of our presets' 4-bit repositories, in its table"


def read(package: Path) -> dict[str, Any]:
    """The names that we lean on, from the source of an installed or unpacked unsloth, unsloth_zoo beside it."""

    def tree(file: str) -> ast.Module:
        return ast.parse((package / file).read_text(encoding="utf-8"))

    def arguments(file: str, name: str, inside: str) -> list[str]:
        (outer,) = (node for node in tree(file).body if getattr(node, "name", "") == inside)
        (inner,) = (node for node in outer.body if getattr(node, "name", "") == name)  # type: ignore[attr-defined]
        return [argument.arg for argument in (*inner.args.posonlyargs, *inner.args.args, *inner.args.kwonlyargs)]

    def text(file: str) -> str:
        return (package.parent / file).read_text(encoding="utf-8")

    llama, names = text("unsloth/models/llama.py"), text("unsloth/models/_utils.py") + text("unsloth_zoo/compiler.py")
    table = text("unsloth/models/mapper.py").lower()
    entries = [node for node in ast.walk(tree("models/mapper.py")) if isinstance(node, ast.Dict)]
    mapped = [value for node in entries for key, value in zip(node.keys, node.values, strict=True)
              if isinstance(key, ast.Constant) and key.value == MAPPED]  # fmt: skip
    return {
        "version": re.findall(r'^__version__ = "(.+)"', text("unsloth_zoo/__init__.py"), re.MULTILINE)[0],
        "arguments": {name: arguments(file, name, inside) for file, name, inside in FUNCTIONS},
        "set on a loaded model": [name for name in ("for_inference", "for_training") if f"model.{name} = " in llama],
        "environment": [name for name in ENVIRONMENT if f'"{name}"' in names],
        MAPPED: list(ast.literal_eval(mapped[0])),
        FOUR_BIT: sorted(name for name in four_bit_names() if f'"{name}"'.lower() in table),
    }


def four_bit_names() -> set[str]:
    """The repositories of 4-bit weights that our presets name."""
    return {preset.four_bit for preset in PRESETS.values() if preset.four_bit}


def recorded() -> dict[str, Any]:
    return dict(json.loads(RECORD.read_text(encoding="utf-8")))


def our_calls() -> dict[str, list[ast.Call]]:
    """Our calls of FastLanguageModel's functions, by name."""
    calls: dict[str, list[ast.Call]] = {}
    for file in (ROOT / "cai_experiment").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            function = node.func if isinstance(node, ast.Call) else None
            if isinstance(function, ast.Attribute) and ast.unparse(function.value) == "FastLanguageModel":
                calls.setdefault(function.attr, []).append(node)  # type: ignore[arg-type]
    return calls


def test_our_calls_use_names_that_unsloth_has() -> None:
    names, calls = recorded()["arguments"], our_calls()
    assert set(calls) == {"from_pretrained", "for_inference", "for_training", "get_peft_model"}
    for function, nodes in calls.items():
        for node in nodes:
            used = [keyword.arg for keyword in node.keywords]
            assert set(used) <= set(names[function]), f"{function} has no {set(used) - set(names[function])}"
            assert not set(used) & set(names[function][: len(node.args)]), f"{function}: an argument is given twice"


def test_what_else_we_lean_on_is_there() -> None:
    from cai_experiment.engines import branches

    found = recorded()
    calls = [node for node in ast.walk(ast.parse(inspect.getsource(branches.weigh))) if isinstance(node, ast.Call)]
    used = {keyword.arg for node in calls if ast.unparse(node.func) == "model" for keyword in node.keywords}
    assert {"input_ids", "position_ids", "past_key_values", "use_cache", "logits_to_keep"} == used
    assert used <= set(found["arguments"]["_CausalLM_fast_forward"])
    assert found["set on a loaded model"] == ["for_inference", "for_training"]
    assert PRESETS["qwen2.5-32b"].hub_id in found[MAPPED] and PRESETS["qwen2.5-32b"].four_bit == MAPPED
    assert set(found[FOUR_BIT]) == four_bit_names()
    assert found["environment"] == list(ENVIRONMENT)
    assert f"unsloth=={found['version']}," in (ROOT / "requirements.txt").read_text(encoding="utf-8")


def test_the_record_is_of_the_installed_version() -> None:
    package = find_spec("unsloth")
    if package is None or not package.submodule_search_locations:
        pytest.skip("unsloth is not installed here: our calls are held against the recorded names only")
    assert read(Path(package.submodule_search_locations[0])) == recorded()


def test_loading_asks_for_what_the_spec_asks_and_writes_nothing_into_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torch

    from cai_experiment.engines import unsloth

    asked: dict[str, Any] = {}

    class FastLanguageModel:
        @staticmethod
        def from_pretrained(model_name: str, **arguments: Any) -> tuple[str, str]:
            asked.update(arguments, model_name=model_name, cache=os.environ["UNSLOTH_COMPILE_LOCATION"])
            return "model", "tokenizer"

        @staticmethod
        def for_inference(model: str) -> str:
            return f"{model} for inference"

    package = ModuleType("unsloth")
    package.FastLanguageModel = FastLanguageModel  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "unsloth", package)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "huggingface"))
    for name in ("UNSLOTH_COMPILE_LOCATION", "UNSLOTH_DISABLE_STATISTICS"):
        monkeypatch.setenv(name, "")  # so that what is set now is undone afterwards
        monkeypatch.delenv(name)
    assert unsloth.load("unsloth/Qwen2.5-32B-bnb-4bit", 4096) == ("model for inference", "tokenizer")
    assert asked == {
        "model_name": "unsloth/Qwen2.5-32B-bnb-4bit", "dtype": torch.bfloat16, "load_in_4bit": True,
        "max_seq_length": 4096, "revision": None, "use_exact_model_name": True,
        "cache": str(tmp_path / "huggingface" / "unsloth_compiled_cache"),
    }  # fmt: skip
    assert os.environ["UNSLOTH_DISABLE_STATISTICS"] == "1"


# ---------------------------------------------------------------- the disk, before and during a download


@pytest.mark.parametrize(
    ("engine", "free", "downloaded", "words"),
    [
        ("unsloth", 12.0, {}, r"qwen2.5-32b: 12 GB free disk at .*, 20 GB needed for 19 GB of weights; make room"),
        ("unsloth", 12.0, {"unsloth--Qwen2.5-32B-bnb-4bit": 10}, ""),  # goes on with what is there
        ("unsloth", 0.5, {"unsloth--Qwen2.5-32B-bnb-4bit": 19}, ""),  # is there
        ("hf", 30.0, {}, ""),  # takes what was quantised beforehand
        ("hf", 1.0, {"unsloth--Qwen2.5-32B-bnb-4bit": 19}, ""),
        ("hf", 12.0, {}, r"12 GB free disk at .*, 20 GB needed for 19 GB"),
        ("hf", 1.0, {"unsloth--Qwen2.5-32B-Instruct-bnb-4bit": 19}, "1 GB free disk"),  # another model's
        ("unsloth", 1.0, {"unsloth--Qwen2.5-32B-Instruct-bnb-4bit": 19}, "1 GB free disk"),
        ("hf", 30.0, {"Qwen--Qwen2.5-32B": 40}, ""),
    ],
)
def test_a_disk_too_small_is_refused_before_the_download(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, free: float, downloaded: dict[str, int], words: str
) -> None:
    from cai_experiment.engines import load
    from cai_experiment.models import serving
    from cai_experiment.models.hardware import PROFILES

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(serving, "free_gb", lambda place: free)
    monkeypatch.setattr(load, "find_spec", lambda name: True)
    monkeypatch.setattr("cai_experiment.engines.at_hand.ask_hub", lambda *_: None)
    for name, gigabytes in downloaded.items():
        blobs = tmp_path / "hub" / f"models--{name}" / "blobs"
        blobs.mkdir(parents=True)
        with (blobs / "part").open("wb") as file:
            file.truncate(gigabytes * 10**9)  # sparse
    began = RuntimeError("the download began")

    def begin(*_: Any) -> None:
        raise began

    monkeypatch.setattr("cai_experiment.engines.unsloth.load", begin)
    monkeypatch.setattr(load, "_pretrained", begin)
    settings = load.LoadSettings(engine=engine, quantization="4bit")
    plan = load.make_plan(settings, PROFILES["runpod_a100_80gb"])
    with pytest.raises(DiskError if words else EngineError, match=words or "the download began; python .*doctor.py"):
        load.load_model(plan, settings)


@pytest.mark.parametrize(
    ("model", "files", "revision"),
    [
        ("qwen2.5-7b-base", "unsloth/Qwen2.5-7B-bnb-4bit", "main"),  # by Unsloth's own table a larger one
        ("smollm3-3b", "HuggingFaceTB/SmolLM3-3B", "a07cc9a04f16550a088caea529712d1d335b0ac1"),
        ("org/name", "org/name", "main"),
    ],
)
def test_unsloth_is_told_which_files_to_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model: str, files: str, revision: str
) -> None:
    from cai_experiment.engines import load
    from cai_experiment.models import serving
    from cai_experiment.models.hardware import PROFILES

    asked: list[object] = []
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(serving, "free_gb", lambda place: 500.0)
    monkeypatch.setattr(load, "find_spec", lambda name: True)
    monkeypatch.setattr("cai_experiment.engines.at_hand.ask_hub", lambda *_: None)

    def told(*arguments: object) -> None:
        asked.extend(arguments)
        raise RuntimeError

    monkeypatch.setattr("cai_experiment.engines.unsloth.load", told)
    settings = load.LoadSettings(model=model, engine="unsloth", quantization="4bit")
    with pytest.raises(EngineError):
        load.load_model(load.make_plan(settings, PROFILES["runpod_a100_80gb"]), settings)
    assert asked == [files, 4096, revision]


def test_a_disk_that_fills_up_during_the_download_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cai_experiment.engines.weights import loading_error

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    wrapped = OSError("Can't load the model")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device", "blobs/x.incomplete")
    for error in (wrapped, RuntimeError("Data processing error: No space left on device (os error 28)")):
        found = loading_error("a/b", error)
        assert isinstance(found, DiskError) and found.exit_code == 1
        assert f"--model a/b: the disk is full, and the download is not whole; make room at {tmp_path}" in str(found)


if __name__ == "__main__":
    print(json.dumps(read(Path(sys.argv[1])), indent=1))
