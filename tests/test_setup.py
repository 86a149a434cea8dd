"""setup_runpod.sh and doctor.py: what they refuse, what they install, and that a second run installs nothing.

The script runs for real on a copy of the checkout; pip, nvidia-smi and df are small stand-ins that log their calls.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cai_experiment.models import hardware
from cai_experiment.scripts import doctor
from tests.conftest import pytest_xdist_auto_num_workers

ROOT = Path(__file__).resolve().parents[1]
GPU_TABLE = "| NVIDIA-SMI 999.1   Driver Version: 999.1   CUDA Version: {cuda} |"


def program(path: Path, text: str) -> None:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def fake_gpu(folder: Path, cuda: str, name: str = "NVIDIA A100-SXM4-80GB", mebibytes: int = 81920) -> None:
    """An nvidia-smi that answers as one with this GPU and this driver would."""
    program(
        folder / "nvidia-smi",
        f'case "$*" in\n-L) echo "GPU 0: {name} (UUID: GPU-1)" ;;\n'
        f'*memory.total*) echo "{name}, {mebibytes}" ;;\n*driver_version*) echo 999.1 ;;\n'
        f"*) echo '{GPU_TABLE.format(cuda=cuda)}' ;;\nesac",
    )


class Checkout:
    """A copy of the files that set-up needs, in `root`, with its own folder of programs first on PATH."""

    def __init__(self, folder: Path) -> None:
        self.root, self.programs, self.workspace = folder / "repo", folder / "programs", folder / "workspace"
        for name in ("cai_experiment/models", "cai_experiment/scripts"):
            shutil.copytree(ROOT / name, self.root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("__init__.py", "errors.py", "milestones.py"):
            shutil.copy(ROOT / "cai_experiment" / name, self.root / "cai_experiment" / name)
        for name in ("requirements.txt", "requirements-cpu.txt"):
            shutil.copy(ROOT / name, self.root / name)
        script = (ROOT / "setup_runpod.sh").read_text(encoding="utf-8")
        (self.root / "setup_runpod.sh").write_text(script.replace("/workspace", str(self.workspace)))
        weights = self.root / "cai_experiment/nano/weights/nano/model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.touch()
        self.programs.mkdir()

    def fake_environment(self) -> None:
        """A .venv whose pip only writes down what it was asked to install."""
        program(
            self.root / ".venv/bin/python",
            f'if [ "$1" = -m ] && [ "$2" = pip ]; then shift 2; echo "$@" >> "{self.root}/pip.log"; exit 0; fi\n'
            f'exec "{sys.executable}" "$@"',
        )
        (self.root / ".venv/bin/activate").touch()

    def setup(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run setup_runpod.sh from another folder."""
        base = {k: v for k, v in os.environ.items() if k not in ("RUNPOD_POD_ID", "HF_HOME", "CUDA_VISIBLE_DEVICES")}
        env = {**base, "PATH": f"{self.programs}:{os.environ['PATH']}", **environment}
        script = ["bash", str(self.root / "setup_runpod.sh")]
        return subprocess.run(script, cwd="/", env=env, capture_output=True, text=True, timeout=120)

    @property
    def installs(self) -> list[str]:
        """What pip was asked to install, in order."""
        log = self.root / "pip.log"
        return re.findall(r"install --quiet (.*)", log.read_text()) if log.is_file() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    """A copy without GPU: an nvidia-smi that fails, as in a container without one."""
    copy = Checkout(tmp_path)
    program(copy.programs / "nvidia-smi", "exit 9")
    return copy


def test_cpu_installs_torch_first_and_a_second_run_installs_nothing(checkout: Checkout) -> None:
    checkout.fake_environment()
    first = checkout.setup()
    assert checkout.installs == ["torch==2.13.0", "-r requirements-cpu.txt"], first.stderr
    assert "needs 4 GB of disk" in first.stdout
    second = checkout.setup()
    assert len(checkout.installs) == 2
    assert "installing" not in second.stdout
    assert "Python" in second.stdout  # it still ends with the check
    assert second.returncode == first.returncode


def test_changed_pins_are_installed(checkout: Checkout) -> None:
    checkout.fake_environment()
    checkout.setup()
    with (checkout.root / "requirements-cpu.txt").open("a") as file:
        file.write("# changed\n")
    checkout.setup()
    assert len(checkout.installs) == 4


def test_gpu_installs_the_gpu_pins(checkout: Checkout) -> None:
    fake_gpu(checkout.programs, cuda="13.0")
    checkout.fake_environment()
    done = checkout.setup()
    assert checkout.installs == ["-r requirements.txt"], done.stderr
    # Qwen2.5-32B in 4 bit; three checkpoints of its adapter with the optimizer's moments, the final one, 1 GB of data
    assert "needs 51 GB of disk (20 for packages, 19 for 4-bit weights, 12 for a milestone's" in done.stdout


def test_a_pod_too_old_is_named_before_anything_is_installed(checkout: Checkout) -> None:
    fake_gpu(checkout.programs, cuda="12.4")
    done = checkout.setup()
    assert done.returncode == 1
    assert "CUDA 12.4" in done.stderr and "13.0" in done.stderr and "rent a pod" in done.stderr
    assert not (checkout.root / ".venv").exists()


