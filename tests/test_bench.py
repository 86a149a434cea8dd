"""bench.py's counting with known answers, a tiny real run of each suite, and what kill_test.py counts."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from cai_experiment.constitution.principles import load_constitution
from cai_experiment.constitution.prompts import Turn, ask_for_answer, ask_violated
from cai_experiment.engines.base import Completion, Prompt, Sampling
from cai_experiment.errors import EXIT_NO_GO, EXIT_OK, BadInputError
from cai_experiment.models.hardware import Hardware
from cai_experiment.models.memory import weights_gb
from cai_experiment.models.presets import PRESETS
from cai_experiment.observe.log_file import LogFile
from cai_experiment.scripts import bench, kill_test
from cai_experiment.scripts._bench_chain import batches, instructions_for, lockstep, stage_settings
from cai_experiment.scripts._bench_distilabel import CHAIN, Distilabel
from cai_experiment.scripts._bench_equality import compared
from cai_experiment.scripts._bench_figures import Figure, Occupancy, Report, interleaved, medians, prefix_tree_size
from cai_experiment.scripts._bench_generation import Chain, speedups
from cai_experiment.scripts._bench_gpu import Run, figures, shrunk
from cai_experiment.scripts._bench_process import peak_bytes, run_child
from cai_experiment.scripts._bench_scale import Cost
from cai_experiment.scripts._bench_scale import figures as scale_figures
from cai_experiment.scripts._bench_watch import Recorded, computed_over_tree, fewest_passes, tokens_read, watched_passes
from cai_experiment.scripts._kill_count import Session, Tally, lost_lines
from cai_experiment.scripts._kill_log import log_faults
from cai_experiment.scripts._scripted_engine import ScriptedEngine, script

GENERATION = ("speedup_vs_generate_batch16", "speedup_vs_generate_batch1", "speedup_vs_distilabel",
              "prefill_over_prefix_tree", "pipeline_over_engine", "slot_occupancy")  # fmt: skip
RECORDS = ("rows_per_second", "resume_scan_seconds_100k", "resume_replay_seconds_100k")
KEYS = {"value", "target", "limit", "arms", "rounds"}
SCALE = ("memory_20_over_2", "seconds_per_example_20_over_2", "cpu_seconds_per_example_20_over_2", "bytes_an_example")
EQUALITY = ("equal_texts_server_float32", "equal_texts_vllm_float32",
            "equal_texts_server_bfloat16", "equal_texts_vllm_bfloat16")  # fmt: skip


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize(
    ("rows", "size"),
    [
        ([], 0),
        ([[]], 0),
        ([[5, 6, 7]], 3),
        ([[5, 6, 7], [5, 6, 7]], 3),
        ([[1, 2, 3], [1, 2], [1, 2, 4, 5]], 5),  # 1, 1-2, 1-2-3, 1-2-4, 1-2-4-5
        ([[1, 2], [2, 1]], 4),
        ([[1], [256], [65536], [1, 256]], 4),  # ids whose bytes are prefixes of one another
    ],
)
def test_prefix_tree(rows: list[list[int]], size: int) -> None:
    assert prefix_tree_size(rows) == size


def test_prefix_tree_against_a_set_of_prefixes() -> None:
    chance = random.Random(3)
    rows = [[chance.randrange(3) for _ in range(chance.randrange(9))] for _ in range(200)]
    assert prefix_tree_size(rows) == len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)})


def test_occupancy_counts_only_passes_for_which_rows_waited() -> None:
    full = Occupancy()
    assert full.share is None and full.reason
    full.add(at_hand=3, put_off=0, worked=3, slots=4)  # a slot is idle, but nothing waits
    assert (full.passes, full.crowded, full.share) == (1, 0, None)
    full.add(at_hand=9, put_off=5, worked=4, slots=4)
    full.add(at_hand=4, put_off=0, worked=3, slots=4)
    full.add(at_hand=3, put_off=1, worked=2, slots=4)  # one waits for a neighbour's prefix: it could have had a slot
    assert (full.passes, full.crowded, full.offered, full.worked) == (4, 3, 11, 9)
    assert full.share == pytest.approx(9 / 11)


def test_interleaved_rounds_begin_with_another_arm_each() -> None:
    order: list[str] = []
    given = {name: itertools.count(start) for name, start in (("a", 1), ("b", 10), ("c", 100))}

    def arm(name: str) -> float:
        order.append(name)
        return float(next(given[name]))

    arms = {name: lambda name=name: arm(name) for name in given}
    rounds = interleaved(arms, 3, lambda line: None)
    assert rounds == {"a": [1, 2, 3], "b": [10, 11, 12], "c": [100, 101, 102]}
    assert medians(rounds) == {"a": 2, "b": 11, "c": 101}
    assert "".join(order) == "abcbcacab"


def test_figures_are_met_by_their_own_side_and_never_without_a_value() -> None:
    assert Figure("x", 4.0, 4.0, None).met
    assert not Figure("x", 3.9, 4.0, None).met
    assert Figure("x", 1.0, 1.05, None, at_most=True).met
    assert not Figure("x", 1.1, 1.05, None, at_most=True).met
    assert not Figure("x", None, 4.0, None, reason="no pip").met
    assert Figure("x", 3.0, None, None).met  # no target: a figure to be read
    row = Figure("x", None, 4.0, 9.0, {"ours": 2.0, "theirs": None}, reason="no pip").as_json()
    assert row == {
        "value": None,
        "target": 4.0,
        "limit": 9.0,
        "arms": {"ours": 2.0, "theirs": None},
        "rounds": {},
        "reason": "no pip",
    }


def test_the_json_keeps_every_round_and_the_setting_beside_the_figures() -> None:
    rounds = {"ours": [2.0, 3.0], "theirs": [math.nan, 1.0]}
    report = Report([Figure("x", 2.5, 4.0, None, {"ours": 2.5}, rounds=rounds)], {"rows": 400})
    found = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert found["x"]["rounds"] == {"ours": [2.0, 3.0], "theirs": [None, 1.0]}
    assert found["x"].keys() == KEYS and found["setting"] == {"rows": 400}


def test_the_pipeline_is_held_against_a_rival_s_fastest_arm() -> None:
    chain = Chain(None, (), stage_settings(0), "")
    rounds = {"pipeline": [60.0], "generate_batch16": [9.0, 11.0], "generate_batch1": [4.0],
              "distilabel_one_process": [5.0], "distilabel_two_processes": [12.0]}  # fmt: skip
    found = {figure.name: figure for figure in speedups(chain, rounds, 120.0)}
    assert {name: figure.value for name, figure in found.items()} == {
        "speedup_vs_generate_batch16": 6.0, "speedup_vs_generate_batch1": 15.0, "speedup_vs_distilabel": 5.0,
    }  # fmt: skip
    assert found["speedup_vs_distilabel"].limit == 10.0
    assert found["speedup_vs_generate_batch16"].rounds == {"pipeline": [60.0], "generate_batch16": [9.0, 11.0]}
    chain.unmeasured["distilabel_two_processes"] = "no room"
    figure = {figure.name: figure for figure in speedups(chain, rounds, 120.0)}["speedup_vs_distilabel"]
    assert (figure.value, figure.reason, figure.met) == (None, "no room", False)  # the other might be the faster one
    assert figure.arms == {"pipeline": 60.0, "distilabel_one_process": 5.0, "distilabel_two_processes": None}


def test_memory_and_time_of_a_large_run_over_a_small_one() -> None:
    small, large = Cost(500, 1000e6, 100.0, 150.0), Cost(5000, 1090e6, 1200.0, 1500.0)
    found = {figure.name: figure for figure in scale_figures(small, large, 500, 5000, [small, large, small])}
    assert found["memory_5000_over_500"].rounds == {"mb_500": [1000.0, 1000.0], "mb_5000": [1090.0]}
    assert found["memory_5000_over_500"].value == pytest.approx(1.09) and found["memory_5000_over_500"].met
    assert found["seconds_per_example_5000_over_500"].value == pytest.approx(1.2)
    assert not found["seconds_per_example_5000_over_500"].met
    assert found["cpu_seconds_per_example_5000_over_500"].value == pytest.approx(1.0)
    assert found["bytes_an_example"].value == pytest.approx(20_000)


def test_texts_are_equal_with_their_ends_and_a_failure_equals_nothing() -> None:
    ours = {id: Completion(id, id * 3, "stop", completion_tokens=3) for id in "abc"}
    ours["d"] = Completion("d", "", "error", error="lost")
    theirs = ours | {"b": Completion("b", "bb", "stop"), "c": Completion("c", "ccc", "length")}
    figure = compared("x", ours, theirs, 1.0)
    assert (figure.value, figure.met, figure.arms) == (0.25, False, {"equal": 1, "prompts": 4, "tokens": 9})
    assert compared("x", ours | {"d": theirs["a"]}, ours | {"d": theirs["a"]}, 1.0).met


def test_a_child_that_fails_says_so_in_one_line(tmp_path: Path) -> None:
    done = tmp_path / "done"
    run_child([sys.executable, "-c", f"open({str(done)!r}, 'w'); raise SystemExit(3)"], {}, "no run", 60, (0, 3))
    assert done.exists()
    with pytest.raises(RuntimeError, match=r"no run: ValueError: seven$"):
        run_child([sys.executable, "-c", "print('x'); raise ValueError('seven')"], {}, "no run", 60)
    with pytest.raises(RuntimeError, match=r"no run: exit code 4$"):
        run_child([sys.executable, "-c", "raise SystemExit(4)"], {}, "no run", 60)


def test_a_child_s_peak_is_its_own() -> None:
    held = bytearray(200_000_000)
    code = "from cai_experiment.scripts._bench_process import peak_bytes; print(peak_bytes()); "
    code += "held = bytearray(50_000_000); print(peak_bytes())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    before, after = map(int, done.stdout.split())
    assert peak_bytes() > len(held) > before  # it did not inherit ours
    assert 45_000_000 < after - before < 60_000_000


def test_the_fewest_passes_of_an_engine_that_cannot_be_watched() -> None:
    done = [Completion("a", "x", "stop", prompt_tokens=10, completion_tokens=3) for _ in range(4)]
    done.append(Completion("v", "", "stop", prompt_tokens=7, logprobs=(-0.1, -2.0)))
    least = fewest_passes(done, slots=8)
    assert (least.occupancy.passes, least.cached_tokens_read) == (2, 4 * (10 + 11 + 12))


def test_an_example_s_verdicts_read_its_conversation_once() -> None:
    done = [Completion(f"7/verdict/0/{i}", "", "stop", prompt_tokens=40 + i, logprobs=(-0.1, -2.0)) for i in range(3)]
    done += [Completion("8/verdict/0/1", "", "stop", prompt_tokens=30, logprobs=(-0.1, -2.0))]
    done += [Completion("9/answer/0", "x", "stop", prompt_tokens=10, completion_tokens=5)]
    assert tokens_read(done) == 42 + 30 + 15


def test_a_conversation_that_is_weighed_waits_for_one_slot(tiny_model_dir: Path) -> None:
    from cai_experiment.engines.load import LoadSettings, load_engine

    engine = load_engine(LoadSettings(model=str(tiny_model_dir), layout="chat", engine="hf", batch_size=16))
    asked = ask_for_answer(instructions_for(1, 0)[0].text)
    answered = (*asked, Turn("answer", "Use a pot."))
    prompts = [Prompt("0/answer/0", asked, "answer", Sampling(0.0, 4))]
    for one in load_constitution().principles:
        turns = (*answered, ask_violated(one))
        prompts.append(Prompt(f"1/verdict/0/{one.id}", turns, "verdict", Sampling(0.0, 1), options=("A", "B")))
    with watched_passes() as passes:
        assert len(list(engine.stream(prompts))) == 16
    assert passes.occupancy.share is None  # two rows at most, of sixteen slots: none ever waited
    engine.close()


def test_slots_of_a_card_follow_its_free_memory() -> None:
    from cai_experiment.engines.hf import LEAST_SLOTS, slots_that_fit

    qwen = SimpleNamespace(num_hidden_layers=64, num_key_value_heads=8, num_attention_heads=40, hidden_size=5120)
    row = 9 / 8 * 2049 * 256 * 1024  # 256 KiB a token of Qwen2.5-32B, the bucket above 1,536 columns, scratch rows
    assert slots_that_fit(100 * row, qwen, 2, 4096, 256) == 100
    assert slots_that_fit(100 * row, qwen, 2, 512, 256) == 256  # shorter rows
    assert slots_that_fit(1e9, qwen, 2, 4096, 256) == LEAST_SLOTS


def test_a_card_is_held_against_its_data_sheet() -> None:
    numbers = PRESETS["qwen2.5-32b"].architecture
    card = Hardware("this machine", "cuda", "NVIDIA A100-SXM4-80GB", 80, "4bit", 117, 16)
    run = Run(seconds=10.0, spoken=1000, computed=4000, weighed=0, passes=100, cached_tokens_read=0)
    found = {figure.name: figure for figure in figures(run, numbers, "4bit", card, 25.0)}
    read = 100 * weights_gb(numbers, "4bit") / 10  # GB a second
    assert found["share_of_bandwidth"].value == pytest.approx(read / 2039)
    skipped = 3 * numbers.hidden * numbers.intermediate * 4000  # the last layer's, for prompt tokens
    flops = 2 * (numbers.linear_parameters * 5000 - skipped + numbers.vocab * numbers.hidden * 1000) / 10
    assert found["share_of_flops"].value == pytest.approx(flops / 312e12)
    assert found["tokens_per_second"].value == 100
    busiest = max(found["share_of_bandwidth"].value, found["share_of_flops"].value)
    assert found["tokens_per_second"].limit == pytest.approx(100 / busiest)
    assert (found["peak_memory_gb"].value, found["peak_memory_gb"].limit) == (25.0, 80)
    unknown = figures(run, numbers, "4bit", dataclasses.replace(card, gpu_name="NVIDIA X1"), 25.0)
    assert [figure.value for figure in unknown if "share" in figure.name] == [None, None]


@pytest.mark.parametrize("key", [key for key, preset in PRESETS.items() if not preset.is_local])
def test_a_shrunk_preset_keeps_its_shape_of_heads(key: str) -> None:
    numbers, small = PRESETS[key].architecture, shrunk(PRESETS[key]).architecture
    assert small.heads / small.kv_heads == numbers.heads / numbers.kv_heads
    assert small.heads * small.head_size == small.hidden
    assert small.tied == numbers.tied and small.parameters < 10_000_000


# ---------------------------------------------------------------- the chain of the other arms


def test_lockstep_asks_what_the_pipeline_asks() -> None:
    rows, settings = instructions_for(6, 0), stage_settings(0, "random")
    asked: list[list[Prompt]] = []

    def complete(prompts: list[Prompt]) -> list[Completion]:
        asked.append(prompts)
        return [script(prompt) for prompt in reversed(prompts)]  # any order will do

    tokens = lockstep(rows, settings, complete)
    assert tokens == sum(script(prompt).completion_tokens for prompts in asked for prompt in prompts)
    engine = ScriptedEngine()
    chain = Chain(engine, rows, settings, "")
    assert chain.pipeline() == tokens
    assert engine.asked == {prompt.id: 1 for prompts in asked for prompt in prompts}
    first: list[list[Prompt]] = []
    lockstep(rows, settings, lambda prompts: first.append(prompts) or complete(prompts), stages=2)
    assert first == asked[:2]


def test_a_batch_holds_prompts_of_one_kind() -> None:
    warm, cool = Sampling(0.7, 500), Sampling(0.3, 300)
    prompts = [Prompt(str(i), (), "answer", cool if i % 3 == 0 else warm) for i in range(7)]
    prompts.append(Prompt("v", (), "verdict", warm, options=("A", "B")))
    ids = [[prompt.id for prompt in batch] for batch in batches(prompts, 2)]
    assert ids == [["0", "3"], ["6"], ["1", "2"], ["4", "5"], ["v"]]


def test_recorded_prefill_against_the_tree(tiny_model_dir: Path) -> None:
    from cai_experiment.engines.load import LoadSettings, load_engine

    engine = load_engine(LoadSettings(model=str(tiny_model_dir), layout="chat", engine="hf", batch_size=16))
    recorded = Recorded(engine)
    turns = ask_for_answer(instructions_for(1, 0)[0].text)
    prompts = [Prompt(str(i), turns, "answer", Sampling(0.0, 4)) for i in range(3)]
    assert len(list(recorded.stream(prompts))) == 3
    size = len(engine.renderer.prompt_ids(prompts[0].turns, "answer", max_tokens=4))
    value, arms = computed_over_tree(recorded)
    # three times one prompt: one whole prefill, and each other row's last token, which gives its logits
    assert arms["prefix_tree_tokens"] == size
    assert arms["computed_prompt_tokens"] == size + 2
    assert value == pytest.approx((size + 2) / size)
    engine.close()


# ---------------------------------------------------------------- the suites, for real and tiny


def check_json(path: Path, names: tuple[str, ...]) -> dict[str, dict[str, object]]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert tuple(found) == (*names, "setting")
    setting = found.pop("setting")
    assert {"suite", "rows", "repeats", "threads", "seed", "principles", "versions", "processor"} <= setting.keys()
    assert setting["versions"]["python"] and setting["processor"]
    for name, row in found.items():
        assert KEYS <= row.keys() <= KEYS | {"reason"}, name
        assert row["arms"] and (row["value"] is not None) != ("reason" in row), name
        assert row["rounds"].keys() <= row["arms"].keys(), name
    return found | {"setting": setting}


@pytest.fixture
def one_thread() -> Iterator[list[str]]:
    """Flags of bench.py, which sets torch's threads for its process: two wait for each other on a busy machine."""
    import torch

    before = torch.get_num_threads()
    yield ["--threads", "1"]
    torch.set_num_threads(before)


