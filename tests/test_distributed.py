"""Ray: two actors write the bytes of one process, a killed one costs no row, and nobody without the token is served."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import scripted_engine
from scripted_engine import ScriptedEngine, script

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.engines import load, ray_actor
from cai_experiment.engines.base import Completion, Engine, Prompt
from cai_experiment.engines.load import LoadSettings
from cai_experiment.engines.ray_actor import Speaker
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.models import serving
from cai_experiment.models.hardware import PROFILES
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline import distributed
from cai_experiment.pipeline.distributed import REFUSED, check_address, connect, gpus_each, is_open, ray_engines
from cai_experiment.pipeline.runner import run_pipeline
from cai_experiment.pipeline.settings import RunResult, RunSettings
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.records.files import read_jsonl
from cai_experiment.records.store import RunFolder

CONSTITUTION = load_constitution()
FILES = ("instructions.jsonl", "pairs.jsonl", "rejected.jsonl")
SETTINGS = RunSettings(pairs=20, max_draws=120, stages=StageSettings(rounds=2, principles="random"))
WITH_RAY = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: --ray is not tried")
TOKEN = "a-token-that-only-this-test-knows"


def run(path: Path, engine: Engine, settings: RunSettings = SETTINGS, critic: Engine | None = None) -> RunResult:
    with (
        RunFolder(path) as folder,
        ContentLogger(0, path / "content_log.jsonl") as logger,
        Progress(settings.pairs, verbosity=0) as progress,
    ):
        return run_pipeline(settings, folder, engine, critic or engine, CONSTITUTION, logger, progress)


def contents(path: Path) -> list[bytes]:
    return [(path / name).read_bytes() for name in FILES]


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"{i:06d}/answer/0", ask_for_answer(f"How do I mend thing {i}?"), "answer") for i in range(count)]


# ---------------------------------------------------------------- the actor, without Ray


def take_all(speaker: Speaker, session: int, count: int) -> list[Completion]:
    done: list[Completion] = []
    while len(done) < count:
        done += speaker.take(session)
    return done


def test_an_actor_gives_back_what_it_is_given_whenever_it_comes() -> None:
    speaker = Speaker(ScriptedEngine)
    asked = prompts(30)
    speaker.put(1, asked[:11])
    first = take_all(speaker, 1, 11)
    speaker.put(1, asked[11:])  # the engine had nothing left, and waited
    rest = take_all(speaker, 1, 19)
    assert {c.id: c for c in first + rest} == {p.id: script(p) for p in asked}
    speaker.close()


def test_a_newer_session_drops_the_older_ones_work() -> None:
    spoken, go_on = threading.Event(), threading.Event()

    def slow(prompt: Prompt) -> Completion:
        if prompt.id.startswith("000000"):
            spoken.set()
            assert go_on.wait(60)
        return script(prompt)

    speaker = Speaker(lambda: ScriptedEngine(speak=slow))
    asked = prompts(9)
    speaker.put(1, asked[:5])
    assert spoken.wait(60)
    speaker.put(2, asked[5:])
    go_on.set()
    assert {c.id for c in take_all(speaker, 2, 4)} == {p.id for p in asked[5:]}
    speaker.put(1, asked[:1])  # a call that was late
    assert speaker.take(1) == []
    speaker.close()


def test_an_engine_that_fails_says_so_in_every_call() -> None:
    def fail(prompt: Prompt) -> Completion:
        raise EngineError("the card fell off the bus")

    speaker = Speaker(lambda: ScriptedEngine(speak=fail))
    speaker.put(1, prompts(1))
    for _ in range(2):
        with pytest.raises(EngineError, match="fell off"):
            speaker.take(1)


def test_a_model_that_cannot_be_loaded_says_so() -> None:
    def load() -> Engine:
        raise BadInputError("model x: no such folder")

    with pytest.raises(BadInputError, match="no such folder"):
        Speaker(load).loaded()


def test_an_engine_that_loads_again_is_no_hanging_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_actor, "BEAT_SECONDS", 0.01)
    loaded = threading.Event()

    def after_loading(prompt: Prompt) -> Completion:
        assert loaded.wait(60)
        return script(prompt)

    engine = ScriptedEngine(speak=after_loading)
    monkeypatch.setattr(engine, "loading", True, raising=False)
    speaker = Speaker(lambda: engine)
    speaker.put(1, prompts(1))
    assert speaker.take(1) == speaker.take(1) == []  # signs of life
    loaded.set()
    assert [c.id for c in take_all(speaker, 1, 1)] == [prompts(1)[0].id]
    speaker.close()


# ---------------------------------------------------------------- GPUs by preset

BIG = LoadSettings("qwen2.5-32b", trains_after=False)


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that makes up a cluster: a card (a profile's), the GPUs of each machine, cores, memory.

    The real Ray is left alone: it reads its environment when it is first imported, and that is `connect`'s to set.
    """
    ray = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "ray", ray)

    def make(card: str, *gpus: int, cores: int = 64, memory: float = 1e12) -> None:
        nodes = [{"Alive": True, "Resources": {"GPU": float(n)} if n else {}} for n in gpus]
        free = {"CPU": float(cores), "memory": memory, "GPU": float(sum(gpus))}
        ray.nodes = lambda: [*nodes, {"Alive": False, "Resources": {"GPU": 16.0}}]
        ray.available_resources = lambda: free
        monkeypatch.setattr(distributed, "detect", lambda: PROFILES[card])
        monkeypatch.setattr(distributed, "FREED_SECONDS", 0.0)
        monkeypatch.setattr(load, "find_spec", lambda name: True)
        monkeypatch.setattr(serving, "free_gb", lambda place: 500.0)

    return make


