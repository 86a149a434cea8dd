"""The sandbox: a corpus of attacks held, and of harmless code that runs, in each tier; the channel; the choice."""

from __future__ import annotations

import builtins
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from cai_experiment.errors import BadInputError, UserError
from cai_experiment.investigations.sandbox import Limits, Outcome, Sandbox, accounts, probe, sandbox, strongest, tiers
from cai_experiment.investigations.sandbox import run as runner
from cai_experiment.investigations.sandbox.channel import MOST_BYTES, MOST_CALLS, Channel, answer
from cai_experiment.investigations.sandbox.restrict import DEVICES
from cai_experiment.investigations.sandbox.syscalls import refused_numbers

ROOT = Path(__file__).resolve().parents[1]
SNIPPETS = Path(__file__).parent / "sandbox_snippets"
HOSTILE: dict[str, dict[str, Any]] = yaml.safe_load((SNIPPETS / "hostile.yaml").read_text(encoding="utf-8"))
BENIGN: dict[str, dict[str, Any]] = yaml.safe_load((SNIPPETS / "benign.yaml").read_text(encoding="utf-8"))
SAFE_TIERS = ("bubblewrap", "landlock")
LIMITS = Limits(seconds=2, cpu_seconds=1, memory_mb=512, processes=16, file_mb=4, folder_mb=12, output_chars=10_000)
CALM = Limits(seconds=30, cpu_seconds=10, memory_mb=1024, output_chars=10_000)
GRACE = 8  # seconds beyond the limit in which a busy machine must have ended a run
BROKEN = ("SyntaxError", "NameError", "ImportError", "ModuleNotFoundError: No module named 'ctypes'")


def limits_of(snippet: dict[str, Any]) -> Limits:
    """Short where time is what ends an attack; ample where another limit must, however busy the machine is."""
    return LIMITS if "time" in snippet.get("stopped", ()) else replace(LIMITS, seconds=40, cpu_seconds=20)


def fail() -> None:
    raise ValueError("no such layer")


SERVED = {
    "echo": lambda first, second=None: [first, second],
    "much": lambda: "x" * 900_000,
    "too_much": lambda: "x" * MOST_BYTES,
    "fail": fail,
}


def devices() -> list[str]:
    """The machine's devices but those that every run has, and the terminals, of which bubblewrap makes its own."""
    harmless = {*DEVICES, "/dev/tty", "/dev/ptmx", "/dev/console"}
    found = (entry for entry in os.scandir("/dev") if not (entry.is_dir() or entry.is_file() or entry.is_symlink()))
    return sorted({entry.path for entry in found} - harmless)


def is_held(outcome: Outcome, snippet: dict[str, Any]) -> bool:
    """Whether an attack came to its end or was refused: not broken on its way there."""
    error = outcome.stderr.rstrip().rpartition("\n")[2].partition(":")[0]
    kind = getattr(builtins, error, None)
    refused = (isinstance(kind, type) and issubclass(kind, OSError)) or error == "held"
    return bool(outcome.stopped) or "held" in outcome.stdout or refused or outcome.exit_code in snippet.get("exit", ())


@dataclass
class Target:
    """What the attacks reach for: a secret that any uid can read, listeners, and what became of them."""

    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(dir="/tmp")))
    token: str = field(default_factory=lambda: secrets.token_hex(12))

    def __post_init__(self) -> None:
        self.folder.chmod(0o755)
        self.secret = self.folder / "secret.txt"
        self.secret.write_text(self.token)
        self.secret.chmod(0o644)
        self.before = self.secret.stat()
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.path, self.abstract = self.folder / "socket", f"sandbox-{self.token[:8]}"
        self.unix, self.hidden = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        self.unix.bind(str(self.path))
        self.path.chmod(0o777)
        self.hidden.bind(f"\0{self.abstract}")
        for listener in (self.unix, self.hidden):
            listener.listen(8)
        self.post = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.post.bind(f"\0{self.abstract}-post")
        self.links = (self.tcp, self.udp, self.unix, self.hidden, self.post)
        for link in self.links:
            link.setblocking(False)
        self.home = self.folder / "home"
        (self.home / ".cache" / "huggingface").mkdir(parents=True)
        (self.home / ".cache" / "huggingface" / "token").write_text(self.token)

    def fill(self, code: str) -> str:
        words = {
            "SECRET": self.secret, "PORT": self.tcp.getsockname()[1], "UDP": self.udp.getsockname()[1],
            "UNIX": self.path, "ABSTRACT": self.abstract, "PARENT": os.getpid(), "REPOSITORY": ROOT,
            "HOME": self.home, "DEVICES": devices(), "REFUSED": refused_numbers(own_uid=False),
        }  # fmt: skip
        for word, value in words.items():
            code = code.replace(f"<{word}>", str(value))
        return code

    def assert_untouched(self) -> None:
        now = self.secret.stat()
        assert self.secret.read_text() == self.token
        assert all(getattr(now, name) == getattr(self.before, name) for name in ("st_mode", "st_uid", "st_mtime"))
        assert sorted(path.name for path in self.folder.iterdir()) == ["home", "secret.txt", "socket"]
        for listener in (self.tcp, self.unix, self.hidden):
            with pytest.raises(BlockingIOError):
                listener.accept()
        for link in (self.udp, self.post):
            with pytest.raises(BlockingIOError):
                link.recv(10)

    def close(self) -> None:
        for link in self.links:
            link.close()
        shutil.rmtree(self.folder)