def test_generation_suite(
    tmp_path: Path, nano_dir: Path, capsys: pytest.CaptureFixture[str], one_thread: list[str]
) -> None:
    path = tmp_path / "bench.json"
    flags = ["--rows", "4", "--repeats", "1", "--principles", "random", "--batch-size", "16", "--no-distilabel"]
    flags += one_thread
    code = bench.main(["--suite", "generation", *flags, "--model", str(nano_dir), "--json", str(path)])
    assert code == EXIT_NO_GO  # a figure that was not measured is no pass
    found = check_json(path, GENERATION)
    assert found["speedup_vs_distilabel"]["value"] is None
    assert found["prefill_over_prefix_tree"]["value"] < 1.5
    assert {arm: len(each) for arm, each in found["pipeline_over_engine"]["rounds"].items()} == {
        "pipeline": 1, "engine": 1,
    }  # fmt: skip
    setting = found["setting"]
    assert (setting["rows"], setting["dtype"], setting["slots"]) == (4, "float32", 16)
    assert len(setting["weights_sha256"]) == 64
    assert "pipeline_over_engine" in capsys.readouterr().out


def test_equality_suite(tmp_path: Path, nano_dir: Path, one_thread: list[str]) -> None:
    path = tmp_path / "bench.json"
    flags = ["--rows", "4", "--model", str(nano_dir), *one_thread]
    code = bench.main(["--suite", "equality", *flags, "--json", str(path)])
    found = check_json(path, EQUALITY)
    served = found["equal_texts_server_float32"]
    assert (served["value"], served["target"]) == (1.0, 1.0) and served["arms"]["tokens"] > 40
    assert found["equal_texts_server_bfloat16"]["target"] is None
    if found["equal_texts_vllm_float32"]["value"] is None:  # no card, so nothing is missed
        assert code == EXIT_OK


