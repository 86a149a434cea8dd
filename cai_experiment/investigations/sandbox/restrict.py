"""Tier "landlock": gives up rights in a process of its own, then becomes the Python that runs the model's code.

Run: python -I -S -c "...; restrict.main()" with the order (JSON) as its argument; see tiers.py. The parent never
restricts itself: Landlock and seccomp cannot be undone.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
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


def main() -> None:
    """Take the order apart, restrict this process, execute the interpreter. Ends with CANNOT_START where that fails."""
    order, keeper = json.loads(sys.argv[1]), os.getppid()
    try:
        from cai_experiment.investigations.sandbox.syscalls import make_filter

        own_uid = order["uid"] is None
        rules = make_filter(own_uid)
        restrict_files(order["readable"], order["listable"], order["folder"])
        if not own_uid:
            os.setgroups([])
            os.setresgid(order["uid"], order["uid"], order["uid"])
            os.setresuid(order["uid"], order["uid"], order["uid"])  # takes every capability away
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of uid, which clears it
        if os.getppid() != keeper:
            raise OSError("the parent is gone")
        os.chdir(order["folder"])
        rules.load()
        os.execve(order["command"][0], order["command"], order["environment"])
    except Exception as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(CANNOT_START)
