"""The Impact tab's logic: suites, statistics, a comparison on the shipped model, own files, exports."""

from __future__ import annotations

import csv
import io
import json
import os
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from adapters import with_fresh_adapter

from cai_experiment.demo import evaluating, exports, impact
from cai_experiment.demo.checkpoints import Checkpoint
from cai_experiment.demo.impact import MOST_PROMPTS, compare, load_own
from cai_experiment.demo.models import Arms, Speaker
from cai_experiment.demo.settings import DemoSettings
from cai_experiment.engines.base import Completion, Engine
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.evaluation.arms import BothAnswers, BothArms, Speakers, transformers_engine
from cai_experiment.evaluation.harm.labelled import shipped_sets as detection_sets
from cai_experiment.evaluation.harm_rules import Detection
from cai_experiment.evaluation.impact import Impact, detect, detector_for, measure
from cai_experiment.evaluation.suites import AXES, COMPREHENSIVE, SUITES, ImpactPrompt, Suite, load_suite
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.evaluation_sets import EvaluationTexts, shipped_sets
from cai_experiment.pipeline.known import fingerprint

NOTHING_LEFT = "I can't help with that."
HARMFUL = "You should use a crowbar to break into the house and steal the money."
HARMLESS = "Ask a friend what they think about it, and take your time with the answer."
HOSTILE = '<script>alert(1)</script> [link](javascript:x) \x1b[31m \u202e <img src=x onerror="y">'

# ---------------------------------------------------------------- suites


def test_suites_are_balanced_and_unique() -> None:
    every = load_suite(COMPREHENSIVE).prompts
    assert len({one.text for one in every}) == len({one.id for one in every}) == len(every) == 144
    for name in AXES:
        prompts = load_suite(name).prompts
        assert [one.id for one in prompts] == [f"{name}/{number:02d}" for number in range(1, 37)]
        assert sorted(Counter(one.kind for one in prompts).values()) == [6] * 6
        assert all(20 < len(one.text) < 200 and one.text == one.text.strip() for one in prompts)


def test_no_prompt_stands_in_an_evaluation_set_or_in_the_detection_sets() -> None:
    known = EvaluationTexts(shipped_sets())
    labelled = {one.text for texts in detection_sets().values() for one in texts}
    every = load_suite(COMPREHENSIVE).prompts
    assert not [one.id for one in every if known.holds(fingerprint(one.text)) or one.text in labelled]


def test_the_shipped_model_has_household_questions_of_every_kind() -> None:
    every = load_suite(COMPREHENSIVE, of_world=True)
    assert every.collection == "world" and "rehearsal" in every.says
    assert len({one.text for one in every.prompts}) > 140
    assert every == load_suite(COMPREHENSIVE, of_world=True)
    assert set(Counter(one.kind for one in load_suite("stereotyping", of_world=True).prompts).values()) == {6}


@pytest.mark.parametrize("count", [4, 10, 143])
def test_a_part_holds_as_many_of_each_suite_as_can_be(count: int) -> None:
    part = load_suite(COMPREHENSIVE, count=count)
    shares = Counter(one.suite for one in part.prompts)
    assert len(part.prompts) == count and max(shares.values()) - min(shares.values()) <= 1 and len(shares) == 4
    assert f"{count} of its 144" in part.notes[0]


@pytest.mark.parametrize("ask", [lambda: load_suite("nothing"), lambda: load_suite(SUITES[0], count=0)])
def test_what_is_no_suite_is_told(ask: Any) -> None:
    with pytest.raises(BadInputError):
        ask()


# ---------------------------------------------------------------- statistics


def compared(
    pairs: list[tuple[str, str]], scores: list[tuple[float, float]] | None = None, truth: bool = False
) -> Impact:
    """The impact of (base's, trained's) texts; by the rules, or with the given scores of harm_prevention."""
    suite = Suite(
        "harmful_content",
        "general",
        tuple(ImpactPrompt(f"p/{i}", f"Ask {i}?", "harmful_content") for i in range(len(pairs))),
    )
    answers = [
        BothAnswers(p.text, said(p.id, one), said(p.id, two))
        for p, (one, two) in zip(suite.prompts, pairs, strict=True)
    ]
    found = detect(detector_for("Rules"), answers)
    if scores is not None:
        found = [(scored(one), scored(two)) for one, two in scores]
    return measure(suite, answers, found, "Rules", truth)


def said(id: str, text: str) -> Completion:
    return Completion(id, "", "error", error="too long") if text == "FAILED" else Completion(id, text, "stop")


def scored(score: float) -> Detection:
    return Detection(("harm_prevention",) if score else (), score, ())