@pytest.mark.parametrize(("card", "gpus", "settings", "each"), [
    ("a100-80gb", 8, BIG, 1),  # 71 GB of 79
    ("rtx-4090", 8, BIG, 4),  # of 24 GB; three would hold them and do not divide the heads
    ("rtx-4090", 8, dataclasses.replace(BIG, engine="vllm"), 4),
    ("rtx-4090", 2, BIG, 1),  # no machine has four: Unsloth, 4 bit
    ("rtx-4090", 8, dataclasses.replace(BIG, quantization="4bit"), 1),
    ("rtx-4090", 8, dataclasses.replace(BIG, model="qwen2.5-7b"), 1),
    ("rtx-4090", 8, dataclasses.replace(BIG, engine="vllm", model="org/unknown"), 1),
    ("cpu", 8, BIG, 1),  # a head without a card to measure by
    ("a100-80gb", 8, dataclasses.replace(BIG, device="cpu"), 0),
])  # fmt: skip
def test_an_actor_takes_the_gpus_that_its_model_needs(
    machines: Callable[..., None], card: str, gpus: int, settings: LoadSettings, each: int
) -> None:
    machines(card, gpus, 1)
    assert gpus_each(settings) == each


def test_vllm_asked_for_where_no_machine_has_enough_gpus(machines: Callable[..., None]) -> None:
    machines("rtx-4090", 2, 2, 2)
    with pytest.raises(EngineError, match=r"71 GB of GPU memory needed .* on the 2 GPUs of one machine; use --engine"):
        gpus_each(dataclasses.replace(BIG, engine="vllm"))


@pytest.mark.parametrize(("gpus", "each", "wanted", "shares"), [
    ([8], [1], None, [8]),
    ([8, 8], [4], None, [4]),
    ([3, 3], [2], None, [2]),  # an actor's GPUs are of one machine
    ([8], [1, 1], None, [4, 4]),
    ([8], [2, 1], None, [2, 4]),  # halves of GPUs, not of actors
    ([1, 1], [1, 1], None, [1, 1]),
    ([8], [1, 1], 3, [2, 1]),
    ([0], [0], None, [3]),  # by memory
    ([0], [0], 2, [2]),
])  # fmt: skip
def test_shares_count_gpus(
    machines: Callable[..., None], gpus: list[int], each: list[int], wanted: int | None, shares: list[int]
) -> None:
    machines("a100-80gb", *gpus, memory=3.5 * distributed.ACTOR_BYTES)
    assert distributed._shares(each, wanted) == shares


