"""The three ways to start a run: what each shuts out, and the command that starts it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from cai_experiment.investigations.sandbox.accounts import descendants_of, fresh_uid, is_root, processes_of
from cai_experiment.investigations.sandbox.interpreter import Interpreter, find_interpreter, is_open_to_all
from cai_experiment.investigations.sandbox.limits import Limits
from cai_experiment.investigations.sandbox.syscalls import compiled_filter

BUBBLEWRAP, LANDLOCK, UNSAFE = "bubblewrap", "landlock", "unsafe-local"
TIERS = (BUBBLEWRAP, LANDLOCK, UNSAFE)
BOX = "/box"  # the empty folder inside bubblewrap
PACKAGES = "/packages"  # numpy, there
CHILD = Path(__file__).with_name("child.py").read_text(encoding="utf-8")
# by file, not through the package, whose modules the launcher does not need: 0.02 s less a run
LAUNCH = "import sys; sys.path[:0] = {paths!r}; import restrict; restrict.main()"
SYSTEM_FOLDERS = ("/lib", "/lib32", "/lib64", "/libx32", "/bin", "/sbin")


@dataclass
class Start:
    """One run, ready to start. `members()` lists its processes once it runs, given its keeper's id."""

    command: list[str]
    environment: dict[str, str]
    cwd: str
    user: int | None = None  # the uid that the first process starts with; None: this process's own
    uid: int | None = None  # the uid that only this run has; None: this process's own
    folder: Path | None = None  # on disk; the caller removes it
    pass_fds: list[int] = field(default_factory=list)  # the caller closes them
    packages: list[str] = field(default_factory=list)  # what enters sys.path, as the run sees it
    box: str = ""  # the folder in memory, as the run sees it

    def members(self, keeper: int) -> list[int]:
        """The run's living processes."""
        return descendants_of(keeper) if self.uid is None else processes_of(self.uid)


def environment(folder: str) -> dict[str, str]:
    """The whole environment of a run: nothing of the parent's."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "TZ": "UTC", **one_thread}


def python_command(python: Interpreter, descriptors: tuple[int, int, int]) -> list[str]:
    """The interpreter that runs child.py; isolated, unbuffered (what is printed before a kill counts), UTF-8."""
    return [python.path, "-I", "-B", "-u", "-X", "utf8", "-c", CHILD, *map(str, descriptors)]


def interpreter_for(tier: str) -> Interpreter:
    """The Python of a tier. Raises OSError where the run's uid could read none."""
    python = find_interpreter(for_all=is_root() and tier != UNSAFE)
    if python is None:
        raise OSError("no Python here that an unprivileged uid can read; apt-get install -y python3")
    return python


def start_bubblewrap(limits: Limits, descriptors: tuple[int, int, int]) -> Start:
    """Namespaces of its own for users, mounts, processes, network, IPC, names; a system of read-only folders."""
    program = shutil.which("bwrap")
    if program is None:
        raise OSError("bwrap is not installed; apt-get install -y bubblewrap")
    python = interpreter_for(BUBBLEWRAP)
    uid = fresh_uid() if is_root() else None
    rules = compiled_filter()
    # No /proc: nothing of Python's needs it, and mounting one is what containers refuse most often.
    command = [
        program, "--unshare-all", "--unshare-user", "--disable-userns", "--new-session", "--die-with-parent",
        "--clearenv", "--cap-drop", "ALL", "--hostname", "sandbox", "--ro-bind", "/usr", "/usr", *_system_folders(),
        "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache",
        "--ro-bind-try", "/etc/alternatives", "/etc/alternatives",
    ]  # fmt: skip
    for folder in python.own_folders:
        command += ["--ro-bind", folder, folder]
    for folder in python.packages:
        command += ["--ro-bind", folder, f"{PACKAGES}/{Path(folder).name}"]
    for name, value in environment(BOX).items():
        command += ["--setenv", name, value]
    command += [
        "--dev", "/dev", "--size", str(limits.folder_mb * 1_000_000), "--tmpfs", BOX, "--remount-ro", "/dev",
        "--remount-ro", "/", "--chdir", BOX, "--seccomp", str(rules), "--",
    ]  # fmt: skip
    command += python_command(python, descriptors)
    return Start(command, {}, "/", user=uid, uid=uid, pass_fds=[rules], packages=[PACKAGES], box=BOX)


def _system_folders() -> list[str]:
    """/lib and its kin: links into /usr on most systems, folders on older ones."""
    arguments: list[str] = []
    for path in SYSTEM_FOLDERS:
        if os.path.islink(path):
            arguments += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            arguments += ["--ro-bind", path, path]
    return arguments


def start_landlock(limits: Limits, descriptors: tuple[int, int, int]) -> Start:
    """A uid of its own (as root), no-new-privs, Landlock, seccomp; see restrict.py."""
    python = interpreter_for(LANDLOCK)
    uid = fresh_uid() if is_root() else None
    launch = LAUNCH.format(paths=[str(Path(__file__).parent), *_library_folders()])
    folder = _folder_for(uid)
    rules = compiled_filter(own_uid=uid is None)
    order = {
        "uid": uid, "filter": rules, "folder": str(folder), "readable": [*python.own_folders, *python.packages],
        "listable": python.package_roots, "command": python_command(python, descriptors),
        "environment": environment(str(folder)),
    }  # fmt: skip
    command = [sys.executable, "-I", "-S", "-c", launch, json.dumps(order)]
    environ = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin"}  # of the launcher
    return Start(command, environ, "/", uid=uid, folder=folder, pass_fds=[rules], packages=_roots(LANDLOCK))


def _library_folders() -> list[str]:
    """Where the launcher, which starts without site-packages to start fast, finds its library."""
    found = {}
    for name in ("py_landlock", "pyseccomp"):  # the second for this process
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise OSError(f"{name} is not installed; bash setup_runpod.sh")
        found[str(Path(spec.origin).parents[1 if spec.submodule_search_locations else 0])] = True
    return list(found)


def _folder_for(uid: int | None) -> Path:
    """An empty folder that only the run's uid can use, in a place to which any uid can walk."""
    for place in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm")):
        if uid is None or (os.path.isdir(place) and is_open_to_all(place)):
            folder = Path(tempfile.mkdtemp(prefix="sandbox-", dir=place)).resolve()
            if uid is not None:
                os.chown(folder, uid, uid)
            return folder
    raise OSError("no temporary folder to which an unprivileged uid can walk")


def _roots(tier: str) -> list[str]:
    return interpreter_for(tier).package_roots


def start_unsafe(limits: Limits, descriptors: tuple[int, int, int]) -> Start:
    """A plain process with rlimits in an empty folder: a bound for accidents, no protection."""
    folder = _folder_for(None)
    command = python_command(interpreter_for(UNSAFE), descriptors)
    return Start(command, environment(str(folder)), str(folder), folder=folder, packages=_roots(UNSAFE))


STARTS: dict[str, Callable[[Limits, tuple[int, int, int]], Start]] = {
    BUBBLEWRAP: start_bubblewrap,
    LANDLOCK: start_landlock,
    UNSAFE: start_unsafe,
}