def varied(text: str, count: int) -> list[str]:
    """Answers that differ, as a model's do."""
    words = (
        "alpha",
        "bravo",
        "carol",
        "delta",
        "eagle",
        "fancy",
        "giant",
        "hotel",
        "igloo",
        "jolly",
        "kitten",
        "lemon",
    )
    return [f"{text} {words[i % len(words)]} {words[(i * 7 + 3) % len(words)]} {i}." for i in range(count)]


def test_figures_of_a_case_computed_by_hand() -> None:
    texts = list(zip(varied("One", 20), varied("Two", 20), strict=True))
    found = compared(texts, [(2.0, 0.0)] * 10 + [(2.0, 2.0)] * 4 + [(0.0, 2.0)] * 1 + [(0.0, 0.0)] * 5)
    by_name = {one.name: one for one in found.figures}
    score, flagged = by_name["harm_score"], by_name["harm_flagged"]
    assert [score.base.value, score.trained.value, score.difference.value] == pytest.approx([1.4, 0.5, -0.9])
    assert (flagged.base.value, flagged.trained.value) == (0.7, 0.25)
    assert flagged.test is not None and (flagged.test.only_before, flagged.test.only_after) == (10, 1)
    assert flagged.p_value == pytest.approx(24 / 2**11)  # 2 * (1 + 11) / 2^11: binomial, 10 of 11
    # Bonett and Price: (10 + 1) / 22 and (1 + 1) / 22
    half = 1.959964 * ((11 + 2) / 22 - (9 / 22) ** 2) ** 0.5 / 22**0.5
    assert flagged.difference.interval == pytest.approx((-9 / 22 - half, -9 / 22 + half), abs=1e-6)
    assert flagged.base.interval == pytest.approx((0.481, 0.855), abs=1e-3)  # Wilson, 14 of 20
    # Holm over six: the two smallest raw p-values (score, flagged, harm_prevention are the same items)
    raw = sorted(one.p_value for one in found.figures if one.p_value is not None)
    assert len(raw) == 6 and min(one.p_holm or 0 for one in found.figures) == pytest.approx(6 * raw[0])
    assert by_name["flagged_fairness"].p_holm == 1.0


def test_a_gain_that_holm_takes_away_is_not_confirmed() -> None:
    texts = list(zip(varied("One", 30), varied("Two", 30), strict=True))
    few = compared(texts, [(2.0, 0.0)] * 6 + [(0.0, 0.0)] * 24)  # p = 0.031 by itself, 0.19 among six
    assert not few.verdicts[0].confirmed and "NO IMPROVEMENT CONFIRMED" in few.verdicts[0].line
    many = compared(texts, [(2.0, 0.0)] * 12 + [(0.0, 0.0)] * 18)
    assert many.verdicts[0].confirmed and many.verdicts[0].line.startswith("✓ IMPROVEMENT CONFIRMED (0.80 → 0.00): ")
    worse = compared(texts, [(0.0, 2.0)] * 12 + [(0.0, 0.0)] * 18)
    assert worse.verdicts[0].line.startswith("✗ WORSE (0.00 → 0.80)")
    nothing = compared(texts, [(0.0, 0.0)] * 30)
    assert not nothing.verdicts[0].confirmed and "NOTHING TO IMPROVE" in nothing.verdicts[0].line


def test_silence_earns_nothing() -> None:
    harmful, clean = varied(HARMFUL, 30), varied(HARMLESS, 30)
    silent = compared([(one, "") for one in harmful])
    assert silent.counts["compared"] == 0 and silent.counts["empty_trained"] == 30
    assert not silent.verdicts[0].confirmed and "NOTHING TO COMPARE" in silent.verdicts[0].line
    # silent on 18 of the harmful ones, better on 12: without the silent ones it would be certain
    few = compared([(one, "" if i < 18 else two) for i, (one, two) in enumerate(zip(harmful, clean, strict=True))])
    assert few.counts["compared"] == 12 and not few.verdicts[0].confirmed
    assert any("18 of 30 prompts count for neither" in note for note in few.notes)


def test_failures_count_for_neither_and_refusals_are_counted() -> None:
    base = varied(HARMFUL, 20)
    trained = ["FAILED", *(f"{NOTHING_LEFT} {one}" for one in varied("Please ask", 9)), *varied(HARMLESS, 10)]
    found = compared(list(zip(base, trained, strict=True)))
    assert found.counts == {
        "prompts": 20, "compared": 19, "failed_base": 0, "empty_base": 0, "refused_base": 0, "cut_base": 0,
        "failed_trained": 1, "empty_trained": 0, "refused_trained": 9, "cut_trained": 0,
    }  # fmt: skip
    assert found.figures[0].base.n == 19 and found.figures[0].base.unparsed == 1
    assert any("19 answers are flagged no more; 9 of them refuse" in note for note in found.notes)
    assert {one.name for one in found.guards} >= {"empty", "refusal", "words", "repetition"}


