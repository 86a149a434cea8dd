"""The floors of docs/ARCHITECTURE.md, what imports bring in, and that the README names nothing that is not there."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "cai_experiment"
FLOORS = (  # the lowest first, as in docs/ARCHITECTURE.md
    ("errors",),
    ("constitution", "records", "models", "observe", "milestones"),
    ("nano",),
    ("engines",),
    ("judging",),
    ("pipeline", "training", "evaluation", "ensemble"),
    ("demo", "investigations", "comparison"),
    ("scripts",),
)
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
HEAVY = (
    "torch", "transformers", "trl", "peft", "datasets", "matplotlib", "scipy", "sklearn", "pandas", "statsmodels",
    "ray",
)  # fmt: skip
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if not {"data", "checkpoints"} & set(path.parts))
SCRIPTS = sorted(path for path in (PACKAGE / "scripts").glob("*.py") if not path.name.startswith("_"))
README = ROOT / "README.md"


def place_of(path: Path) -> str:
    """The package (or top module) of cai_experiment that a source file belongs to; "" for cai_experiment itself."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported_places(path: Path) -> Iterator[tuple[int, str]]:
    """(line, package) of every import from cai_experiment in a file, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            own = node.module == "cai_experiment"
            names = [f"cai_experiment.{alias.name}" for alias in node.names] if own else [node.module or ""]
        for name in names:
            if name.startswith("cai_experiment."):
                yield node.lineno, name.split(".")[1]


def heavy_after(code: str, *arguments: str) -> tuple[set[str], int]:
    """(heavy modules imported, exit code) of Python code run in a fresh interpreter."""
    report = "import atexit, sys; atexit.register(lambda: print('MODULES', *sys.modules, file=sys.__stderr__))\n"
    done = subprocess.run([sys.executable, "-c", report + code, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert "MODULES" in done.stderr, done.stderr
    modules = {name.split(".")[0] for name in done.stderr.rsplit("MODULES", 1)[1].split()}
    return modules & set(HEAVY), done.returncode


# ---------------------------------------------------------------- floors


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_import_only_from_floors_below(path: Path) -> None:
    place = place_of(path)
    if not place:
        assert not list(imported_places(path)), "the package's __init__ imports nothing of its own"
        return
    for line, target in imported_places(path):
        allowed = target == place or FLOOR_OF[target] < FLOOR_OF[place]
        assert allowed, f"{path.relative_to(ROOT)}:{line}: {place} must not import {target}"


def test_every_package_has_its_floor() -> None:
    assert {place_of(path) for path in SOURCES} - {""} <= set(FLOOR_OF)


@pytest.mark.parametrize("floor", FLOORS, ids="|".join)
def test_architecture_names_the_floors(floor: tuple[str, ...]) -> None:
    text = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name}\b", text) for name in floor)


# ---------------------------------------------------------------- what importing brings in


def modules_of(package: str) -> list[str]:
    """Dotted names of a package's modules."""
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in SOURCES
        if place_of(path) == package
    ]


@pytest.mark.parametrize("package", ["constitution", "records", "models", "observe", "pipeline"])
def test_importing_leaves_heavy_libraries_unimported(package: str) -> None:
    names = modules_of(package)
    if not names:
        pytest.skip(f"{package} has no modules yet")
    heavy, code = heavy_after("\n".join(f"import {name}" for name in names))
    assert (heavy, code) == (set(), 0)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_imports_nothing_heavy(script: Path) -> None:
    code = "import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    heavy, exit_code = heavy_after(code, str(script), "--help")
    assert (heavy, exit_code) == (set(), 0)


def test_help_is_quick() -> None:
    """--help against a bare interpreter on the same machine: 0.5 s against 0.02 s is the promise; 40 times is slow.

    Processor seconds, since other tests run beside this one.
    """

    def seconds(*arguments: str) -> float:
        tries = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True, cwd=ROOT)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            tries.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return min(tries)

    bare = seconds("-c", "pass")
    for script in SCRIPTS:
        assert seconds(str(script), "--help") < 40 * bare, f"{script.name} --help is slow"


# ---------------------------------------------------------------- scripts


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_have_a_docstring_with_their_command_and_a_guarded_main(script: Path) -> None:
    tree = ast.parse(script.read_text(encoding="utf-8"))
    assert f"scripts/{script.name}" in (ast.get_docstring(tree) or ""), "the docstring gives the command to run"
    assert any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in tree.body)
    guarded = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    assert guarded, "main() is called under if __name__ == '__main__'"
    loose = [node for node in tree.body if isinstance(node, (ast.For, ast.While, ast.With))]
    loose += [node for node in tree.body if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
    assert not loose, "nothing runs at import"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_run_from_any_folder(script: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert script.name in done.stdout


def test_plain_pytest_does_not_collect_the_milestones() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(PACKAGE)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "no tests" in done.stdout


# ---------------------------------------------------------------- what the README promises


@pytest.fixture(scope="module")
def readme() -> str:
    """The README's text; skipped while there is none."""
    if not README.is_file():
        pytest.skip("README.md is not written yet")
    return README.read_text(encoding="utf-8")


def test_readme_names_only_files_that_exist(readme: str) -> None:
    named = set(re.findall(r"\b(?:cai_experiment|docs|tests|notebooks)/[\w./-]*\w\.(?:py|md|yaml|ipynb)\b", readme))
    named |= set(re.findall(r"\b(?:setup_runpod\.sh|constitution\.yaml|requirements[\w-]*\.txt)\b", readme))
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_readme_names_only_flags_that_exist(readme: str) -> None:
    known = set()
    for script in SCRIPTS:
        done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=True)
        known |= set(re.findall(r"--[a-z][a-z0-9-]+", done.stdout))
    commands = re.findall(r"scripts/\w+\.py((?: +[^\s`|&;]+)*)", readme)
    named = {flag for arguments in commands for flag in re.findall(r"--[a-z][a-z0-9-]+", arguments)}
    named |= set(re.findall(r"`(--[a-z][a-z0-9-]+)", readme))
    assert named - known == set()


def test_readme_gives_the_two_commands_of_the_rehearsal(readme: str) -> None:
    assert "bash setup_runpod.sh && .venv/bin/python cai_experiment/scripts/test_single.py" in readme
    assert "bash setup_runpod.sh && .venv/bin/python -m pytest" in readme
