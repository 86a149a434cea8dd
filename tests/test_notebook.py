"""The Colab notebook: it runs on the shipped model from top to bottom, names only what exists, and fails visibly."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from cai_experiment.models.presets import PRESETS

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "Phase1_Colab.ipynb"
RUNS = "ROOT / 'cai_experiment' / 'data'"
CHECKPOINTS = "ROOT / 'cai_experiment' / 'checkpoints'"
MODEL = "MODEL_NAME = 'Qwen/Qwen2.5-3B-Instruct'"
PHASE = "PHASE_SCRIPT = 'cai_experiment/scripts/run_investigation.py --condition none'"
SHORT = "--turns 1 --reply-tokens 40"

sys.path.insert(0, str(NOTEBOOK.parent))
import lab  # noqa: E402


@pytest.fixture
def notebook() -> Any:
    """The committed notebook, as nbformat reads it."""
    return nbformat.read(NOTEBOOK, as_version=4)


def sources(notebook: Any, kind: str = "code") -> dict[str, str]:
    """Cell id -> source of the cells of one kind."""
    return {cell.id: cell.source for cell in notebook.cells if cell.cell_type == kind}


def replace(notebook: Any, old: str, new: str) -> None:
    """Change one line of settings, as a person would."""
    cell = next(cell for cell in notebook.cells if cell.cell_type == "code" and old in cell.source)
    cell.source = cell.source.replace(old, new, 1)


def execute(notebook: Any, folder: Path, without: tuple[str, ...] = ()) -> dict[str, str]:
    """Run the cells on the shipped model with runs in `folder`; cell id -> all that it shows, as text."""
    replace(notebook, RUNS, f"Path({str(folder / 'data')!r})")
    replace(notebook, CHECKPOINTS, f"Path({str(folder / 'checkpoints')!r})")
    replace(notebook, MODEL, "MODEL_NAME = 'nano'")
    notebook.cells = [cell for cell in notebook.cells if not cell.id.startswith(without or ("-",))]
    NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return {cell.id: shown(cell) for cell in notebook.cells if cell.cell_type == "code"}


def shown(cell: Any) -> str:
    """Text and HTML of a cell's outputs."""
    data = [output.get("data", {}) for output in cell.outputs]
    streams = [output.get("text", "") for output in cell.outputs]
    return "\n".join([*streams, *(part.get("text/html", part.get("text/plain", "")) for part in data)])


# ---------------------------------------------------------------- as committed


def test_it_is_valid_cleared_and_of_any_machine(notebook: Any) -> None:
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert all(cell.outputs == [] and cell.execution_count is None for cell in notebook.cells if "outputs" in cell)
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert re.findall(r"/(?:home|root|work|workspace|tmp|Users)/", text) == []
    kinds = [cell.cell_type for cell in notebook.cells]
    assert kinds[0] == "markdown" and kinds.count("markdown") >= 9
    assert [name for name, source in sources(notebook).items() if len(source.splitlines()) > 32] == []


