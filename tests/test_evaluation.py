"""Preference, truth metrics, gates and reports: known answers, the real engine on a tiny model, hostile texts."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Iterable, Iterator

import pytest
from adapters import with_fresh_adapter

from cai_experiment.constitution.prompts import NO_ISSUE, Turn, ask_for_answer
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.answers import world_found
from cai_experiment.evaluation.arms import BareRenderer, BothAnswers, BothArms
from cai_experiment.evaluation.collapse import collapse_watch
from cai_experiment.evaluation.forgetting import score_sums
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.gates import Gate, generation_gates, training_gates
from cai_experiment.evaluation.generation import answers_critique, generation_metrics, is_complete
from cai_experiment.evaluation.measure import (
    EvaluationSettings,
    evaluate_generation,
    evaluate_training,
    held_out_instructions,
)
from cai_experiment.evaluation.preference import (
    PairScore,
    completion_logps,
    preference_metrics,
    rows_of,
    score_pairs,
)
from cai_experiment.evaluation.report import RunFacts, print_report, read_report, write_report
from cai_experiment.evaluation.reporting.differences import differences
from cai_experiment.evaluation.reporting.page import render_page
from cai_experiment.evaluation.reporting.screen import print_example
from cai_experiment.evaluation.reporting.words import PLUMBING, figure, gate_cells
from cai_experiment.evaluation.shortcuts import by_length, by_words, shortcut_metrics
from cai_experiment.evaluation.verdicts import win_rate
from cai_experiment.judging.judge import Judge
from cai_experiment.judging.result import Result
from cai_experiment.milestones import MILESTONES
from cai_experiment.observe.progress import Progress
from cai_experiment.records.schema import Example, PreferencePair, Round, to_row
from cai_experiment.records.store import write_jsonl
from cai_experiment.scripts import inspect_data


@dataclass(frozen=True)
class Pair:
    """As training.data.Pair: what preference needs of it."""

    turns: tuple[Turn, ...]
    chosen: str
    rejected: str


def pair(prompt: str, chosen: str, rejected: str) -> Pair:
    return Pair(ask_for_answer(prompt), chosen, rejected)


PAIRS = [
    pair("How do I grow tomatoes?", "Use a large pot.", "Lean far over the rail."),
    pair("How do I water it?", "In the morning, and turn the plant once a week.", "No issue."),
    pair("Why?", "It may still grow slowly without much sun.", "Use a large pot, water it."),
]


@dataclass
class Loaded:
    model: Any
    tokenizer: Any
    renderers: dict[str, Any] = field(default_factory=dict)


@pytest.fixture(scope="module")
def loaded(tiny_model_dir: Path) -> Loaded:
    """The tiny model in memory with a fresh adapter, and both layouts' renderers."""
    from cai_experiment.engines.render import Renderer

    model, tokenizer = with_fresh_adapter(tiny_model_dir)
    return Loaded(model, tokenizer, {layout: Renderer(tokenizer, layout, 2048) for layout in ("chat", "base")})


