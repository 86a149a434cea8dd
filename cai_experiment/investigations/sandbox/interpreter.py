"""The Python that runs the model's code: one that an unprivileged uid can read, with the folders that it needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ASK = "import json, os, sys; print(json.dumps([sys.version_info[:2], sys.base_prefix, os.path.dirname(os.__file__)]))"
SYSTEM = ("/usr/bin/python3", "/usr/local/bin/python3", "/usr/bin/python3.12", "/usr/bin/python3.11")
OLDEST = (3, 8)


@dataclass(frozen=True)
class Interpreter:
    """A Python: its file, its prefix, its library, and the folders of packages (numpy) that fit it."""

    path: str
    prefix: str
    library: str
    packages: tuple[str, ...]  # folders to read, such as .../site-packages/numpy

    @property
    def package_roots(self) -> list[str]:
        """What enters sys.path for the packages."""
        return sorted({str(Path(folder).parent) for folder in self.packages})

    @property
    def own_folders(self) -> list[str]:
        """Its prefix, where it does not lie in /usr, which every run may read."""
        return [] if Path(self.prefix).is_relative_to("/usr") else [self.prefix]


def is_open_to_all(path: str | Path) -> bool:
    """Whether any uid can read a file or list a folder, and walk to it."""
    path = Path(path)
    try:
        wanted = 0o005 if path.is_dir() or os.access(path, os.X_OK) else 0o004
        walkable = all(parent.stat().st_mode & 0o001 for parent in path.resolve().parents)
        return walkable and path.stat().st_mode & wanted == wanted
    except OSError:
        return False


def _describe(path: str) -> tuple[tuple[int, ...], str, str] | None:
    """(version, prefix, library) of an interpreter; None where it does not run or is too old."""
    try:
        done = subprocess.run([path, "-I", "-c", ASK], capture_output=True, timeout=20, check=True, env={}, cwd="/")
        version, prefix, library = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    return (tuple(version), prefix, library) if tuple(version) >= OLDEST else None


def _numpy(version: tuple[int, ...], for_all: bool) -> tuple[str, ...]:
    """The folders of this environment's numpy, where that interpreter can load and read them."""
    spec = find_spec("numpy") if version == sys.version_info[:2] else None
    if spec is None or spec.origin is None:
        return ()
    folder = Path(spec.origin).parent
    found = [path for path in (folder, folder.with_name("numpy.libs")) if path.is_dir()]
    return tuple(str(path) for path in found if not for_all or is_open_to_all(path))


@cache
def find_interpreter(for_all: bool) -> Interpreter | None:
    """The first Python that runs here; with `for_all` the first that any uid can read, None where there is none."""
    own = os.path.realpath(sys.executable)
    for path in (own, *(os.path.realpath(found) for found in map(shutil.which, SYSTEM) if found)):
        described = _describe(path)
        if described is None:
            continue
        version, prefix, library = described
        if not for_all or (is_open_to_all(path) and is_open_to_all(library)):
            return Interpreter(path, prefix, library, _numpy(version, for_all))
    return None