def test_it_names_only_files_and_flags_that_exist() -> None:
    text = "\n".join(cell["source"] for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    named = set(re.findall(r"\b(?:cai_experiment|notebooks)/[\w./-]*\w\.\w+\b|setup_runpod\.sh|README\.md", text))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []
    commands = re.findall(r"(cai_experiment/scripts/\w+\.py)([^'\n]*)", text)
    told = re.findall(r"`(--[^`]+)`", text)  # the table: flags of run_investigation.py
    commands += [("cai_experiment/scripts/run_investigation.py", flags) for flags in told]
    for script in sorted({script for script, _ in commands}):
        done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
        flags = {flag for name, rest in commands if name == script for flag in re.findall(r"--[a-z-]+", rest)}
        assert flags - set(re.findall(r"--[a-z-]+", done.stdout)) == set(), script
        choices = {
            value for name, rest in commands if name == script for value in re.findall(r"--condition (\w+)", rest)
        }
        assert all(value in done.stdout for value in choices)


def test_the_7b_figures_are_the_presets(notebook: Any) -> None:
    cell, preset = sources(notebook)["investigate"], PRESETS["qwen2.5-7b"]
    assert f"{preset.architecture.parameters / 1e9:.1f}B parameters" in cell
    command = re.findall(r"(scripts/models\.py --fit [^)]+)\)", cell)[0].split()
    done = subprocess.run([sys.executable, f"cai_experiment/{command[0]}", *command[1:]],
                          cwd=ROOT, capture_output=True, text=True, check=True)  # fmt: skip
    row = next(line.split() for line in done.stdout.splitlines() if line.split()[:1] == [preset.key])
    assert row[1] == "4bit" and f"{row[2]} GB of its 15" in cell
    assert preset.hub_id in cell and PRESETS["qwen2.5-3b"].hub_id in cell


# ---------------------------------------------------------------- run on the shipped model


def test_the_investigation_and_milestone_0_run(
    notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    replace(notebook, PHASE, f"{PHASE[:-1]} {SHORT}'")
    replace(notebook, "else None,", f"else Path({str(tmp_path / 'kept')!r}),")
    monkeypatch.setenv("CAI_MODEL", "no-such-model")  # MODEL_NAME counts in a notebook
    text = execute(notebook, tmp_path, without=("batch", "pairs"))
    assert "machine: local" in text["code"]
    assert "nothing to do" in text["install"]
    assert "nano" in text["fit"] and "DPO" in text["fit"] and "\x1b" not in text["fit"]
    assert "selected model: nano" in text["investigate"] and "AGI_MODEL_NAME=nano" in text["investigate"]
    promised = ("turns", "tokens.written", "code_blocks", "errors", "notes.conclusion", "similarity_to_documents")
    assert [name for name in (*promised, "none") if f">{name}<" not in text["summary"]] == []
    assert "similarity_is" not in text["summary"] and "architecture" in text["conversation"]
    assert "pairs" in text["single"] and "step-0 margin is 0" in text["single"]
    assert 'sandbox="allow-scripts" srcdoc="&lt;!doctype html' in text["single-report"].replace("DOCTYPE", "doctype")
    assert "revised_answer" in text["single-pairs"]
    assert (tmp_path / "kept/data/single-nano/pairs.jsonl").read_bytes() == (
        tmp_path / "data/single-nano/pairs.jsonl").read_bytes()  # fmt: skip
    assert any((tmp_path / "kept/checkpoints/single-nano").rglob("adapter_model.safetensors"))


@pytest.mark.slow
def test_milestone_1_runs(notebook: Any, tmp_path: Path) -> None:
    replace(notebook, PHASE, f"{PHASE[:-1]} {SHORT}'")
    text = execute(notebook, tmp_path, without=("fit", "single"))
    assert "10/10 pairs" in text["batch"] and "step 10/10" in text["batch"]
    assert "srcdoc" in text["batch-report"] and "<iframe" in text["batch-report"]
    assert text["pairs"].count("<tr") == 11 and "pairs.jsonl" in text["pairs"]


def test_a_failing_script_fails_its_cell(notebook: Any, tmp_path: Path) -> None:
    replace(notebook, PHASE, f"{PHASE[:-1]} --compare nano nano'")
    with pytest.raises(CellExecutionError, match=r"ScriptFailed.*exit code 2"):
        execute(notebook, tmp_path, without=("fit", "single", "batch", "pairs"))


# ---------------------------------------------------------------- the first cell, and lab.py


def test_the_code_is_cloned_then_pulled_and_asked_for(notebook: Any, tmp_path: Path) -> None:
    origin, place = tmp_path / "origin", tmp_path / "place"
    place.mkdir()
    (origin / "notebooks").mkdir(parents=True)
    (origin / "setup_runpod.sh").touch()
    shutil.copy(ROOT / "notebooks" / "lab.py", origin / "notebooks")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(origin)]
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *arguments], check=True)

    def first_cell(address: str) -> subprocess.CompletedProcess[str]:
        cell = sources(notebook)["code"].replace("REPOSITORY = ''", f"REPOSITORY = {address!r}")
        return subprocess.run([sys.executable, "-c", cell], cwd=place, capture_output=True, text=True)

    assert "fill in REPOSITORY" in first_cell("").stderr
    assert str(place / "cai") in first_cell(origin.as_uri()).stdout
    (origin / "new").touch()
    for arguments in (["add", "-A"], ["commit", "-qm", "two"]):
        subprocess.run([*git, *arguments], check=True)
    assert first_cell(origin.as_uri()).returncode == 0 and (place / "cai/new").is_file()