@pytest.mark.slow
def test_scale_suite(tmp_path: Path, nano_dir: Path) -> None:
    path = tmp_path / "bench.json"
    bench.main(["--suite", "scale", "--rows", "20", "--model", str(nano_dir), "--json", str(path)])
    found = check_json(path, SCALE)
    assert found["memory_20_over_2"]["value"] > 0.8
    assert found["bytes_an_example"]["arms"]["examples_more"] == 18
    assert found["seconds_per_example_20_over_2"]["value"] > 0


def test_generation_suite_on_a_card_runs_dry_without_one(tmp_path: Path, one_thread: list[str]) -> None:
    path = tmp_path / "bench.json"
    code = bench.main(["--suite", "generation", "--gpu", "--random-weights", "qwen2.5-32b", "--tiny", "--repeats", "1",
                       "--rows", "1", "--principles", "random", *one_thread, "--json", str(path)])  # fmt: skip
    found = json.loads(path.read_text(encoding="utf-8"))
    names = ("tokens_per_second", "peak_memory_gb", "share_of_bandwidth", "share_of_flops", "setting")
    assert (code, tuple(found)) == (EXIT_OK, names)
    assert found["tokens_per_second"]["rounds"] == {"tokens_per_second": [found["tokens_per_second"]["value"]]}
    assert found["tokens_per_second"]["value"] > 0
    # answer, and per round critique and revision, each to its last token: nothing was cut by random words
    assert found["tokens_per_second"]["arms"]["completion_tokens"] == 5 * 8


