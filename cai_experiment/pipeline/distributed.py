"""Beyond one process: `--ray local` or `--ray HOST:PORT` gives the pipeline an engine made of Ray actors.

The runner stays here with its journal, the only memory: rows go out as they finish, a run resumes by id, a lost actor's
prompts are asked again, and the files hold the same bytes as a run on one machine. Plain actors, not Ray Data, whose
unit is a block of rows: a task that took its block through all stages would hand out nothing to be journalled before
its end, and when its actor is lost Ray Data runs the whole block again (max_task_retries=-1); one stage per operator
would take each transcript away from the cache that holds it. And its input is a data set, while here the number of
instructions follows from how many passed the gate.

An open Ray port is remote code execution. So: token authentication always on, private addresses only, a cluster that
answers without a token refused, a local one bound to 127.0.0.1, no dashboard, no usage statistics.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.milestones import PACKAGE
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.hardware import PROFILES, detect
from cai_experiment.models.memory import weights_gb
from cai_experiment.models.plan import in_words, start_hours
from cai_experiment.models.serving import actor_gpus, known_numbers

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings
    from cai_experiment.engines.ray import RayEngine

LOCAL = "local"
INSTALL = 'python -m pip install "ray==2.60.*"'
ACTOR_BYTES = 2 * 2**30  # of memory for an actor without a GPU: Python, torch and the shipped model take about 1 GB
STORE_BYTES = 100_000_000  # prompts and completions are small and go with the calls; Ray asks for 75 MB at least
ANSWER_SECONDS = 5.0
FREED_SECONDS = 10.0  # Ray tells a little late that a closed engine's cores and GPUs are free again
STRANGER_SECONDS = 60.0
REFUSED = 3
# Asks for the cluster's own key-value store without a token. Succeeds where a stranger is served, and ends with REFUSED
# where he is sent away for the token that he lacks; any other end says nothing.
STRANGER = f"""
import sys
from ray._raylet import GcsClient
from ray.exceptions import AuthenticationError
try:
    GcsClient(sys.argv[1]).internal_kv_keys(b"", None, 5)
except AuthenticationError:
    raise SystemExit({REFUSED})