@pytest.mark.parametrize(("gpus", "each", "wanted", "says"), [
    ([2, 2], [4], None, r"1 actors needed \(4 GPUs each\), 0 fit into what is free; .* ray status"),
    ([1], [1, 1], None, r"2 actors needed \(1 GPU and 1 GPU each\), 1 fit"),
    ([4], [1], 5, r"5 actors needed \(1 GPU each\), 4 fit"),
    ([0], [0], 9, r"9 actors needed \(a CPU core and 2 GB of memory each\), 3 fit"),
])  # fmt: skip
def test_actors_that_do_not_fit_are_one_line(
    machines: Callable[..., None], gpus: list[int], each: list[int], wanted: int | None, says: str
) -> None:
    machines("a100-80gb", *gpus, memory=3.5 * distributed.ACTOR_BYTES)
    with pytest.raises(EngineError, match=says):
        distributed._shares(each, wanted)


# ---------------------------------------------------------------- addresses


@WITH_RAY
@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("10.0.0.2", "neither local nor HOST:PORT"),
        ("ray://10.0.0.2:10001", "neither local nor HOST:PORT"),
        ("no-such-host.invalid:6379", "unknown host"),
        ("8.8.8.8:6379", "public address"),
        ("10.0.0.2:6379", "no token in RAY_AUTH_TOKEN"),
    ],
)
def test_an_address_that_may_not_be_used_is_refused(
    address: str, says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    (tmp_path / "empty").touch()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "empty"))
    with pytest.raises(BadInputError, match=says) as caught:
        check_address(address)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("stranger", "is_served"), [("pass", True), (f"raise SystemExit({REFUSED})", False)])
def test_a_stranger_who_is_refused_or_served(stranger: str, is_served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "STRANGER", stranger)
    assert is_open("10.0.0.2:6379") is is_served


@pytest.mark.parametrize(
    ("stranger", "why"),
    [
        ("import time; time.sleep(600)", r"no answer within 0\.2 s"),
        ("raise TimeoutError('seven')", "TimeoutError: seven"),
        ("raise SystemExit(7)", "exit code 7"),
    ],
)
def test_a_cluster_that_may_be_open_is_refused(stranger: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "STRANGER", stranger)
    monkeypatch.setattr(distributed, "STRANGER_SECONDS", 0.2 if "sleep" in stranger else 60.0)
    with pytest.raises(EngineError, match=rf"^--ray 10\.0\.0\.2:6379: could not check .* \({why}\); .*ray status$"):
        is_open("10.0.0.2:6379")


def test_before_loading_it_is_said_what_loads_and_how_long_that_takes() -> None:
    said = distributed._announcement("10.0.0.2:6379", BIG, gpus=1, actors=8)
    assert said.startswith("--ray 10.0.0.2:6379: 8 actors with 1 GPU each load qwen2.5-32b: about 5 minutes where")
    assert "about 16 minutes with a download of 66 GB" in said and "session_latest" in said
    here = distributed._announcement("local", LoadSettings("nano"), gpus=0, actors=1)
    assert here.startswith("--ray local: 1 actor with a CPU core each load nano: about 1 minute. A line")


def test_without_ray_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(EngineError, match="pip install"):
        check_address("local")


# ---------------------------------------------------------------- actors