def test_records_suite(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    bench.main(["--suite", "records", "--rows", "500", "--repeats", "1", "--json", str(path)])
    found = check_json(path, RECORDS)
    assert found["resume_replay_seconds_100k"]["value"] > found["resume_replay_seconds_100k"]["limit"] > 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--random-weights", "qwen2.5-32b"], "add --gpu"),
        (["--engine", "vllm"], "add --gpu"),
        (["--gpu", "--tiny"], "--random-weights"),
    ],
)
def test_flags_that_do_not_go_together(flags: list[str], words: str) -> None:
    with pytest.raises(BadInputError, match=words):
        bench.main(["--suite", "generation", *flags])


def test_a_card_is_measured_by_two_suites_alone() -> None:
    with pytest.raises(BadInputError, match="not records"):
        bench.main(["--suite", "records", "--gpu"])


def test_an_unknown_suite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(["--suite", "ensembles"])
    assert stop.value.code == 2
    assert "generation" in capsys.readouterr().err


def test_distilabel_that_cannot_be_had_is_no_figure(tmp_path: Path) -> None:
    (tmp_path / "file").touch()  # no environment can be made below a file
    arm = Distilabel(tmp_path / "file" / "cache", "nowhere", 2, 1, stage_settings(0), processes=2)
    with pytest.raises(RuntimeError, match="no environment for distilabel"):
        arm.tokens_per_second()


