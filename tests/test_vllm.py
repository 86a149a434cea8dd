"""The vLLM engine: its child process, its requests, its faults; `--engine auto`. vLLM itself is a scripted stand-in
(tests/stand_ins/vllm); the processes, pipes and signals are real."""

from __future__ import annotations

import ast
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Iterator

import pytest

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines import load, revived
from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.engines.load import LoadSettings, make_plan
from cai_experiment.engines.process import living_members
from cai_experiment.engines.render import Renderer
from cai_experiment.engines.vllm import VLLMEngine, VLLMSettings, seed_of
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.models import disk, serving
from cai_experiment.models.hardware import PROFILES, Hardware
from cai_experiment.models.presets import PRESETS

STAND_INS = Path(__file__).resolve().parent / "stand_ins"
POD = PROFILES["a100-80gb"]


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    """A chat renderer over the tiny tokenizer; no model."""
    from conftest import build_tiny_tokenizer
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    build_tiny_tokenizer(folder)
    return Renderer(AutoTokenizer.from_pretrained(folder), "chat", 1024)


@pytest.fixture
def start(renderer: Renderer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """Returns a function that starts an engine over the stand-in, with a fault and settings; closes them all."""
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # for the logs
    engines: list[VLLMEngine] = []

    def make(fault: str = "", **settings: Any) -> VLLMEngine:
        monkeypatch.setenv("STAND_IN", fault)
        engine = VLLMEngine(VLLMSettings("folder", **settings), None, renderer, {"model": "m", "quantization": "bf16"})
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


def ask(number: int, options: tuple[str, ...] = (), text: str = "Why?", **sampling: Any) -> Prompt:
    speak_as = "verdict" if options else "answer"
    turns = (Turn("instruction", f"{text} {number}"),)
    return Prompt(str(number), turns, speak_as, Sampling(**{"max_tokens": 20, **sampling}), options)


def until(condition: Any, seconds: float = 20.0) -> bool:
    """Waits for a condition of another process; the time is only how long a broken one may take to fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# ---------------------------------------------------------------- speaking


def test_speaks_with_keyed_seeds_and_cuts_at_our_stop(start: Any, renderer: Renderer) -> None:
    engine = start()
    found = {c.id: c for c in engine.stream([ask(i, key=f"key{i}") for i in range(20)] + [ask(99, max_tokens=1)])}
    assert len(found) == 21
    for i in range(20):
        seed = seed_of(0, f"key{i}")
        token, times = seed % 90 + 300, seed % 7 + 1
        expected = renderer.tokenizer.decode([token] * times)
        assert found[str(i)] == Completion(str(i), expected, "stop", found[str(i)].prompt_tokens,
                                           found[str(i)].computed_tokens, times + 1)  # fmt: skip
    assert found["99"].finish == "length" and found["99"].completion_tokens == 1
    assert engine.describe() | {"slots": 0} == {
        "model": "m", "quantization": "bf16", "engine": "vllm", "vllm": "0.32.0", "dtype": "bfloat16",
        "max_length": 1024, "kv_tokens": 1600, "prefix_caching": True, "layout": "chat", "device": "cuda", "slots": 0,
        "tensor_parallel": 1, "probe": None,
    }  # fmt: skip


def test_the_cache_is_counted(start: Any) -> None:
    engine = start()
    (first,) = engine.stream([ask(1, text="A long question " * 9)])
    (again,) = engine.stream([ask(2, text="A long question " * 9)])
    assert first.computed_tokens == first.prompt_tokens
    assert again.computed_tokens < again.prompt_tokens / 2


def test_weighs_options(start: Any) -> None:
    engine = start()
    (done,) = engine.stream([ask(1, options=("A", "B"))])
    assert (done.text, done.finish) == ("", "stop")
    assert done.logprobs == pytest.approx((math.log(0.1), math.log(0.2)))
    rows = engine.choose([ask(1), ask(1), ask(2)], ["A", "B"])
    assert rows == [done.logprobs] * 3
    with pytest.raises(EngineError, match="begin with the same token"):
        engine.choose([ask(1)], ["A", "A"])


def test_a_long_answer_holds_nobody_and_prompts_are_taken_lazily(start: Any) -> None:
    """Each short answer asks for the next one; a long one runs all the while."""
    engine = start("last:29", slots=2)
    done: list[str] = []
    taken: list[str] = []

    def feed() -> Iterator[Prompt | None]:
        yield ask(0, max_tokens=900)
        for number in range(1, 30):
            while len(done) < number - 1:
                yield None
            taken.append(str(number))
            yield ask(number)

    for completion in engine.stream(feed()):
        done.append(completion.id)
        assert len(taken) <= len(done) + 1
    assert list(map(int, done)) == [*range(1, 30), 0]


def test_a_stream_that_only_waits_is_a_deadlock(start: Any) -> None:
    with pytest.raises(EngineError, match="waits for prompts"):
        list(start().stream([None]))


def test_a_poisoned_prompt_is_its_own_fault(start: Any, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    real = renderer.prompt_ids

    def spoiled(turns: Any, *args: Any, **kwargs: Any) -> list[int]:
        return [*real(turns, *args, **kwargs), 5000] if "poison" in turns[0].text else real(turns, *args, **kwargs)

    monkeypatch.setattr(renderer, "prompt_ids", spoiled)
    prompts = [ask(0), ask(1, text="poison"), ask(2, temperature=9.0), ask(3, text="word " * 3000), ask(4)]
    found = {c.id: c for c in engine.stream(prompts)}
    assert [found[str(i)].finish for i in range(5)] == ["stop", "error", "error", "error", "stop"]
    assert "5000 is out of vocabulary" in found["1"].error
    assert "temperature must be in [0, 2]" in found["2"].error
    assert "do not fit in a context" in found["3"].error


def test_two_streams_and_an_abandoned_one(start: Any) -> None:
    engine = start("last:99")
    left = engine.stream([ask(i, max_tokens=900) for i in range(10)] + [ask(i) for i in range(10, 20)])
    assert next(left).id in {str(i) for i in range(10, 20)}
    inner = [c.id for c in engine.stream([ask(i) for i in range(5)])]
    assert sorted(inner) == list("01234")
    left.close()
    assert engine._child._asked == {}
    assert [c.finish for c in engine.stream([ask(1)])] == ["stop"]


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(("fault", "words"), [
    ("oom", r"vLLM did not load: RuntimeError: CUDA out of memory.*; use a --batch-size below 64, --engine unsloth"),
    ("kv", "larger than the available KV cache.*--engine unsloth"),
    ("busy", "Free memory on device.*; another process holds the GPU"),
    ("odd", r"OddForCausalLM.*; its log is .*vllm_worker-\w+\.log"),
])  # fmt: skip
def test_a_model_that_does_not_load_is_one_line(start: Any, fault: str, words: str) -> None:
    with pytest.raises(EngineError, match=words) as caught:
        start(fault)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("fault", "words"), [
    ("die", r"vLLM died: its process was killed \(signal 9.*; its log is .*\. It is loaded again \(death 1 of "),
    ("step", "vLLM died: RuntimeError: CUDA error: an illegal memory access.*then [2-8] prompts are asked again"),
    ("hang", "vLLM died: no answer for 3 s; its log is .*then [2-8] prompts are asked again"),
])  # fmt: skip
def test_a_child_that_dies_or_hangs_is_started_again_and_asked_what_it_owes(
    start: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], fault: str, words: str
) -> None:
    engine = start(f"once:{tmp_path / 'made'}:{fault}", deadline=3.0 if fault == "hang" else 600.0)
    group, log = engine._child.pid, engine._child.log
    found = {c.id: c for c in engine.stream([ask(i) for i in range(8)])}
    assert {c.finish for c in found.values()} == {"stop"} and len(found) == 8
    assert found == {c.id: replace(c, computed_tokens=found[c.id].computed_tokens) for c in
                     start().stream([ask(i) for i in range(8)])}  # fmt: skip
    said = [line for line in capfd.readouterr().err.splitlines() if "died" in line]
    assert len(said) == 1 and re.search(words, said[0]), said
    assert living_members(group) == [] and engine._child.pid != group
    engine.close()
    assert log.exists() and not engine._child.log.exists()  # the line has named the first


class Clock:
    """In the place of threading.Timer: it strikes when the test says so."""

    made: list[Clock]

    def __init__(self, seconds: float, strike: Any, args: tuple[int, ...]) -> None:
        self.seconds, self.strike, self.going = seconds, lambda: strike(*args), False
        Clock.made.append(self)

    def start(self) -> None:
        self.going = True

    def cancel(self) -> None:
        self.going = False


def test_a_load_that_never_ends_is_a_death(
    start: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first child dies at work, the second hangs while it loads, the third serves."""
    Clock.made = []
    monkeypatch.setattr(revived.threading, "Timer", Clock)
    engine = start(f"once:{tmp_path / 'first'}:die")
    hangs = tmp_path / "second"
    monkeypatch.setenv("STAND_IN", f"once:{hangs}:slow_load")
    found: list[Completion] = []
    speaking = threading.Thread(target=lambda: found.extend(engine.stream([ask(i) for i in range(4)])), daemon=True)
    speaking.start()
    assert until(hangs.exists) and engine.loading and Clock.made[1].going
    Clock.made[1].strike()
    speaking.join(60)
    assert {c.finish for c in found} == {"stop"} and len(found) == 4 and not engine.loading
    assert [clock.seconds for clock in Clock.made] == [revived.LOAD_SECONDS] * 3
    assert not any(clock.going for clock in Clock.made)
    Clock.made[1].strike()  # too late: it means a child that is gone
    assert [c.finish for c in engine.stream([ask(1)])] == ["stop"]
    said = [line for line in capfd.readouterr().err.splitlines() if "died" in line]
    assert len(said) == 2 and "vLLM died: it was not ready after 30 minutes; its log is" in said[1]


def test_a_first_load_that_never_ends_is_one_line(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revived, "LOAD_SECONDS", 0.06)
    with pytest.raises(EngineError, match=r"vLLM did not load: it was not ready after 0\.001 minutes; its log is"):
        start("slow_load")


def test_a_prompt_that_kills_the_child_is_found_and_stops_no_other(start: Any, tmp_path: Path) -> None:
    engine = start(slots=4)
    poison = ask(3, temperature=1.75)
    asked = [poison if i == 3 else ask(i) for i in range(12)]
    found = {c.id: c for c in engine.stream(asked)}
    assert [found[str(i)].finish for i in range(12)] == ["stop"] * 3 + ["error"] + ["stop"] * 8
    assert found["3"].error.startswith("its process died 3 times on this prompt: its process was killed")
    assert found["3"].final == "attempts" and engine._child._deaths == 0
    pid = engine._child.pid
    assert [c.finish for c in engine.stream([ask(1)])] == ["stop"]
    again = list(engine.stream([ask(5), poison, ask(6)]))  # remembered: it runs alone, and kills nobody else's work
    assert [c.id for c in again] == ["5", "3", "6"] and again[1].error.startswith("its process died 4 times")
    assert engine._child.pid != pid


def test_two_streams_outlive_a_death(start: Any, tmp_path: Path) -> None:
    engine = start("last:99", slots=4)
    left = engine.stream([ask(0, max_tokens=900), *(ask(i) for i in range(1, 4))])
    assert next(left).id != "0"
    os.killpg(engine._child.pid, signal.SIGKILL)
    assert sorted(c.id for c in engine.stream([ask(i) for i in range(4, 9)])) == list("45678")
    left.close()
    assert [c.finish for c in engine.stream([ask(1)])] == ["stop"]


def test_a_child_that_dies_whatever_it_is_asked_ends_its_streams_with_one_line(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cai_experiment.engines.revived.DEATHS_IN_A_ROW", 2)
    engine = start("step")
    group = engine._child.pid
    with pytest.raises(EngineError, match="vLLM died 2 times running, at last: RuntimeError: CUDA error") as caught:
        list(engine.stream([ask(i, max_tokens=900) for i in range(8)]))
    assert "\n" not in str(caught.value) and engine._child.log.exists()
    with pytest.raises(EngineError, match="vLLM died 2 times"):
        list(engine.stream([ask(1)]))
    engine.close()
    assert living_members(group) == living_members(engine._child.pid) == []


def test_a_hanging_child_that_reads_nothing_holds_nobody_up(start: Any, tmp_path: Path) -> None:
    """More of prompts than a pipe's 64 kB lies before a child that is stopped."""
    engine = start(slots=60, deadline=3.0)
    os.killpg(engine._child.pid, signal.SIGSTOP)
    found = list(engine.stream([ask(i, text="word " * 150) for i in range(60)]))
    assert {c.finish for c in found} == {"stop"} and len(found) == 60
    assert sum(c.prompt_tokens for c in found) * len("500, ") > 65_536


def test_the_runner_opens_as_many_examples_as_are_sent_ahead(start: Any) -> None:
    engine = start(slots=40)
    taken: list[int] = []

    def feed() -> Iterator[Prompt | None]:
        for number in range(200):
            taken.append(number)
            yield ask(number)

    next(engine.stream(feed()))
    assert engine.width == 50 <= len(taken)


def test_without_vllm_the_line_says_so(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("vllm") is not None:
        pytest.skip("vllm is installed here")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    with pytest.raises(EngineError, match="vLLM did not load: ModuleNotFoundError: No module named 'vllm'"):
        VLLMEngine(VLLMSettings("folder"), None, renderer)


# ---------------------------------------------------------------- ending


@pytest.mark.parametrize("fault", ["worker", "deaf"])
def test_close_ends_the_child_and_its_workers(start: Any, fault: str) -> None:
    engine = start(fault)
    group = engine._child.pid
    assert until(lambda: len(living_members(group)) == 2)  # the child and a worker, which knows nothing of pipes
    began = time.monotonic()
    engine.close()
    assert living_members(group) == []
    assert time.monotonic() - began < 30  # it would have slept for 300 s
    assert not engine._child.log.exists()


PARENT = """
import os, sys, time
sys.path.insert(0, {tests!r})
from test_vllm import VLLMEngine, VLLMSettings
from cai_experiment.engines import revived
from types import SimpleNamespace
before = revived.Child.__init__
def told(self, *args):
    before(self, *args)
    holder = os.fork()
    if holder == 0:
        os.setsid()
        time.sleep(300)
    print("child", self.pid, holder, flush=True)
revived.Child.__init__ = told
VLLMEngine(VLLMSettings("folder"), None, SimpleNamespace(max_length=64))
print("ready", flush=True)
time.sleep(300)
"""


@pytest.mark.parametrize("fault", ["worker", "slow_load"])
def test_kill_9_of_the_parent_leaves_no_orphan(fault: str, tmp_path: Path) -> None:
    """Even with our end of the pipe held open by a process that the parent forked, and while the model is loading."""
    env = {**os.environ, "STAND_IN": fault, "TMPDIR": str(tmp_path),
           "PYTHONPATH": f"{STAND_INS}:{STAND_INS.parents[1]}"}  # fmt: skip
    script = PARENT.format(tests=str(Path(__file__).parent))
    parent = subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    word, child, holder = parent.stdout.readline().split()
    try:
        group = int(child)
        if fault == "worker":
            assert parent.stdout.readline() == "ready\n"
        assert word == "child" and until(lambda: len(living_members(group)) == 2)
        parent.kill()
        parent.wait()
        assert until(lambda: living_members(group) == [])
    finally:
        os.kill(int(holder), signal.SIGKILL)
        parent.kill()
        parent.wait()
        parent.stdout.close()


# ---------------------------------------------------------------- what auto takes


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What is installed and how much disk is free, to be changed by a test."""
    state: dict[str, Any] = {"vllm": True, "unsloth": True, "free": 500.0}
    monkeypatch.setattr(load, "find_spec", lambda name: state[name] or None)
    monkeypatch.setattr(serving, "free_gb", lambda place: state["free"])
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return state


GENERATE = LoadSettings(trains_after=False)


def test_auto_takes_vllm_where_it_fits_and_says_why(pod: dict[str, Any]) -> None:
    plan = make_plan(GENERATE, POD)
    assert (plan.engine, plan.quantization) == ("vllm", "bf16")
    assert plan.first_line.startswith(
        "model qwen2.5-32b (base) | engine vllm (own process; 66 GB of weights, 79 GB usable) | bfloat16 on cuda |"
    )
    assert make_plan(LoadSettings(), POD).engine == "unsloth"  # one load for generation and DPO
    assert make_plan(LoadSettings(trains_after=False, quantization="fp32", model="qwen2.5-7b"), POD).engine == "vllm"
    assert make_plan(LoadSettings(trains_after=False, random_weights="qwen2.5-32b"), POD).engine == "vllm"
    assert make_plan(GENERATE, PROFILES["cpu"]).engine == "hf"


@pytest.mark.parametrize(("change", "settings", "machine", "words"), [
    ({"free": 41.0}, GENERATE, POD, r"vllm no: 41 GB free disk at .*, 69 GB needed for 66 GB of weights"),
    ({"vllm": False}, GENERATE, POD, "vllm no: not installed"),
    ({}, GENERATE, PROFILES["rtx-4090"], r"vllm no: 35 GB of GPU memory needed \(30 of weights\), 24 GB usable"),
    ({}, LoadSettings(trains_after=False, quantization="4bit"), POD, "vllm no: .* not 4bit made while loading"),
    ({}, LoadSettings(trains_after=False, model="org/name"), POD, "vllm no: the size of org/name is not known"),
])  # fmt: skip
def test_each_refusal_has_its_figure(
    pod: dict[str, Any], change: dict[str, Any], settings: LoadSettings, machine: Hardware, words: str
) -> None:
    pod.update(change)
    plan = make_plan(settings, machine)
    assert (plan.engine, plan.quantization) == ("unsloth", "4bit")
    assert re.search(words, plan.first_line), plan.first_line


def test_a_slow_choice_names_the_hours_of_both_and_the_faster_flags(pod: dict[str, Any]) -> None:
    pod["free"] = 41.0
    both = r"by --plan about (\d+\.\d) hours for 1,000 pairs, (\d+\.\d) with --engine hf --quantization 4bit"
    found = re.search(both, make_plan(GENERATE, POD).first_line)
    assert found and float(found[1]) > 4 * float(found[2])
    for settings in (LoadSettings(), LoadSettings(trains_after=False, engine="hf")):  # one load for both; asked for
        assert "by --plan" not in make_plan(settings, POD).first_line
    pod["free"] = 500.0
    assert "by --plan" not in make_plan(GENERATE, POD).first_line


def test_weights_that_were_downloaded_need_no_disk(pod: dict[str, Any], tmp_path: Path) -> None:
    pod["free"] = 41.0
    blobs = disk.hub_cache() / "models--Qwen--Qwen2.5-32B" / "blobs"
    blobs.mkdir(parents=True)
    with (blobs / "part").open("wb") as file:
        file.truncate(30_000_000_000)  # sparse
    assert tmp_path in blobs.parents and disk.downloaded_gb("Qwen/Qwen2.5-32B") == 30.0
    assert make_plan(GENERATE, POD).engine == "vllm"


def test_asked_for_by_name(pod: dict[str, Any]) -> None:
    vllm = LoadSettings(engine="vllm", trains_after=False)
    assert make_plan(vllm, POD).engine == "vllm"
    for settings, machine, words in (
        (LoadSettings(engine="vllm"), POD, "keeps the weights in another process"),
        (LoadSettings(engine="vllm", trains_after=False, quantization="4bit"), POD, "name an AWQ or FP8 checkpoint"),
        (vllm, PROFILES["cpu"], "needs an NVIDIA GPU"),
        (LoadSettings(engine="server", trains_after=False), POD, "add --server URL"),
    ):
        with pytest.raises(BadInputError, match=words):
            make_plan(settings, machine)
    server = LoadSettings(server_url="http://127.0.0.1:1", model="some-name", trains_after=False)
    assert make_plan(server, POD).engine == "server"
    pod["free"] = 3.0
    with pytest.raises(EngineError, match="3 GB free disk"):
        make_plan(vllm, POD)
    pod["vllm"] = False
    with pytest.raises(EngineError, match="vllm is not installed; bash"):
        make_plan(vllm, POD)


def test_several_gpus_share_what_their_heads_divide() -> None:
    numbers = PRESETS["qwen2.5-32b"].architecture
    assert [serving.tensor_parallel(numbers, n) for n in (1, 2, 3, 4, 8)] == [1, 2, 2, 4, 8]
    assert serving.vllm_rows(numbers, POD, 65.5) == pytest.approx(47, abs=3)


# ---------------------------------------------------------------- the whole way, and vLLM's signatures


def test_loads_a_folder_the_whole_way(
    tiny_model_dir: Path, pod: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    monkeypatch.setattr(load, "detect", lambda: POD)
    settings = LoadSettings(model=str(tiny_model_dir), engine="vllm", trains_after=False, batch_size=7)
    engine = load.load_engine(settings)
    try:
        assert "engine vllm (--engine) | bfloat16 on cuda" in engine.first_line
        facts = engine.describe()
        assert (facts["slots"], facts["max_length"], facts["architecture"]) == (7, 2048, "Qwen2ForCausalLM")
        assert len(str(facts["weights_sha256"])) == 64
        assert [c.finish for c in engine.stream([ask(1)])] == ["stop"]
        assert "its log is" in capsys.readouterr().err
    finally:
        engine.close()


def test_signatures_of_vllm() -> None:
    """The stand-in has vLLM's own names and arguments, read from its source: importing it needs a GPU."""
    found = find_spec("vllm")
    if found is None or found.origin is None or STAND_INS in Path(found.origin).parents:
        pytest.skip("vllm is not installed here; setup_runpod.sh installs it on a machine with a GPU")
    package = Path(found.origin).parent

    def node(file: str, name: str, inside: str = "") -> Any:
        body = ast.parse((package / file).read_text(encoding="utf-8")).body
        if inside:
            body = next(n for n in body if isinstance(n, ast.ClassDef) and n.name == inside).body
        return next(n for n in body if getattr(n, "name", "") == name)

    def annotated(file: str, name: str) -> set[str]:
        return {n.target.id for n in node(file, name).body if isinstance(n, ast.AnnAssign)}

    def arguments(file: str, name: str, inside: str = "") -> set[str]:
        return {argument.arg for argument in node(file, name, inside).args.args}

    def stand_in(name: str) -> set[str]:
        module = ast.parse((STAND_INS / "vllm" / "__init__.py").read_text(encoding="utf-8"))
        found = next(n for n in module.body if isinstance(n, ast.ClassDef) and n.name == name)
        return {n.target.id for n in found.body if isinstance(n, ast.AnnAssign)}

    assert set(VLLMSettings("folder").arguments(64)) == stand_in("EngineArgs")
    assert stand_in("EngineArgs") <= annotated("engine/arg_utils.py", "EngineArgs")
    assert stand_in("SamplingParams") <= annotated("sampling_params.py", "SamplingParams")
    engine = "v1/engine/llm_engine.py"
    assert {"engine_args", "usage_context"} <= arguments(engine, "from_engine_args", "LLMEngine")
    assert {"request_id", "prompt", "params"} <= arguments(engine, "add_request", "LLMEngine")
    assert {"request_ids"} <= arguments(engine, "abort_request", "LLMEngine")
    assert node(engine, "step", "LLMEngine") and node(engine, "has_unfinished_requests", "LLMEngine")
    assert node("v1/engine/core_client.py", "shutdown", "InprocClient")
    assert arguments("inputs/engine.py", "tokens_input") >= {"prompt_token_ids"}
    output = {"request_id", "outputs", "finished", "num_cached_tokens"}
    assert output <= arguments("outputs.py", "__init__", "RequestOutput")
    assert {"token_ids", "logprobs", "finish_reason"} <= annotated("outputs.py", "CompletionOutput")
    assert "logprob" in annotated("logprobs.py", "Logprob")
    assert {"num_gpu_blocks", "block_size", "enable_prefix_caching"} <= annotated("config/cache.py", "CacheConfig")
    assert "FINAL_ONLY" in ast.unparse(node("sampling_params.py", "RequestOutputKind"))
    names = (package / "envs.py").read_text(encoding="utf-8")
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD"):
        assert f'"{name}"' in names
