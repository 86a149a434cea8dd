"""The sandbox as the rest of the project sees it, and the choice of its tier."""

from __future__ import annotations

from cai_experiment.errors import BadInputError, UserError
from cai_experiment.investigations.sandbox.accounts import is_root
from cai_experiment.investigations.sandbox.channel import Functions
from cai_experiment.investigations.sandbox.limits import Limits, Outcome
from cai_experiment.investigations.sandbox.probe import probe
from cai_experiment.investigations.sandbox.run import run_once
from cai_experiment.investigations.sandbox.tiers import BUBBLEWRAP, LANDLOCK, TIERS, UNSAFE

HOLDS = {
    BUBBLEWRAP: "namespaces of its own, no network, read-only system, seccomp",
    LANDLOCK: "no-new-privs, Landlock, seccomp without network; sizes and dates of files elsewhere are not hidden",
    UNSAFE: "NO PROTECTION: a plain process that may read, change and send whatever you may",
}


class Sandbox:
    """Runs code in one tier. Each run is a fresh process in an empty folder; nothing stays behind.

    `serve` maps names to functions of plain JSON values; the code calls them as `introspection.NAME(...)`. They run
    here, one at a time, in a thread; an exception in one becomes an IntrospectionError in the code.

    Code may use threads, subprocesses, asyncio and multiprocessing's Process and Pipe. Pool, Queue and Lock of
    multiprocessing fail in every safe tier: their semaphores lie in /dev/shm, which the machine's processes share.
    """

    def __init__(self, tier: str, limits: Limits | None = None, serve: Functions | None = None) -> None:
        """Raises BadInputError for an unknown tier."""
        if tier not in TIERS:
            raise BadInputError(f"sandbox tier {tier!r} is none of {', '.join(TIERS)}")
        self.tier = tier
        self.limits = limits or Limits()
        self.serve = dict(serve or {})

    def run(self, code: str) -> Outcome:
        """Run code to a limit or its end. Nothing it does is raised; EngineError where the tier cannot start."""
        return run_once(self.tier, self.limits, self.serve, code)

    @property
    def first_line(self) -> str:
        """What a script prints before it runs model-written code: tier, limits, and why no stronger one."""
        account = "a uid of its own" if is_root() else "your own uid (weaker than one of its own, which needs root)"
        holds = HOLDS[self.tier] if self.tier == UNSAFE else f"{account}, {HOLDS[self.tier]}"
        stronger = TIERS[: TIERS.index(self.tier)]
        reasons = [f"{tier}: {probe()[tier] or 'works here, and is safer'}" for tier in stronger]
        why = f"; not {'; not '.join(reasons)}" if reasons else ""
        return f"sandbox: {self.tier} ({holds}); {self.limits} a run{why}"


def strongest(unsafe_local: bool = False) -> str:
    """The tier to use: the first that works here; with `unsafe_local`, where neither does, the plain process.

    Raises UserError (exit code 1) where neither works and `unsafe_local` is not given.
    """
    found = probe()
    for tier in (BUBBLEWRAP, LANDLOCK):
        if not found[tier]:
            return tier
    if unsafe_local:
        return UNSAFE
    reasons = "; ".join(f"{tier}: {found[tier]}" for tier in (BUBBLEWRAP, LANDLOCK))
    raise UserError(
        f"model-written code cannot be confined on this machine ({reasons})",
        "--unsafe-local runs it as a plain process that protects nothing: only in a container you can lose",
    )