def _connect() -> None:
    """Start the cluster. Ray gives up if its parts need more than 30 s: no fault on a crowded machine."""
    crowded = os.getloadavg()[0] > 3 * (os.cpu_count() or 1) and not os.environ.get("CI")
    try:
        connect("local")  # Ray reads its environment when it is first imported, here
    except EngineError as error:
        if crowded:
            pytest.skip(f"this machine is too crowded to start Ray: {error}")
        raise


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """One local cluster for this file; its head's address."""
    if find_spec("ray") is None:
        pytest.skip("Ray is not installed: --ray is not tried")
    before = signal.getsignal(signal.SIGTERM)
    os.environ["RAY_AUTH_TOKEN"] = TOKEN
    _connect()
    import ray

    assert signal.getsignal(signal.SIGTERM) is before
    ray.cloudpickle.register_pickle_by_value(scripted_engine)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    del os.environ["RAY_AUTH_TOKEN"]


@dataclasses.dataclass
class Unhurried(ScriptedEngine):
    """Scripted, a few milliseconds a completion, and deadly: `kills` names a prompt that ends its process.

    Where `hangs` names a file that is not there, it makes it at its tenth completion and gives no other for ever.
    """

    kills: str = ""
    hangs: str = ""
    first_line: str = "scripted"

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        for number, completion in enumerate(super().stream(prompts)):
            if completion.id == self.kills:
                os.kill(os.getpid(), signal.SIGKILL)
            if number == 9 and self.hangs and not os.path.exists(self.hangs):
                Path(self.hangs).touch()
                time.sleep(600)
            time.sleep(0.002)
            yield completion

    def describe(self) -> dict[str, object]:
        return super().describe() | {"slots": self.slots}


def ray_engine(make: Callable[[], Engine], actors: int = 2, deadline: float = 600.0) -> Engine:
    from cai_experiment.engines.ray import RayEngine

    return RayEngine(make, actors, {"num_cpus": 0}, deadline)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(folder, ScriptedEngine())
    return folder