@contextmanager
def disturbed(model: Any) -> Iterator[None]:
    """Within it the adapter changes the model's output."""
    import torch

    kept = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in kept:
                p.normal_(std=0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name in kept:
                    p.copy_(kept[name])


# ---------------------------------------------------------------- preference


@pytest.mark.parametrize("layout", ["chat", "base"])
def test_log_probabilities_equal_those_of_one_row_alone_computed_by_hand(loaded: Loaded, layout: str) -> None:
    import torch

    rows = [row for p in PAIRS for row in rows_of(loaded.renderers[layout], p) or ()]
    found = completion_logps(loaded.model, rows, batch_rows=4)
    for (prompt, completion), value in zip(rows, found, strict=True):
        with torch.no_grad():
            logits = loaded.model(input_ids=torch.tensor([prompt + completion])).logits[0].double()
        by_hand = sum(
            (logits[len(prompt) - 1 + i] - logits[len(prompt) - 1 + i].logsumexp(-1))[token].item()
            for i, token in enumerate(completion)
        )
        assert value == pytest.approx(by_hand, abs=1e-4)


def test_rows_are_those_of_training(loaded: Loaded) -> None:
    renderer = loaded.renderers["base"]
    (prompt, chosen), (_, rejected) = rows_of(renderer, PAIRS[0]) or pytest.fail("does not fit")
    assert prompt == renderer.bare_prompt_ids("How do I grow tomatoes?")
    assert loaded.tokenizer.decode(chosen) == "Use a large pot.<|endoftext|>"
    assert rejected == renderer.completion_ids("Lean far over the rail.")


def test_a_fresh_adapter_has_margin_zero_and_a_changed_one_has_not(loaded: Loaded) -> None:
    renderer = loaded.renderers["chat"]
    assert [s.margin for s in score_pairs(loaded.model, renderer, PAIRS) if s] == [0.0, 0.0, 0.0]
    loaded.model.train()
    with disturbed(loaded.model):
        scores = score_pairs(loaded.model, renderer, PAIRS)
        rows = [row for p in PAIRS for row in rows_of(renderer, p) or ()]
        loaded.model.eval()
        trained = completion_logps(loaded.model, rows)
    base = completion_logps(loaded.model, rows)
    rewards = [t - b for t, b in zip(trained, base, strict=True)]
    assert [s and s.margin for s in scores] == pytest.approx([rewards[i] - rewards[i + 1] for i in (0, 2, 4)], abs=1e-4)
    assert all(abs(r) > 1e-3 for r in rewards)


def test_the_models_mode_is_given_back(loaded: Loaded) -> None:
    for mode in (True, False):
        loaded.model.train(mode)
        score_pairs(loaded.model, loaded.renderers["chat"], PAIRS[:1])
        assert loaded.model.training is mode


def test_overlong_pairs_are_left_out_and_counted(loaded: Loaded) -> None:
    scores = score_pairs(loaded.model, loaded.renderers["chat"], [PAIRS[0], pair("Why?", "slow " * 3000, "No.")])
    assert scores[0] is not None and scores[1] is None
    accuracy = preference_metrics(scores)["preference_accuracy"]
    assert (accuracy.n, accuracy.unparsed) == (1, 1)


def test_accuracy_counts_margins_above_zero() -> None:
    scores = [PairScore(1.0, 0.0), PairScore(-2.0, -3.0), PairScore(0.5, 0.5), PairScore(-1.0, 1.0)]
    metrics = preference_metrics(scores)
    assert metrics["preference_accuracy"].value == 0.5
    assert metrics["preference_margin"].value == pytest.approx(0.0)
    assert metrics["chosen_logp_change"].value == pytest.approx(-0.375)


def test_shortcut_baselines() -> None:
    train = [pair("q", "one two three", "one bad") for _ in range(5)]
    lengths = [pair("q", "longer text", "short"), pair("q", "a", "bb"), pair("q", "a", "b")]
    assert by_length(train, lengths) == [True, False, False]
    held_out = [pair("q", "three apples", "bad apples"), pair("q", "bad", "two"), pair("q", "new", "words")]
    assert by_words(train, held_out) == [True, False, False]
    assert shortcut_metrics(train, held_out)["bag_of_words_accuracy"].value == pytest.approx(1 / 3)
    assert shortcut_metrics(train, []) == {}


# ---------------------------------------------------------------- held-out answers


def both(instruction: str, base: str, trained: str, base_end: str = "stop", trained_end: str = "stop") -> BothAnswers:
    id = f"evaluation/{instruction}"
    return BothAnswers(instruction, Completion(id, base, base_end), Completion(id, trained, trained_end))


def test_failed_answers_count_for_neither_arm() -> None:
    answers = [
        both("a", "One two. Three four.", "same same same same", trained_end="length"),
        both("b", "Five six.", "Seven eight.", base_end="error"),
    ]
    metrics = world_found(answers).metrics
    assert metrics["sentences_base"].value == 2 and metrics["sentences_trained"].n == 1
    ends = collapse_watch(answers).metrics["ends_by_itself_trained"]
    assert (ends.value, ends.n, ends.unparsed) == (0.0, 1, 1)


def test_arithmetic_of_repeated_questions() -> None:
    answers = [both("What is 2 plus 3?", "2 plus 3 is 5.", "It is 6."), both("What is 2 plus 3?", "5", "5")]
    found = score_sums(answers, ["5", "5"])
    assert (found.metrics["arithmetic_base"].value, found.metrics["arithmetic_trained"].value) == (1.0, 0.5)
    assert found.tests["arithmetic"].only_before == 1 and found.differences["arithmetic"].value == -0.5


class Scripted:
    """An engine from a function of the prompt; what it gives None for never comes back."""

    name = "scripted"

    def __init__(self, say: Any) -> None:
        self.say = say

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        for prompt in prompts:
            if prompt is not None and (found := self.say(prompt)) is not None:
                yield found


def prefers(word: str) -> Scripted:
    """A judge that prefers the answer with `word` in it, and else always answer A."""

    def say(prompt: Prompt) -> Completion:
        first = prompt.turns[0].text.split("Answer A:")[1].split("Answer B:")
        a = word in first[0] or word not in first[1]
        return Completion(prompt.id, "", "stop", logprobs=(-0.1, -2.0) if a else (-2.0, -0.1))

    return Scripted(say)


def test_win_rate_leaves_out_ties_and_undecided() -> None:
    answers = [
        both("a", "x", "good"), both("b", "good", "y"), both("c", "z", "good z"),
        both("d", "same", "same "), both("e", "one", "two"),
    ]  # fmt: skip
    found = win_rate(Judge(prefers("good"), "scripted"), answers, {"a": "no_harm"})
    result = found.metrics["win_rate"]
    assert result.value == pytest.approx(2 / 3) and result.n == 3 and result.items == "evaluation/win_rate.jsonl"
    assert found.metrics["win_rate_undecided"].value == pytest.approx(1 / 4)
    assert [row["preferred"] for row in found.items["win_rate"]] == ["yes", "no", "yes", "tie", "undecided"]
    assert [case.kind for case in found.cases] == [
        "trained against base: the base's answer is preferred", "trained against base: undecided",
    ]  # fmt: skip
    (table,) = found.tables
    assert [row[0] for row in table.rows] == ["all", "none broken", "no_harm"] and table.rows[0][3] == "1"


def test_both_arms_speak_with_the_adapter_off_and_on(loaded: Loaded) -> None:
    """The base's answers do not depend on the adapter; the real engine, on a tiny model."""
    from cai_experiment.engines.hf import HFEngine

    engine = HFEngine.from_model(loaded.model, loaded.tokenizer, BareRenderer(loaded.renderers["chat"]))
    questions = ["How do I grow tomatoes?", "Why?"]
    arms = BothArms(engine, loaded.model, 0, Progress(8, verbosity=0))
    fresh = arms.answer("answer", questions, max_tokens=8)
    assert all(a.base.text == a.trained.text for a in fresh), "an adapter that does nothing, the same random numbers"
    with disturbed(loaded.model):
        changed = arms.answer("answer", questions, max_tokens=8)
    assert [a.base.text for a in changed] == [a.base.text for a in fresh]
    assert [a.trained.text for a in changed] != [a.trained.text for a in fresh]
    assert arms.progress.done == 8


def test_bare_renderer_gives_the_prompt_of_training(loaded: Loaded) -> None:
    renderer = loaded.renderers["base"]
    bare = BareRenderer(renderer)
    turns = ask_for_answer("Why?")
    assert bare.prompt_ids(turns, "answer", max_tokens=50) == renderer.bare_prompt_ids("Why?")
    assert len(renderer.prompt_ids(turns, "answer")) > len(bare.prompt_ids(turns, "answer"))
    assert bare.stop_strings == renderer.stop_strings


# ---------------------------------------------------------------- examples of the written world


def world_example(seed: int, *, critique: str = "right", repair: bool = True, number: int = 0) -> Example:
    """An example made of the world's own sentences: one flaw of "constructive", criticised and repaired."""
    import random

    from cai_experiment.nano import world

    rng = random.Random(seed)
    question = world.compose_question(rng)
    answer = world.compose_answer(rng, question, flaws=1, principle="constructive")
    revised = world.compose_revision(rng, answer, "constructive", question.noun) if repair else answer
    words = {
        "right": world.compose_critique(answer, "constructive", NO_ISSUE),
        "wrong": f'The answer says "{answer.sentences[0].text}" This mocks the person.',
        "abstains": NO_ISSUE,
    }[critique]
    abstains = critique == "abstains"
    one = Round(
        "constructive", "Keep a friendly tone.", words, "" if abstains else revised.text, "yes",
        "" if abstains else ("no" if repair else "yes"),
    )  # fmt: skip
    pair_ = PreferencePair(question.text, one.revised_answer, answer.text)
    meta = {"source": "written", "seed": 0, "generator": "g", "critic": "c", "tokens": {}, "gate": {}}
    meta["meaningful"] = ["" if abstains else ("yes" if critique == "right" else "no")]
    return Example(
        f"{number:06d}", question.text, answer.text, one.principle, words, one.revised_answer, pair_, (one,), meta
    )


def rejected(example: Example, *reasons: str) -> Example:
    return replace(example, reject_reasons=reasons)


def test_critiques_are_counted_over_flawed_answers_rejected_ones_too_abstentions_apart() -> None:
    accepted = [world_example(1), world_example(2)]
    turned_down = [
        rejected(world_example(3, critique="wrong", repair=False), "verdict_unchanged"),
        rejected(world_example(4, critique="abstains"), "no_violation_found"),
    ]
    metrics = generation_metrics(accepted, turned_down, truth=True)
    assert (metrics["critique_meaningful"].value, metrics["critique_meaningful"].n) == (pytest.approx(2 / 3), 3)
    assert (metrics["critique_right"].value, metrics["critique_right"].n) == (pytest.approx(2 / 3), 3)
    assert (metrics["critique_abstained"].value, metrics["critique_abstained"].n) == (0.25, 4)
    assert metrics["accepted_pairs"].value == 2 and metrics["accepted_pairs"].n == 4
    assert metrics["revision_repaired"].value == pytest.approx(2 / 3)
    assert metrics["judge_kappa"].value == pytest.approx(1.0), "yes before, no after a repair, yes where none was made"
    assert metrics["meaningful_kappa"].value == pytest.approx(1.0)


def test_clean_answers_and_missing_judgements() -> None:
    clean = replace(world_example(1), initial_answer="Take your time. Cook a meal together.")
    no = replace(clean.rounds[0], verdict_before="no")
    by_judge = generation_metrics([replace(clean, rounds=(no,))], [], truth=False)
    assert by_judge["critique_meaningful"].n == 0 and "critique_right" not in by_judge
    lost = replace(world_example(2), meta={**world_example(2).meta, "meaningful": ["unparsed"]})
    metric = generation_metrics([lost], [], truth=False)["critique_meaningful"]
    assert (metric.value, metric.n, metric.unparsed) == (None, 0, 1)


def test_second_round_criticises_the_first_rounds_revision() -> None:
    one = world_example(1)
    again = replace(one, rounds=(one.rounds[0], replace(one.rounds[0], critique=NO_ISSUE, revised_answer="")))
    metrics = generation_metrics([again], [], truth=True)
    assert metrics["critique_right"].n == 1, "the repaired answer has no flaw, so its critique does not count"
    assert metrics["critique_false_alarm"].value == 0.0 and metrics["critique_false_alarm"].n == 1


def test_a_revision_answers_its_critique_if_the_last_revision_does() -> None:
    """A later revision may mend what its own left, or bring back what it mended; older lines have the own one alone."""
    one = world_example(1)

    def answers(own: str, final: list[str] | None) -> bool:
        meta = one.meta if final is None else one.meta | {"final_verdicts": final}
        rounds = (replace(one.rounds[0], verdict_after=own), replace(one.rounds[0], verdict_before="no"))
        return answers_critique(replace(one, rounds=rounds, meta=meta))

    assert answers("yes", ["no", "no"]) and not answers("no", ["yes", "no"])
    assert answers("no", None) and not answers("yes", None)


def test_all_parts_present() -> None:
    one = world_example(1)
    assert is_complete(one)
    assert not is_complete(replace(one, critique=" "))
    assert not is_complete(replace(one, preference_pair=replace(one.preference_pair, chosen="other")))


def test_truth_of_held_out_answers() -> None:
    one = world_example(1)
    found = world_found([both(one.instruction, one.initial_answer, one.revised_answer)])
    metrics, tests = found.metrics, found.tests
    assert (metrics["flawed_answers_base"].value, metrics["flawed_answers_trained"].value) == (1.0, 0.0)
    assert metrics["on_topic_trained"].value == 1.0 and tests["flawed_answers"].only_before == 1


# ---------------------------------------------------------------- gates


@dataclass
class Training:
    """As training.settings.TrainResult."""

    step0_margin: float = 0.0
    loss_before: float = 0.693
    loss_after: float | None = 0.69
    model: Any = None


def verdicts(gates: list[Gate]) -> dict[str, bool]:
    return {gate.name: gate.passed for gate in gates}


def test_milestone_0_gates() -> None:
    metrics = generation_metrics([world_example(1)], [], truth=True)
    assert all(verdicts(generation_gates("single", metrics, 1)).values())
    assert all(verdicts(training_gates("single", {}, Training(), 1)).values())
    bad = Training(step0_margin=1e-7, loss_after=math.nan)
    assert not any(verdicts(training_gates("single", {}, bad, 1)).values())
    assert json.dumps([g.to_json() for g in training_gates("single", {}, bad, 1)], allow_nan=False)
    nothing = verdicts(generation_gates("single", generation_metrics([], [], truth=False), 1))
    assert not any(nothing.values())


def test_milestone_1_gates_take_the_point_estimate() -> None:
    metrics = {
        "accepted_pairs": Result(10, 12, None), "complete_examples": Result.rate(10, 10),
        "critique_meaningful": Result.rate(7, 10), "revision_preferred": Result.rate(5, 10),
    }  # fmt: skip
    found = verdicts(generation_gates("batch", metrics, 10))
    assert found["critiques meaningful"] and not found["revisions better"] and found["accepted pairs"]
    metrics |= {"critique_meaningful": Result.rate(6, 10), "critique_right": Result.rate(7, 10)}
    found = verdicts(generation_gates("batch", metrics, 10))
    assert not found["critiques meaningful"] and found["critiques right by the world's truth"]
    assert verdicts(training_gates("batch", {}, Training(), 10)) == {"DPO loss falls": True}
    assert not training_gates("batch", {}, Training(loss_after=0.693), 10)[0].passed
    assert not training_gates("batch", {}, Training(loss_after=None), 10)[0].passed


def mvp_metrics(**changed: Result) -> dict[str, Result]:
    metrics = {
        "preference_accuracy": Result.rate(17, 20), "ends_by_itself_base": Result.rate(198, 200),
        "ends_by_itself_trained": Result.rate(190, 200), "arithmetic_base": Result.rate(380, 400),
        "arithmetic_trained": Result.rate(360, 400), "flawed_answers_base": Result.rate(120, 200),
        "flawed_answers_trained": Result.rate(6, 200), "win_rate": Result.rate(60, 100),
    }  # fmt: skip
    return metrics | changed


def test_mvp_gates() -> None:
    assert all(verdicts(training_gates("mvp", mvp_metrics(), Training(), 80)).values()), (
        "0.95 is within 5 points"
    )
    sixteen = training_gates("mvp", mvp_metrics(preference_accuracy=Result.rate(16, 20)), Training(), 80)
    assert not sixteen[0].passed, "over 80%, not 80%"
    runs_on = training_gates("mvp", mvp_metrics(ends_by_itself_trained=Result.rate(90, 200)), Training(), 80)
    assert [g.name for g in runs_on if not g.passed] == ["no forgetting: answers end by themselves"]
    other_model = {k: v for k, v in mvp_metrics().items() if not k.startswith("flawed")}
    assert "quality up: trained answers preferred" in verdicts(training_gates("mvp", other_model, Training(), 80))
    unmeasured = training_gates("mvp", {"preference_accuracy": Result.rate(20, 20)}, Training(), 80)
    assert [g.passed for g in unmeasured] == [True, False, False, False]
    assert json.dumps([g.to_json() for g in unmeasured], allow_nan=False)


def test_mvp_gates_of_the_shipped_model_see_a_collapse() -> None:
    world = {
        "on_topic_trained": Result.rate(190, 200), "distinct_2_base": Result(0.4, 200, None),
        "distinct_2_trained": Result(0.44, 200, None), "sentences_base": Result.mean([4.0] * 200),
        "sentences_trained": Result.mean([3.6] * 200),
    }  # fmt: skip

    def missed(**changed: Result) -> list[str]:
        gates = training_gates("mvp", mvp_metrics(**world) | changed, Training(), 80)
        assert len(gates) == 6
        return [gate.name for gate in gates if not gate.passed]

    assert missed() == [], "95%, and a tenth more and less, are enough"
    assert missed(on_topic_trained=Result.rate(189, 200)) == ["answers on topic"]
    assert missed(distinct_2_trained=Result(0.35, 200, None)) == ["no collapse: change of distinct word pairs"]
    assert missed(sentences_trained=Result(None, 0, None)) == ["no collapse: change of sentences an answer"]


# ---------------------------------------------------------------- the evaluation as a whole


def test_evaluate_generation_asks_the_judge_for_revisions() -> None:
    accepted = [world_example(i, number=i) for i in (1, 2)]
    judge = Scripted(lambda p: Completion(p.id, "", "stop", logprobs=_better(p, accepted)))
    found = evaluate_generation(EvaluationSettings("batch", truth=True), accepted, [], 2, Judge(judge, "scripted"))
    assert found.metrics["revision_preferred"].value == 1.0
    assert all(gate.passed for gate in found.gates)


def _better(prompt: Prompt, examples: list[Example]) -> tuple[float, float]:
    a_is_revised = any(f"Answer A: {e.revised_answer}\n" in prompt.turns[0].text for e in examples)
    return (-0.1, -2.0) if a_is_revised else (-2.0, -0.1)


def test_milestone_0_speaks_of_its_accepted_pair_only() -> None:
    bad = rejected(world_example(2, critique="wrong", repair=False), "verdict_unchanged")
    found = evaluate_generation(EvaluationSettings("single", truth=True), [world_example(1)], [bad], 1)
    assert all(gate.passed for gate in found.gates)
    assert found.metrics["accepted_pairs"].n == 2


def test_held_out_instructions_were_never_trained_on() -> None:
    from cai_experiment.nano.world import held_out_questions

    settings = EvaluationSettings("mvp", truth=True, held_out=5)
    drawn = held_out_questions(5, 0)
    train = [pair(drawn[1], "a", "b")]
    found = held_out_instructions(settings, train, [], [])
    assert len(found) == 5 and drawn[1] not in found and found[0] == drawn[0]
    other = replace(settings, truth=False)
    assert held_out_instructions(other, train, [pair("new", "a", "b")], ["new", "more", drawn[1]]) == ["new", "more"]


@pytest.mark.parametrize("layout", ["chat", "base"])
def test_evaluate_training_on_the_real_engine(loaded: Loaded, layout: str) -> None:
    settings = EvaluationSettings("mvp", truth=True, held_out=2, sums=2, verbosity=0)
    trained = Training(model=loaded.model)
    with disturbed(loaded.model), short_answers():
        found = evaluate_training(settings, trained, loaded.tokenizer, loaded.renderers[layout], PAIRS[:2], PAIRS[2:])
    assert found.metrics["preference_accuracy"].n == 1
    assert found.metrics["flawed_answers_base"].n == found.metrics["arithmetic_trained"].n == 2
    assert {g.name for g in found.gates} >= {"revised preferred in held-out pairs", "no forgetting: arithmetic"}
    assert len(found.answers) == 2 and {"flawed_answers", "arithmetic"} <= found.tests.keys()
    assert found.notes[0] == "preference is measured on 1 held-out pair"


@contextmanager
def short_answers() -> Iterator[None]:
    """A random model never ends by itself: let its answers be 6 tokens long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BothArms.answer, "__defaults__", (6, 0.7))
        yield


def test_evaluate_training_of_a_small_milestone_names_the_training_pairs(loaded: Loaded) -> None:
    settings = EvaluationSettings("batch", truth=True)
    found = evaluate_training(settings, Training(model=loaded.model), loaded.tokenizer, loaded.renderers["chat"], PAIRS)
    assert found.notes == ["preference is measured on 3 training pairs"]
    assert [g.name for g in found.gates] == ["DPO loss falls"] and not found.answers


# ---------------------------------------------------------------- reports

HOSTILE = '<script>alert(1)</script> [bold]x[/] \x1b[31mred "quoted" & \u202eback'


def facts(milestone: str = "single", accepted: Iterable[Example] = (), **changed: Any) -> RunFacts:
    values: dict[str, Any] = {
        "milestone": MILESTONES[milestone], "run": milestone, "accepted": list(accepted), "rejected": [],
        "settings": {"model": "nano", "seed": 0}, "seconds": {"generation": 90.0}, "price_per_hour": 1.74,
        "next_command": MILESTONES[milestone].next_command,
        "history": [{"step": i, "loss": 0.69 - i / 100, "margin": i / 10, "chosen_logp": -50.0, "rejected_logp": None}
                    for i in (1, 2)],
    }  # fmt: skip
    return RunFacts(**(values | changed))


def generation(milestone: str = "single", n: int = 1) -> Evaluation:
    accepted = [world_example(i, number=i) for i in range(1, n + 1)]
    return evaluate_generation(EvaluationSettings(milestone, truth=True), accepted, [], n)


class Page(HTMLParser):
    """Collects tags, checks nesting, and every attribute that could load something."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.stack: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_json_has_the_house_plans_keys(tmp_path: Path) -> None:
    report = write_report(tmp_path, generation(), facts(accepted=[world_example(1)]))
    written = json.loads((tmp_path / "report.json").read_text())
    assert written == read_report(tmp_path) == json.loads(json.dumps(report))
    assert written["verdict"] == "go"
    assert {"name", "value", "threshold", "interval", "n", "passed"} <= written["gates"][0].keys()
    assert written["metrics"]["critique_right"].keys() == {"value", "n", "interval", "unparsed", "scale"}
    assert written["cost"]["dollars"] == pytest.approx(90 / 3600 * 1.74)
    assert written["next"] == MILESTONES["single"].next_command


def test_page_is_whole_and_asks_for_nothing_outside(tmp_path: Path) -> None:
    examples = [world_example(i, number=i) for i in (1, 2)]
    evaluation = generation("batch", 2)
    evaluation.answers = [both("Why?", "One two three.", "One four three.")]
    write_report(tmp_path, evaluation, facts("batch", examples, rejected=[rejected(examples[0], "identical")]))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert all(link.startswith("#") for link in page.links) and "http" not in html.replace("http-equiv", "").replace(
        "http://www.w3.org/", ""
    )
    assert page.tags.count("svg") == 4 and "prefers-color-scheme: dark" in html and "width=device-width" in html
    assert {"ins", "del"} <= set(page.tags)
    assert "No-go" in page.text and "identical" in page.text and "1.5 min, $0.04 (budget 60 min" in page.text
    assert PLUMBING in page.text and "inspect_data.py --run batch" in page.text
    assert page.text.index("No-go") < page.text.index("critiques meaningful") < page.text.index("First answer")


def test_hostile_text_stays_text_on_page_and_terminal(tmp_path: Path) -> None:
    from rich.console import Console

    one = world_example(1)
    hostile = replace(
        one, id=HOSTILE, instruction=HOSTILE, initial_answer=HOSTILE, revised_answer=HOSTILE + " more",
        rounds=(replace(one.rounds[0], critique=HOSTILE, principle=HOSTILE, principle_id=HOSTILE),),
    )  # fmt: skip
    turned_down = rejected(hostile, HOSTILE)
    run = facts(accepted=[hostile], rejected=[turned_down], settings={HOSTILE: HOSTILE}, run=HOSTILE)
    report = write_report(tmp_path, generation(), run)
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert "script" not in page.tags and "\x1b" not in html and "\u202e" not in html
    assert "<script>alert(1)</script>" in page.text
    screen = Console(file=io.StringIO(), width=200)
    print_report(report, screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in shown and "[bold]x[/]" in shown


def test_training_keeps_what_generation_found(tmp_path: Path) -> None:
    examples = [world_example(1)]
    write_report(tmp_path, generation(), facts(accepted=examples, history=[]))
    training = Evaluation({"preference_accuracy": Result.rate(1, 1)}, training_gates("single", {}, Training(), 1))
    training.notes = ["measured on training pairs"]
    report = write_report(tmp_path, training, facts(accepted=examples, seconds={"training": 30.0}))
    assert [g["part"] for g in report["gates"]] == ["generation"] * 5 + ["training"] * 2
    assert {"critique_right", "preference_accuracy"} <= report["metrics"].keys()
    assert report["seconds"] == {"generation": 90.0, "training": 30.0}
    assert report["settings"].keys() == {"generation", "training"}
    again = write_report(tmp_path, generation(), facts(accepted=examples, history=[]))
    assert len(again["gates"]) == 7 and again["history"] and again["notes"] == ["measured on training pairs"]
    other = write_report(tmp_path, generation(n=2), facts(accepted=examples * 2, history=[]))
    assert {g["part"] for g in other["gates"]} == {"generation"}, "a report of other pairs is not carried over"


def test_the_peak_of_gpu_memory_is_kept_by_phase(tmp_path: Path) -> None:
    from cai_experiment.evaluation.reporting.words import cost_text

    examples = [world_example(1)]
    peaks = {"generation": {"allocated": 21.34, "reserved": 24.0}, "training": None}
    write_report(tmp_path, generation(), facts(accepted=examples, peak_gpu_gb={"generation": peaks["generation"]}))
    training = Evaluation({}, training_gates("single", {}, Training(), 1))
    report = write_report(tmp_path, training, facts(accepted=examples, peak_gpu_gb={"training": None}))
    assert report["cost"]["peak_gpu_gb"] == peaks
    assert cost_text(report["cost"]).endswith("; peak GPU memory 21.3 GB in generation")


def test_a_damaged_earlier_report_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text('{"counts": 3}')
    assert write_report(tmp_path, generation(), facts(accepted=[world_example(1)]))["verdict"] == "go"
    (tmp_path / "report.json").write_text("{torn")
    assert write_report(tmp_path, generation(), facts(accepted=[world_example(1)]))["verdict"] == "go"


def test_no_go_without_any_pair(tmp_path: Path) -> None:
    found = evaluate_generation(EvaluationSettings("single", truth=False), [], [], 1)
    report = write_report(tmp_path, found, facts(history=[]))
    assert report["verdict"] == "no-go" and "inspect_data.py" in report["next"]
    assert "No pair was accepted." in Page((tmp_path / "report.html").read_text()).text


def test_terminal_report_warns_of_wide_intervals(tmp_path: Path) -> None:
    from rich.console import Console

    report = write_report(tmp_path, generation("batch", 2), facts("batch", [world_example(1), world_example(2)]))
    screen = Console(file=io.StringIO(), width=160)
    print_report(report, screen)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    assert "critiques meaningful: the interval (34.2 to 100.0%) is wide with n = 2" in shown
    assert PLUMBING in shown and "NO-GO" in shown and "next: " in shown


def test_figures_tell_close_values_apart() -> None:
    def told(value: float | None, threshold: float | None, rule: str) -> tuple[str, str]:
        gate = {"value": value, "threshold": threshold, "rule": rule, "interval": None, "n": 9}
        cells = gate_cells(gate, {})
        return cells.value, cells.asked

    assert told(0.693141, 0.693147, "<") == ("0.69314", "< 0.69315")
    assert told(0.7, 0.7, ">=") == ("0.7", ">= 0.7")
    assert told(None, None, ">=") == ("not measured", ">= not measured")
    assert figure(999.6) == "1,000" and figure(0.9996) == "1" and figure(-0.03) == "−0.03"
    assert (figure(1e-17), figure(12345.6), figure(1.0)) == ("0", "12,346", "1")


def test_differences_rebuild_both_texts() -> None:
    before, after = "Hit it with a hammer.\n\nThen  wait.", "Change the washer. Then  wait."
    left, right = differences(before, after)
    assert "".join(p.text for p in left) == before and "".join(p.text for p in right) == after
    assert {p.kind for p in left} == {"same", "del"} and {p.kind for p in right} == {"same", "ins"}
    assert [p.text.strip() for p in right if p.kind == "same"] == ["Then  wait."]
    assert differences("", "") == ([], [])


# ---------------------------------------------------------------- inspect_data.py


@pytest.fixture()
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "batch"
    folder.mkdir()
    accepted = [world_example(i, number=i) for i in (1, 2)]
    write_jsonl(folder / "pairs.jsonl", map(to_row, accepted))
    one = replace(world_example(3, critique="abstains", number=3), instruction=f"Odd {HOSTILE}")
    write_jsonl(folder / "rejected.jsonl", [to_row(rejected(one, "no_violation_found"))])
    return tmp_path


def shown(capsys: pytest.CaptureFixture[str], data_dir: Path, *flags: str) -> str:
    assert inspect_data.main(["--data-dir", str(data_dir), *flags]) == 0
    return capsys.readouterr().out


def test_inspect_lists_and_shows_in_full(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    listed = shown(capsys, data_dir)
    assert "000001" in listed and "000002" in listed and "2 shown" in listed
    full = shown(capsys, data_dir, "--run", "batch", "--index", "1")
    assert "000002" in full and "000001" not in full and "critique:" in full and "[-" in full and "{+" in full
    assert "000003" in shown(capsys, data_dir, "--id", "000003")


def test_a_final_verdict_is_shown_where_it_is_another(tmp_path: Path) -> None:
    from rich.console import Console

    one = world_example(1)
    report = write_report(tmp_path, generation(), facts(accepted=[one]))
    for final, says in (("no", "after: no"), ("yes", "after: no, in the end yes"), ("", "after: no")):
        example = replace(one, meta=one.meta | {"final_verdicts": [final]})
        console = Console(file=io.StringIO(), width=200)
        print_example(example, console)
        assert f"{says};" in console.file.getvalue()  # type: ignore[attr-defined]
        assert f"{says}." in render_page(report, [example])


def test_inspect_filters(capsys: pytest.CaptureFixture[str], data_dir: Path) -> None:
    assert "1 shown" in shown(capsys, data_dir, "--reason", "no_violation_found")
    assert "2 shown" in shown(capsys, data_dir, "--principle", "constructive")
    assert "0 shown" in shown(capsys, data_dir, "--grep", "zebra crossing")
    hostile = shown(capsys, data_dir, "--rejected", "--grep", "ODD", "-v", "2")
    assert "1 shown" in hostile and "\x1b" not in hostile and "[bold]x[/]" in hostile


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--id", "9"], "'9'; there are: 000001"),
        (["--index", "7"], "has 2 such examples"),
        (["--reason", "bored"], "no_violation_found"),
        (["--principle", "beauty"], "constructive"),
        (["--run", "none"], "cannot read"),
    ],
)
def test_inspect_names_what_is_wrong(data_dir: Path, flags: list[str], says: str) -> None:
    with pytest.raises(BadInputError, match=says):
        inspect_data.main(["--data-dir", str(data_dir), *flags])


def test_inspect_without_any_run_and_torch_stays_unimported(tmp_path: Path, data_dir: Path) -> None:
    script = Path(inspect_data.__file__)
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, str(script), "--data-dir", str(empty)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "holds no run" in done.stderr and done.stderr.count("\n") == 1
    code = (
        "import sys; from cai_experiment.scripts import inspect_data;"
        f"inspect_data.main(['--data-dir', {str(data_dir)!r}]);"
        "assert not {'torch', 'transformers', 'scipy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