def test_distilabel_in_another_precision_is_no_figure(tmp_path: Path) -> None:
    arm = Distilabel(tmp_path, "nowhere", 2, 1, stage_settings(0), processes=2, dtype="float32")
    result = {"rows": 2, "tokens": 300, "seconds": 10.0, "dtypes": ["float32"]}
    assert arm.speed(result) == 30.0
    with pytest.raises(RuntimeError, match="distilabel computed in float16, the other arms in float32"):
        arm.speed(result | {"dtypes": ["float16"]})
    with pytest.raises(RuntimeError, match="1 of 2 rows"):
        arm.speed(result | {"rows": 1})


def test_distilabel_s_task_writes_the_precision_that_it_computes_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = distilabel_chain(monkeypatch)
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: text.split())
    llm = SimpleNamespace(
        _pipeline=SimpleNamespace(model=SimpleNamespace(dtype="torch.float16"), tokenizer=tokenizer),
        generate_outputs=lambda inputs, **kind: [{"generations": ["A"]} for _ in inputs],
    )
    part = chain.Part()
    part.llm, part.principles, part.times = llm, "random", str(tmp_path / "times")
    rows = [{"id": row.id, "instruction": row.text, "replies": "[]"} for row in instructions_for(2, 0)]
    (done,) = part.process(rows)
    assert all(json.loads(row["replies"]) for row in done)
    found = chain.timing((tmp_path / "times").read_text(encoding="utf-8"))
    assert found["dtypes"] == ["float16"] and found["seconds"] > 0
    assert chain.timing("2.0 5.0 torch.float32\n1.0 3.0 torch.float32\n") == {"seconds": 4.0, "dtypes": ["float32"]}