@dataclass
class Done:
    """One run with what it had: its outcome, the uid and the folder that were its own."""

    outcome: Outcome
    uids: list[int]
    folders: list[Path]


class Runs:
    """All snippets of all tiers, four at a time: most of an attack's time is waiting for its limit."""

    def __init__(self, target: Target, patch: pytest.MonkeyPatch) -> None:
        self.target, self.pool = target, ThreadPoolExecutor(4)
        self.mine = threading.local()
        uid, folder = tiers.fresh_uid, tiers._folder_for
        patch.setattr(tiers, "fresh_uid", lambda: self._note("uids", uid()))
        patch.setattr(tiers, "_folder_for", lambda owner: self._note("folders", folder(owner)))
        self.futures: dict[tuple[str, str], Future[Done]] = {}

    def _note(self, kind: str, value: Any) -> Any:
        getattr(self.mine, "noted", {}).get(kind, []).append(value)
        return value

    def submit(self, tier: str, name: str, code: str, limits: Limits) -> None:
        self.futures[tier, name] = self.pool.submit(self._run, tier, code, limits)

    def _run(self, tier: str, code: str, limits: Limits) -> Done:
        self.mine.noted = {"uids": [], "folders": []}
        outcome = Sandbox(tier, limits, SERVED).run(self.target.fill(code))
        return Done(outcome, self.mine.noted["uids"], self.mine.noted["folders"])


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    target = Target()
    found = probe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANARY_TOKEN", target.token)
        runs = Runs(target, patch)
        for tier in SAFE_TIERS:
            for name, snippet in HOSTILE.items() if not found[tier] else ():
                runs.submit(tier, name, snippet["code"], limits_of(snippet))
            for name, snippet in BENIGN.items() if not found[tier] else ():
                runs.submit(tier, name, snippet["code"], CALM)
        try:
            yield runs
        finally:
            runs.pool.shutdown(wait=True, cancel_futures=True)
            target.close()


def needs(tier: str) -> None:
    """Skip where a tier cannot work; under CI it must."""
    reason = probe()[tier]
    if reason:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{tier}: {reason}")


def test_the_corpora_are_as_large_as_promised() -> None:
    assert len(HOSTILE) >= 40 and len(BENIGN) >= 20


@pytest.mark.parametrize("tier", SAFE_TIERS)
@pytest.mark.parametrize("name", HOSTILE)
def test_an_attack_is_contained(tier: str, name: str, runs: Runs) -> None:
    needs(tier)
    done = runs.futures[tier, name].result()
    outcome, shown = done.outcome, done.outcome.stdout + done.outcome.stderr
    assert "ESCAPED" not in outcome.stdout, shown
    assert runs.target.token not in shown
    assert not any(error in outcome.stderr for error in BROKEN), f"the attack itself is broken: {outcome.stderr}"
    assert len(outcome.stdout) <= LIMITS.output_chars and len(outcome.stderr) <= 2 * LIMITS.output_chars
    assert is_held(outcome, HOSTILE[name]), outcome
    wanted = HOSTILE[name].get("stopped", [""])
    if os.geteuid() and "BlockingIOError" in outcome.stderr:  # without root the runs beside it count: no fork is left
        wanted = [*wanted, ""]
    assert outcome.stopped in wanted, outcome
    assert outcome.seconds < limits_of(HOSTILE[name]).seconds + GRACE
    assert not any(accounts.processes_of(uid) for uid in done.uids), "a process is left"
    assert not any(folder.exists() for folder in done.folders), "a folder is left"
    runs.target.assert_untouched()


