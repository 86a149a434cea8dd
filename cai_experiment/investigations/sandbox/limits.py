"""What a run may use, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

READ_FACTOR = 50  # output beyond `output_chars` is dropped; beyond this many times as much, the run is stopped


@dataclass(frozen=True)
class Limits:
    """Limits of one run. Memory holds for each process (address space) and for all of them together (resident)."""

    seconds: float = 20.0  # wall clock, without the time that served functions take
    cpu_seconds: int = 10  # of each process
    memory_mb: int = 1024
    processes: int = 32  # threads count
    file_mb: int = 16  # one file
    folder_mb: int = 64  # all files
    output_chars: int = 20_000  # of stdout, and of stderr

    def __str__(self) -> str:
        return (
            f"{self.seconds:g} s, {self.cpu_seconds} s of CPU, {self.memory_mb} MB of memory, "
            f"{self.processes} processes, {self.folder_mb} MB of files"
        )


@dataclass(frozen=True)
class Outcome:
    """What a run printed and how it ended. `stopped` says which limit ended it: time, cpu, memory, output or files;
    unknown where the watch could not look at it."""

    stdout: str
    stderr: str
    exit_code: int | None  # 128 + signal as in a shell; None where the sandbox ended it
    stopped: str
    seconds: float
    truncated: bool  # stdout or stderr was longer than `output_chars`

    @property
    def ok(self) -> bool:
        """Whether the code ran to its end without an error."""
        return self.exit_code == 0 and not self.stopped
