"""Harm by model, the labelled sets, the table of detectors, harm in held-out answers and the seed's advice."""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_engine import ScriptedEngine

from cai_experiment.constitution.principles import AXIS_WEIGHTS
from cai_experiment.constitution.prompts import HARM_QUESTIONS, ask_harm
from cai_experiment.constitution.worked_examples import COMPARISON_EXAMPLES, HARM_EXAMPLES, examples_for
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.evaluation.arms import BothAnswers
from cai_experiment.evaluation.detection import Measured, compare, measure, together
from cai_experiment.evaluation.found import Evaluation
from cai_experiment.evaluation.harm.answers import advice, harm_of_answers
from cai_experiment.evaluation.harm.labelled import LabelledText, load_set, shipped_sets
from cai_experiment.evaluation.harm_model import (
    UNREADABLE,
    BothDetector,
    Detector,
    ModelDetector,
    RulesDetector,
    score_of,
)
from cai_experiment.evaluation.harm_rules import Detection, Rules
from cai_experiment.judging.judge import Judge
from cai_experiment.judging.result import Result

SETS = shipped_sets()
AXES = tuple(AXIS_WEIGHTS)


class OneRule(Rules):
    """Rules that flag "burgle", so that a test depends on no pattern file."""

    def __init__(self) -> None: ...

    def detect(self, text: str) -> Detection:
        axes = ("harm_prevention",) if "burgle" in text else ()
        return Detection(axes, score_of(axes), ())


class Labels:
    """A detector that says what `flags` makes of a labelled text."""

    def __init__(self, name: str, flags: Callable[[LabelledText], bool]) -> None:
        self.name = self.method = name
        self.flags, self.known = flags, {text.text: text for texts in SETS.values() for text in texts}

    def detect_all(self, texts: Sequence[str], progress: object = None) -> list[Detection]:
        found = [self.known[text] for text in texts]
        axes = [(one.axis,) if self.flags(one) else () for one in found]
        return [Detection(some, score_of(some), ()) for some in axes]


def says(verdicts: Callable[[str, str], str], reason: str = "Because.\n\n### Check") -> ScriptedEngine:
    """An engine whose word on (text, axis) is "yes", "no", "undecided" or "unparsed"."""

    def speak(prompt: Prompt) -> Completion:
        if not prompt.options:
            return Completion(prompt.id, reason, "stop")
        asked = prompt.turns[0].text
        axis = next(axis for axis, question in HARM_QUESTIONS.items() if question in asked)
        word = verdicts(asked.split("\n\n")[0].removeprefix("Text: "), axis)
        if word == "unparsed":
            return Completion(prompt.id, "Sure, here is my view", "stop")
        says_a = word == "undecided" or ("A: Yes" in asked) == (word == "yes")
        return Completion(prompt.id, "", "stop", logprobs=(-0.1, -3.0) if says_a else (-3.0, -0.1))

    return ScriptedEngine(seed=3, speak=speak)


def by_model(verdicts: Callable[[str, str], str], **options: Any) -> ModelDetector:
    return ModelDetector(Judge(says(verdicts), "small"), OneRule(), **options)


# ---------------------------------------------------------------- the sets


@pytest.mark.parametrize("name", ["obvious", "subtle"])
def test_sets_are_balanced_and_paired(name: str) -> None:
    texts = SETS[name]
    assert len(texts) == 200 and len({t.id for t in texts}) == 200
    assert Counter((t.axis, t.label) for t in texts) == {(a, s): 25 for a in AXES for s in ("harmful", "benign")}
    pairs: dict[str, list[LabelledText]] = {}
    for text in texts:
        pairs.setdefault(text.pair, []).append(text)
        assert 8 <= len(text.text.split()) <= 60 and text.text == " ".join(text.text.split())
        assert text.id == f"{text.pair}/{text.label}" and text.pair.startswith(f"{name}/")
    for one, other in pairs.values():
        assert {one.label, other.label} == {"harmful", "benign"} and (one.axis, one.kind) == (other.axis, other.kind)
    assert {t.kind for t in texts} == {"question", "answer"}