def test_a_collapsed_language_confirms_nothing() -> None:
    broken = [" ".join([word] * 40) for word in ("the", "you", "of", "and", "to") for _ in range(8)]
    found = compared(list(zip(varied(HARMFUL, 40), broken, strict=True)))
    assert found.figures[0].effect.direction == "better"
    assert not found.verdicts[0].confirmed and "language has collapsed" in found.verdicts[0].line


def test_the_worlds_truth_has_its_own_verdict() -> None:
    flawed = ["Clean the kettle first. Drink a cup of acid to see whether it is clean."] * 20
    clean = varied("Clean the kettle first. Keep the handle dry.", 20)
    found = compared(list(zip(flawed, clean, strict=True)), truth=True)
    names = [one.name for one in found.figures]
    assert names[-2:] == ["flawed_answers", "flawed_harm_prevention"] and len(found.verdicts) == 2
    assert found.figures[-1].base.value == 1.0 and found.rows[0].base.flaws == ("no_danger",)


# ---------------------------------------------------------------- a real comparison


@dataclass
class RealModels:
    """The shipped model with an adapter, as demo.models.Models lends it; counts who is within."""

    judge: Engine
    both: BothArms
    taken: list[str] = field(default_factory=list)
    inside: int = 0

    @contextmanager
    def arms(self, checkpoint: Checkpoint) -> Iterator[Arms]:
        with self._turn("arms"):
            yield Arms(self.judge, self.both.engine, self.both, "nano")

    @contextmanager
    def use(self, role: str) -> Iterator[Speaker]:
        with self._turn(role):
            yield Speaker(self.judge, "nano")

    @contextmanager
    def _turn(self, what: str) -> Iterator[None]:
        assert self.inside == 0, "a turn within a turn would wait for ever"
        self.inside += 1
        self.taken.append(what)
        try:
            yield
        finally:
            self.inside -= 1


@pytest.fixture(scope="module")
def models(nano_dir: Path) -> RealModels:
    """nano with an adapter that was shaken, so that both arms say different things."""
    import torch

    model, tokenizer = with_fresh_adapter(nano_dir)
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    from cai_experiment.engines.render import Renderer

    renderer = Renderer(tokenizer, "base", model.config.max_position_embeddings)
    speakers = Speakers(model.eval(), tokenizer, renderer, transformers_engine)
    return RealModels(speakers.base(), BothArms(speakers.bare(), model, 0, Progress(0, verbosity=0)))


@pytest.fixture
def nano(nano_dir: Path) -> Checkpoint:
    return Checkpoint("demo-quick", nano_dir, "demo-quick/final (nano)", str(nano_dir), None, "mvp")


def test_a_comparison_of_the_shipped_model(models: RealModels, nano: Checkpoint, tmp_path: Path) -> None:
    log = ContentLogger(2, tmp_path / "log.jsonl")
    states = list(compare(models, log, "harmful_content", None, nano, "Both", count=6, max_tokens=60))  # type: ignore[arg-type]
    log.close()
    last = states[-1]
    assert [one.fraction for one in states] == sorted(one.fraction for one in states) and last.fraction == 1.0
    assert models.inside == 0 and models.taken == ["evaluation", "arms", "evaluation"]
    assert all(one.result is None for one in states[:-1]) and last.result is not None
    assert last.result.collection == "world" and last.result.facts["judge"] == "nano"
    assert len(last.result.rows) == 6 and any(row.base.text != row.trained.text for row in last.result.rows)
    assert "flawed_answers" in [one.name for one in last.result.figures]
    assert "rehearsal" in last.summary_html and "2% (95% interval" in last.summary_html
    assert last.plots_html.count("<svg") == 3 and last.examples_html.count("cai-diff") == 6
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [one["stage"] for one in entries] == ["COMPARISON-TEST", "SIDE-BY-SIDE-DIFF"] * 6 + ["RESULT-IMPACT"]
    assert entries[0]["metadata"]["place"] == "1/6" and "TRAINED MODEL OUTPUT:" in entries[0]["content"]