def distilabel_chain(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script of distilabel's arm, over stand-ins for the names that it imports."""
    for module, names in {
        "distilabel": [], "distilabel.models": [], "distilabel.models.llms": ["TransformersLLM"],
        "distilabel.pipeline": ["Pipeline"], "distilabel.steps": ["LoadDataFromDicts", "StepInput"],
        "distilabel.steps.tasks": ["Task"], "distilabel.typing": ["StepOutput"],
    }.items():  # fmt: skip
        stand_in = ModuleType(module)
        for name in names:
            setattr(stand_in, name, type(name, (), {}))
        monkeypatch.setitem(sys.modules, module, stand_in)
    spec = importlib.util.spec_from_file_location("distilabel_chain", CHAIN)
    chain = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))  # a script puts the checkout first
    spec.loader.exec_module(chain)
    return chain


# ---------------------------------------------------------------- what a kill costs


def journal_of(*ids: str) -> list[dict[str, object]]:
    return [{"id": id, "finish": "stop", "completion_tokens": 10} for id in ids]


def session(asked: str, lines: int, killed: bool = True, slots: int = 4, digest: str = "") -> Session:
    return Session(tuple(asked), slots, lines, digest, killed)


def test_what_was_in_flight_may_be_asked_again() -> None:
    tally = Tally()
    sessions = [session("abc", 1), session("bcd", 2), session("cd", 4, killed=False)]
    assert tally.add(sessions, journal_of("a", "b", "c", "d")) == []
    assert (tally.kills, tally.in_flight, tally.redone) == (2, 4, 4)  # b c, then c d
    assert (tally.tokens_in_flight, tally.tokens_redone, tally.most_in_flight) == (40, 40, 2)
    assert "4 prompts (40 tokens) were asked again, of 4 (40 tokens) in flight at 2 kills" in str(tally)


