"""Training stops and resumes: limits, signals, kill -9, damage; the end is that of an unbroken run, to the bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import training_tools as tools
from training_tools import BACKENDS, LONG, PAIRS, difference, load, settings_for, stop_after, train, weights

from cai_experiment.errors import BadInputError, DiskError, Interrupted
from cai_experiment.training import checkpoints, dpo
from cai_experiment.training.data import tokenize_pairs
from cai_experiment.training.settings import TrainResult


@pytest.fixture(scope="module")
def unbroken(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TrainResult]:
    """The result of LONG without a break, by backend."""
    found: dict[str, TrainResult] = {}

    def of(backend: str) -> TrainResult:
        if backend not in found:
            folder = tmp_path_factory.mktemp(f"unbroken_{backend}")
            found[backend] = train(settings_for(folder, **LONG, backend=backend), *load(tiny_model_dir))
        return found[backend]

    return of


def off(folder: Path, whole: TrainResult) -> float:
    """How far the final weights in `folder` are from those of an unbroken run."""
    return difference(weights(folder), weights(whole.adapter_dir.parent))


# ---------------------------------------------------------------- limits and signals


@pytest.mark.parametrize("backend", BACKENDS)
def test_stopped_by_a_limit_after_every_step_and_resumed_equals_unbroken(
    tmp_path: Path, tiny_model_dir: Path, unbroken: Callable[[str], TrainResult], backend: str
) -> None:
    said: list[str] = []
    for step in range(1, 4):
        began = time.monotonic() - 4000  # of the script: what it downloaded and loaded counts as well
        limit = {"max_hours": 1.0, "started": began} if step % 2 else {"max_cost": 0.0, "price_per_hour": 1.74}
        result = train(settings_for(tmp_path, **LONG, **limit, backend=backend), *load(tiny_model_dir), said)
        assert result.stopped == ("--max-hours 1" if step % 2 else "--max-cost 0") and result.steps == step
        checkpoints.verify(result.adapter_dir)
    result = train(settings_for(tmp_path, **LONG, backend=backend), *load(tiny_model_dir), said)
    whole = unbroken(backend)
    assert not result.stopped and sum("resuming from" in line for line in said) == 3
    assert off(tmp_path, whole) == 0.0
    assert [row["loss"] for row in result.history] == [row["loss"] for row in whole.history]
    assert result.loss_after == whole.loss_after


@pytest.mark.parametrize(
    ("number", "backend"),
    [(signal.SIGTERM, "fast"), (signal.SIGTERM, "trl"), (signal.SIGINT, "fast"), (signal.SIGHUP, "fast")],
)
def test_a_stop_signal_saves_the_current_step_and_ends_with_its_exit_code(
    tmp_path: Path, tiny_model_dir: Path, unbroken: Callable[[str], TrainResult], monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals, backend: str,
) -> None:  # fmt: skip
    from cai_experiment.training.watch import Watch

    begin = Watch.on_step_begin

    def signalled(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Watch, "on_step_begin", signalled)
        with pytest.raises(Interrupted) as caught:
            train(settings_for(tmp_path, **LONG, backend=backend), *load(tiny_model_dir))
    assert caught.value.exit_code == 128 + number and signal.getsignal(number) == before
    newest, skipped = checkpoints.newest_whole(tmp_path)
    assert newest == tmp_path / "checkpoint-3" and not skipped
    train(settings_for(tmp_path, **LONG, backend=backend), *load(tiny_model_dir))
    assert off(tmp_path, unbroken(backend)) == 0.0


# ---------------------------------------------------------------- kill -9


def killed_training(model_dir: str, folder: str, settings: dict[str, Any], moment: int, torn: bool, only: str) -> None:
    """Child process: train, and kill -9 itself at its `moment`-th call among those counted (0: never).

    `only` says which calls count: "step" the beginnings of steps, "write" those of a checkpoint's writing (files,
    flushes, hashes, renames, deletions), "" both. `torn` dies after the call, with the file it wrote cut to half.
    """
    import safetensors.torch
    import torch

    from cai_experiment.training.watch import Watch

    torch.set_num_threads(1)
    calls = 0

    def counted(work: Any, kind: str, place: int | None = None) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += kind in (only or kind)
            dies = calls == moment and kind in (only or kind)
            if dies and not torn:
                os.kill(os.getpid(), signal.SIGKILL)
            found = work(*args, **kwargs)
            if dies:
                if place is not None:
                    os.truncate(args[place], os.path.getsize(args[place]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return found

        return run

    save = safetensors.torch.save_file
    checkpoints._fsync = counted(checkpoints._fsync, "write")
    checkpoints._sha256 = counted(checkpoints._sha256, "write")
    checkpoints._manifest_text = counted(checkpoints._manifest_text, "write")
    os.rename, os.rmdir = counted(os.rename, "write"), counted(os.rmdir, "write")
    torch.save = counted(torch.save, "write", 1)
    for module in ("peft.peft_model", "peft.utils.save_and_load", "safetensors.torch"):
        loaded = __import__(module, fromlist=["x"])
        for name in ("save_file", "safe_save_file"):
            if getattr(loaded, name, None) is save:
                setattr(loaded, name, counted(save, "write", 1))
    Watch.on_step_begin = counted(Watch.on_step_begin, "step")
    train(settings_for(Path(folder), **settings), *load(Path(model_dir)))


@pytest.fixture(scope="module")
def forker() -> Any:
    """A clean parent that has imported everything and forks a child in a moment; it never ran torch itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["training_tools", "cai_experiment.training.run", "cai_experiment.training.fast_dpo", "trl",
         "trl.trainer.dpo_trainer", "peft", "transformers.models.qwen2.modeling_qwen2"]
    )  # fmt: skip
    return context


