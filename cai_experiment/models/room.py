"""How much memory is free now: RAM by /proc and the container's limit. GB are 10^9 bytes. No torch, no psutil."""

from __future__ import annotations

from pathlib import Path

from cai_experiment.models.memory import GB

MEMINFO = Path("/proc/meminfo")
CGROUPS = (  # (limit, used, statistics, the line of page cache that the kernel gives back first)
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def free_ram_gb() -> float:
    """GB of RAM that a process can still take: MemAvailable, or less where the container's limit is nearer.

    Where the system says neither (macOS), half of what is installed.
    """
    found = [available for available in (_available(), *map(_container, CGROUPS)) if available is not None]
    if found:
        return max(0.0, min(found))
    from cai_experiment.models.hardware import detect

    return detect().ram_gb * 2**30 / GB / 2


def _available() -> float | None:
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    kib = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(kib[0]) * 1024 / GB if kib else None


def _container(files: tuple[str, str, str, str]) -> float | None:
    """GB below a cgroup's limit, its page cache that is not in use counted as free; None without a limit."""
    limit, used, statistics, line = files
    try:
        most, now = Path(limit).read_text().strip(), int(Path(used).read_text())
        lines = dict(row.split() for row in Path(statistics).read_text().splitlines())
    except (OSError, ValueError):
        return None
    if not most.isdigit() or int(most) > 2**60:  # "max", or version 1's word for it
        return None
    return (int(most) - now + int(lines.get(line, 0))) / GB