def test_what_was_finished_may_not_be_asked_again() -> None:
    found = Tally().add([session("ab", 1), session("ab", 2, killed=False)], journal_of("a", "b"))
    assert found == ["session 2 asked for a, which was finished", "a was asked again more often than it was in flight"]


def test_a_kill_costs_no_more_than_the_engine_holds() -> None:
    found = Tally().add([session("abc", 1, slots=1), session("bc", 3, killed=False)], journal_of("a", "b", "c"))
    assert found == ["kill 1 cost prompts of 2 conversations, and the engine holds 1"]


def test_an_example_s_verdicts_need_one_slot_together() -> None:
    asked = ("0/answer/0", "1/verdict/0/fair/yes_first", "1/verdict/0/lawful/yes_first")
    killed = Session(asked, 2, 0, "", True, weighed=frozenset(asked[1:]))
    after = Session(asked, 2, 3, "", False, weighed=frozenset(asked[1:]))
    assert Tally().add([killed, after], journal_of(*asked)) == []
    found = Tally().add([dataclasses.replace(killed, slots=1), after], journal_of(*asked))
    assert found == ["kill 1 cost prompts of 2 conversations, and the engine holds 1"]


def test_finished_lines_stay_where_they_were() -> None:
    lines = [b'{"id": "a"}\n', b'{"id": "b"}\n', b'{"id": "c"}\n']

    def after(count: int, of: list[bytes]) -> Session:
        return session("", count, digest=hashlib.sha256(b"".join(of[:count])).hexdigest())

    whole = b"".join(lines)
    assert lost_lines([after(2, lines), after(0, lines), after(3, lines)], whole) == []
    other = [lines[0], b'{"id": "x"}\n', lines[2]]
    assert lost_lines([after(1, lines), after(2, other), after(3, lines)], whole) == [
        "session 2 had finished lines that are not in the journal any more"
    ]
    assert lost_lines([after(3, lines)], b"".join(lines[:2])) != []


def log_of(path: Path, *words: str) -> Path:
    """A content log: "1ab" is stages a and b of example 1; the last one's content holds a time that no run repeats."""
    path.unlink(missing_ok=True)
    log = LogFile(path)
    for word in words:
        for stage in word[1:]:
            seconds = f"Time: {random.random():.1f}s"
            log.append({"stage": stage, "content": seconds, "metadata": {"example": word[0]}, "timestamp": 1.0})
    log.close()
    return path


@pytest.mark.parametrize(
    ("words", "kills", "wrong"),
    [
        (["1abc", "2abc"], 0, []),
        (["1ab", "1abc", "2a", "2abc"], 2, []),  # cut short, and told from the beginning
        (["1ab", "1abc", "2a", "2abc"], 1, ["the content log has 2 stories cut short by 1 kills"]),
        (["1abc", "1abc", "2abc"], 9, ["the content log has no whole story of example 2 where it should stand"]),
        (["1abc", "2abc", "2c"], 9, ["the content log has 1 entries too many"]),
        (["2abc", "1abc"], 9, ["the content log has no whole story of example 1 where it should stand"]),
        (["1abc"], 9, ["the content log has no whole story of example 2 where it should stand"]),
    ],
)
def test_a_content_log_tells_each_example_once(tmp_path: Path, words: list[str], kills: int, wrong: list[str]) -> None:
    reference = log_of(tmp_path / "reference", "1abc", "2abc")
    assert log_faults(log_of(tmp_path / "log", *words), reference, kills) == wrong


def test_ten_kills_of_a_scripted_run(tmp_path: Path) -> None:
    """In a process of its own, as the script is used: it forks, and must not have imported torch."""
    code = "import sys; from cai_experiment.scripts.kill_test import main; code = main(sys.argv[1:]); "
    code += "print('torch' in sys.modules); raise SystemExit(code)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--scripted", "--cycles", "10", "--count", "4", "--keep", str(tmp_path)],
        capture_output=True, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip
    assert done.returncode == EXIT_OK, done.stdout + done.stderr
    assert "at 10 kills" in done.stdout
    assert "10 cycles" in done.stdout and "bytes equal, nothing lost or made twice" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.slow  # a minute; tests/test_scale.py and test_resume.py kill the shipped model in every run