def run_child(
    forker: Any, model_dir: Path, folder: Path, settings: dict[str, Any], moment: int = 0, torn: bool = False,
    only: str = "",
) -> int | None:  # fmt: skip
    child = forker.Process(target=killed_training, args=(str(model_dir), str(folder), settings, moment, torn, only))
    child.start()
    child.join()
    return child.exitcode


KILLED = -signal.SIGKILL
TWELVE = {**LONG, "steps": 12, "save_every": 3}  # four checkpoints, two of which `keep` deletes


@pytest.mark.parametrize("backend", BACKENDS)
def test_kill_9_in_steps_and_inside_writes_then_resumed_equals_unbroken(
    tmp_path: Path, tiny_model_dir: Path, unbroken: Callable[[str], TrainResult], forker: Any, backend: str
) -> None:
    """One run, killed at a step, in a write, in the middle of a file and in a deletion, one after the other."""
    settings = {**LONG, "backend": backend}
    for moment, torn, only in ((2, False, "step"), (3, True, "write"), (25, False, "write"), (47, True, "write")):
        assert run_child(forker, tiny_model_dir, tmp_path, settings, moment, torn, only) == KILLED
    assert run_child(forker, tiny_model_dir, tmp_path, settings) == 0
    whole = unbroken(backend)
    assert off(tmp_path, whole) == 0.0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole.history]
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_killed_at_every_step_of_twelve_and_at_fifty_points_inside_checkpoint_writes(
    tmp_path: Path, tiny_model_dir: Path, forker: Any, backend: str, record_property: Any
) -> None:
    """Each from a fresh start, resumed to the end, and held against the unbroken run."""
    settings = {**TWELVE, "backend": backend}
    assert run_child(forker, tiny_model_dir, tmp_path / "whole", settings) == 0
    expected, outcomes = weights(tmp_path / "whole"), {}
    steps = [(moment, False, "step") for moment in range(1, 13)]
    writes = [(moment, torn, "write") for moment in range(1, 120, 5) for torn in (False, True)]
    for case in (*steps, *writes, (124, False, "write"), (127, True, "write")):
        folder = tmp_path / "-".join(map(str, case))
        assert run_child(forker, tiny_model_dir, folder, settings, *case) == KILLED, case
        assert run_child(forker, tiny_model_dir, folder, settings) == 0, case
        outcomes[case] = difference(weights(folder), expected)
        assert not list(folder.glob("*.tmp"))
        shutil.rmtree(folder)
    assert len(steps) == 12 and len(outcomes) - 12 == 50
    assert set(outcomes.values()) == {0.0}, outcomes
    record_property("cases", len(outcomes))


# ---------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def three_steps(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training stopped after step 3, with the checkpoints of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("three_steps")
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3)
        train(settings_for(folder, **LONG), *load(tiny_model_dir))
    return folder


def flip(path: Path, place: int) -> bytes:
    """Flip a bit of one byte of a file; what was in it before."""
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    return whole


