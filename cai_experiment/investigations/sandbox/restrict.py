"""Tier "landlock": gives up rights in a process of its own, then becomes the Python that runs the model's code.

Run: python -I -S -c "...; restrict.main()" with the order (JSON) as its argument; see tiers.py. The parent never
restricts itself: Landlock and seccomp cannot be undone.

What this tier does not hide: Landlock has no rule for stat, readlink, access and chdir, so code can learn that a file
exists, its size, owner and dates, and where a link leads, as any uid of the machine can. Contents and the names in a
folder stay closed, and so do watches (inotify) and locks (flock), which the filter refuses.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

PR_SET_PDEATHSIG, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 1, 22, 2
CANNOT_START = 125  # exit code where a restriction failed; the code did not run
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/random")
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/libx32", "/bin", "/etc/ld.so.cache", "/etc/alternatives")


def restrict_files(readable: list[str], listable: list[str], folder: str) -> None:
    """Landlock: read and execute `readable`, list `listable`, write only in `folder`; no TCP, no signals to others.

    What a kernel older than a right lacks is left to the uid and to seccomp.
    """
    from py_landlock import AccessFs, Landlock

    # `strict=False`: TRUNCATE and IOCTL_DEV are younger than the first Landlock
    rules = Landlock(strict=False)
    of_file = AccessFs.READ_FILE | AccessFs.EXECUTE
    for path in filter(os.path.exists, (*SYSTEM, *readable)):
        rules.add_path_rule(path, access=of_file | AccessFs.READ_DIR if os.path.isdir(path) else of_file)
    for path in listable:
        rules.add_path_rule(path, access=AccessFs.READ_DIR)
    for path in filter(os.path.exists, DEVICES):
        rules.add_path_rule(path, access=AccessFs.READ_FILE | AccessFs.WRITE_FILE | AccessFs.TRUNCATE)
    rules.allow_read_write(folder)
    rules.add_path_rule(folder, access=AccessFs.REFER | AccessFs.MAKE_FIFO)
    rules.apply()  # sets no-new-privs first


def filter_calls(program: bytes) -> None:
    """Load a seccomp filter, a program of 8 bytes an instruction (syscalls.py), for this process and its children."""

    class Program(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    libc = ctypes.CDLL(None, use_errno=True)
    order = Program(len(program) // 8, program)
    if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(order), 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def main() -> None:
    """Take the order apart, restrict this process, execute the interpreter. Ends with CANNOT_START where that fails."""
    order, keeper = json.loads(sys.argv[1]), os.getppid()
    try:
        with open(order["filter"], "rb") as stream:
            program = stream.read()
        restrict_files(order["readable"], order["listable"], order["folder"])
        if order["uid"] is not None:
            os.setgroups([])
            os.setresgid(order["uid"], order["uid"], order["uid"])
            os.setresuid(order["uid"], order["uid"], order["uid"])  # takes every capability away
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of uid, which clears it
        if os.getppid() != keeper:
            raise OSError("the parent is gone")
        os.chdir(order["folder"])
        filter_calls(program)
        os.execve(order["command"][0], order["command"], order["environment"])
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(CANNOT_START)