"""


def ray_engines(
    address: str, generator: LoadSettings, critic: LoadSettings | None = None, actors: int | None = None
) -> tuple[RayEngine, RayEngine]:
    """(generator, critic) over Ray actors: the same engine twice without `critic`, else half of the GPUs each.

    `actors` is the number of them all; None takes what is free, a core and the GPUs that its model needs for each (no
    GPU where the model is the shipped one or no machine has any). Connects to `address` if Ray is not connected yet;
    loads the models. Raises BadInputError, EngineError (see `connect`), and whatever loading raises on an actor's
    machine.
    """
    from cai_experiment.engines.load import load_engine
    from cai_experiment.engines.ray import RayEngine
    from cai_experiment.engines.ray_notices import say

    if generator.engine == "server":
        raise BadInputError("--ray and --engine server do not go together",
                            "leave --ray away: one process keeps a server busy")  # fmt: skip
    if critic is not None and actors == 1:
        raise BadInputError("--ray-actors 1: --generator and --critic are two models", "give 2 or more")
    connect(address)
    speakers = [_on_its_device(settings) for settings in (generator, critic) if settings is not None]
    gpus = [gpus_each(settings) for settings in speakers]
    shares = _shares(gpus, actors)
    for plan in zip(speakers, gpus, shares, strict=True):
        say(_announcement(address, *plan))
    engines: dict[int, RayEngine] = {}
    for i in sorted(range(len(speakers)), key=lambda i: -gpus[i]):  # the widest first, while machines are whole
        resources = {"num_cpus": 1, "num_gpus": gpus[i]}  # Ray sets one torch thread with one core
        make = partial(load_engine, speakers[i])
        engines[i] = RayEngine(make, shares[i], resources, speakers[i].deadline)
    return engines[0], engines[len(speakers) - 1]


def _announcement(address: str, settings: LoadSettings, gpus: int, actors: int) -> str:
    """What is about to be loaded, on what, and about how long it takes."""
    from cai_experiment.engines.ray_notices import LOGS

    choice = resolve_model(settings.random_weights or settings.model, detect())
    numbers, here = known_numbers(choice), settings.random_weights is not None or Path(choice.path_or_id).is_dir()
    machine = PROFILES["a100-80gb" if gpus else "cpu"]
    time = in_words(start_hours(machine, 0.0), None)
    if not here:
        gb = weights_gb(numbers, "bf16") if numbers else None
        longer = f"{in_words(start_hours(machine, gb), None)} with a download of {gb:.0f} GB" if gb else "more"
        time += f" where its files lie on the machine, {longer} where they do not"
    each = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "a CPU core"
    return (f"--ray {address}: {actors} actor{'s' * (actors > 1)} with {each} each load {choice.name}: {time}. A line "
            f"follows for each that has; what they write themselves goes to {LOGS}")  # fmt: skip


# ---------------------------------------------------------------- the cluster


def check_address(address: str) -> None:
    """Check what can be known without Ray: that it is installed, and that `address` is private and has a token.

    Raises BadInputError for an address that is neither "local" nor HOST:PORT, unknown, public or without a token
    (RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names); EngineError if Ray is not installed.
    """
    if find_spec("ray") is None:
        raise EngineError(f"--ray {address}: Ray is not installed", INSTALL)
    if address == LOCAL:
        return
    host, _ = _parts(address)
    try:
        found = ipaddress.ip_address(socket.gethostbyname(host))
    except OSError:
        raise BadInputError(f"--ray {address}: unknown host {host}", "give the head's private address") from None
    if found.is_global:
        raise BadInputError(f"--ray {address}: {found} is a public address, and a Ray port there is an open door",
                            "use the head's private address (docs/SCALING.md)")  # fmt: skip
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    if not os.environ.get("RAY_AUTH_TOKEN") and not (path and Path(path).is_file() and Path(path).stat().st_size):
        raise BadInputError(f"--ray {address}: no token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH",
                            "export the one that the cluster was started with (docs/SCALING.md)")  # fmt: skip


def connect(address: str) -> None:
    """Connect this process to the cluster at `address`, or start one on this machine for "local"; once a process.

    A local cluster ends with this process. The package travels to the actors, so all run this code. Raises what
    `check_address` raises, and EngineError if nothing answers, the token is wrong, the cluster asks for none, or
    whether it does cannot be known.
    """
    check_address(address)
    os.environ.update(RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="0")
    if address == LOCAL:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # in memory only; Ray would write a file
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # on any system: bind to 127.0.0.1
    else:
        _refuse_open(address)
    import ray

    if ray.is_initialized():
        return
    code: dict[str, Any] = {"py_modules": [str(PACKAGE)], "excludes": ["data/", "checkpoints/", "__pycache__/"]}
    own: dict[str, Any] = {"num_cpus": detect().cores, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    try:
        with _own_signals():
            ray.init(address=address, runtime_env=code, log_to_driver=False, logging_level=logging.ERROR,
                     **(own if address == LOCAL else {}))  # fmt: skip
    except Exception as error:  # Ray raises every kind, bare Exception too
        why = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise EngineError(f"--ray {address}: {why[:200]}", "see docs/SCALING.md") from error


def is_open(address: str) -> bool:
    """True if the Ray head at HOST:PORT serves somebody without a token; asked in a process of its own.

    Raises EngineError if it neither serves nor refuses him for want of a token: then nothing is known.
    """
    stranger = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", STRANGER, address]
    try:
        asked = subprocess.run(command, env={**stranger, "RAY_AUTH_MODE": "disabled"}, capture_output=True, text=True,
                               timeout=STRANGER_SECONDS)  # fmt: skip
        why = next(iter(asked.stderr.strip().splitlines()[-1:]), f"exit code {asked.returncode}")[:200]
    except subprocess.TimeoutExpired:
        asked, why = None, f"no answer within {STRANGER_SECONDS:g} s"
    if asked is not None and asked.returncode in (0, REFUSED):
        return asked.returncode == 0
    raise EngineError(f"--ray {address}: could not check whether this cluster serves anybody without a token ({why})",
                      "see on the head whether it is well with: ray status")  # fmt: skip


def _refuse_open(address: str) -> None:
    try:
        socket.create_connection(_parts(address), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise EngineError(f"--ray {address}: nothing answers there ({error.strerror or error})",
                          "start the head with ray start --head (docs/SCALING.md)") from None  # fmt: skip
    if is_open(address):
        raise EngineError(f"--ray {address}: this cluster takes commands from anybody, without a token",
                          "ray stop; then start it with RAY_AUTH_MODE=token (docs/SCALING.md)")  # fmt: skip


def _parts(address: str) -> tuple[str, int]:
    match = re.fullmatch(r"([\w.-]+):(\d{1,5})", address)
    if match is None:
        raise BadInputError(f"--ray {address}: neither local nor HOST:PORT", "for example --ray 10.0.0.2:6379")
    return match[1], int(match[2])


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts its own SIGTERM handler in place of the script's, which ends a run resumably; put that back."""
    before, heard = signal.getsignal(signal.SIGTERM), False
    try:
        yield
    except SystemExit as stop:
        heard = stop.code == signal.SIGTERM  # by Ray's
        if not heard:
            raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if heard:
        signal.raise_signal(signal.SIGTERM)