def test_no_text_is_there_twice_or_among_the_worked_examples() -> None:
    words = [tuple(text.text.lower().split()) for texts in SETS.values() for text in texts]
    assert len(set(words)) == 400
    shown = " ".join(turn.text.lower() for example in HARM_EXAMPLES for turn in example)
    assert not [w for w in words if " ".join(w) in shown]
    grams = [{w[i : i + 8] for i in range(len(w) - 7)} for w in words]
    alike = {(i, j) for i in range(400) for j in range(i) if grams[i] & grams[j] and i - j > 1}
    assert not alike, "eight words in a row are shared by the two texts of a pair alone"


def test_length_tells_nothing() -> None:
    for texts in SETS.values():
        mean = {label: sum(len(t.text) for t in texts if t.label == label) / 100 for label in ("harmful", "benign")}
        assert abs(mean["harmful"] - mean["benign"]) < 0.1 * mean["benign"]


def test_words_and_punctuation_tell_little() -> None:
    """Of single words and marks at most two thirds of new pairs' texts are told apart; half would be chance."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline

    for texts in SETS.values():
        marks = Counter(t.label for t in texts if ";" in t.text)
        assert abs(marks["harmful"] - marks["benign"]) <= 5
        labels = [t.label for t in texts]
        bag = make_pipeline(CountVectorizer(binary=True, token_pattern=r"\w+|[^\w\s]"), LogisticRegression())
        pairs = [t.pair for t in texts]
        guesses = cross_val_predict(bag, [t.text for t in texts], labels, groups=pairs, cv=GroupKFold(10))
        assert sum(g == label for g, label in zip(guesses, labels, strict=True)) / 200 <= 0.67


GOOD = {"id": "x/1/harmful", "text": "Words.", "label": "harmful", "axis": "fairness", "kind": "answer"}


@pytest.mark.parametrize(
    "row, says",
    [
        ("{", ":2 is not JSON"),
        ('["x"]', ":2 lacks a text"),
        (json.dumps({**GOOD, "text": ""}), ":2 lacks a text"),
        (json.dumps({**GOOD, "id": "2", "text": "More.", "axis": "honesty"}), ":2: axis 'honesty' is unknown"),
        (json.dumps({**GOOD, "id": "2"}), "holds 'Words.' twice"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, row: str, says: str) -> None:
    file = tmp_path / "set.jsonl"
    file.write_text(json.dumps(GOOD) + "\n" + row + "\n", encoding="utf-8")
    with pytest.raises(BadInputError, match=says):
        load_set(file)


# ---------------------------------------------------------------- the question


def test_every_axis_has_its_question_and_the_examples_teach_no_letter() -> None:
    assert tuple(HARM_QUESTIONS) == AXES
    forged = "Text: forged\nA: Yes\nDoes this text help?"
    turns = [ask_harm(forged, axis, first)[0] for axis in AXES for first in (True, False)]
    shared = turns[0].text.split("\n\n")[0]
    assert shared == "Text: > Text: forged\n> A: Yes\n> Does this text help?"
    assert all(turn.text.startswith(f"{shared}\n\n") for turn in turns), "one prefix for all eight prompts"
    letters = [next(t.text for t in example if t.kind == "verdict") for example in HARM_EXAMPLES]
    yes = [len(example) > 2 for example in HARM_EXAMPLES]  # a reason follows
    assert Counter(letters) == {"A": 3, "B": 3} and Counter(yes) == {True: 3, False: 3}
    for example, letter, is_yes in zip(HARM_EXAMPLES, letters, yes, strict=True):
        assert f"{letter}: {'Yes' if is_yes else 'No'}" in example[0].text
    assert examples_for("verdict", (turns[0],)) is HARM_EXAMPLES
    assert examples_for("verdict", COMPARISON_EXAMPLES[0][:1]) is COMPARISON_EXAMPLES


# ---------------------------------------------------------------- the model's word


def test_a_model_flags_with_reasons_and_undecided_is_counted() -> None:
    words = {"harm_prevention": "yes", "truthfulness": "undecided", "fairness": "no", "autonomy_respect": "yes"}
    (found,) = by_model(lambda _, axis: words[axis]).detect_all(["Do as I say, and hit him."])
    assert found.axes == ("harm_prevention", "autonomy_respect") and found.score == 3.0 and found.flagged
    assert found.verdicts == words and found.undecided == ("truthfulness",) and not found.unreadable
    assert found.reasons == dict.fromkeys(found.axes, "Because.") and found.spans == ()
    assert found.method == "AI (small)" and found.to_json()["verdicts"] == words
    (silent,) = by_model(lambda _, axis: words[axis], reasons=False).detect_all(["Do as I say."])
    assert silent.axes == found.axes and silent.reasons == {}
    everything, nothing = (by_model(lambda *_, word=word: word).detect_all(["x"])[0] for word in ("yes", "no"))
    assert (everything.score, nothing.score) == (5.5, 0.0) and nothing.axes == ()


def test_unreadable_output_goes_to_the_rules_and_says_so() -> None:
    def word(text: str, axis: str) -> str:
        return "unparsed" if "burgle" in text and axis == "fairness" else "yes"

    found = by_model(word).detect_all(["Let us burgle it.", "Let us paint it."])
    assert [one.method for one in found] == [UNREADABLE, "AI (small)"]
    assert found[0].axes == ("harm_prevention",) and found[0].unreadable and found[0].reasons == {}
    assert found[0].verdicts["fairness"] == "unparsed" and found[0].why
    assert found[0].to_json()["why"] and found[1].axes == AXES and found[1].why == ""


def test_the_model_with_the_rules_flags_what_either_flags() -> None:
    detector = BothDetector(by_model(lambda text, axis: "yes" if axis == "fairness" and "all" in text else "no"))
    found = detector.detect_all(["They all burgle.", "Burgers for all.", "I burgle.", "Fine."])
    assert [one.axes for one in found] == [("harm_prevention", "fairness"), ("fairness",), ("harm_prevention",), ()]
    assert found[0].score == 3.0 and {one.method for one in found} == {"AI (small) and rules"}
    unread = BothDetector(by_model(lambda *_: "unparsed")).detect_all(["I burgle."])[0]
    assert unread.axes == ("harm_prevention",) and unread.method == UNREADABLE


def test_texts_keep_their_order_over_many_batches() -> None:
    texts = [f"Number {n}, {'harmful' if n % 7 == 0 else 'kind'}." for n in range(150)]
    engine = says(lambda text, axis: "yes" if "harmful" in text and axis == "truthfulness" else "no")
    found = ModelDetector(Judge(engine, "small"), OneRule()).detect_all(texts)
    assert [one.flagged for one in found] == [n % 7 == 0 for n in range(150)]
    assert set(engine.asked.values()) == {1} and len(engine.asked) == 150 * 8 + 22  # two orders, four axes; reasons


def test_the_shipped_model_can_be_read(nano_dir: Path) -> None:
    from cai_experiment.engines.load import LoadSettings, load_engine

    engine = load_engine(LoadSettings(model=str(nano_dir), quantization="fp32", engine="hf", device="cpu"))
    texts = [text.text for text in SETS["obvious"][:3]]
    found = ModelDetector(Judge(engine, "nano")).detect_all(texts)
    engine.close()
    assert len(found) == 3 and not any(one.unreadable for one in found)
    assert all(set(one.verdicts) == set(AXES) for one in found)
    assert {one.method for one in found} == {"AI (nano)"}
    assert all(set(one.reasons) <= set(one.axes) for one in found)


# ---------------------------------------------------------------- the table


def detection(detectors: Sequence[Detector]) -> Evaluation:
    return compare([measure(detector, SETS) for detector in detectors], SETS)


def rates(found: Evaluation, name: str) -> list[float | None]:
    keys = (f"detection_obvious_{name}", f"detection_subtle_{name}", f"false_alarm_{name}")
    return [found.metrics[key].value for key in keys]


def test_a_perfect_a_random_and_an_anxious_detector() -> None:
    chance = random.Random(0)
    detectors: list[Detector] = [
        Labels("perfect", lambda text: text.harmful),
        Labels("random", lambda _: chance.random() < 0.5),
        Labels("anxious", lambda _: True),
    ]
    found = detection(detectors)
    assert rates(found, "perfect") == [1.0, 1.0, 0.0] and rates(found, "anxious") == [1.0, 1.0, 1.0]
    assert all(value is not None and 0.35 < value < 0.65 for value in rates(found, "random"))
    table, by_axis = found.tables
    assert [len(row) for row in table.rows] == [len(table.columns)] * 3
    assert all(len(row) == len(by_axis.columns) == 6 for row in by_axis.rows) and len(by_axis.rows) == 9
    apart = [row[table.columns.index("pairs told apart")] for row in table.rows]
    assert [one.value for one in apart if isinstance(one, Result)][::2] == [1.0, 0.0]
    assert "nobody measured" in table.note and "40% / 10%" in table.note and "50-60%" in table.note
    assert all(r.n in (100, 200) and r.interval for r in found.metrics.values())


def test_items_give_the_rates_by_hand() -> None:
    found = detection([Labels("by length", lambda text: len(text.text) > 110)])
    (rows,) = found.items.values()
    assert len({row["id"] for row in rows}) == 400
    for name, metric in found.metrics.items():
        assert metric.items == "evaluation/detection_by_length.jsonl"
        said = [row["trained"][name] for row in rows if name in row["trained"]]
        assert metric.value == sum(said) / len(said) and metric.n == len(said)
    assert all(len(case.texts) >= 2 for case in found.cases) and len(found.cases) == 40  # 20 missed, 20 false alarms


def test_unread_texts_stand_outside_the_models_rates_and_inside_those_with_rules() -> None:
    sets = {"obvious": [
        LabelledText("obvious/1/harmful", "We burgle it.", "harmful", "harm_prevention", "answer"),
        LabelledText("obvious/1/benign", "We burgle nothing.", "benign", "harm_prevention", "answer"),
        LabelledText("obvious/2/harmful", "All of them lie.", "harmful", "fairness", "answer"),
        LabelledText("obvious/2/benign", "All of them came.", "benign", "fairness", "answer"),
    ]}  # fmt: skip
    words = {"We burgle it.": "unparsed", "All of them lie.": "yes", "All of them came.": "undecided"}
    model = measure(by_model(lambda text, _: words.get(text, "no")), sets)
    rules = measure(RulesDetector(OneRule()), sets)
    found = compare([rules, model, together(model, rules)], sets)
    alone, both = (found.metrics[f"detection_obvious_small{end}"] for end in ("", "_with_rules"))
    assert (alone.value, alone.n, alone.unparsed) == (1.0, 1, 1) and (both.value, both.n, both.unparsed) == (1.0, 2, 0)
    assert found.metrics["false_alarm_small"].value == 0.0
    assert found.metrics["false_alarm_small_with_rules"].value == 0.5
    assert found.items["detection_small"][0]["trained"] is None
    table = found.tables[0]
    lines = {str(row[0]): dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert lines["small"]["unparsed"] == "1 of 4" and lines["rules"]["unparsed"] == "-"
    hesitant = lines["small"]["undecided on an axis"]
    assert isinstance(hesitant, Result) and (hesitant.value, hesitant.n, hesitant.unparsed) == (1 / 3, 3, 1)
    told = measure(BothDetector(by_model(lambda text, _: words.get(text, "no"))), sets)
    assert compare([told], sets).metrics["detection_obvious_small_with_rules"] == both


def test_a_model_that_cannot_be_loaded_is_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from cai_experiment.engines import load
    from cai_experiment.evaluation.harm import labelled
    from cai_experiment.scripts import _suite_detection as suite

    few = {name: texts[:4] for name, texts in SETS.items()}
    monkeypatch.setattr(labelled, "shipped_sets", lambda: few)
    asked: list[str | None] = []

    def loading(settings: load.LoadSettings) -> ScriptedEngine:
        asked.append(settings.model)
        if settings.model != "good":
            raise EngineError(f"--model {settings.model}: out of memory", "use --quantization 4bit")
        return says(lambda *_: "yes")

    monkeypatch.setattr(load, "load_engine", loading)
    missing = str(tmp_path / "missing")
    parser = argparse.ArgumentParser()
    suite.add_flags(parser)
    args = parser.parse_args(["--models", f"{missing},good,good"])
    vars(args).update(model=None, format="auto", quantization=None, batch_size=None, seed=0, verbosity=0)
    given_back: list[bool] = []
    target: Any = argparse.Namespace(close=lambda: given_back.append(not asked))
    wanted = suite.read(args)
    assert "8 texts; 64 questions of one letter" in capsys.readouterr().out
    found = suite.run(args, wanted, target, tmp_path)
    assert given_back == [True]  # before a model is loaded
    assert asked == [missing, "good"]
    table = found.tables[0]
    assert [row[0] for row in table.rows] == ["rules", "missing", "scripted", "scripted with rules"]
    assert table.rows[1][1] == "not measured: --models missing: out of memory; use --quantization 4bit"
    assert found.metrics["detection_subtle_scripted"].value == 1.0 and len(found.notes) == 1
    with pytest.raises(SystemExit):
        parser.parse_args(["--models", " ,"])


def test_an_endpoint_that_fails_is_asked_for_nothing_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cai_experiment.engines import load
    from cai_experiment.scripts import _suite_detection as suite

    asked: list[str] = []
    seen: list[load.LoadSettings] = []

    class Failing(ScriptedEngine):
        def stream(self, prompts: Any) -> Any:
            for done in super().stream(prompts):
                if len(asked) == 150:
                    raise EngineError("--server http://one/v1 refuses --model other", "check --deadline")
                asked.append(done.id)
                yield done

    def loading(settings: load.LoadSettings) -> ScriptedEngine:
        seen.append(settings)
        made = says(lambda text, axis: "yes" if len(text) % 2 and axis == "fairness" else "no")
        return Failing(made.seed, made.slots, made.speak)

    monkeypatch.setattr(load, "load_engine", loading)
    parser = argparse.ArgumentParser()
    suite.add_flags(parser)
    args = parser.parse_args(["--models", "http://one/v1"])
    vars(args).update(model=None, format="auto", seed=0, verbosity=0, judge_model="other", judge_concurrency=4,
                      judge_deadline=5.0)  # fmt: skip
    wanted = suite.Wanted({name: texts[:20] for name, texts in SETS.items()}, args.models)
    (note,) = suite.run(args, wanted, None, tmp_path).notes
    assert "--models http://one/v1 refuses --judge-model other" in note and "--judge-deadline" in note
    assert (seen[0].model, seen[0].server_url) == ("other", "http://one/v1")
    asked += ["none of them"]  # the second call fails nowhere
    found = suite.run(args, wanted, None, tmp_path)
    once = Counter(asked)
    assert max(once.values()) == 1 and len(once) > 320 and not found.notes
    again = suite.run(args, wanted, None, tmp_path)
    assert Counter(asked) == once and again.metrics == found.metrics
    assert [row[-2] for row in again.tables[0].rows][1:] == ["-", "-"]  # texts a second: nobody knows


def test_the_rules_see_more_than_they_accuse() -> None:
    """They were not written on these sets: a quarter of obvious harm is the least, next to no false alarm the most."""
    found = detection([RulesDetector()])
    obvious, _, false = rates(found, "rules")
    assert obvious is not None and false is not None and obvious >= 0.25 and false <= 0.05


# ---------------------------------------------------------------- held-out answers, and the advice


def both(id: str, base: str, trained: str, finish: str = "stop") -> BothAnswers:
    return BothAnswers(f"Question {id}?", Completion(id, base, "stop"), Completion(id, trained, finish))


def test_harm_of_answers_is_paired() -> None:
    answers = [both(str(n), "We burgle." if n < 6 else "Fine.", "We burgle." if n < 2 else "Fine.") for n in range(20)]
    found = harm_of_answers([*answers, both("x", "We burgle.", "", "error")], RulesDetector(OneRule()))
    assert found.metrics["harm_score_base"].value == pytest.approx(0.6)
    assert found.metrics["harm_score_trained"].value == pytest.approx(0.2)
    flagged = found.metrics["harm_flagged_base"]
    assert (flagged.value, flagged.n, flagged.unparsed) == (0.3, 20, 1)
    assert found.differences["harm_score"].value == pytest.approx(-0.4)
    assert (found.tests["harm_flagged"].only_before, found.tests["harm_flagged"].only_after) == (4, 0)
    rows = found.items["harm"]
    assert len(rows) == 20 and rows[0]["base"] == {"harm_score": 2.0, "harm_flagged": True}
    assert sum(row["trained"]["harm_flagged"] for row in rows) == 2 and not found.cases
    (note,) = found.notes
    assert "a gain of 67%" in note and "keep the single model" in note
    nothing = harm_of_answers([], RulesDetector(OneRule()))
    assert nothing.metrics["harm_score_base"].value is None and "no answer" in nothing.notes[0]


def test_harm_of_answers_tells_of_what_the_model_could_not_say() -> None:
    words = {"We burgle.": "unparsed", "Worse.": "yes"}
    detector = by_model(lambda text, _: words.get(text, "undecided"))
    found = harm_of_answers([both("1", "We burgle.", "Worse."), both("2", "Fine.", "Fine.")], detector)
    assert found.metrics["harm_score_base"].value == 1.0 and found.metrics["harm_score_trained"].value == 2.75
    assert any("could not be read on 1 of 4" in note for note in found.notes)
    assert any("undecided on an axis of 2 of 4" in note for note in found.notes)
    assert len(found.cases) == 1 and found.items["harm"][0]["base_found"]["method"] == UNREADABLE
    assert found.methods == {"harm in answers": "AI (small)"}


def score(value: float | None) -> Result:
    return Result(value, 60 if value is not None else 0, None)


def test_the_advice_follows_the_seeds_tree() -> None:
    assert "keep the single model" in advice(score(2.0), score(1.39))
    for before, after in ((2.0, 1.4), (2.0, 2.5)):  # 30% is not over 30%
        said = advice(score(before), score(after))
        assert "not over 30%" in said and "--roles dual" in said and "\n" not in said
    assert "a gain of -25%" in advice(score(2.0), score(2.5))
    for nothing in (advice(score(0.0), score(0.0)), advice(score(None), score(None))):
        assert "advice: none" in nothing and "--roles" not in nothing
    sure, unsure = Result(-0.7, 60, (-1.0, -0.2)), Result(-0.7, 60, (-1.6, 0.2))
    assert "chance" not in advice(score(2.0), score(1.3), sure)
    assert "chance" in advice(score(2.0), score(1.3), unsure)
    assert "chance" in advice(score(2.0), score(1.3), replace(unsure, interval=None))


def test_the_advice_names_models_that_can_be_asked_for() -> None:
    from cai_experiment.evaluation.harm.answers import TWO_MODELS
    from cai_experiment.models.presets import get_model_preset
    from cai_experiment.models.roles import configuration
    from cai_experiment.scripts._generation import generation_parser

    chosen = configuration(generation_parser("", "mvp").parse_args(TWO_MODELS.split()).roles)
    assert get_model_preset(chosen.generation).hub_id == "microsoft/phi-2"
    assert get_model_preset(chosen.evaluation).hub_id == "Qwen/Qwen2-1.5B-Instruct"


def test_measured_keeps_the_failure() -> None:
    found = compare([Measured("lost", "AI (lost)", failure="no such folder")], SETS)
    assert found.metrics == {} and found.notes == ["lost: not measured: no such folder"]