def test_too_little_disk_is_named_before_anything_is_installed(checkout: Checkout) -> None:
    program(checkout.programs / "df", "echo Filesystem\necho x 9 8 1000000 1% /")
    done = checkout.setup()
    assert done.returncode == 1
    assert "1 GB free" in done.stderr and "4 GB needed" in done.stderr
    assert not (checkout.root / ".venv").exists()


def test_other_python_versions_are_refused_with_what_to_do(checkout: Checkout) -> None:
    for name in ("python3.11", "python3.12", "python3", "python"):
        program(checkout.programs / name, '[ "$1" = -V ] && echo "Python 3.10.4"\nexit 1')
    done = checkout.setup()
    assert done.returncode == 2
    assert "no Python 3.11 or 3.12" in done.stderr and "3.10.4" in done.stderr and "apt-get install" in done.stderr


def test_an_environment_of_another_python_is_refused_and_kept(checkout: Checkout) -> None:
    program(checkout.root / ".venv/bin/python", 'case "$2" in "") exit 0 ;; esac\nexit 1')
    done = checkout.setup()
    assert done.returncode == 2
    assert "remove .venv" in done.stderr
    assert (checkout.root / ".venv/bin/python").exists()


def test_on_a_pod_downloads_go_to_the_volume(checkout: Checkout) -> None:
    checkout.fake_environment()
    checkout.workspace.mkdir()
    done = checkout.setup(RUNPOD_POD_ID="abc")
    checkout.setup(RUNPOD_POD_ID="abc")
    activate = (checkout.root / ".venv/bin/activate").read_text()
    assert activate.count(f'export HF_HOME="{checkout.workspace}/huggingface"') == 1
    assert "is lost when the pod stops" in done.stdout  # the copy lies outside the volume
    assert f"${{HF_HOME:-{hardware.POD_HF_HOME}}}" in (ROOT / "setup_runpod.sh").read_text(encoding="utf-8")


def test_scripts_started_with_the_systems_python_use_the_environment(checkout: Checkout) -> None:
    program(checkout.root / ".venv/bin/python", 'echo "again: $*"')
    script = checkout.root / "cai_experiment/scripts/doctor.py"
    system = Path(sys.base_prefix) / "bin" / "python3"
    env = {k: v for k, v in os.environ.items() if k not in ("CONDA_PREFIX", "VIRTUAL_ENV")}
    done = subprocess.run([str(system), str(script), "--seed", "3"], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == f"again: {script} --seed 3"


def test_pins_are_one_set_and_the_gpu_adds_lower_bounds() -> None:
    gpu, cpu = dict(doctor.pins(ROOT / "requirements.txt")), dict(doctor.pins(ROOT / "requirements-cpu.txt"))
    assert cpu.items() <= gpu.items()
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    for bound in ("unsloth==2026.10.7,>=2026.10", "vllm==0.32.0,>=0.30"):
        assert bound in text


def test_ci_runs_the_readme_command() -> None:
    command = "bash setup_runpod.sh && .venv/bin/python -m pytest"
    assert command in (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci/run", os.X_OK)


@pytest.mark.parametrize(
    ("change", "workers"),
    [
        ({}, 2), ({"cores": 64}, 8), ({"cores": 64, "ram_gb": 13.0}, 4), ({"cores": 1}, 0), ({"kind": "cuda"}, 0),
        ({"args": ["tests/test_setup.py::test_x"]}, 0), ({"keyword": "x"}, 0), ({"markexpr": "gpu"}, 0),
        ({"lf": True}, 0), ({"capture": "no"}, 0),
    ],
)  # fmt: skip
def test_the_whole_suite_takes_the_cores_and_single_tests_this_process(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], workers: int
) -> None:
    given = {"args": ["tests"], "keyword": "", "markexpr": "not slow and not gpu", "lf": False, "collectonly": False,
             "capture": "fd", "kind": "cpu", "cores": 2, "ram_gb": 64.0} | change  # fmt: skip
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(hardware, "detect", lambda: SimpleNamespace(**given))
    config: Any = SimpleNamespace(option=SimpleNamespace(**given), args=given["args"])
    assert pytest_xdist_auto_num_workers(config) == workers


def test_doctor_names_another_version_and_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"numpy": "1.0", "trl": None}
    real = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: versions[name] if name in versions else real(name))
    rows = list(doctor.version_rows(hardware.PROFILES["cpu"]))
    assert [row.state for row in rows] == [doctor.FAIL, doctor.WARN]
    assert "trl" in rows[0].value and "numpy 1.0 (pinned 2.3.5)" in rows[1].value


def test_doctor_never_shows_the_token(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert doctor.token_row().value.startswith("absent")
    monkeypatch.setenv("HF_TOKEN", "hf_secretvalue")
    assert doctor.token_row().value == "present"


def test_doctor_fails_without_the_weights_it_would_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    choice = doctor.resolve_model("nano", hardware.PROFILES["cpu"])
    monkeypatch.setattr(doctor, "NANO_DIR", tmp_path)
    missing = choice.__class__(choice.name, str(tmp_path), choice.preset, choice.kind, choice.reason)
    assert [row.state for row in doctor.model_rows(missing, hardware.PROFILES["cpu"])] == [doctor.OK, doctor.FAIL]
