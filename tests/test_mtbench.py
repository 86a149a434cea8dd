"""MT-Bench: every row of the real files, both turns of both arms, and judges that grade, fail, or speak nonsense."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from cai_experiment.constitution.prompts import Turn
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.engines.render import PromptTooLong
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.evaluation import mtbench
from cai_experiment.evaluation.arms import BothArms, Remembered, Remembering, Speakers, transformers_engine
from cai_experiment.evaluation.benchmarks import mtbench_fitness, mtbench_grades, mtbench_results, mtbench_rows
from cai_experiment.evaluation.benchmarks.mtbench_grades import (
    Comparison,
    Grade,
    Graded,
    read_grade,
    read_letter,
    winner_of,
)
from cai_experiment.evaluation.benchmarks.mtbench_rows import JudgePrompts, Question, read_judge_prompts, read_questions
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.mtbench import Answered, generate
from cai_experiment.judging.result import paired_bootstrap
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.hardware import profile
from cai_experiment.observe.progress import Progress
from cai_experiment.scripts import _suite_mtbench
from tests.openai_server import Answer, Body, Serving, chat, models

ROOT = Path(__file__).resolve().parents[1]
ARMS: tuple[mtbench.Arm, ...] = ("base", "trained")
CATEGORIES = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data / "mt_bench"


@pytest.fixture(scope="module")
def questions(folder: Path) -> list[Question]:
    return read_questions(folder / "question.jsonl", folder / "reference_answer_gpt-4.jsonl")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> JudgePrompts:
    return read_judge_prompts(folder / "judge_prompts.jsonl")


# ---------------------------------------------------------------- files


def test_every_row_of_the_real_files_is_read(questions: list[Question]) -> None:
    assert [q.id for q in questions] == [str(number) for number in range(81, 161)]
    assert Counter(q.category for q in questions) == dict.fromkeys(CATEGORIES, 10)
    assert all(text for q in questions for text in q.turns)
    with_reference = [q for q in questions if q.reference is not None]
    assert [q.id for q in with_reference] == [str(number) for number in range(101, 131)]
    assert {q.category for q in with_reference} == mtbench_rows.NEED_REFERENCE
    assert all(text for q in with_reference for text in q.reference or ())
    assert set(mtbench.TEMPERATURES) == set(CATEGORIES)


def test_the_pinned_sources_are_those_very_files(folder: Path) -> None:
    names = {
        "question.jsonl": mtbench_rows.QUESTIONS,
        "reference_answer_gpt-4.jsonl": mtbench_rows.REFERENCES,
        "judge_prompts.jsonl": mtbench_rows.JUDGE_PROMPTS,
    }
    for name, source in names.items():
        assert source.hashes == (hashlib.sha256((folder / name).read_bytes()).hexdigest(),)
        assert mtbench_rows.REVISION in source.url and source.flag


def test_the_eight_judge_prompts_have_the_fields_that_are_filled(prompts: JudgePrompts) -> None:
    assert sorted(prompts.by_name) == sorted(
        f"{name}{turn}"
        for name in ("single-v1", "single-math-v1", "pair-v2", "pair-math-v1")
        for turn in ("", "-multi-turn")
    )
    assert prompts.sha256 == mtbench_rows.JUDGE_PROMPTS.hashes[0]


def rewrite(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


ROW = {"question_id": 1, "category": "math", "turns": ["One?", "Two?"]}
REFERENCE = {"question_id": 1, "choices": [{"turns": ["1", "2"]}]}


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{", "is no JSON"),
        ({**ROW, "question_id": None}, "has no question_id"),
        ({**ROW, "category": ""}, "has no category"),
        ({**ROW, "turns": ["One?"]}, "turns are not two texts"),
        ({**ROW, "turns": ["One?", " "]}, "turns are not two texts"),
        (ROW, "question_id 1 stands there twice"),
        ({**ROW, "question_id": 2}, "question 2 (math) has no reference answer in references.jsonl"),
        ({**ROW, "question_id": 2, "reference": ["2", ""]}, "has no reference answer"),
    ],
)
def test_a_bad_question_is_named_with_file_and_line(
    row: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = rewrite(tmp_path / "questions.jsonl", ["", ROW, row])
    with pytest.raises(BadInputError) as raised:
        read_questions(file, rewrite(tmp_path / "references.jsonl", [REFERENCE]))
    assert str(raised.value).startswith("questions.jsonl:3 ") and why in str(raised.value)


def test_a_row_may_carry_its_own_reference(tmp_path: Path) -> None:
    file = rewrite(tmp_path / "q.jsonl", [ROW, {**ROW, "question_id": "b", "reference": ["3", "4"]}])
    both = read_questions(file, rewrite(tmp_path / "r.jsonl", [REFERENCE]))
    assert [q.reference for q in both] == [("1", "2"), ("3", "4")]
    with pytest.raises(BadInputError, match=r"choices\[0\].turns are not two texts"):
        read_questions(file, rewrite(tmp_path / "r.jsonl", [{"question_id": 1, "choices": []}]))
    with pytest.raises(BadInputError, match="holds no question"):
        read_questions(rewrite(file, []), rewrite(tmp_path / "r.jsonl", [REFERENCE]))


def test_a_judge_prompt_with_other_fields_is_refused(folder: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (folder / "judge_prompts.jsonl").read_text().splitlines()]
    file = tmp_path / "prompts.jsonl"
    with pytest.raises(BadInputError, match=f"has no prompt {rows[0]['name']}"):
        read_judge_prompts(rewrite(file, rows[1:]))
    for template, why in (("{answer.__class__}", "has the fields"), ("{", "is no template"), ("{question}", "fields")):
        with pytest.raises(BadInputError, match=rf":1 .*{why}"):
            read_judge_prompts(rewrite(file, [{**rows[0], "prompt_template": template}, *rows[1:]]))


# ---------------------------------------------------------------- what a judgement says


@pytest.mark.parametrize(
    ("judgement", "value"),
    [
        ("It is sound. Rating: [[7]]", 7.0),
        ("[[7.5]]", 7.5),
        ("Rating: [[ 8/10 ]]", 8.0),
        ("In short:\n\n**Rating: [6]**", 6.0),
        ("Good.\n[7]", 7.0),
        ('You asked for "[[5]]", and I say [[9]].', 9.0),
        ("<think>maybe [[3]]</think>\nRating: [[4]]", 4.0),
        ("<think>maybe [[3]], or", None),
        ("The code reads list[1], and see [2].", None),
        ("My score of arr[3] is high", None),
        ("Rating: [[0]]", None),
        ("Rating: [[11]]", None),
        ("Rating: [[-3]]", None),
        ("Rating: [[rating]]", None),
        ("Seven of ten.", None),
        ("", None),
    ],
)
def test_a_grade_is_read_or_is_a_failure(judgement: str, value: float | None) -> None:
    assert read_grade(judgement) == value


def test_a_verdict_needs_both_orders() -> None:
    assert read_letter('I give "[[A]]" if A is better. [[B]]') == "B"
    assert read_letter("A is better. [A]") is None and read_letter("[[D]]") is None
    outcomes = {(a, b): winner_of(a, b) for a in ("A", "B", "C", None) for b in ("A", "B", "C", None)}
    assert {pair for pair, winner in outcomes.items() if winner == "base"} == {("A", "B")}
    assert {pair for pair, winner in outcomes.items() if winner == "trained"} == {("B", "A")}
    assert {pair for pair, winner in outcomes.items() if winner == "tie"} == {("C", "C")}
    assert Counter(outcomes.values()) == {"undecided": 6, "unparsed": 7, "base": 1, "trained": 1, "tie": 1}


# ---------------------------------------------------------------- both arms


@dataclass
class Switch:
    """Stands for the PEFT model."""

    on: bool = True

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        self.on = False
        yield
        self.on = True


@dataclass
class Scripted:
    """An engine that says who it is and what it was asked last; `fails` are ids whose prompt comes to nothing."""

    switch: Switch = field(default_factory=Switch)
    fails: frozenset[str] = frozenset()
    asked: list[Prompt] = field(default_factory=list)
    name: str = "scripted"
    first_line: str = "scripted"

    def stream(self, prompts: Sequence[Prompt]) -> Iterator[Completion]:
        for prompt in prompts:
            self.asked.append(prompt)
            if prompt.id in self.fails:
                yield Completion(prompt.id, "", "error", error="too long")
            else:
                who = "trained" if self.switch.on else "base"
                yield Completion(prompt.id, f"{who} on {{{prompt.turns[-1].text[:40]}}}", "stop", 9, 9, 5)


def arms_of(engine: Scripted, remembered: Remembered | None = None) -> BothArms:
    any_engine: Any = engine
    return BothArms(any_engine, engine.switch, 3, Progress(0, verbosity=0), remembered)


def test_the_second_turn_follows_the_arms_own_first_answer(questions: list[Question]) -> None:
    engine = Scripted()
    answered = generate(arms_of(engine), questions)
    assert len(engine.asked) == 320 and len({p.id for p in engine.asked}) == 320
    by_id = {p.id: p for p in engine.asked}
    for q, one in zip(questions, answered, strict=True):
        for arm in ("base", "trained"):
            first, second = by_id[f"{arm}/mt_bench/{q.id}/1"], by_id[f"{arm}/mt_bench/{q.id}/2"]
            said = getattr(one, arm)[0].text
            assert said.startswith(arm)
            assert [(t.kind, t.text) for t in second.turns] == [
                ("instruction", q.turns[0]), ("answer", said), ("instruction", q.turns[1]),
            ]  # fmt: skip
            for prompt, turn in ((first, 1), (second, 2)):
                drawn = prompt.sampling
                assert drawn.key == f"mt_bench/{q.id}/{turn}", "both arms share their random numbers"
                assert (drawn.temperature, drawn.max_tokens, drawn.seed) == (mtbench.TEMPERATURES[q.category], 1024, 3)


def test_an_answer_that_never_came_leaves_its_turns_out(questions: list[Question]) -> None:
    engine = Scripted(fails=frozenset({"base/mt_bench/81/1", "trained/mt_bench/82/2"}))
    one, two = generate(arms_of(engine), questions[:2])
    assert len(engine.asked) == 7, "no second turn without a first"
    assert one.texts("base", 1) is None and one.texts("base", 2) is None and one.texts("trained", 2)
    assert "the first turn was not answered: too long" in one.base[1].error
    assert two.texts("trained", 1) and two.texts("trained", 2) is None


@pytest.mark.parametrize("layout", ["chat", "base"])
def test_two_turns_render_in_both_layouts(layout: str, questions: list[Question], tiny_model_dir: Path) -> None:
    from transformers import AutoTokenizer

    from cai_experiment.engines.render import Renderer

    renderer = Renderer(AutoTokenizer.from_pretrained(tiny_model_dir), layout, 32768)
    engine = Scripted()
    generate(arms_of(engine), questions[:1])
    ids = [renderer.prompt_ids(p.turns, p.speak_as, 0, p.sampling.max_tokens) for p in engine.asked]
    text = renderer.tokenizer.decode(ids[1])
    places = [text.find(turn.text) for turn in engine.asked[1].turns]
    assert -1 < places[0] < places[1] < places[2], "all three turns, none of them cut"
    assert ids[1][: len(ids[0])] == ids[0], "the second turn's prompt goes on from the first's"


KILLED = """
import sys
from pathlib import Path
from tests.test_mtbench import *
folder, journal = Path(sys.argv[1]), Path(sys.argv[2])
engine = Scripted()
def stream(prompts, speak=engine.stream):
    for n, completion in enumerate(speak(prompts)):
        yield completion
        if len(engine.asked) == 7:
            print("seven", flush=True)
            sys.stdin.read()
engine.stream = stream
questions = read_questions(folder / "question.jsonl", folder / "reference_answer_gpt-4.jsonl")
generate(arms_of(engine, Remembered(journal, "weights")), questions[:3])
"""


def test_a_killed_generation_goes_on_where_it_was(folder: Path, questions: list[Question], tmp_path: Path) -> None:
    journal = tmp_path / "said.jsonl"
    command = [sys.executable, "-c", KILLED, str(folder), str(journal)]
    child = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "seven\n"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    whole, rest, other = Scripted(), Scripted(), Scripted()
    unbroken = generate(arms_of(whole), questions[:3])
    resumed = generate(arms_of(rest, Remembered(journal, "weights")), questions[:3])
    for arm in ARMS:
        assert [one.texts(arm, 2) for one in resumed] == [one.texts(arm, 2) for one in unbroken]
    assert len(whole.asked) == 12 and len(rest.asked) in (5, 6), "what had come is not asked again"
    generate(arms_of(other, Remembered(journal, "other weights")), questions[:3])
    assert len(other.asked) == 12, "another adapter's answers do not stand in"


# ---------------------------------------------------------------- a judge


@dataclass(frozen=True)
class Named:
    """As judging.judge.Judge: what grading needs of it."""

    engine: Any
    name: str = "the judge"


def said(id: str, text: str) -> Completion:
    return Completion(id, text, "stop")


def answered_by_rule(questions: Sequence[Question]) -> list[Answered]:
    """Short answers that name arm, question and turn; braces and brackets are in them as data."""
    return [
        Answered(q, *((said("", f"{arm} {q.id} one {{x}} [[2]]"), said("", f"{arm} {q.id} two")) for arm in
                      ("base", "trained")))
        for q in questions
    ]  # fmt: skip


def test_each_prompt_shows_the_texts_as_they_are(questions: list[Question], prompts: JudgePrompts) -> None:
    engine = Scripted()
    answered = answered_by_rule(questions)
    mtbench_grades.judge_answers(answered, prompts, Named(engine), verbosity=0)
    texts = [p.turns[0].text for p in engine.asked]
    assert len(texts) == len(set(texts)) == 640 and len({p.id for p in engine.asked}) == 640
    assert {(p.sampling.temperature, p.sampling.max_tokens, p.speak_as) for p in engine.asked} == {
        (0.0, 2048, "answer")
    }
    for i, q in enumerate(questions):
        first, second = texts[8 * i : 8 * i + 4], texts[8 * i + 4 : 8 * i + 8]
        assert all(q.turns[0] in text for text in first + second) and all(q.turns[1] in text for text in second)
        for turn, some in enumerate((first, second)):
            assert f"base {q.id} one {{x}} [[2]]" in some[0] and f"trained {q.id}" not in some[0]
            assert f"trained {q.id} one {{x}} [[2]]" in some[1] and f"base {q.id}" not in some[1]
            assert some[2].index(f"base {q.id}") < some[2].index(f"trained {q.id}")
            assert some[3].index(f"trained {q.id}") < some[3].index(f"base {q.id}")
            shown = (q.reference or ())[: turn + 1]
            assert all(text in prompt for text in shown for prompt in some)
            assert ("Reference" in some[0]) is (q.reference is not None)
        assert first[0].startswith("[Instruction]\nPlease act") and first[2].startswith("[Instruction]\nPlease act")
        assert second[0].startswith("[Instruction]\nPlease act")


class Knows:
    """Which answers of the known ones are better; what is none of them is left to others."""

    def __init__(self) -> None:
        known = mtbench_fitness.known()
        self.grades = {(one.question.turns[0], one.texts("base", 1)[0]): 3 for one in known}  # type: ignore[index]
        self.grades |= {(one.question.turns[0], one.texts("trained", 1)[0]): 9 for one in known}  # type: ignore[index]

    def grade(self, text: str) -> int | None:
        return next((grade for (asked, said), grade in self.grades.items() if asked in text and said in text), None)


class Rule:
    """A server's judge: grades trained answers by 8 and base ones by 7, prefers the trained one, with some failures."""

    def __init__(self) -> None:
        self.attempts: Counter[str] = Counter()
        self.known = Knows()

    def __call__(self, path: str, body: Body | None) -> Body:
        if body is None:
            return models("gpt-judge", owned_by="tests")
        text = body["messages"][-1]["content"]
        if (grade := self.known.grade(text)) is not None:
            return chat(f"Rating: [[{grade}]]")
        self.attempts[text] += 1
        if "trained 81 one" in text and self.attempts[text] == 1:
            raise Answer(429)
        if "base 82 two" in text and "Assistant B" not in text:
            raise Answer(500)
        return chat(self.says(text))

    def says(self, text: str) -> str:
        trained, base = text.find("trained "), text.find("base ")
        if trained >= 0 and base >= 0:  # a comparison
            if "base 83" in text:
                return "The first is better. [[A]]"  # whatever stands there
            return "Alike. [[C]]" if "base 84" in text else f"So it is. [[{'A' if trained < base else 'B'}]]"
        if "trained 85" in text:
            return "I would rather not say."
        if "trained 86" in text:
            return "Rating: [[95]]"
        return f"Fair. Rating: [[{8 if trained >= 0 else 7}]]"


@pytest.fixture
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CAI_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


@contextmanager
def served(rule: Rule) -> Iterator[tuple[Serving, Named]]:
    from cai_experiment.engines.server import ServerEngine
    from cai_experiment.engines.server_client import Retry

    with Serving(rule) as server:
        engine = ServerEngine(
            server.url, None, concurrency=8, deadline=60.0, retry=Retry(first_wait=0.01, longest_wait=0.05)
        )
        yield server, Named(engine, "gpt-judge")
        engine.close()


def test_a_served_judge_grades_and_its_failures_are_counted_never_averaged(
    questions: list[Question], prompts: JudgePrompts, tmp_path: Path, no_keys: None
) -> None:
    some, rule = questions[:10], Rule()
    with served(rule) as (server, bare):

        def graded() -> Evaluation:
            said = Remembered(tmp_path / "judged.jsonl", "gpt-judge")
            judge = Named(Remembering(bare.engine, said, "judge"), "gpt-judge")
            return mtbench_results.grade(answered_by_rule(some), prompts, judge, verbosity=0)

        found = graded()
        first = len(server.requests)
        again = graded()
        asked = [body for _, body, _ in server.requests[first:] if body]
    assert {row["messages"][-1]["content"] for row in asked} == {t for t in rule.attempts if rule.attempts[t] > 3}
    assert again.metrics == found.metrics, "only what failed is asked again, the rest is remembered"
    base, trained, change = *(found.metrics[f"mt_bench_{arm}"] for arm in ("base", "trained")), found.differences
    # 81 had to wait; 82's second turn failed with 500; 85 says nothing, 86 gives 95: five turns of twenty
    assert (base.n, base.unparsed, trained.n, trained.unparsed) == (15, 5, 15, 5)
    assert (base.value, trained.value, change["mt_bench"].value) == (7.0, 8.0, 1.0)
    won = found.metrics["mt_bench_pairwise"]
    # 83 says A in both orders, 84 ties
    assert (won.value, won.n, won.unparsed) == (1.0, 16, 0)
    assert found.tables[0].rows[0][-1] == "16, 2, 0, 2, 0"
    assert [row[0] for row in found.tables[0].rows] == ["all", "turn 1", "turn 2", "writing"]
    *kept, fit = found.gates
    assert all(gate.value is None and not gate.passed and gate.part == "mtbench" for gate in kept)
    assert (fit.passed, fit.value, fit.n, fit.part) == (True, 1.0, 42, "mtbench") and not found.alarms
    assert any("15 of 20 turns were graded, and it takes 60 and 80% of them" in note for note in found.notes)
    assert any("of 40 grades 4 could not be read, 1 never came, and 0 had no answer" in note for note in found.notes)
    assert any("gpt-judge" in note and "no place on a leaderboard" in note for note in found.notes)
    assert "gpt-judge" in found.methods["mt_bench"] and prompts.sha256[:12] in found.methods["mt_bench"]
    rows = {row["id"]: row for row in found.items["mt_bench"]}
    assert rows["mt_bench/82/2"]["base"] is rows["mt_bench/82/2"]["trained"] is None
    assert rows["mt_bench/82/2"]["grade_trained"] == 8 and "500" in rows["mt_bench/82/2"]["judgement_base"]
    pairs = {row["id"]: row for row in found.items["mt_bench_pairwise"]}
    assert (pairs["mt_bench_pairwise/83/1"]["trained"], pairs["mt_bench_pairwise/83/1"]["verdict"]) == (
        None,
        "undecided",
    )
    assert pairs["mt_bench_pairwise/81/1"]["trained"] is True
    assert Counter(case.kind for case in found.cases) == {"MT-Bench: no grade": 5, "MT-Bench: undecided": 2}
    assert base.items == "evaluation/mt_bench.jsonl"
    json.dumps([found.tables[0].to_json(), *(case.to_json() for case in found.cases), *rows.values()])


def test_equal_answers_are_asked_once_and_tie(questions: list[Question], prompts: JudgePrompts) -> None:
    engine = Scripted()
    same = (said("", "Yes."), said("", "No."))
    graded = mtbench_grades.judge_answers([Answered(questions[0], same, same)], prompts, Named(engine), verbosity=0)
    assert len(engine.asked) == 2 and [g.comparison.winner for g in graded] == ["tie", "tie"]


def test_a_judge_that_grades_nothing_leaves_the_gate_without_a_value(
    questions: list[Question], prompts: JudgePrompts
) -> None:
    engine = Scripted()
    found = mtbench_results.grade(answered_by_rule(questions), prompts, Named(engine), verbosity=0)
    assert len(engine.asked) == 84, "the known answers, and then nothing is paid for"
    assert all(found.metrics[f"mt_bench_{arm}"].value is None for arm in ("base", "trained", "pairwise"))
    assert (found.differences["mt_bench"].n, found.differences["mt_bench"].unparsed) == (0, 160)
    assert not any(gate.passed for gate in found.gates)
    assert found.notes == ["MT-Bench: the answers were not graded, since the judge is not fit to; name another --judge"]
    (alarm,) = found.alarms
    assert "the judge is not fit to grade: of 42 better answers it graded 0 higher" in alarm and "42 could not" in alarm
    assert found.items["mt_bench"][0]["base_text"] == answered_by_rule(questions)[0].base[0].text
    ungated = mtbench_results.grade(answered_by_rule(questions), prompts, Named(Scripted()), gated=False, verbosity=0)
    assert ungated.gates == [] and ungated.cases == []


def grading(grade: Any) -> Named:
    """A judge whose grade of a prompt's text comes from a function."""
    engine = Scripted()

    def stream(prompts: Sequence[Prompt]) -> Iterator[Completion]:
        for prompt in prompts:
            engine.asked.append(prompt)
            yield said(prompt.id, f"Rating: [[{grade(prompt.turns[0].text)}]]")

    engine.stream = stream  # type: ignore[method-assign]
    return Named(engine)


def fitness_of(grade: Any, prompts: JudgePrompts) -> Evaluation:
    return mtbench_fitness.fitness(prompts, grading(grade), "mtbench", 0)


def test_a_judge_that_knows_nothing_never_gives_a_go(questions: list[Question], prompts: JudgePrompts) -> None:
    """Both gates of "kept or better" would pass with no difference found: the judge itself has to."""
    knows = Knows().grade
    fit = fitness_of(knows, prompts)
    assert fit.gates[0].passed and fit.gates[0].part == "mtbench" and not fit.alarms
    assert (fit.metrics[mtbench_fitness.METRIC].value, fit.metrics[mtbench_fitness.METRIC].n) == (1.0, 42)
    chance = random.Random(0)
    unfit = {
        "always 5": lambda text: 5,
        "errs": lambda text: 12 - knows(text),
        "longer": lambda text: min(10, len(text) // 100),
        "mostly alike": lambda text: knows(text) if "leap year" in text or "hexagon" in text else 5,
        "unread": lambda text: "what",
    }
    for name, grade in unfit.items():
        found = fitness_of(grade, prompts)
        assert not found.gates[0].passed and found.alarms, name
    for _ in range(100):
        assert not fitness_of(lambda text: chance.randint(1, 10), prompts).gates[0].passed
    judge = grading(lambda text: 5)
    found = mtbench_results.grade(answered_by_rule(questions), prompts, judge, verbosity=0)
    assert not any(gate.passed for gate in found.gates) and len(judge.engine.asked) == 84
    assert "graded 0 higher than the worse one, 0 lower, 42 alike" in found.alarms[0]


def test_a_judge_that_fails_on_everything_after_it_was_fit_leaves_no_value(
    questions: list[Question], prompts: JudgePrompts
) -> None:
    """And what its context has no room for is named."""
    knows = Knows().grade
    judge = grading(lambda text: knows(text) or "what")
    judge.engine.renderer = Context(1024)
    args = argparse.Namespace(seed=0, milestone="full", verbosity=0)
    found = _suite_mtbench.grade(args, answered_by_rule(questions), prompts, judge)
    assert [gate.passed for gate in found.gates] == [False, False, True] and not found.alarms
    assert len(found.cases) == mtbench_results.CASES and found.differences["mt_bench"].unparsed == 160
    assert any("of 320 grades 320 could not be read" in note and "graded nothing" in note for note in found.notes)
    assert any("the judge reads 1,024 tokens, and a comparison takes up to 8,192" in note for note in found.notes)


def test_one_grade_for_every_answer_has_no_value(questions: list[Question]) -> None:
    """A judge may know the known answers and still give all of these one grade."""
    graded = [graded_of(q, turn, 10.0, 10.0) for q in questions for turn in (1, 2)]
    found = mtbench_results.evaluate(graded, "a judge")
    assert [gate.passed for gate in found.gates] == [False, False]
    assert "MT-Bench: all answers got the same grade, so its gates have no value" in found.notes
    other = mtbench_results.evaluate([*graded[1:], graded_of(questions[0], 1, 9.0, 9.0)], "a judge")
    assert [gate.passed for gate in other.gates] == [True, True]


class Context:
    """A renderer whose tokens are words."""

    def __init__(self, max_length: int) -> None:
        self.max_length = max_length

    def prompt_ids(self, turns: Any, speak_as: str, examples: Any = None, max_tokens: int = 0) -> list[str]:
        ids: list[str] = turns[0].text.split()
        if len(ids) > self.max_length - max_tokens:
            raise PromptTooLong("too long")
        return ids


@pytest.mark.parametrize(
    ("context", "prompt", "new"),
    [(8192, 1000, 2048), (8192, 6500, 1692), (8192, 7680, 512), (8192, 7681, 2048), (8192, 9000, 2048),
     (2048, 1000, 1048), (1024, 768, 256), (1024, 769, 2048)],
)  # fmt: skip
def test_a_judgement_takes_what_the_context_leaves(context: int, prompt: int, new: int) -> None:
    renderer: Any = Context(context)
    assert mtbench_grades.tokens_for(renderer, (Turn("instruction", "word " * prompt),)) == new
    assert mtbench_grades.tokens_for(None, (Turn("instruction", "word " * prompt),)) == 2048


# ---------------------------------------------------------------- figures


def graded_of(question: Question, turn: int, base: float | None, trained: float | None, winner: Any = "tie") -> Graded:
    one = Answered(question, (said("", "b"),) * 2, (said("", "t"),) * 2)
    return Graded(one, turn, Grade(base, ""), Grade(trained, ""), Comparison(winner, ("", "")))


def test_the_interval_is_the_paired_bootstraps_and_turns_of_a_question_stay_together(
    questions: list[Question],
) -> None:
    rng = random.Random(0)
    pairs = [(float(rng.randint(1, 10)), float(rng.randint(1, 10))) for _ in questions]
    single = [graded_of(q, 1, *pair) for q, pair in zip(questions, pairs, strict=True)]
    alone = mtbench_results.difference(single)
    plain = paired_bootstrap(*zip(*pairs, strict=True))
    assert alone.value == pytest.approx(plain.value) and alone.n == 80
    assert alone.interval == pytest.approx(plain.interval, abs=0.06), "one turn a question: the ordinary one"
    twice = mtbench_results.difference([*single, *(replace(g, turn=2) for g in single)])
    assert twice.n == 160 and twice.value == pytest.approx(plain.value)
    assert twice.interval == pytest.approx(plain.interval, abs=0.06), "the same again teaches nothing"


def test_kept_or_better_needs_both_gates(questions: list[Question]) -> None:
    def passes(changes: Sequence[float | None], of: int = 80) -> list[bool]:
        graded = [
            graded_of(q, turn, 5.0, None if change is None else 5.0 + change)
            for q, change in zip(questions[:of], changes, strict=True)
            for turn in (1, 2)
        ]
        return [gate.passed for gate in mtbench_results.gates(mtbench_results.difference(graded))]

    assert passes([0.0] * 80) == [True, True]
    assert passes([-1.0, 0.9] * 40) == [True, True]
    assert passes([-0.15] * 80) == [True, False], "little, but beyond doubt"
    assert passes([-3.0, 2.4] * 40) == [False, True], "much, but in doubt"
    assert passes([-1.0] * 80) == [False, False]
    assert passes([1.0] * 64 + [None] * 16) == [True, True]
    assert passes([1.0] * 63 + [None] * 17) == [False, False], "too many without a grade"
    assert passes([1.0] * 29, 29) == [False, False] and passes([1.0] * 30, 30) == [True, True], "a handful"


def test_categories_and_large_falls_are_shown(questions: list[Question]) -> None:
    graded = [graded_of(q, turn, 8.0, 5.0 if q.id == "100" else 8.0, "base") for q in questions for turn in (1, 2)]
    found = mtbench_results.evaluate(graded, "a judge")
    table = found.tables[0]
    assert [row[0] for row in table.rows] == ["all", "turn 1", "turn 2", *CATEGORIES]
    assert all(len(row) == len(table.columns) for row in table.rows)
    roleplay = next(row for row in table.rows if row[0] == "roleplay")
    assert not isinstance(roleplay[3], str) and (roleplay[3].value, roleplay[3].n) == (-0.3, 20)
    assert [case.title for case in found.cases] == [f"question 100, turn {turn}, roleplay, -3" for turn in (1, 2)]


# ---------------------------------------------------------------- the whole


@dataclass
class Target:
    """Stands for `_target.Target`; the shipped model is its judge."""

    given: Speakers
    said: Path
    asked_for: list[int | None] = field(default_factory=list)

    def speakers(self) -> Speakers:
        return self.given

    def remembered(self) -> Remembered:
        return Remembered(self.said, "nano")

    def judge(self, max_length: int | None = None) -> Named:
        self.asked_for.append(max_length)
        return Named(self.given.base(), "nano")


def test_the_shipped_model_answers_two_questions_and_cannot_grade_them(
    folder: Path, nano_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cai_experiment.engines.render import Renderer

    lines = (folder / "question.jsonl").read_text().splitlines()
    tokenizer = AutoTokenizer.from_pretrained(nano_dir)
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(nano_dir, dtype=torch.float32)
    model = get_peft_model(loaded, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).eval()
    speakers = Speakers(model, tokenizer, Renderer(tokenizer, "base", 1024), transformers_engine)
    args = argparse.Namespace(
        questions=rewrite(tmp_path / "two.jsonl", [lines[0], lines[30]]), seed=0, verbosity=0, milestone="full",
        references=folder / "reference_answer_gpt-4.jsonl", judge_prompts=folder / "judge_prompts.jsonl",
    )  # fmt: skip
    monkeypatch.setattr(mtbench, "MAX_TOKENS", 24)
    monkeypatch.setattr(mtbench_grades, "MAX_TOKENS", 24)
    kept: list[Answered] = []
    monkeypatch.setattr(_suite_mtbench, "grade", lambda *a, f=_suite_mtbench.grade: (kept.extend(a[1]), f(*a))[1])
    target = Target(speakers, tmp_path / "said.jsonl")
    found = _suite_mtbench.run(args, _suite_mtbench.read(args), target, tmp_path)
    assert target.asked_for == [mtbench_grades.JUDGE_CONTEXT]
    assert [one.question.id for one in kept] == ["81", "111"]
    assert all(
        c.finish in ("stop", "length") and c.completion_tokens <= 24 for k in kept for c in (*k.base, *k.trained)
    )
    assert kept[0].base != kept[0].trained, "the adapter speaks in one arm only"
    assert found.differences["mt_bench"].unparsed == 4 and not any(gate.passed for gate in found.gates)
    assert found.alarms and found.items["mt_bench"][0]["judgement_base"].startswith("not asked")
    silent: Any = Scripted()
    arms = BothArms(silent, model, 0, Progress(0, verbosity=0), Remembered(tmp_path / "said.jsonl", "nano"))
    again = generate(arms, [one.question for one in kept], 24)
    assert silent.asked == [], "all is remembered"
    assert [one.texts("trained", 2) for one in again] == [one.texts("trained", 2) for one in kept]


def test_without_files_and_without_a_network_the_flags_are_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    parser = argparse.ArgumentParser()
    _suite_mtbench.add_flags(parser)
    with pytest.raises(EngineError, match="--questions FILE"):
        _suite_mtbench.read(parser.parse_args([]))


def test_the_plan_counts_the_real_files(questions: list[Question]) -> None:
    assert len(questions) == _suite_mtbench.QUESTIONS and 2 * len(mtbench_fitness.known()) == _suite_mtbench.KNOWN
    assert sum(q.reference is not None for q in questions) == _suite_mtbench.WITH_REFERENCE
    hardware = profile("a100-80gb")
    choice = resolve_model("qwen2.5-32b", hardware)
    parts, lines = _suite_mtbench.plan_lines(argparse.Namespace(price_per_hour=1.74), choice, hardware, "hf", "4bit")
    assert parts[0].hours is not None and parts[0].hours < 1
    assert "128,000 tokens written" in lines[0] and "724 calls at most" in lines[1]
