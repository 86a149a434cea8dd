"""download_models.py against a real local server that speaks the hub's API; the cache is a folder of the test's."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from cai_experiment.models.downloads import needed
from tests.conftest import ROOT
from tests.hub_server import COMMIT, Hub, blob

SCRIPT = ROOT / "cai_experiment" / "scripts" / "download_models.py"
WEIGHTS = bytes(range(256)) * 4000
QWEN = {"config.json": b"{}", "tokenizer.json": b"{} ", "model.safetensors": WEIGHTS, "pytorch_model.bin": b"no",
        "onnx/model.safetensors": b"no", "consolidated.safetensors": b"no", "README.md": b"no"}  # fmt: skip
PHI = {"config.json": b"{}", "model-1.safetensors": WEIGHTS[::-1], "model-2.safetensors": WEIGHTS[:20_000],
       "model.safetensors.index.json":
           b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}'}  # fmt: skip
REPOSITORIES = {"Qwen/Qwen2-1.5B-Instruct": QWEN, "microsoft/phi-2": PHI}
FOUR_BIT = "unsloth/Qwen2-1.5B-Instruct-bnb-4bit"


def environment(home: Path, url: str, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**kept, "HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", **more}  # fmt: skip


def run(home: Path, url: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60,
                          env=environment(home, url, **more))  # fmt: skip


def largest_half(blobs: Path) -> int:
    """Bytes of the largest piece of a download; small files beside it end, and their pieces go, while one looks."""
    sizes = [0]
    for half in blobs.glob("*.incomplete"):
        with suppress(FileNotFoundError):
            sizes.append(half.stat().st_size)
    return max(sizes)


def cached(home: Path, hub_id: str) -> Path:
    return home / "hub" / f"models--{hub_id.replace('/', '--')}"


def test_without_arguments_the_two_models_with_the_files_that_loading_takes_and_nothing_twice(tmp_path: Path) -> None:
    with Hub(REPOSITORIES) as hub:
        done = run(tmp_path, hub.url)
        assert done.returncode == 0, done.stderr
        assert COMMIT in done.stdout and "1.02 to fetch" not in done.stdout and "whole" in done.stdout
        qwen = cached(tmp_path, "Qwen/Qwen2-1.5B-Instruct") / "snapshots" / COMMIT
        assert {f.name for f in qwen.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors"}
        assert len(list((cached(tmp_path, "microsoft/phi-2") / "snapshots" / COMMIT).iterdir())) == 4
        gets = [path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path]
        assert len(gets) == 7
        again = run(tmp_path, hub.url)
        assert again.returncode == 0 and "0.00 to fetch" in again.stdout
        assert len([1 for m, p, _ in hub.requests if m == "GET" and "/resolve/" in p]) == 7
        listed = run(tmp_path, hub.url, "--list", COLUMNS="160").stdout
        assert "whole" in listed and "phi-2" in listed and "at hand" in listed and "Qwen/Qwen2.5-32B" in listed
        narrow = run(tmp_path, hub.url, "--list", COLUMNS="80").stdout
        assert len(narrow.splitlines()) <= len(listed.splitlines()) + 2 and "Qwen/Qwen2.5-32B" not in narrow
    assert run(tmp_path, hub.url, "--verify").returncode == 0  # needs no network


def test_verify_names_what_is_damaged_or_half_and_the_command_that_repairs(tmp_path: Path) -> None:
    with Hub(REPOSITORIES) as hub:
        assert run(tmp_path, hub.url, "phi-2").returncode == 0
        blobs = cached(tmp_path, "microsoft/phi-2") / "blobs"
        whole = blobs / blob(WEIGHTS[::-1])
        whole.write_bytes(b"x" + whole.read_bytes()[1:])
        (blobs / f"{'0' * 64}.12345678.incomplete").write_bytes(b"half")
        done = run(tmp_path, hub.url, "--verify", "phi-2")
        assert done.returncode == 1
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 2 and all("download_models.py microsoft/phi-2" in line for line in lines)
        assert "did not finish" in lines[0] and "is damaged" in lines[1]
        repaired = run(tmp_path, hub.url, "microsoft/phi-2", "--repair")
        assert repaired.returncode == 0 and "model-1.safetensors is damaged" in repaired.stderr, repaired.stderr
        assert run(tmp_path, hub.url, "--verify", "phi-2").returncode == 0
        assert not list(blobs.glob("*.incomplete"))


@pytest.mark.parametrize("number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_what_broke_off_is_kept_and_the_same_command_goes_on_in_the_middle_of_a_file(
    tmp_path: Path, number: signal.Signals
) -> None:
    large = WEIGHTS * 20  # huggingface_hub writes pieces of 10 MB
    with Hub({"Qwen/Qwen2-1.5B-Instruct": {**QWEN, "model.safetensors": large}}, cut=15_000_000) as hub:
        started = subprocess.Popen([sys.executable, str(SCRIPT), "qwen2-1.5b-instruct"], stderr=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, env=environment(tmp_path, hub.url))  # fmt: skip
        assert hub.hanging.wait(30)
        blobs = cached(tmp_path, "Qwen/Qwen2-1.5B-Instruct") / "blobs"
        while largest_half(blobs) < 10_000_000:
            assert started.poll() is None
        started.send_signal(number)
        _, said = started.communicate(timeout=30)
        if number == signal.SIGINT:
            assert started.returncode == 130 and "the same command resumes" in said
        hub.cut = 0
        have = largest_half(blobs)
        done = run(tmp_path, hub.url, "qwen2-1.5b-instruct")
        assert done.returncode == 0, done.stderr
        place = f"/Qwen/Qwen2-1.5B-Instruct/resolve/{COMMIT}/model.safetensors"
        assert ("GET", place, f"bytes={have}-") in hub.requests
        assert (blobs / blob(large)).read_bytes() == large and not list(blobs.glob("*.incomplete"))


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["phi-3"], 2, "unknown preset; nearest: phi"),
        (["--roles", "duel"], 2, "nearest: dual"),
        (["google/gemma-2-2b-it"], 1, "is gated, and this machine has no access to it; accept its licence"),
        (["nobody/nothing"], 2, "the hub has no such model"),
    ],
)
def test_each_fault_is_one_line(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    with Hub(REPOSITORIES, gated=("google/gemma-2-2b-it",)) as hub:
        done = run(tmp_path, hub.url, *arguments)
    assert done.returncode == code and says in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_no_network_and_offline_are_one_line_with_what_is_missing(tmp_path: Path) -> None:
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = run(tmp_path, "http://127.0.0.1:9", "phi-2", **more)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
        step = "unset HF_HUB_OFFLINE" if more else "connect to the internet"
        words = f"the hub cannot be reached, and nothing of it is here; {step}, then run the same command"
        assert words in done.stderr and "local folder" not in done.stderr


def test_what_is_whole_here_needs_no_network(tmp_path: Path) -> None:
    with Hub(REPOSITORIES) as hub:
        assert run(tmp_path, hub.url, "phi-2").returncode == 0
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = run(tmp_path, "http://127.0.0.1:9", "phi-2", **more)
        assert (done.returncode, done.stderr) == (0, "")
        assert "microsoft/phi-2: whole" in done.stdout and "the pinned revision" in done.stdout
    next((cached(tmp_path, "microsoft/phi-2") / "snapshots").glob("*/model-2.safetensors")).unlink()
    lacking = run(tmp_path, "http://127.0.0.1:9", "phi-2")
    assert lacking.returncode == 1 and "and model-2.safetensors is missing; connect" in lacking.stderr


def test_4_bit_files_are_fetched_listed_and_verified_beside_the_models_own(tmp_path: Path) -> None:
    with Hub({**REPOSITORIES, FOUR_BIT: QWEN}) as hub:
        done = run(tmp_path, hub.url, "qwen2-1.5b-instruct", "--quantization", "4bit")
        assert done.returncode == 0, done.stderr
        first, second, *_ = done.stdout.splitlines()
        assert first.startswith("on a GPU milestones 0 and 1 load 4-bit files (1.1 GB: these), 2 and 3 also 16-bit")
        assert f"{FOUR_BIT} (main, not pinned: a run records commit {COMMIT})" in second
        assert "--quantization 4bit), 2 and 3" in run(tmp_path, hub.url, "qwen2-1.5b-instruct", "--repair").stdout
        own = cached(tmp_path, "Qwen/Qwen2-1.5B-Instruct") / "snapshots" / COMMIT
        (own / "model.safetensors").unlink()  # as it was before: the tokenizer alone
    listed = run(tmp_path, hub.url, "--list", "qwen2-1.5b-instruct", COLUMNS="160").stdout
    assert "tokenizer" in listed and "whole, 0.0 GB" in listed
    verified = run(tmp_path, hub.url, "--verify")
    assert verified.returncode == 0, verified.stderr
    assert f"{FOUR_BIT}: whole" in verified.stdout and "its tokenizer alone, whole" in verified.stdout
    blobs = cached(tmp_path, FOUR_BIT) / "blobs"
    (blobs / blob(WEIGHTS)).write_bytes(WEIGHTS[::-1])
    for names in ((), ("qwen2-1.5b-instruct",)):
        damaged = run(tmp_path, hub.url, "--verify", *names)
        assert damaged.returncode == 1 and f"download_models.py {FOUR_BIT} --repair" in damaged.stderr


def test_no_disk_is_said_with_the_figures_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_experiment.errors import DiskError
    from cai_experiment.scripts import _download

    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(_download, "free_gb", lambda place: 1.0)
    remote = _download._Remote(COMMIT, {"model.safetensors": (3_000_000_000, "0" * 64)})
    with pytest.raises(DiskError, match=r"3.0 GB to fetch and 1.0 GB free"):
        _download._check_room(_download.Wanted("phi-2", "microsoft/phi-2", "main"), remote)


def test_files_that_loading_takes() -> None:
    names = [*QWEN, "gemma-2b.gguf", "original/consolidated.00.pth", "tokenizer.model", "model.fp16.safetensors"]
    assert needed(names) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]


def test_verify_of_a_shipped_model_says_so_and_of_one_that_is_not_here_names_the_plain_command(tmp_path: Path) -> None:
    done = run(tmp_path, "http://127.0.0.1:9", "--verify", "nano", "microsoft/phi-2")
    assert done.returncode == 1 and done.stdout == "nano: ships with the lab: whole\n"
    assert "not downloaded; " in done.stderr and done.stderr.endswith("download_models.py microsoft/phi-2\n")
    assert run(tmp_path, "http://127.0.0.1:9", "--verify", "nano").returncode == 0
