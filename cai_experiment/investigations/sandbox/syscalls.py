"""The system calls that model-written code is refused, as a filter of libseccomp.

A list of refusals, not of permissions: what Python, numpy and the C library call differs between versions, and a
missing permission would break harmless code. Files, processes and memory have other bounds (namespaces or Landlock, a
uid of its own, rlimits); the filter closes what those leave open. Calls of another architecture kill the process.
"""

from __future__ import annotations

import errno
import os
import tempfile
from functools import cache
from typing import Any

# Pairs of unix sockets may be made, written and read (asyncio needs one). No address may be given, and nothing but
# bytes sent: a descriptor under way in a message would be out of sight of the watch.
NETWORK = "socket connect bind listen accept accept4 sendmsg sendmmsg recvmsg recvmmsg"
OTHER_PROCESSES = (
    "ptrace process_vm_readv process_vm_writev pidfd_getfd pidfd_send_signal pidfd_open kcmp process_madvise "
    "process_mrelease move_pages migrate_pages perf_event_open"
)
NAMESPACES = (
    "unshare setns mount umount2 pivot_root chroot move_mount open_tree fsopen fsconfig fsmount fspick mount_setattr "
    "open_by_handle_at name_to_handle_at fanotify_init quotactl quotactl_fd"
)
# memory that no rlimit and no watch counts; keys; rings that pass by this filter
UNCOUNTED = (
    "memfd_create memfd_secret shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl "
    "mq_open mq_unlink keyctl add_key request_key io_uring_setup io_uring_enter io_uring_register userfaultfd bpf "
    "io_setup io_submit"
)
# what others do with files that the run may not read: Landlock does not hold these
OTHER_FILES = "inotify_init inotify_init1 inotify_add_watch fanotify_mark flock"
MACHINE = (
    "init_module finit_module delete_module kexec_load kexec_file_load reboot swapon swapoff syslog acct "
    "settimeofday clock_settime clock_adjtime adjtimex sethostname setdomainname iopl ioperm modify_ldt nfsservctl "
    "vhangup personality"
)
IDENTITY = "setuid setgid setreuid setregid setresuid setresgid setgroups setfsuid setfsgid capset"
# Where the run has the user's own uid: nothing may leave its group, signal others or change what Landlock omits.
OWN_UID = (
    "setsid setpgid kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo chmod fchmod fchmodat fchmodat2 chown fchown "
    "lchown fchownat setxattr lsetxattr fsetxattr removexattr lremovexattr fremovexattr utime utimes utimensat "
    "futimesat setpriority ioprio_set sched_setaffinity sched_setscheduler sched_setparam sched_setattr"
)
CLONE_NEW = (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)  # CLONE_NEW*
TIOCSTI, TIOCLINUX = 0x5412, 0x541C  # would type into the user's terminal
TERMINAL = 0x5400  # the ioctls that are let through are 0x5400 to 0x54ff: terminals, FIONREAD, FIONBIO, FIOCLEX
# signals to any process of the same uid (F_SETOWN, F_SETSIG, F_SETOWN_EX), leases, watching folders (F_NOTIFY)
FCNTL = (8, 10, 15, 1024, 1026)
AF_UNIX = 1
LOWER = 0xFFFFFFFF  # the kernel reads these arguments as 32 bits


def make_filter(own_uid: bool = False) -> Any:
    """A pyseccomp.SyscallFilter, not yet loaded. Raises RuntimeError or OSError where libseccomp is missing."""
    import pyseccomp as seccomp

    refuse = seccomp.ERRNO(errno.EPERM)
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for number in refused_numbers(own_uid):
        rules.add_rule(refuse, number)
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")  # its flags are out of reach; libc takes clone
    for flag in CLONE_NEW:
        rules.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    rules.add_rule(refuse, "prlimit64", seccomp.Arg(0, seccomp.NE, 0))  # of other processes
    _refuse_by_argument(rules, refuse)
    return rules


def _refuse_by_argument(rules: Any, refuse: int) -> None:
    """fallocate, sockets, fcntl and ioctl, each where Landlock, rlimits and the watch leave a way round."""
    import pyseccomp as seccomp

    # RLIMIT_FSIZE does not hold what is allocated beyond a file's size; libc writes zeros instead
    rules.add_rule(seccomp.ERRNO(errno.EOPNOTSUPP), "fallocate")
    rules.add_rule(refuse, "socketpair", seccomp.Arg(0, seccomp.NE, AF_UNIX))
    rules.add_rule(refuse, "sendto", seccomp.Arg(4, seccomp.NE, 0))
    for command in FCNTL:
        rules.add_rule(refuse, "fcntl", seccomp.Arg(1, seccomp.MASKED_EQ, LOWER, command))
    for request in (TIOCSTI, TIOCLINUX):
        rules.add_rule(refuse, "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, LOWER, request))
    # Others allocate like fallocate (FS_IOC_RESVSP), set owners (FIOSETOWN), change attributes: a request that
    # differs from 0x54.. in any of the upper 24 bits.
    for bit in (1 << place for place in range(8, 32)):
        rules.add_rule(refuse, "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, bit, ~TERMINAL & bit))


def refused_numbers(own_uid: bool) -> list[int]:
    """The calls that are refused whatever their arguments, as far as this machine has them."""
    names = " ".join((NETWORK, OTHER_PROCESSES, NAMESPACES, UNCOUNTED, OTHER_FILES, MACHINE, IDENTITY))
    numbers = map(_number, f"{names} {OWN_UID if own_uid else ''}".split())
    return [number for number in numbers if number is not None]


def _number(name: str) -> int | None:
    """The number of a call; None where this machine's libseccomp or architecture does not know it."""
    import pyseccomp as seccomp

    try:
        number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)
    except ValueError:
        return None
    return number if number >= 0 else None


@cache
def program(own_uid: bool) -> bytes:
    """The filter as a BPF program (struct sock_filter[])."""
    with tempfile.TemporaryFile() as stream:
        make_filter(own_uid).export_bpf(stream)
        stream.seek(0)
        return stream.read()


def compiled_filter(own_uid: bool = False) -> int:
    """The program in a descriptor of its own, read from its start; the caller closes it."""
    descriptor = os.memfd_create("filter")
    with open(descriptor, "wb", closefd=False) as stream:
        stream.write(program(own_uid))
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