def test_ten_kills_of_the_shipped_model(tmp_path: Path, nano_dir: Path) -> None:
    done = subprocess.run(
        [sys.executable, kill_test.__file__, "--cycles", "10", "--count", "2", "--keep", str(tmp_path)],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == EXIT_OK, done.stdout + done.stderr
    assert "at 10 kills" in done.stdout


# ---------------------------------------------------------------- suite dpo


def _token_pairs() -> list[Any]:
    from cai_experiment.training.data import TokenPair

    one = TokenPair("a", [1, 2, 3], [4, 5, 6, 9], [4, 7, 9])  # 10 tokens with both prompts; trunk 1 2 3 4
    return [one, TokenPair("b", [1], [2, 9], [3, 4, 9])]


def test_tokens_of_the_arms_and_their_flops() -> None:
    from cai_experiment.models.presets import PRESETS
    from cai_experiment.scripts import _bench_dpo

    shape = _bench_dpo._shape(_token_pairs(), seed=0)
    assert shape["tokens_real"] == 6 + 4 + 3 + 2 + 2 + 3 and shape["tokens_padded"] == 2 * 2 * 7
    assert shape["tokens_packed"] == (4 + 2 + 1) + (1 + 1 + 2)  # the last token of an answer is no input
    assert shape["targets"] == 4 + 3 + 2 + 3 and shape["targets_packed"] == (1 + 3 + 2) + (2 + 3)
    numbers = PRESETS["nano"].architecture
    ours, theirs = (_bench_dpo._flops(numbers, shape, flag, 3) for flag in (True, False))
    assert ours < theirs < 4 * ours


def test_arms_of_the_dpo_suite_lose_alike(tmp_path: Path) -> None:
    """Two steps of each on the shipped model, from the very code that is timed."""
    from cai_experiment.scripts import _bench_dpo
    from cai_experiment.training.data import tokenize_pairs
    from cai_experiment.training.plumbing import plumbing_pairs

    args = argparse.Namespace(model=None, seed=0)
    engine = _bench_dpo._engine(args)
    rows, _ = tokenize_pairs(plumbing_pairs(10), engine.renderer, 1024)
    work = _bench_dpo.Work(args, rows, tmp_path)
    rounds = {f"{arm}_1": [work.run(arm, 1)()] for arm in _bench_dpo.ARMS}
    loss = _bench_dpo._losses(work.losses)
    assert loss.met and loss.value is not None and all(len(found) == 2 for found in work.losses.values())
    assert all(figures[0] > 0 for figures in rounds.values())
    rounds |= {name.replace("_1", "_3"): figures for name, figures in rounds.items()}
    found = _bench_dpo._speedups(rounds, _bench_dpo._shape(rows, 0), PRESETS["nano"].architecture)
    names = ["speedup_vs_trl_1_epoch", "speedup_vs_trl_3_epochs"]
    assert [figure.name for figure in found] == [*names, *(f"{name}_default" for name in names)]


def test_the_loss_head_holds_less_than_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    from cai_experiment.scripts import _bench_head

    for name, value in (("TOKENS", 2048), ("VOCAB", 20_000), ("HIDDEN", 64), ("ARMS", ("fast", "trl_best"))):
        monkeypatch.setattr(_bench_head, name, value)
    figure = _bench_head.head_memory(argparse.Namespace(threads=1), lambda line: None)
    assert figure.name == "loss_head_memory_over_trl" and figure.arms["fast"] and figure.met


@pytest.mark.parametrize("arms", [("fast",), pytest.param(("fast", "trl", "unsloth"), marks=pytest.mark.slow)])
def test_dpo_suite_on_a_card_runs_dry_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arms: tuple[str, ...]
) -> None:
    from cai_experiment.scripts import _bench_dpo_gpu

    monkeypatch.setattr(_bench_dpo_gpu, "ARMS", arms)
    path = tmp_path / "bench.json"
    code = bench.main(["--suite", "dpo", "--gpu", "--random-weights", "qwen2.5-32b", "--tiny", "--json", str(path)])
    found = json.loads(path.read_text(encoding="utf-8"))
    assert code == EXIT_NO_GO and found["fast_over_unsloth"]["value"] is None  # what was not measured is no pass
    for arm in set(arms) - {"unsloth"}:
        assert found[f"tokens_per_second_{arm}"]["value"] > 0, found[f"tokens_per_second_{arm}"]
