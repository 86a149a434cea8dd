"""The system calls that model-written code is refused, as a filter of libseccomp.

A list of refusals, not of permissions: what Python, numpy and the C library call differs between versions, and a
missing permission would break harmless code. Files, processes and memory have other bounds (namespaces or Landlock, a
uid of its own, rlimits); the filter closes what those leave open. Calls of another architecture kill the process.
"""

from __future__ import annotations

import errno
import os
from typing import Any

NETWORK = (
    "socket socketpair connect bind listen accept accept4 sendto sendmsg sendmmsg recvfrom recvmsg recvmmsg"
)
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


def make_filter(own_uid: bool = False) -> Any:
    """A pyseccomp.SyscallFilter, not yet loaded. Raises RuntimeError or OSError where libseccomp is missing."""
    import pyseccomp as seccomp

    refuse = seccomp.ERRNO(errno.EPERM)
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    names = " ".join((NETWORK, OTHER_PROCESSES, NAMESPACES, UNCOUNTED, MACHINE, IDENTITY, OWN_UID if own_uid else ""))
    for name in names.split():
        number = _number(name)
        if number is not None:
            rules.add_rule(refuse, number)
    rules.add_rule(seccomp.ERRNO(errno.ENOSYS), "clone3")  # its flags are out of reach; libc takes clone
    for flag in CLONE_NEW:
        rules.add_rule(refuse, "clone", seccomp.Arg(0, seccomp.MASKED_EQ, flag, flag))
    rules.add_rule(refuse, "prlimit64", seccomp.Arg(0, seccomp.NE, 0))  # of other processes
    for request in (TIOCSTI, TIOCLINUX):
        rules.add_rule(refuse, "ioctl", seccomp.Arg(1, seccomp.MASKED_EQ, 0xFFFFFFFF, request))
    return rules


def _number(name: str) -> int | None:
    """The number of a call; None where this machine's libseccomp or architecture does not know it."""
    import pyseccomp as seccomp

    try:
        number = seccomp.resolve_syscall(seccomp.Arch.NATIVE, name)
    except ValueError:
        return None
    return number if number >= 0 else None


def compiled_filter() -> int:
    """The filter as a BPF program in a descriptor of its own, read from its start; the caller closes it."""
    descriptor = os.memfd_create("filter")
    with open(descriptor, "wb", closefd=False) as stream:
        make_filter().export_bpf(stream)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor
