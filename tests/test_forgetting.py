"""Forgetting and collapse: lm-eval over a real model, GSM8K's real rows, alarms that ring and alarms that must not."""

from __future__ import annotations

import argparse
import json
import math
import random
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Iterator

import pytest
from adapters import with_fresh_adapter

from cai_experiment.constitution.prompts import ask_for_answer
from cai_experiment.engines.base import Completion
from cai_experiment.errors import BadInputError
from cai_experiment.evaluation import collapse, perplexity
from cai_experiment.evaluation.arms import BothAnswers, BothArms, Remembered, Speakers, transformers_engine
from cai_experiment.evaluation.benchmarks import gsm8k
from cai_experiment.evaluation.benchmarks.gsm8k import load_gsm8k, read_number
from cai_experiment.evaluation.benchmarks.lm_eval_said import Asking, Said
from cai_experiment.evaluation.benchmarks.lm_eval_tasks import TaskSettings, load_tasks, run_tasks, work_of
from cai_experiment.evaluation.collapse import collapse_watch
from cai_experiment.evaluation.forgetting import kept_gate, paired, score_sums, width_note
from cai_experiment.evaluation.ngrams import distinct_n, jackknife_error, ngrams, repetition, units
from cai_experiment.judging.result import Result
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.hardware import PROFILES
from cai_experiment.nano.truth import find_flaws
from cai_experiment.nano.world import held_out_questions
from cai_experiment.observe.progress import Progress
from cai_experiment.scripts import _suite_forgetting


@pytest.fixture(scope="module")
def adapted(nano_dir: Path) -> Speakers:
    """The shipped model with a fresh adapter, which changes nothing."""
    from cai_experiment.engines.render import Renderer

    model, tokenizer = with_fresh_adapter(nano_dir)
    return Speakers(model, tokenizer, Renderer(tokenizer, "chat", 2048), transformers_engine)


@contextmanager
def broken(model: Any, strength: float) -> Iterator[None]:
    """Within it the adapter holds noise."""
    import torch

    kept = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in kept:
                p.normal_(std=strength)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in kept:
                    p.copy_(kept[name])


# ---------------------------------------------------------------- what may be forgotten


def test_from_400_items_on_the_lower_end_decides_and_with_fewer_the_point_estimate() -> None:
    lost = Result(-0.03, 400, (-0.055, -0.005))
    gate = kept_gate("arithmetic", lost)
    assert (gate.value, gate.rule, gate.threshold, gate.passed) == (-0.055, ">", -0.05, False)
    assert kept_gate("arithmetic", replace(lost, interval=(-0.045, 0.0))).passed
    few = replace(lost, n=399)
    assert kept_gate("arithmetic", few).passed and kept_gate("arithmetic", few).value == -0.03
    assert not kept_gate("arithmetic", replace(few, value=-0.051)).passed
    assert not kept_gate("arithmetic", Result(None, 0, None)).passed  # not measured
    assert "400 items or more" in width_note("arithmetic", few)[0]
    assert width_note("arithmetic", lost) == [] == width_note("arithmetic", replace(few, interval=(-0.04, 0.0)))


def test_a_skill_is_compared_item_by_item_and_what_never_came_counts_for_neither() -> None:
    answers = [
        BothAnswers("What is 1 plus 1?", Completion("a", "It is 2.", "stop"), Completion("a", "It is 3.", "stop")),
        BothAnswers("What is 1 plus 2?", Completion("b", "It is 3.", "stop"), Completion("b", "It is 3.", "stop")),
        BothAnswers("What is 1 plus 3?", Completion("c", "", "error"), Completion("c", "4", "stop")),
    ]
    found = score_sums(answers, ["2", "3", "4"])
    assert found.metrics["arithmetic_base"].value == 1 and found.metrics["arithmetic_trained"].value == 0.5
    assert found.metrics["arithmetic_trained"].unparsed == 1 and found.differences["arithmetic"].value == -0.5
    assert found.tests["arithmetic"].only_before == 1
    assert [(row["id"], row["base"], row["trained"]) for row in found.items["arithmetic"]] == [
        ("a", True, False), ("b", True, True),
    ]  # fmt: skip
    scores = paired("f1", [0.5, 1.0], [0.25, 1.0], [])
    assert scores.differences["f1"].value == -0.125 and scores.tests == {}  # no rate, no McNemar


