"""Which tiers hold on this machine: each runs a small attack, once a process."""

from __future__ import annotations

import secrets
import socket
import tempfile
from functools import cache
from pathlib import Path

from cai_experiment.errors import UserError
from cai_experiment.investigations.sandbox.limits import Limits
from cai_experiment.investigations.sandbox.run import run_once
from cai_experiment.investigations.sandbox.tiers import TIERS, UNSAFE

ATTACK = """
import socket
got = []
try:
    got.append("read " + open({secret!r}).read())
except OSError:
    pass
try:
    socket.create_connection(("127.0.0.1", {port}), timeout=2)
    got.append("connected")
except OSError:
    pass
open("own", "w").write("written")
print(got, open("own").read(), introspection.ask(1))
"""
HELD = "[] written 2\n"
LIMITS = Limits(seconds=15, cpu_seconds=5, memory_mb=512)


@cache
def _results() -> dict[str, str]:
    return {tier: "" if tier == UNSAFE else _try(tier) for tier in TIERS}


def probe() -> dict[str, str]:
    """Tier -> "" where it works here, else why not: harmless code runs, a secret and a server are out of reach."""
    return dict(_results())


def _try(tier: str) -> str:
    with tempfile.NamedTemporaryFile("w", suffix=".secret") as secret, socket.create_server(("127.0.0.1", 0)) as server:
        Path(secret.name).chmod(0o644)  # held back by the sandbox, not by the file's mode
        secret.write(secrets.token_hex(8))
        secret.flush()
        code = ATTACK.format(secret=secret.name, port=server.getsockname()[1])
        try:
            outcome = run_once(tier, LIMITS, {"ask": lambda number: number + 1}, code)
        except UserError as error:
            return str(error).removeprefix(f"sandbox {tier}: ")
    if outcome.ok and outcome.stdout == HELD:
        return ""
    shown = " ".join((outcome.stopped, outcome.stdout, outcome.stderr[-300:])).split()
    return f"its test run did not hold or did not work: {' '.join(shown)}"