def test_two_actors_one_killed_write_the_bytes_of_one_process(
    tmp_path: Path, unbroken: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ray_engine(Unhurried)
    loaded = capsys.readouterr().err.splitlines()
    assert [line.split(" has loaded on ")[0] for line in loaded] == ["Ray actor 1 of 2", "Ray actor 2 of 2"]
    victim = engine.processes[0].pid
    assert victim not in (engine.processes[1].pid, os.getpid())
    seen = iter(range(10**9))

    class Killing(type(engine)):  # type: ignore[misc]
        def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
            for completion in super().stream(prompts):
                if next(seen) == 60:
                    os.kill(victim, signal.SIGKILL)
                yield completion

    engine.__class__ = Killing
    result = run(tmp_path / "run", engine)
    assert result.complete
    assert contents(tmp_path / "run") == contents(unbroken)
    said = capsys.readouterr().err
    assert said.count("a Ray actor on ") == 1 and "death 1 of at most " in said and "asked again" in said
    ids = [row["id"] for row in read_jsonl(tmp_path / "run" / "journal.jsonl")]
    assert len(ids) == len(set(ids))
    assert victim not in {one.pid for one in engine.processes}
    assert result.manifest.models["generator"]["engine"] == "scripted"  # one process may resume it
    engine.close()


def test_a_prompt_that_kills_every_actor_is_recorded_and_stops_no_other(
    tmp_path: Path, unbroken: Path, cluster: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ray_engine(partial(Unhurried, kills="000003/answer/0"))
    assert run(tmp_path / "run", engine).complete
    engine.close()
    said = capsys.readouterr().err
    assert "000003/answer/0 is to blame and is not asked again" in said and "the new Ray actor has loaded on " in said
    rejected = {row["id"]: row for row in read_jsonl(tmp_path / "run" / "rejected.jsonl")}
    assert rejected["000003"]["reject_reasons"] == ["engine_error"]
    assert "died" in rejected["000003"]["meta"]["error"]
    kept = {row["id"]: row for row in read_jsonl(tmp_path / "run" / "pairs.jsonl")}
    before = {row["id"]: row for row in read_jsonl(unbroken / "pairs.jsonl") if row["id"] != "000003"}
    assert {name: kept[name] for name in before} == before


def test_two_models_are_waited_for_in_a_thread_each(tmp_path: Path, unbroken: Path, cluster: str) -> None:
    engines = [ray_engine(Unhurried, 1), ray_engine(Unhurried, 1)]
    threads: dict[int, set[str]] = {id(engine): set() for engine in engines}

    class Noted(type(engines[0])):  # type: ignore[misc]
        def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
            for completion in super().stream(prompts):
                threads[id(self)].add(threading.current_thread().name)
                yield completion

    for engine in engines:
        engine.__class__ = Noted
    assert run(tmp_path / "run", engines[0], critic=engines[1]).complete
    assert contents(tmp_path / "run") == contents(unbroken)
    assert list(threads.values()) == [{"lane-ray"}, {"lane-ray"}]
    for engine in engines:
        engine.close()


def test_closing_ends_a_stream_that_waits_and_starts_no_actor_more(
    tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cai_experiment.engines import ray as ray_module

    monkeypatch.setattr(ray_module, "CLOSE_SECONDS", 0.1)
    engine = ray_engine(partial(Unhurried, hangs=str(tmp_path / "hung")), 1)
    ended: list[Exception] = []

    def pull() -> None:
        try:
            list(engine.stream(iter(prompts(30))))
        except EngineError as error:
            ended.append(error)

    thread = threading.Thread(target=pull, daemon=True)
    thread.start()
    while not (tmp_path / "hung").exists():
        time.sleep(0.01)
    engine.close()
    thread.join(60)
    assert [str(error) for error in ended] == ["the engine is closed"]
    with pytest.raises(EngineError, match="closed"):
        engine._start()
    engine.close()  # once more does nothing


def test_an_actor_that_hangs_is_replaced_and_costs_no_prompt(tmp_path: Path, cluster: str) -> None:
    engine = ray_engine(partial(Unhurried, hangs=str(tmp_path / "hung")), deadline=5.0)
    before = {one.pid for one in engine.processes}
    done = list(engine.stream(iter(prompts(600))))
    assert sorted(c.id for c in done) == [p.id for p in prompts(600)]
    assert {c.finish for c in done} <= {"stop", "length"}
    assert (tmp_path / "hung").exists() and len(before & {one.pid for one in engine.processes}) <= 1
    engine.close()


def test_a_conversation_stays_with_the_actor_that_holds_its_prefix(cluster: str) -> None:
    def who(prompt: Prompt) -> Completion:
        return Completion(prompt.id, str(os.getpid()), "stop")

    engine = ray_engine(partial(Unhurried, speak=who))
    first: dict[str, str] = {}

    def feed() -> Iterator[Prompt | None]:
        yield from prompts(10)
        while len(first) < 10:
            yield None
        for prompt in reversed(prompts(10)):
            yield dataclasses.replace(prompt, id=prompt.id + "/again", turns=(*prompt.turns, *prompt.turns))

    done = engine.stream(feed())
    first.update({c.id: c.text for c in islice(done, 10)})
    assert len(set(first.values())) == 2  # both have work
    assert {c.id.removesuffix("/again"): c.text for c in done} == first
    engine.close()


def test_loading_errors_come_as_the_line_that_they_are(cluster: str) -> None:
    def load() -> Engine:
        raise BadInputError("model x: no such folder", "give another")

    with pytest.raises(BadInputError, match=r"^model x: no such folder; give another$"):
        ray_engine(load, 1)


def test_a_stranger_is_not_served_and_nothing_listens_outside(cluster: str) -> None:
    import ray

    assert cluster.startswith("127.0.0.1:")
    assert not is_open(cluster)
    listening = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True).stdout.splitlines()
    session = ray._private.worker._global_node
    pids = {str(info.process.pid) for infos in session.all_processes.values() for info in infos} | {str(os.getpid())}
    ours = [line.split()[3] for line in listening if any(f"pid={pid}," in line for pid in pids)]
    assert ours, "the head listens somewhere"
    assert [place for place in ours if not place.startswith(("127.0.0.1:", "[::ffff:127.0.0.1]:", "[::1]:"))] == []
    found = subprocess.run(["grep", "-rl", TOKEN, session.get_session_dir_path()], capture_output=True, text=True)
    assert found.stdout == ""  # the token is in no file


@pytest.mark.slow
def test_the_shipped_model_on_two_actors_writes_the_bytes_of_one_process(
    tmp_path: Path, nano_dir: Path, cluster: str
) -> None:
    from cai_experiment.engines.load import load_engine

    settings = dataclasses.replace(SETTINGS, pairs=3, max_draws=9)
    alone = load_engine(LoadSettings("nano", device="cpu"))
    run(tmp_path / "alone", alone, settings)
    engine, critic = ray_engines("local", LoadSettings("nano"), actors=2)
    assert engine is critic
    run(tmp_path / "two", engine, settings)
    assert contents(tmp_path / "two") == contents(tmp_path / "alone")
    options = [prompt for prompt in prompts(4)]
    assert engine.choose(options, ["A", "B"]) == alone.choose(options, ["A", "B"])
    engine.close()


# ---------------------------------------------------------------- a cluster that was started by hand


@contextmanager
def head(**environment: str) -> Iterator[str]:
    """`ray start --head` as docs/SCALING.md has it; gives its address, and ends it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect(("10.255.255.255", 1))  # sends nothing: it only chooses the address
        host = one.getsockname()[0]
    with socket.socket() as one:
        one.bind(("", 0))
        port = one.getsockname()[1]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    ray = str(Path(sys.executable).with_name("ray"))
    command = [ray, "start", "--head", f"--node-ip-address={host}", f"--port={port}", "--include-dashboard=false",
               "--disable-usage-stats", "--num-cpus=2", "--object-store-memory=100000000", "--block"]  # fmt: skip
    started = subprocess.Popen(command, env=plain | environment, stdout=subprocess.PIPE, text=True)
    try:
        assert started.stdout is not None
        assert any("Ray runtime started" in line for line in started.stdout), "ray start failed"
        yield f"{host}:{port}"
    finally:
        started.terminate()
        started.wait(60)


USE = """
import sys
sys.path[:0] = sys.argv[2:]
from cai_experiment.engines.ray import RayEngine
from cai_experiment.pipeline.distributed import connect
from cai_experiment.scripts._scripted_engine import ScriptedEngine
import test_distributed
connect(sys.argv[1])
engine = RayEngine(ScriptedEngine, 2, {"num_cpus": 1})
print(len(list(engine.stream(test_distributed.prompts(50)))), engine.first_line)
engine.close()
"""


@pytest.mark.slow
@WITH_RAY
def test_a_cluster_with_a_token_is_used_from_any_folder(tmp_path: Path) -> None:
    with head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=TOKEN) as address:
        assert not is_open(address)
        command = [sys.executable, "-c", USE, address, str(Path(__file__).parents[1]), str(Path(__file__).parent)]
        for token, code, says in (
            (TOKEN, 0, "50 scripted engine | 2 Ray actors on 1 machine"),
            ("wrong", 1, "EngineError"),
        ):
            used = subprocess.run(command, cwd=tmp_path, env=os.environ | {"RAY_AUTH_TOKEN": token}, text=True,
                                  capture_output=True)  # fmt: skip
            assert (used.returncode, says in used.stdout + used.stderr) == (code, True), used.stderr[-2000:]


@pytest.mark.slow
@WITH_RAY
def test_an_open_cluster_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    with head(RAY_AUTH_MODE="disabled") as address:
        assert is_open(address)
        with pytest.raises(EngineError, match="takes commands from anybody"):
            connect(address)
    with pytest.raises(EngineError, match="nothing answers there"):
        connect(address)