@pytest.mark.parametrize("tier", SAFE_TIERS)
@pytest.mark.parametrize("name", BENIGN)
def test_harmless_code_runs(tier: str, name: str, runs: Runs) -> None:
    needs(tier)
    wanted, outcome = BENIGN[name], runs.futures[tier, name].result().outcome
    if "long" in wanted:
        assert len(outcome.stdout) == wanted["long"]
    else:
        assert outcome.stdout == wanted["out"], outcome
    assert not outcome.stopped and not outcome.truncated
    assert outcome.ok == ("error" not in wanted)
    assert wanted.get("error", "") in outcome.stderr
    assert str(ROOT) not in outcome.stderr and "/usr/" not in outcome.stderr, "a traceback names the machine"


@pytest.mark.parametrize("name", [name for name, snippet in HOSTILE.items() if snippet.get("unsafe")])
def test_the_attack_is_real_where_nothing_protects(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the corpus would prove nothing. The environment is cleared in every tier."""
    target = Target()
    monkeypatch.setenv("CANARY_TOKEN", target.token)
    try:
        outcome = Sandbox("unsafe-local", CALM).run(target.fill(HOSTILE[name]["code"]))
    finally:
        target.close()
    if name == "environment":
        assert "held" in outcome.stdout
    elif os.geteuid() == 0 or "namespaces" not in name:
        assert "ESCAPED" in outcome.stdout, outcome


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"call": "echo", "args": [1], "kwargs": {}}', b'{"result": [1, null]}'),
        (b'{"call": "fail", "args": [], "kwargs": {}}', b"no such layer"),
        (b'{"call": "echo", "args": [], "kwargs": {"third": 1}}', b"unexpected keyword"),
        (b'{"call": "other", "args": [], "kwargs": {}}', b"no function 'other'; there are echo"),
        (b'{"call": "too_much", "args": [], "kwargs": {}}', b"ask for less"),
        (b'{"call": "echo", "args": [NaN], "kwargs": {}}', b"NaN is not JSON"),
        (b'{"call": "echo", "args": [' + b"9" * 10_000 + b'], "kwargs": {}}', b"not a message"),
        (b"[" * 100_000, b"not a message"),
        (b"\xff\xfe", b"UnicodeDecodeError"),
        (b"\x80\x04\x95", b"not a message"),
        (b"", b"not a message"),
        (b"[1]", b"a message is"),
    ],
)
def test_every_line_has_an_answer_and_none_an_exception(line: bytes, said: bytes) -> None:
    reply = answer(SERVED, line)
    assert said in reply and reply.endswith(b"\n") and reply.count(b"\n") == 1
    assert b"error" in reply or b"result" in reply


@pytest.mark.parametrize("tier", SAFE_TIERS)
def test_the_time_of_a_served_function_is_not_the_codes(tier: str) -> None:
    needs(tier)
    going = threading.Event()
    served = {"slow": lambda: going.wait(1.5)}
    limits = Limits(seconds=1, cpu_seconds=1, memory_mb=512)
    outcome = Sandbox(tier, limits, served).run("print(introspection.slow())")
    assert (outcome.stdout, outcome.stopped) == ("False\n", "")


def test_output_is_cut_where_it_is_long_and_the_code_goes_on() -> None:
    tier = next((tier for tier in SAFE_TIERS if not probe()[tier]), "unsafe-local")
    outcome = Sandbox(tier, CALM).run("print('ü' * 15_000)\nopen('f', 'w').write('x')\n")
    assert outcome.ok and outcome.truncated and outcome.stdout == "ü" * 10_000


def test_where_no_tier_works_it_refuses_with_both_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"bubblewrap": "no bwrap", "landlock": "no Landlock", "unsafe-local": ""}
    monkeypatch.setattr(sandbox, "probe", lambda: found)
    with pytest.raises(UserError, match=r"bubblewrap: no bwrap; landlock: no Landlock.*--unsafe-local") as refused:
        strongest()
    assert refused.value.exit_code == 1 and "\n" not in str(refused.value)
    assert strongest(unsafe_local=True) == "unsafe-local"
    assert "NO PROTECTION" in Sandbox("unsafe-local").first_line and "no Landlock" in Sandbox("unsafe-local").first_line


def test_a_weaker_tier_is_taken_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "probe", lambda: {"bubblewrap": "no namespaces", "landlock": "", "unsafe-local": ""})
    assert strongest() == strongest(unsafe_local=True) == "landlock"
    line = Sandbox("landlock").first_line
    assert "no namespaces" in line and "20 s" in line and "\n" not in line


def test_a_missing_program_or_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers.shutil, "which", lambda name: None)
    monkeypatch.setattr(tiers, "find_spec", lambda name: None)
    from cai_experiment.investigations.sandbox.probe import _try

    assert "apt-get install -y bubblewrap" in _try("bubblewrap")
    assert "py_landlock is not installed" in _try("landlock")


def test_an_interpreter_that_the_uid_cannot_read_is_passed_over(tmp_path: Path) -> None:
    from cai_experiment.investigations.sandbox.interpreter import is_open_to_all

    assert is_open_to_all("/usr/bin") and not is_open_to_all(tmp_path / "missing")
    tmp_path.chmod(0o700)
    (tmp_path / "python").write_text("")
    assert not is_open_to_all(tmp_path / "python")


FORKS = """
import os, time
if os.fork() == 0:
    try:
        os.setsid()
    except OSError:
        pass
    time.sleep(600)
introspection.ready()
time.sleep(600)
"""
KILLED = f"""
import sys
from cai_experiment.investigations.sandbox import Limits, Sandbox
Sandbox(sys.argv[1], Limits(seconds=60), {{"ready": lambda: print("ready", flush=True)}}).run({FORKS!r})
"""


def alive(processes: list[int]) -> list[int]:
    return [process for process in processes if not accounts._is_dead(process)]


@pytest.mark.parametrize("tier", SAFE_TIERS)
def test_the_code_ends_with_a_parent_that_is_killed(tier: str, request: pytest.FixtureRequest) -> None:
    needs(tier)
    place = Path(tempfile.mkdtemp(dir="/tmp"))  # a killed parent cannot remove the run's folder
    place.chmod(0o755)
    request.addfinalizer(lambda: shutil.rmtree(place))
    parent = subprocess.Popen(
        [sys.executable, "-c", KILLED, tier], cwd=ROOT, env={**os.environ, "TMPDIR": str(place)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdout.readline() == "ready\n"
    started = accounts.descendants_of(parent.pid)
    assert len(started) >= 3  # the keeper, the code and its fork
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while (alive(started) or any(place.iterdir())) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(started)
    assert not any(place.iterdir()), "the run's folder is left"


REAPER = """
import ctypes, os, sys
from cai_experiment.investigations.sandbox import Limits, Sandbox
from cai_experiment.investigations.sandbox.accounts import _all, _parent_of
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # the place of a PID 1 that does not reap
daemon = "import os, time\\nif os.fork() == 0:\\n    time.sleep(600)\\n"
for code, stopped in ((daemon, ""), (daemon + "time.sleep(600)", "time")):
    assert Sandbox(sys.argv[1], Limits(seconds=1 if stopped else 30)).run(code).stopped == stopped
    print([process for process in _all() if _parent_of(process) == os.getpid()])
"""


@pytest.mark.parametrize("tier", SAFE_TIERS)
def test_no_zombie_is_left_where_pid_1_does_not_reap(tier: str) -> None:
    needs(tier)
    done = subprocess.run([sys.executable, "-c", REAPER, tier], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout == "[]\n[]\n", done


@pytest.mark.parametrize("tier", SAFE_TIERS)
def test_a_watch_that_fails_ends_the_run(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(tier)
    uids: list[int] = []
    fresh = tiers.fresh_uid
    monkeypatch.setattr(tiers, "fresh_uid", lambda: uids.append(fresh()) or uids[-1])
    monkeypatch.setattr(runner, "memory_mb", lambda members: int("not a number"))
    outcome = Sandbox(tier, CALM).run("import os, time\nos.fork()\ntime.sleep(600)")
    assert (outcome.stopped, outcome.exit_code) == ("unknown", None)
    assert not any(accounts.processes_of(uid) for uid in uids)


@pytest.mark.parametrize("tier", SAFE_TIERS)
def test_what_a_run_left_on_disk_is_said_at_its_end(tier: str) -> None:
    needs(tier)
    code = "for n in range(5):\n    open(f'{n}', 'wb').write(bytes(3_900_000))\nprint('written')"
    outcome = Sandbox(tier, LIMITS).run(code)
    assert outcome.stopped == "files" or "No space left" in outcome.stderr, outcome


def test_a_run_has_so_many_calls() -> None:
    channel = Channel({"echo": lambda value: value})
    said = []
    for number in range(MOST_CALLS + 1):
        channel.take(b'{"call": "echo", "args": [%d], "kwargs": {}}\n' % number)
        while not channel.answer:
            channel.poll()
        said.append(channel.answer)
        channel.answer = b""
    assert said[-2] == b'{"result": %d}\n' % (MOST_CALLS - 1)
    assert b"more than 1000 calls" in said[-1] and channel.closed and not channel.wants_more
    channel.wait()


def test_an_unknown_tier_is_bad_input() -> None:
    with pytest.raises(BadInputError, match="'docker' is none of bubblewrap"):
        Sandbox("docker")