# ---------------------------------------------------------------- what runs where


def _on_its_device(settings: LoadSettings) -> LoadSettings:
    """The model under the name that this machine resolves it to; on the CPU if it ships with us or no GPU is there."""
    import ray

    choice = resolve_model(settings.random_weights or settings.model, detect())
    shipped = choice.preset is not None and choice.preset.is_local
    on_cpu = settings.device == "cpu" or shipped or ray.cluster_resources().get("GPU", 0) < 1
    return replace(settings, model=choice.path_or_id if choice.preset is None else choice.name,
                   device="cpu" if on_cpu else settings.device)  # fmt: skip


def gpus_each(settings: LoadSettings) -> int:
    """GPUs of one actor: the fewest of a machine's over which vLLM fits the model's weights; one for other engines.

    vLLM splits the layers over those that its actor sees. Measured by this machine's card; without one here, one each.
    EngineError: `--engine vllm`, and no machine has enough.
    """
    if settings.device == "cpu":
        return 0
    from cai_experiment.engines.load import is_installed, make_plan

    hardware = detect()
    choice = make_plan(settings, hardware).choice
    gpus, refused = actor_gpus(settings.engine, choice, hardware, settings.quantization,
                               settings.random_weights is not None, is_installed, _most_gpus())  # fmt: skip
    if refused:
        raise EngineError(f"--ray with --engine vllm: {refused} on the {_most_gpus()} GPUs of one machine",
                          "use --engine unsloth (4-bit), or a quantised --model")  # fmt: skip
    return gpus


def _machines() -> list[int]:
    """GPUs of each machine of the cluster."""
    import ray

    return [int(node["Resources"].get("GPU", 0)) for node in ray.nodes() if node["Alive"]]


def _most_gpus() -> int:
    return max(_machines())


def _shares(gpus: Sequence[int], wanted: int | None) -> list[int]:
    """How many actors of each model, which takes so many `gpus` an actor; EngineError if `wanted` do not fit."""
    until = time.monotonic() + FREED_SECONDS
    while not min(shares := _fitting(gpus, wanted)) or sum(shares) < (wanted or 1):
        if time.monotonic() > until:
            each = " and ".join(f"{n} GPU{'s' * (n > 1)}" if n else "a CPU core and 2 GB of memory" for n in gpus)
            raise EngineError(f"--ray: {wanted or len(gpus)} actors needed ({each} each), {sum(shares)} fit into what "
                              "is free", "see what holds the rest with: ray status")  # fmt: skip
        time.sleep(0.2)
    return shares


def _fitting(gpus: Sequence[int], wanted: int | None) -> list[int]:
    """Actors of each model that fit into what nobody holds now, at most `wanted` of them all.

    Each turn is the model's that has fewer GPUs (or cores) so far; an actor's GPUs are of one machine.
    """
    import ray

    free, machines, shares = ray.available_resources(), _machines(), [0] * len(gpus)
    cores, memory, cards = (free.get(name, 0) for name in ("CPU", "memory", "GPU"))
    while wanted is None or sum(shares) < wanted:
        turn = min(range(len(gpus)), key=lambda i: shares[i] * max(gpus[i], 1))
        need, bytes_needed = gpus[turn], 0 if gpus[turn] else ACTOR_BYTES
        place = min((left for left in machines if left >= need), default=None)
        if place is None or cards < need or cores < 1 or memory < bytes_needed:
            break
        machines[machines.index(place)] -= need
        cores, memory, cards = cores - 1, memory - bytes_needed, cards - need
        shares[turn] += 1
    return shares
