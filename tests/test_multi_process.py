"""Several processes, as `accelerate launch` starts them: the same weights as one, written by the first alone."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAIN = """
import json, os, sys, torch
torch.set_num_threads(1)
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.test_multi_process import train
train(Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
"""


def train(model_dir: Path, folder: Path, changes: dict[str, Any]) -> None:
    """Train in this process, which may be one of several; `changes` are settings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cai_experiment.constitution.prompts import ask_for_answer
    from cai_experiment.engines.render import Renderer
    from cai_experiment.training import dpo
    from cai_experiment.training.data import Pair
    from cai_experiment.training.settings import DPOSettings

    plants = ("tomatoes", "beans", "roses", "figs", "mint", "basil", "kale", "leek", "rye", "oats", "peas")
    pairs = tuple(
        Pair(f"{i:06d}", ask_for_answer(f"How do I grow {plant}?" + " It is dry." * (i % 4)),
             f"Use a large pot for {plant}. Water it." + " Turn it once a week." * (i % 3),
             f"Only a fool asks about {plant}.")
        for i, plant in enumerate(plants)
    )  # fmt: skip
    kill_at = changes.pop("kill_at", None)
    if kill_at is not None:
        _signal_at(kill_at)
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    given = {"pairs": pairs, "output_dir": folder / "run", "steps": 5, "learning_rate": 1e-3, "lora_r": 8,
             "effective_batch": 5, "backend": "fast", "save_every": 2, "base": "tiny", "held_out": pairs[:3],
             **changes}  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    dpo.train(DPOSettings(**given), model, tokenizer, Renderer(tokenizer, "chat", 2048))


def _signal_at(step: int) -> None:
    """The second of two processes gets a SIGTERM when that step begins."""
    from cai_experiment.training.watch import Watch

    begin = Watch.on_step_begin

    def signalled(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        if state.global_step == step and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGTERM)

    Watch.on_step_begin = signalled  # type: ignore[method-assign]


def run(processes: int, model_dir: Path, folder: Path, **changes: Any) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of each process; 1 runs without any of the launcher's variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", TRAIN, str(ROOT), str(model_dir), str(folder), json.dumps(changes)]
    started = []
    for rank in range(processes):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}  # fmt: skip
        env = os.environ | {"OMP_NUM_THREADS": "1"} | ({k: str(v) for k, v in own.items()} if processes > 1 else {})
        started.append(subprocess.Popen(command, env=env, cwd=ROOT, stdout=-1, stderr=-1, text=True))
    said = [process.communicate() for process in started]
    return [(process.returncode, *words) for process, words in zip(started, said, strict=True)]


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "run" / "final" / "adapter_model.safetensors")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def apart(one: Path, other: Path) -> float:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.fixture(scope="module")
def alone(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    (done,) = run(1, tiny_model_dir, folder, nll_weight=0.5)
    assert done[0] == 0, done[2]
    return folder


def test_two_processes_train_as_one(tmp_path: Path, tiny_model_dir: Path, alone: Path, record_property: Any) -> None:
    """11 pairs in steps of 5: the last of an epoch has one pair, one process none; the NLL's mean is over all."""
    first, second = run(2, tiny_model_dir, tmp_path, nll_weight=0.5)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "step 5/5" in first[1] and second[1] == ""
    record_property("weights apart", apart(tmp_path, alone))
    assert apart(tmp_path, alone) < 1e-6
    ours, theirs = rows_of(tmp_path), rows_of(alone)
    assert [row["step"] for row in ours] == [1, 2, 3, 4, 5] and abs(ours[0]["margin"]) < 1e-6
    for mine, its in zip(ours, theirs, strict=True):
        assert mine.keys() == its.keys() and mine["tokens"] == its["tokens"]
        for name in set(mine) - {"seconds"}:
            assert mine[name] == pytest.approx(its[name], abs=1e-5), name
    files = {file.name for file in (tmp_path / "run" / "checkpoint-4").iterdir()}
    assert {"rng_state_0.pth", "rng_state_1.pth", "files.json", "optimizer.pt"} <= files
    assert len(list((tmp_path / "reference").iterdir())) == 2  # training and held-out pairs, written by one
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_after_the_same_step_and_the_resumed_run_equals_unbroken(
    tmp_path: Path, tiny_model_dir: Path, alone: Path
) -> None:
    stopped = run(2, tiny_model_dir, tmp_path, nll_weight=0.5, kill_at=2)
    assert all(code != 0 and "Interrupted" in said for code, _, said in stopped)
    assert (tmp_path / "run" / "checkpoint-3").is_dir() and not (tmp_path / "run" / "final").exists()
    first, second = run(2, tiny_model_dir, tmp_path, nll_weight=0.5)
    assert first[0] == second[0] == 0, first[2] + second[2]
    assert "resuming from" in first[1] and second[1] == ""
    assert apart(tmp_path, alone) < 1e-6


@pytest.mark.parametrize("name", ["ddp", "fsdp_qlora"])
def test_the_shipped_configurations_are_accelerates_own(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "cai_experiment" / "training" / "accelerate" / f"{name}.yaml"))
    assert config.num_processes == 2 and not config.use_cpu
    if name == "fsdp_qlora":
        assert config.fsdp_config["fsdp_use_orig_params"] is False  # type: ignore[attr-defined]


def test_fast_refuses_sharded_weights_and_unsloth_several_processes(
    tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from cai_experiment.errors import BadInputError
    from cai_experiment.training.backends import backend_of
    from cai_experiment.training.settings import DPOSettings

    settings = DPOSettings((), tmp_path, steps=1, backend="unsloth")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInputError, match="trains in one process"):
        backend_of(settings, SimpleNamespace(for_training=None))  # type: ignore[arg-type]
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(BadInputError, match="does not train sharded weights"):
        train(tiny_model_dir, tmp_path, {})
