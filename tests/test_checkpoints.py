"""Checkpoints: whole or not there, every later damage found, the newest whole one used, nothing lost to kill -9."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest

from cai_experiment.errors import BadInputError, DiskError
from cai_experiment.training import checkpoints

FILES = {name: f"content of {name} ".encode() * 20 for name in checkpoints.TRAINING_FILES}


def write(folder: Path, step: int) -> Path:
    """Publish a checkpoint of made-up files."""
    aside = folder / f"checkpoint-{step}.tmp"
    aside.mkdir(parents=True)
    for name, content in FILES.items():
        (aside / name).write_bytes(content + str(step).encode())
    final = folder / f"checkpoint-{step}"
    checkpoints.publish(aside, final)
    return final


def test_a_published_checkpoint_verifies_and_leaves_nothing_aside(tmp_path: Path) -> None:
    final = write(tmp_path, 3)
    checkpoints.verify(final)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    assert checkpoints.step_of(final) == 3


@pytest.mark.parametrize("name", [*checkpoints.TRAINING_FILES, checkpoints.MANIFEST])
def test_any_flipped_byte_is_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 3) / name
    whole = path.read_bytes()
    for place in range(0, len(whole), 1 if name == checkpoints.MANIFEST else 50):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(checkpoints.Damaged):
            checkpoints.verify(path.parent)
    path.write_bytes(whole)
    checkpoints.verify(path.parent)


@pytest.mark.parametrize("name", [*checkpoints.TRAINING_FILES, checkpoints.MANIFEST])
def test_a_missing_or_shortened_file_is_found_and_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, 3) / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(checkpoints.Damaged, match=name):
        checkpoints.verify(path.parent)
    path.unlink()
    with pytest.raises(checkpoints.Damaged, match=f"{name} is missing"):
        checkpoints.verify(path.parent)


def test_a_checkpoint_published_without_its_optimizer_counts_as_damaged(tmp_path: Path) -> None:
    aside = tmp_path / "checkpoint-1.tmp"
    aside.mkdir()
    for name in FILES:
        if name != "optimizer.pt":
            (aside / name).write_bytes(b"x")
    checkpoints.publish(aside, tmp_path / "checkpoint-1")
    with pytest.raises(checkpoints.Damaged, match=r"optimizer\.pt is missing"):
        checkpoints.verify(tmp_path / "checkpoint-1")


def test_the_newest_whole_one_is_used_and_the_skipped_are_named(tmp_path: Path) -> None:
    for step in (2, 9, 10):  # 10 is newer than 9, though not by alphabet
        write(tmp_path, step)
    assert checkpoints.newest_whole(tmp_path) == (tmp_path / "checkpoint-10", [])
    (tmp_path / "checkpoint-10" / "rng_state.pth").unlink()
    found, skipped = checkpoints.newest_whole(tmp_path)
    assert found == tmp_path / "checkpoint-9"
    assert len(skipped) == 1 and "checkpoint-10" in skipped[0] and "rng_state.pth is missing" in skipped[0]
    assert checkpoints.newest_whole(tmp_path / "nowhere") == (None, [])


def test_a_damaged_checkpoint_named_by_path_is_bad_input(tmp_path: Path) -> None:
    final = write(tmp_path, 3)
    assert checkpoints.named(final) == final
    (final / "optimizer.pt").write_bytes(b"other")
    with pytest.raises(BadInputError, match=r"checkpoint-3 is damaged: optimizer\.pt") as caught:
        checkpoints.named(final)
    assert caught.value.exit_code == 2
    with pytest.raises(BadInputError, match="no such checkpoint folder"):
        checkpoints.named(tmp_path / "checkpoint-4")
    with pytest.raises(BadInputError, match="not a folder named checkpoint-<step>"):
        checkpoints.step_of(tmp_path)


def test_retention_sweeping_and_setting_aside(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    checkpoints.keep_newest(tmp_path, keep=2, best=2)  # the best stays, whatever its age
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    checkpoints.keep_newest(tmp_path, keep=2, best=4)
    for name in ("checkpoint-5.tmp", "final.tmp", "notes.tmp"):
        (tmp_path / name).mkdir()
    checkpoints.sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-3", "checkpoint-4", "notes.tmp"]
    (tmp_path / "notes.tmp").rmdir()
    said: list[str] = []
    checkpoints.set_aside_newer(tmp_path, 3, said.append)
    write(tmp_path, 4)
    checkpoints.set_aside_newer(tmp_path, 3, said.append)
    names = ["checkpoint-3", "checkpoint-4.unused", "checkpoint-4.unused-"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert len(said) == 2


def test_a_disk_too_small_is_refused_before_writing(tmp_path: Path) -> None:
    checkpoints.check_space(tmp_path, 1)
    with pytest.raises(DiskError, match="a checkpoint needs") as caught:
        checkpoints.check_space(tmp_path, shutil.disk_usage(tmp_path).total + 2**40)
    assert caught.value.exit_code == 1


def in_child(work) -> int:
    """Run `work()` in a forked child; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(9)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_a_write_that_fails_is_one_disk_error_and_the_older_checkpoint_stays_whole(tmp_path: Path) -> None:
    write(tmp_path, 1)

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # no file may grow beyond 1,000 bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(DiskError, match=r"checkpoint-2 could not be written.*free space"), \
                checkpoints.disk_errors(tmp_path / "checkpoint-2"):
            (tmp_path / "checkpoint-2.tmp").mkdir()
            (tmp_path / "checkpoint-2.tmp" / "optimizer.pt").write_bytes(b"x" * 5000)

    assert in_child(fill) == 0
    checkpoints.sweep(tmp_path)
    assert checkpoints.newest_whole(tmp_path) == (tmp_path / "checkpoint-1", [])


def test_kill_9_anywhere_in_a_write_leaves_old_or_new(tmp_path: Path) -> None:
    write(tmp_path, 1)
    outcomes = set()
    for moment in range(1, 40):
        calls = 0

        def counted(work, moment=moment):
            def run(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return work(*args, **kwargs)

            return run

        def publish() -> None:
            checkpoints._fsync = counted(checkpoints._fsync)
            checkpoints._sha256 = counted(checkpoints._sha256)
            checkpoints._manifest_text = counted(checkpoints._manifest_text)
            os.rename = counted(os.rename)
            write(tmp_path, 2)

        status = in_child(publish)
        found, skipped = checkpoints.newest_whole(tmp_path)
        assert found is not None and not skipped
        outcomes.add((os.WIFSIGNALED(status), found.name))
        checkpoints.sweep(tmp_path)
        shutil.rmtree(tmp_path / "checkpoint-2", ignore_errors=True)
        if status == 0:
            break
    assert outcomes == {(True, "checkpoint-1"), (True, "checkpoint-2"), (False, "checkpoint-2")}
