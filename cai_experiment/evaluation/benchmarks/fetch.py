"""Benchmark files of others, fetched once from a pinned revision and checked against their hash; never shipped.

They lie beside what Hugging Face downloads (HF_HOME, on a pod its volume), so that a second run needs no network.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterable

from cai_experiment.engines.server_address import is_loopback
from cai_experiment.errors import EngineError
from cai_experiment.models.disk import hf_home
from cai_experiment.records.files import show, write_atomic, writing_error

if TYPE_CHECKING:
    import httpx

FOLDER = "cai_benchmarks"  # below HF_HOME
SECONDS_TO_CONNECT = 15.0
SECONDS_TO_READ = 60.0  # without a byte
WAITS = (1.0, 4.0, 15.0)  # seconds before each further attempt
MAY_PASS = frozenset({408, 425, 429, 500, 502, 503, 504})
YES = ("1", "ON", "YES", "TRUE")  # as Hugging Face reads its own switches
LARGEST = 64 << 20  # bytes: a benchmark's questions are a few hundred kilobytes


@dataclass(frozen=True, slots=True)
class Source:
    """A file of somebody else's repository. `url` holds a commit, so that its content cannot change.

    `sha256`: the hashes, in hexadecimal, that its content may have (a mirror may differ in its line ends). `flag` is
    what a user gives instead where the file cannot be fetched, such as "--behaviors FILE".
    """

    name: str  # the file's name in the cache
    url: str
    sha256: tuple[str, ...] | str
    licence: str
    flag: str = ""

    @property
    def hashes(self) -> tuple[str, ...]:
        """The allowed hashes, one or more."""
        return (self.sha256,) if isinstance(self.sha256, str) else self.sha256


def cache_folder() -> Path:
    """Where fetched files are kept: below HF_HOME (`scripts/_common.py` sets it to the pod's volume)."""
    return hf_home() / FOLDER


def fetch(
    source: Source,
    folder: Path | None = None,
    waits: Iterable[float] = WAITS,
    sleep: Callable[[float], None] = time.sleep,
) -> Path:
    """The file's path; it is downloaded where `folder` (default: `cache_folder()`) has it not, or has it damaged.

    Its name there holds its hash, so another revision is another file. Raises EngineError (no network, a status other
    than 200, a wrong hash), BadInputError and DiskError (a folder that cannot be written), one line each, with what
    to give instead. `waits` are the seconds before each further attempt, waited for by `sleep`.
    """
    folder = cache_folder() if folder is None else folder
    path = folder / f"{source.hashes[0][:12]}-{source.name}"
    if path.is_file() and _hash(path.read_bytes()) in source.hashes:
        return path
    print(f"fetching {source.name} ({source.licence}) from {source.url}", file=sys.stderr, flush=True)
    content = _download(source, waits, sleep)
    found = _hash(content)
    if found not in source.hashes:
        raise EngineError(
            f"{source.url}: its sha256 is {found}, not the pinned {source.hashes[0]}", _instead(source, "do not use it")
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_error(folder, error) from error
    write_atomic(path, [content])
    print(f"fetched {source.name}: {len(content):,} bytes, sha256 as pinned, in {show(path)}", file=sys.stderr)
    return path


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _instead(source: Source, step: str) -> str:
    """What to do: `step`, or fetch the file elsewhere and name it."""
    return f"{step}, or give a copy of it with {source.flag}" if source.flag else step


class _Passing(Exception):
    """What may pass; the request is worth another attempt."""


def _download(source: Source, waits: Iterable[float], sleep: Callable[[float], None]) -> bytes:
    """The content; every attempt has its own connection. Nobody is asked where HF_HUB_OFFLINE says so."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in YES and not is_loopback(source.url):
        raise EngineError(
            f"cannot fetch {source.url}: HF_HUB_OFFLINE is set", _instead(source, "take it away and run again")
        )
    tries, last = 1, ""
    for wait in (*waits, None):
        try:
            return _attempt(source)
        except _Passing as error:
            last = str(error)
        if wait is not None:
            print(f"{source.name}: {last}; trying again in {wait:g} s", file=sys.stderr, flush=True)
            sleep(wait)
            tries += 1
    raise EngineError(
        f"cannot fetch {source.url}: {last} ({tries} attempts)", _instead(source, "connect this machine and run again")
    )


def _attempt(source: Source) -> bytes:
    import httpx

    timeout = httpx.Timeout(SECONDS_TO_READ, connect=SECONDS_TO_CONNECT)
    try:
        with httpx.stream(
            "GET", source.url, timeout=timeout, follow_redirects=True, trust_env=not is_loopback(source.url)
        ) as response:
            return _body(source, response)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise EngineError(f"cannot fetch {source.url}: {error}", _instead(source, "correct the address")) from None
    except httpx.HTTPError as error:
        raise _Passing(" ".join(str(error).split()) or type(error).__name__) from None


def _body(source: Source, response: httpx.Response) -> bytes:
    if response.status_code in MAY_PASS:
        raise _Passing(f"status {response.status_code}")
    if response.status_code != 200:
        raise EngineError(
            f"cannot fetch {source.url}: status {response.status_code}", _instead(source, "check the address")
        )
    pieces: list[bytes] = []
    size = 0
    for piece in response.iter_bytes():
        pieces.append(piece)
        size += len(piece)
        if size > LARGEST:
            raise EngineError(f"{source.url} is larger than {LARGEST:,} bytes", _instead(source, "do not use it"))
    return b"".join(pieces)