Make = Callable[[str], "lab.Lab"]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A lab whose scripts are the given Python text, `scripts/s.py`."""

    def made(script: str) -> lab.Lab:
        (tmp_path / "s.py").write_text(script)
        return lab.Lab(tmp_path, tmp_path / "data", tmp_path / "checkpoints", tmp_path / "kept")

    return made


def test_no_go_is_a_result_and_other_codes_are_failures(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    assert make("print('gates'); raise SystemExit(3)").run("s.py") == 3
    assert "NO-GO (exit code 3)" in capsys.readouterr().out
    with pytest.raises(lab.ScriptFailed, match="exit code 1"):
        make("raise SystemExit(1)").run("s.py")
    with pytest.raises(lab.ScriptFailed, match="run this cell again"):
        make("raise SystemExit(143)").run("s.py")


def test_the_stop_button_reaches_the_script(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "import time\ntry:\n  print('started'); time.sleep(100)\nexcept KeyboardInterrupt:\n"
        "  print('written'); raise SystemExit(130)"
    )
    lab_ = make(script)
    real = print

    def stop(*args: Any, **more: Any) -> None:
        real(*args, **more)
        if "started" in str(args[:1]):
            threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT)).start()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lab, "print", stop, raising=False)
        lab_.run("s.py")
    assert "written" in capsys.readouterr().out


def test_copies_follow_a_run_and_bring_it_back(make: Make, tmp_path: Path) -> None:
    made = make("")
    run, kept = tmp_path / "data/a", tmp_path / "kept/data/a"
    run.mkdir(parents=True)
    for name in ("pairs.jsonl", "run.lock", "x.tmp"):
        (run / name).write_text("1")
    made.keep()
    assert [file.name for file in kept.iterdir()] == ["pairs.jsonl"]
    (run / "journal.jsonl").write_text("22")
    (run / "pairs.jsonl").unlink()  # --fresh moved it aside
    made.keep()
    made.restore()
    assert [file.name for file in kept.iterdir()] == ["journal.jsonl"]
    assert not (run / "pairs.jsonl").exists()
    shutil.rmtree(run)  # the machine is gone
    made.restore()
    assert (run / "journal.jsonl").read_text() == "22"


def test_foreign_settings_do_not_reach_the_script(make: Make, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in lab.FOREIGN[:1]:
        monkeypatch.setenv(name, "module://matplotlib_inline.backend_inline")
    make("import os, json; print(json.dumps(sorted(os.environ)))").run("s.py")
    assert "MPLBACKEND" not in json.loads(capsys.readouterr().out.splitlines()[1])


def test_figures_of_a_summary_and_a_conversation_without_control_codes(make: Make, tmp_path: Path) -> None:
    made = make("")
    made.root = ROOT
    folder = tmp_path / "data/a/early"
    folder.mkdir(parents=True)
    summary = {"turns": 3, "tokens": {"written": 7}, "revisions": {"notes": 1, "texts": ["x"]}, "questions": ["Why?"],
               "similarity_is": "a sentence", "finish_phrase": "DONE"}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "conversation.md").write_text("before \x1b]52;c;eA==\x07 after")
    assert made.summaries("a")["early"].to_dict() == {"turns": 3, "tokens.written": 7, "revisions.notes": 1}
    assert made.conversation("a") == "before \\x1b]52;c;eA==\\x07 after"


def test_another_model_or_style_is_another_run() -> None:
    assert lab.run_name("single", "Qwen/Qwen2.5-3B-Instruct") == "single-qwen2.5-3b-instruct"
    assert lab.run_name("investigation", "nano", "x.py --style research-driven") == "investigation-nano-research-driven"
    assert lab.run_name("investigation", "nano", "x.py --compare") == "investigation-comparison"