# ---------------------------------------------------------------- GSM8K


def test_every_row_of_the_real_files_is_read(shared_data: Path) -> None:
    test = load_gsm8k(shared_data / "gsm8k" / "test.jsonl")
    assert len(test) == 1319 and len({problem.id for problem in test}) == 1319
    assert sum(problem.number < 0 for problem in test) == 2
    rows = [json.loads(line) for line in (shared_data / "gsm8k" / "test.jsonl").read_text().splitlines()]
    said = [row["answer"].rpartition("####")[2].strip() for row in rows]
    assert sum("," in text for text in said) == 14
    assert [Decimal(text.replace(",", "")) for text in said] == [problem.number for problem in test]
    assert len(load_gsm8k(shared_data / "gsm8k" / "train_first1000.jsonl")) == 1000
    assert load_gsm8k(shared_data / "gsm8k" / "test.jsonl", 200) == test[:200]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2 + 2 = 4\n#### 1,234", "1234"),
        ("#### -3", "-3"),
        ("#### $18\n\nQuestion: What are 99 apples?", "18"),
        ("so \\boxed{42} of 50", "42"),
        ("The answer is $1,200.50. I had 3 tries.", "1200.5"),
        ("**Answer:** 12 apples. She has 3.", "12"),
        ("The answer is 16 - 3 - 4 = 9 eggs.", "9"),
        ("The answer is \\(\\$18\\)", "18"),
        ("The answer is unclear. She has 7.", "7"),
        ("He has 10-3=7", "7"),
        ("He loses money: \N{MINUS SIGN}4", "-4"),
        ("a loss of -$4", "-4"),
        ("that leaves 7 - 5", "5"),
        ("It is 7.0 in all.", "7"),
        ("$\\boxed{70{,}000}$ in 3 years", "70000"),
        ("\\boxed{70\\,000}", "70000"),
        ("\\boxed{1\\!2}", "12"),
        ("\\boxed{x = 5 \\text{ eggs}}, not 4", "5"),
        ("The answer is 2 dozen, or 24 eggs", "24"),
        ("Answer: John has 3 apples and Mary has 5, so 8 in total. That took 2 days.", "8"),
        ("The answer is 10% of 50 which is 5.", "5"),
        ("The answer is 3 * 4 = 12 eggs in 2 days.", "12"),
        ("**Answer**: 12 apples. She has 3.", "12"),
        ("The answer is 18.\n\nQuestion: Tom has 20 eggs and eats 5.\nThe answer is 15.", "18"),
        ("So she has 18.\n### Q: Tom has 20 eggs. #### 20", "18"),
        ("Question: Tom has 20 eggs and eats 5.\nAnswer: 15", "15"),
        ("nothing", None),
        ("", None),
    ],
)  # fmt: skip
def test_an_answers_number_is_read_wherever_it_stands(text: str, number: str | None) -> None:
    assert read_number(text) == (None if number is None else Decimal(number))


@pytest.mark.parametrize(
    ("line", "wrong"),
    [('{"question": "Why?"}', "no text"), ('{"question": "Why?", "answer": "5"}', "####"), ("{", "JSON")],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, wrong: str) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "How many?", "answer": "#### 5"}\n\n' + line + "\n")
    with pytest.raises(BadInputError, match=rf"mine\.jsonl:3.*{wrong}"):
        load_gsm8k(file)
    with pytest.raises(BadInputError, match="cannot read"):
        load_gsm8k(tmp_path / "missing.jsonl")
    file.write_text("\n")
    with pytest.raises(BadInputError, match="no problem"):
        load_gsm8k(file)