def test_any_flipped_byte_and_any_missing_file_of_a_real_checkpoint_is_named_and_the_one_before_used(
    tmp_path: Path, three_steps: Path
) -> None:
    """Every file, and in each its first, last, and two bytes in between."""
    shutil.copytree(three_steps, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoint-3"
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {*checkpoints.TRAINING_FILES, checkpoints.MANIFEST, "tokenizer.json"}

    def is_found(path: Path) -> None:
        found, skipped = checkpoints.newest_whole(tmp_path)
        assert found == tmp_path / "checkpoint-2"
        assert len(skipped) == 1 and "checkpoint-3" in skipped[0] and path.name in skipped[0]

    for path in files:
        size = path.stat().st_size
        for place in (0, size // 3, size // 2, size - 1):
            whole = flip(path, place)
            is_found(path)
            path.write_bytes(whole)
        path.rename(tmp_path / "aside")
        is_found(path)
        (tmp_path / "aside").rename(path)
    assert checkpoints.newest_whole(tmp_path) == (newest, [])


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_newest_checkpoint_is_said_and_the_resumed_run_still_equals_unbroken(
    tmp_path: Path, tiny_model_dir: Path, three_steps: Path, unbroken: Callable[[str], TrainResult], file: str
) -> None:
    shutil.copytree(three_steps, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-3" / file
    if file == "rng_state.pth":
        path.unlink()
    else:
        flip(path, path.stat().st_size - 9)
    with pytest.raises(BadInputError, match=f"checkpoint-3 is damaged: {file}"):
        train(settings_for(tmp_path, **LONG, resume=tmp_path / "checkpoint-3"), *load(tiny_model_dir))
    said: list[str] = []
    train(settings_for(tmp_path, **LONG), *load(tiny_model_dir), said)
    assert any("skipped" in line and "checkpoint-3" in line and file in line for line in said)
    assert any(line.startswith("resuming from") and line.endswith("checkpoint-2") for line in said)
    assert off(tmp_path, unbroken("fast")) == 0.0


# ---------------------------------------------------------------- room on the disk, settings, the end


def test_a_disk_without_room_for_a_checkpoint_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_model_dir: Path, three_steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(three_steps, tmp_path, dirs_exist_ok=True)
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
        with pytest.raises(DiskError, match=r"a checkpoint needs 0\.0\d GB, 0\.00 GB are free"):
            train(settings_for(tmp_path, **LONG), *load(tiny_model_dir))
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert checkpoints.newest_whole(tmp_path) == (tmp_path / "checkpoint-3", [])


def test_changed_settings_stop_with_the_difference(tmp_path: Path, three_steps: Path, tiny_model_dir: Path) -> None:
    shutil.copytree(three_steps, tmp_path, dirs_exist_ok=True)
    with pytest.raises(BadInputError, match=r"other settings: beta 0\.1 -> 0\.2.*--fresh"):
        train(settings_for(tmp_path, **LONG, beta=0.2), *load(tiny_model_dir))
    with pytest.raises(BadInputError, match="other settings: early_stop None -> 2"):
        train(settings_for(tmp_path, **LONG, early_stop=2, held_out=PAIRS[:1]), *load(tiny_model_dir))


def test_a_finished_training_is_loaded_and_a_damaged_end_is_made_again(tmp_path: Path, tiny_model_dir: Path) -> None:
    first = train(settings_for(tmp_path), *load(tiny_model_dir))
    said: list[str] = []
    again = train(settings_for(tmp_path), *load(tiny_model_dir), said)
    assert not said and again.to_json() == {**first.to_json(), "resumed_from": 3} and again.history == first.history
    logps = [answer_logp(result.model, load(tiny_model_dir)[1]) for result in (first, again)]
    assert logps[0] == logps[1]
    kept = weights(tmp_path)
    path = tmp_path / "final" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInputError, match="damaged"):
        dpo.load_adapter(load(tiny_model_dir)[0], tmp_path / "final")
    train(settings_for(tmp_path), *load(tiny_model_dir), said)
    assert any("moved to final.bad" in line for line in said)
    assert difference(weights(tmp_path), kept) == 0.0


def answer_logp(model: Any, tokenizer: Any) -> float:
    """Sum of the first pair's chosen answer's log-probabilities in a plain forward pass."""
    import torch

    row = tokenize_pairs(PAIRS[:1], tools.renderer_of(tokenizer), 2048)[0][0]
    ids = torch.tensor([[*row.prompt_ids, *row.chosen_ids]])
    with torch.no_grad():
        logps = model(ids).logits[0, len(row.prompt_ids) - 1 : -1].log_softmax(-1)
    return float(logps.gather(1, ids[0, len(row.prompt_ids) :, None]).sum())