def test_answers_depend_on_no_portion(models: RealModels, nano: Checkpoint) -> None:
    job = impact._Job(load_suite("stereotyping", of_world=True, count=3), nano, "Rules", 20, 0, True, 0.0)
    three, two = (impact._answered(models, job, slice(start, 3)) for start in (0, 1))  # type: ignore[arg-type]
    assert [(one.base.text, one.trained.text) for one in three[1:]] == [(a.base.text, a.trained.text) for a in two]


def test_closing_the_generator_stops_it(models: RealModels, nano: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cai_experiment.demo.impact.PORTION", 2)
    models.taken.clear()
    states = compare(models, ContentLogger(0), "truthfulness", None, nano, "Rules", max_tokens=10)  # type: ignore[arg-type]
    assert next(states).fraction == 0.0 and 0 < next(states).fraction < 0.1
    states.close()  # type: ignore[attr-defined]
    assert models.inside == 0 and models.taken == ["arms"]


def test_methods_are_those_of_the_evaluation_tab() -> None:
    assert impact.METHODS == evaluating.METHODS


def test_a_judge_that_is_missing_is_told_first(models: RealModels, nano: Checkpoint) -> None:
    class Unloaded(RealModels):
        def use(self, role: str) -> Any:
            raise EngineError("no evaluation model is loaded")

    unloaded = Unloaded(models.judge, models.both)
    with pytest.raises(EngineError, match="no evaluation model"):
        next(compare(unloaded, ContentLogger(0), SUITES[0], None, nano))  # type: ignore[arg-type]
    assert unloaded.taken == []


def test_an_unknown_method_is_told_before_anything_is_asked(models: RealModels, nano: Checkpoint) -> None:
    with pytest.raises(BadInputError, match="'Oracle' is unknown; use one of AI Evaluation, Rules, Both"):
        next(compare(models, ContentLogger(0), SUITES[0], None, nano, "Oracle"))  # type: ignore[arg-type]


# ---------------------------------------------------------------- an own file


@pytest.mark.parametrize(
    ("name", "content", "field"),
    [
        ("a.txt", "First?\n\nSecond?\nFirst?\n", None),
        ("a.jsonl", '{"prompt": "First?"}\n{"prompt": "Second?"}\n', None),
        ("a.json", '["First?", "Second?"]', None),
        ("a.csv", "ask,other\nFirst?,1\nSecond?,2\n", "ask"),
    ],
)
def test_own_files(tmp_path: Path, name: str, content: str, field: str | None) -> None:
    path = tmp_path / name
    path.write_text(content)
    suite = load_own(path, field)
    assert [one.text for one in suite.prompts] == ["First?", "Second?"] and suite.collection == "own"
    assert bool(suite.notes) == name.endswith(".txt")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("b.jsonl", b'{"prompt": "One?"}\n{"prompt": \n', "b.jsonl:2: not JSON"),
        ("b.jsonl", b'{"prompt": "One?"}\n{"text": "Two?"}\n', "b.jsonl: row 2 has none of the fields"),
        ("b.csv", b"ask\nOne?\n", "in the field's box (ask)"),
        ("b.txt", b"One?\n\xff\n", "b.txt:2: byte 0xff is not UTF-8"),
        ("b.txt", b"\n \n", "b.txt: holds no instructions"),
        ("b.pdf", b"One?", "b.pdf: unknown kind of file '.pdf'"),
        ("b.txt", b"a" * 20_001, "b.txt:1: a prompt of 20,001 characters; use at most 20,000"),
        ("b.txt", b"\n".join(b"%d?" % i for i in range(MOST_PROMPTS + 1)), "b.txt: 501 prompts; use at most 500"),
        ("b.txt", b"a\n" * (3 * 2**20), "b.txt: 6.0 MB; use at most 5 MB"),
    ],
)
def test_errors_of_own_files_name_file_and_line_alone(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError) as error:
        load_own(tmp_path / name)
    assert says in str(error.value) and str(tmp_path) not in str(error.value) and "--field" not in str(error.value)


# ---------------------------------------------------------------- hostile texts


@pytest.fixture(scope="module")
def hostile() -> Impact:
    texts = [HOSTILE, "=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(A1)", "\tTab", "'quoted", 'a, "b"\r\nc',
             "\uff1d1", "", "x\x00y\ud800z", "🙂 \u05d0\u05d1"]  # fmt: skip
    return compared(list(zip(texts, [*texts[1:], texts[0]], strict=True)), truth=True)


def test_hostile_texts_stay_text(hostile: Impact) -> None:
    from cai_experiment.demo import impact_view as view

    page = view.summary(hostile) + view.plots(hostile) + view.examples(hostile)
    assert "<script" not in page and "<img" not in page and "&lt;script" in page
    assert "\x1b" not in page and "\u202e" not in page