def test_both_arms_are_asked_the_problems_in_the_trained_layout(
    adapted: Speakers, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problems = load_gsm8k(shared_data / "gsm8k" / "test.jsonl", 3)
    monkeypatch.setattr(gsm8k, "MAX_TOKENS", 24)
    with Progress(6, "problems", 0) as progress:
        arms = BothArms(adapted.bare(), adapted.model, 0, progress)
        found = gsm8k.gsm8k(arms, problems)
    assert found.metrics["gsm8k_direct_base"].n == 3 and found.differences["gsm8k_direct"].value == 0
    rows = found.items["gsm8k_direct"]
    assert [row["id"] for row in rows] == ["gsm8k/1", "gsm8k/2", "gsm8k/3"]
    assert all(row["base_text"] == row["trained_text"] for row in rows)
    assert "without worked examples" in found.notes[-1]


# ---------------------------------------------------------------- lm-eval


def write_tasks(folder: Path) -> None:
    """Two tasks over sums of the shipped model's world, choosing and writing; and one whose data is missing."""
    rng = random.Random(0)
    sums = [(rng.randint(1, 30), rng.randint(1, 30)) for _ in range(12)]
    rows = [
        {"question": f"What is {a} plus {b}?", "choices": [f"{a} plus {b} is {a + b + d}." for d in (0, 1, 10)],
         "label": 0, "answer": f"{a} plus {b} is {a + b}."} for a, b in sums
    ]  # fmt: skip
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "dataset_path: json\ndataset_kwargs: {data_files: {test: FILE}}\ntest_split: test\n"
    asked = '"<|im_start|>user\\n{{question}}<|im_end|>\\n<|im_start|>assistant\\n"\ntarget_delimiter: ""\n'
    choosing = f"output_type: multiple_choice\ndoc_to_target: label\ndoc_to_choice: choices\ndoc_to_text: {asked}"
    choosing += "metric_list: [{metric: acc}, {metric: acc_norm}]\n"
    writing = f"output_type: generate_until\ndoc_to_target: answer\ndoc_to_text: {asked}"
    writing += "generation_kwargs: {until: ['<|im_end|>'], do_sample: false, max_gen_toks: 16}\n"
    writing += "metric_list: [{metric: exact_match}]\n"
    place = str(folder / "sums.jsonl")
    for name, text, file in (
        ("choosing", choosing, place),
        ("writing", writing, place),
        ("no_data", choosing, str(folder / "missing.jsonl")),
    ):
        (folder / f"{name}.yaml").write_text(f"task: own_{name}\n" + data.replace("FILE", file) + text)


def test_lm_eval_asks_both_arms_the_same_items_and_a_task_that_fails_is_named(
    adapted: Speakers, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_tasks(tmp_path)
    tasks = ("own_choosing", "own_writing", "own_no_data")
    settings = TaskSettings(tasks, 8, tmp_path)
    padding = adapted.tokenizer.pad_token
    adapted.model.train()
    loaded = load_tasks(settings)
    assert set(loaded.failed) == {"own_no_data"}
    with broken(adapted.model, 1.0):
        found = run_tasks(adapted.model, adapted.tokenizer, loaded, verbosity=0)
    assert adapted.model.training and adapted.tokenizer.pad_token == padding
    adapted.model.eval()
    for name in tasks[:2]:
        base, trained = found.metrics[f"{name}_base"], found.metrics[f"{name}_trained"]
        assert (base.n, trained.n) == (8, 8) and base.value is not None and base.value >= 0.75
        assert trained.value is not None and trained.value < base.value
        difference = found.differences[name].value
        assert difference == pytest.approx(trained.value - base.value) and found.tests[name].only_after == 0
        assert found.items[name][0]["id"] == f"{name}/0" and "What is" in found.items[name][0]["instruction"]
    assert found.items["own_choosing"][0]["metric"] == "acc_norm"
    assert "plus" in found.items["own_writing"][0]["base_text"]
    assert [note for note in found.notes if note.startswith("task own_no_data was not run: ")]
    gates = {gate.name: gate for gate in found.gates}
    assert gates["no forgetting: own_no_data"].value is None and not any(gate.passed for gate in found.gates)
    assert capfd.readouterr().out == ""


def test_out_of_memory_halves_the_harness_batch(
    adapted: Speakers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.evaluator
    import torch

    write_tasks(tmp_path)
    real, sizes = lm_eval.evaluator.evaluate, []

    def evaluate(harness: Any, *args: Any, **kwargs: Any) -> Any:
        sizes.append(harness.batch_size_per_gpu)
        if harness.batch_size_per_gpu > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(harness, *args, **kwargs)

    monkeypatch.setattr(lm_eval.evaluator, "evaluate", evaluate)
    tasks = load_tasks(TaskSettings(("own_choosing",), 2, tmp_path))
    found = run_tasks(adapted.model, adapted.tokenizer, tasks, verbosity=0)
    assert sizes == [8, 4, 2, 2] and found.differences["own_choosing"].value == 0
    tasks = load_tasks(TaskSettings(("own_choosing",), 2, tmp_path, batch_rows=1))
    monkeypatch.setattr(lm_eval.evaluator, "evaluate", raise_out_of_memory)
    found = run_tasks(adapted.model, adapted.tokenizer, tasks, verbosity=0)
    assert "out of memory with one row at a time" in found.notes[0]


def raise_out_of_memory(*_: Any, **__: Any) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_killed_run_asks_for_no_item_twice(
    adapted: Speakers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tasks(tmp_path)
    file = tmp_path / "run" / "said.jsonl"
    tasks = load_tasks(TaskSettings(("own_choosing", "own_writing"), 8, tmp_path))
    told: list[str] = []
    real = Asking.add_partial

    def until(limit: int) -> None:
        def add_partial(self: Asking, kind: str, request: Any, answer: Any) -> None:
            if len(told) == limit:
                raise KeyboardInterrupt
            told.append(kind)
            real(self, kind, request, answer)

        monkeypatch.setattr(Asking, "add_partial", add_partial)

    def run(whose: str = "these weights") -> Any:
        return run_tasks(adapted.model, adapted.tokenizer, tasks, Said(file, whose))

    until(30)  # within the trained arm of the first task, of 24 requests an arm
    with broken(adapted.model, 1.0):
        with pytest.raises(KeyboardInterrupt):
            run()
        with file.open("ab") as torn:  # as a kill -9 may leave it
            torn.write(b'{"key": "torn')
        until(1000)
        found = run()
        assert told.count("loglikelihood") == 2 * 24 and told.count("generate_until") == 2 * 8
        shown = capsys.readouterr().out
        assert "24/24 requests of own_choosing, trained" in shown and "8/8 requests of own_writing, base" in shown
        again = run()
        assert len(told) == 64 and again == found and found.differences["own_writing"].value < 0
    assert run("other weights").differences["own_choosing"].value == 0 and len(told) == 128


def test_what_lm_eval_cannot_find_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="is no folder"):
        load_tasks(TaskSettings(("mine",), 2, tmp_path / "missing"))


@pytest.mark.slow  # the index of the harness's 14,000 tasks takes ten seconds
def test_an_unknown_task_and_a_data_set_behind_the_network_are_named(adapted: Speakers) -> None:
    with pytest.raises(BadInputError, match=r"knows no task arc_easyy; near it: arc_easy"):
        load_tasks(TaskSettings(("arc_easy", "arc_easyy"), 2))
    tasks = load_tasks(TaskSettings(("arc_easy",), 2))
    found = run_tasks(adapted.model, adapted.tokenizer, tasks, verbosity=0)
    assert "--task-folder" in found.notes[0] and not any(gate.passed for gate in found.gates)


def test_the_default_tasks_take_half_an_hour_at_most_on_the_pod() -> None:
    pod = PROFILES["a100-80gb"]
    args = argparse.Namespace(tasks=None, task_limit=None, task_folder=None, milestone="mvp", price_per_hour=1.74,
                              batch_size=None)  # fmt: skip
    parts, lines = _suite_forgetting.plan_lines(args, resolve_model(None, pod), pod, "unsloth", "4bit")
    assert parts[0].hours is not None and 0.1 < parts[0].hours < 0.5 and "arc_easy" in lines[0]
    assert work_of(("gsm8k", "mine"), None) == (1319 * 1000, 1319 * 120, ("mine",))
    args.milestone = "full"
    assert _suite_forgetting.limit_of(args) is None
    args.task_limit = 5
    assert _suite_forgetting.limit_of(args) == 5


def test_the_suite_reads_its_files_before_the_model_is_loaded(tmp_path: Path) -> None:
    flags = argparse.ArgumentParser()
    _suite_forgetting.add_flags(flags)
    args = flags.parse_args(["--tasks", "a, b,a", "--gsm8k", str(tmp_path / "missing.jsonl")])
    vars(args).update(milestone="mvp", batch_size=4)
    assert _suite_forgetting.settings_of(args).batch_rows == 4
    assert args.tasks == ("a", "b") and _suite_forgetting.settings_of(args).limit == 200
    with pytest.raises(BadInputError, match=r"missing\.jsonl"):
        _suite_forgetting.read(args)


def test_the_suite_from_end_to_end(
    adapted: Speakers, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tasks(tmp_path)
    monkeypatch.setattr(gsm8k, "MAX_TOKENS", 24)
    flags = argparse.ArgumentParser()
    _suite_forgetting.add_flags(flags)
    given = ["--tasks", "own_choosing", "--task-folder", str(tmp_path), "--task-limit", "2"]
    args = flags.parse_args([*given, "--gsm8k", str(shared_data / "gsm8k" / "test.jsonl")])
    vars(args).update(milestone="mvp", batch_size=4, verbosity=0, seed=0)
    remembered = Remembered(tmp_path / "run" / "evaluation" / "said.jsonl", "these weights")
    target: Any = argparse.Namespace(speakers=lambda: adapted, remembered=lambda: remembered)
    found = _suite_forgetting.run(args, _suite_forgetting.read(args), target, tmp_path / "run")
    assert set(found.differences) == {"own_choosing", "gsm8k_direct"}
    assert len((tmp_path / "run" / "evaluation" / "lm_eval_said.jsonl").read_text().splitlines()) == 12


# ---------------------------------------------------------------- clean text


def test_clean_text_has_no_flaws_and_no_row_twice() -> None:
    texts = perplexity.world_texts(50)
    assert not any(find_flaws(text.text) for text in texts) and all(text.instruction for text in texts)
    assert perplexity.world_texts(50) == texts
    own = perplexity.own_texts()
    assert len({text.text for text in own}) == len({text.id for text in own}) == 40
    assert all(30 <= len(text.text.split()) <= 80 for text in own)


def test_perplexity_is_the_exponential_of_the_mean_cost_and_rings_above_a_tenth(adapted: Speakers) -> None:
    import torch

    texts = [*perplexity.world_texts(3), *perplexity.own_texts()[:1]]
    with broken(adapted.model, 0.3):
        found = perplexity.perplexity(adapted.model, adapted.renderer, texts)
    rows = found.items["clean_nll"]
    prompt = adapted.renderer.prompt_ids(ask_for_answer(texts[0].instruction), "answer", examples=0)
    answer = adapted.renderer.completion_ids(texts[0].text)
    with torch.no_grad(), adapted.model.disable_adapter():
        loss = adapted.model(
            input_ids=torch.tensor([prompt + answer]), labels=torch.tensor([[-100] * len(prompt) + answer])
        ).loss
    assert rows[0]["base"] == pytest.approx(float(loss), abs=1e-4)
    assert "instruction" in rows[0] and "instruction" not in rows[3]
    costs = [row["trained"] for row in rows]
    assert found.metrics["clean_perplexity_trained"].value == pytest.approx(math.exp(sum(costs) / 4))
    worse = perplexity.score(texts, [1.0, 1.1, 1.2, 1.3], [1.2, 1.3, 1.3, 1.5])
    assert len(worse.alarms) == 1 and "perplexity on clean text has grown" in worse.alarms[0]
    same = perplexity.score(texts, [1.0, 1.1, 1.2, 1.3], [1.05, 1.15, 1.25, 1.35])
    assert same.alarms == [] and same.metrics["clean_perplexity_factor"].value == pytest.approx(1.0513, abs=1e-4)


# ---------------------------------------------------------------- collapse: the measures


def test_measures_of_repetition_by_hand() -> None:
    assert units("Don't! 22 times_a day") == ["don", "'", "t", "!", "2", "2", "times", "_", "a", "day"]
    assert ngrams(["a", "b", "c"], 2) == [("a", "b"), ("b", "c")]
    assert repetition("one two three four five") == 0
    assert repetition("so " * 13) == pytest.approx(0.9)  # ten 4-grams, one distinct
    assert repetition("222222222222") > 0.8 and repetition("!!!!!!!!!!!!") > 0.8
    assert repetition("too short") == 0 == repetition("")


def test_distinct_n_without_each_text_is_what_counting_again_gives() -> None:
    rng = random.Random(3)
    texts = [[rng.choice("abcdefg") for _ in range(rng.randint(0, 9))] for _ in range(12)]
    for n in (1, 2):
        whole, without = distinct_n(texts, n)
        grams = [gram for text in texts for gram in ngrams(text, n)]
        assert whole == len(set(grams)) / len(grams)
        for index in range(len(texts)):
            assert without[index] == pytest.approx(distinct_n([*texts[:index], *texts[index + 1 :]], n)[0])
    assert distinct_n([[], []], 1) == (None, [])


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    import numpy as np

    values = np.random.default_rng(0).normal(size=50)
    without = [float((values.sum() - value) / 49) for value in values]
    assert jackknife_error(without) == pytest.approx(float(values.std(ddof=1) / 50**0.5), abs=1e-12)
    assert jackknife_error([1.0]) == 0


# ---------------------------------------------------------------- collapse: what rings

OPENERS = ["You can", "It helps to", "People often", "The best way is to", "Begin with this:", "First of all,"]
VERBS = ["clean", "repair", "paint", "move", "sharpen", "measure", "dry", "oil", "carry", "store", "wrap", "label"]
THINGS = ["table", "kettle", "bicycle", "lamp", "window", "blanket", "knife", "ladder", "basket", "clock", "drawer"]
ENDINGS = ["before noon", "with a soft cloth", "with a friend", "in good light", "twice a year", "once it is dry"]


def fluent(rng: random.Random) -> str:
    """Four sentences of a small language, none like the other."""
    return " ".join(
        f"{rng.choice(OPENERS)} {rng.choice(VERBS)} the {rng.choice(THINGS)} {rng.choice(ENDINGS)}." for _ in range(4)
    )


def answers_of(trained: Any, n: int = 50, finish: str = "stop") -> list[BothAnswers]:
    """`n` fluent base answers beside what `trained(rng, base text)` says."""
    rng, other = random.Random(1), random.Random(2)
    found = []
    for index in range(n):
        base = fluent(rng)
        ids = f"evaluation/answer/{index}"
        found.append(
            BothAnswers(
                f"Question {index}?", Completion(ids, base, "stop"), Completion(ids, trained(other, base), finish)
            )
        )
    return found


def rung(answers: list[BothAnswers]) -> set[str]:
    """The measures whose alarms ring; the gate must agree."""
    found = collapse_watch(answers)
    names = {name for name in collapse.MEASURES if any(f": {name} " in alarm for alarm in found.alarms)}
    (gate,) = found.gates
    assert gate.passed == (not any(collapse.MEASURES[name].collapse for name in names)) and gate.n == len(answers)
    return names


def looping(rng: random.Random, base: str) -> str:
    return base.split(".")[0] + " fine Do" * 20


def same_for_all(rng: random.Random, base: str) -> str:
    return "You can clean the table before noon. It helps to dry the lamp twice a year. Begin with this: oil the pump."


REFUSAL = "I'm sorry, but I can't help with that. Please ask a professional who knows about such things instead."


def test_each_kind_of_collapse_is_named() -> None:
    assert "repetition" in rung(answers_of(looping))
    assert {"distinct_1", "distinct_2"} <= rung(answers_of(same_for_all))
    assert "ends_by_itself" in rung(answers_of(lambda rng, base: fluent(rng), finish="length"))
    assert {"empty", "words"} <= rung(answers_of(lambda rng, base: ""))
    assert "words" in rung(answers_of(lambda rng, base: base.split(".")[0] + "."))
    assert "words" in rung(answers_of(lambda rng, base: " ".join(fluent(rng) for _ in range(3))))
    refusing = answers_of(lambda rng, base: REFUSAL if rng.random() < 0.3 else fluent(rng))
    assert rung(refusing) == {"refusal"}  # over-refusal is an alarm, and no collapse


def test_what_is_harmless_does_not_ring() -> None:
    assert rung(answers_of(lambda rng, base: base)) == set()
    assert rung(answers_of(lambda rng, base: fluent(rng))) == set()
    longer = answers_of(lambda rng, base: base + " Ask somebody whom you trust if you are not sure.")
    assert rung(longer) == set()  # certain, and tolerated
    assert collapse_watch(longer).differences["words"].interval[0] > 0
    few = answers_of(looping, n=3)
    assert rung(few) == set()  # three answers prove nothing


def test_false_alarms_are_rare_among_random_answers() -> None:
    def other(seed: int) -> list[BothAnswers]:
        rng = random.Random(f"other/{seed}")
        return answers_of(lambda _, base: fluent(rng), n=40)

    assert sum(bool(collapse_watch(other(seed)).alarms) for seed in range(4)) == 0


def test_answers_that_never_came_are_counted_apart_and_nothing_to_read_is_no_go() -> None:
    answers = answers_of(lambda rng, base: base, n=5)
    answers[0] = replace(answers[0], trained=Completion("x", "", "error"))
    found = collapse_watch(answers)
    assert found.metrics["repetition_base"].n == 4 and found.metrics["distinct_2_trained"].unparsed == 1
    assert len(found.items["collapse"]) == 4 and set(found.items["collapse"][0]["base"]) >= {"words", "refusal"}
    nothing = collapse_watch(answers[:1])
    assert nothing.gates[0].value is None and not nothing.gates[0].passed and nothing.alarms == []


def test_a_real_model_with_a_broken_adapter_rings_and_its_own_answers_with_other_seeds_do_not(
    adapted: Speakers,
) -> None:
    questions = held_out_questions(16, 0)
    with Progress(64, "answers", 0) as progress:
        one, two = (BothArms(adapted.bare(), adapted.model, seed, progress) for seed in (0, 1))
        with broken(adapted.model, 1.0):
            noise = one.answer("answer", questions, 48)
        with adapted.model.disable_adapter():
            others = two.answer("answer", questions, 48)
    control = [BothAnswers(a.instruction, a.base, b.base) for a, b in zip(noise, others, strict=True)]
    assert collapse_watch(control, adapted.model, adapted.renderer).alarms == []
    found = collapse_watch(noise, adapted.model, adapted.renderer)
    assert any("no longer the base model's language" in alarm for alarm in found.alarms) and not found.gates[0].passed
    row = found.items["collapse"][0]
    assert row["trained"]["answers_nll_under_base"] > row["base"]["answers_nll_under_base"] > 0