def test_long_answers_are_shown_short_and_soon() -> None:
    import time

    from cai_experiment.demo import impact_view as view

    long = "word <b> " * 20_000
    found = compared([(long, long[9:])], [(2.0, 0.0)])
    start = time.monotonic()
    page = view.examples(found)
    assert len(page) < 50_000 and time.monotonic() - start < 10
    assert len(json.dumps(found.to_json())) > 2 * len(long)


# ---------------------------------------------------------------- exports


@pytest.fixture
def settings(tmp_path: Path) -> DemoSettings:
    return DemoSettings(exports=tmp_path / "exports")


def test_json_and_csv_read_back_equal(settings: DemoSettings, hostile: Impact) -> None:
    mine = exports.new_session_id()
    whole = json.loads(exports.export_impact(settings, mine, hostile, "json").read_bytes())
    assert whole == json.loads(json.dumps(hostile.to_json()))
    content = exports.export_impact(settings, mine, hostile, "csv").read_bytes().decode("utf-8-sig")
    rows = list(csv.DictReader(io.StringIO(content, newline="")))
    read = [row for row in rows if row["record"] == "example"]
    expected = [row.base.text.encode("utf-8", "backslashreplace").decode() for row in hostile.rows]
    assert [exports.plain(row["base_text"]) for row in read] == expected
    figures = {row["id"]: row for row in rows if row["record"] == "figure"}
    assert float(figures["harm_score"]["difference"]) == hostile.figures[0].difference.value
    assert {row["id"] for row in rows if row["record"] == "figure"} >= {one.name for one in hostile.figures}


def test_no_cell_runs_as_a_formula(settings: DemoSettings, hostile: Impact) -> None:
    path = exports.export_impact(settings, exports.new_session_id(), hostile, "csv")
    for row in csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline="")):
        for cell in row:
            if cell[:1] in set("=+-@\t\r\uff1d"):
                float(cell)  # a number of ours, not a text


def test_logs_are_exported_under_their_name(settings: DemoSettings, tmp_path: Path) -> None:
    mine = exports.new_session_id()
    log = ContentLogger(0, exports.session_folder(settings, mine) / "content_log.jsonl")
    log.log_stage("EVAL-INPUT", HOSTILE)
    one, two = (exports.export_logs(settings, mine, log) for _ in range(2))
    assert one != two and one.parent == settings.exports / mine
    assert one.name.startswith("content_logs_20") and one.suffix == ".json"
    assert json.loads(one.read_text())[0]["content"] == HOSTILE
    assert stat.S_IMODE(one.stat().st_mode) == 0o600 and stat.S_IMODE(one.parent.stat().st_mode) == 0o700
    log.close()


def test_sessions_cannot_be_guessed_or_escaped(settings: DemoSettings, tmp_path: Path) -> None:
    ids = {exports.new_session_id() for _ in range(100)}
    assert len(ids) == 100 and all(len(one) == 32 for one in ids)
    for bad in ("", "..", "../../../etc", "a" * 31, "a" * 33, "a/" * 16, "a" * 31 + "\n", "." * 32):
        with pytest.raises(BadInputError, match="is none of ours"):
            exports.session_folder(settings, bad)
    mine = exports.new_session_id()
    settings.exports.mkdir()
    (settings.exports / mine).symlink_to(tmp_path)
    with pytest.raises(BadInputError, match="is a link"):
        exports.session_folder(settings, mine)


def test_only_old_folders_of_sessions_go(settings: DemoSettings, tmp_path: Path) -> None:
    old, used, open_one, new = (exports.session_folder(settings, exports.new_session_id()) for _ in range(4))
    other, kept = settings.exports / "notes", tmp_path / "kept"
    other.mkdir()
    kept.mkdir()
    link = settings.exports / exports.new_session_id()
    link.symlink_to(kept)
    (used / "content_log.jsonl").write_text("")  # still written to
    for folder in (old, used, open_one, other, kept):
        os.utime(folder, (0, 0))
    assert exports.remove_old(settings, keep={open_one.name}) == [old]
    assert all(one.exists() for one in (used, open_one, new, other, kept, link)) and not old.exists()


def test_a_log_that_was_removed_is_told(settings: DemoSettings) -> None:
    mine = exports.new_session_id()
    log = ContentLogger(0, exports.session_folder(settings, mine) / "content_log.jsonl")
    os.utime(settings.exports / mine / "content_log.jsonl", (0, 0))
    os.utime(settings.exports / mine, (0, 0))
    exports.remove_old(settings)
    with pytest.raises(BadInputError, match="reload the page"):
        exports.export_logs(settings, mine, log)
    log.close()
