"""The demo's views: hostile texts stay text in all markup; evaluation, the Data tab and the Architecture page."""

from __future__ import annotations

import html
import json
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_tools import example
from scripted_engine import ScriptedEngine
from test_pipeline import run as make_run

from cai_experiment.constitution.principles import AXIS_WEIGHTS, load_constitution
from cai_experiment.demo import browsing, evaluating, markup, pages, rows
from cai_experiment.demo.evaluating import AI, BOTH, EXAMPLES, RULES, evaluate, read_by_rules
from cai_experiment.demo.models import Models, Speaker
from cai_experiment.demo.settings import DemoSettings
from cai_experiment.engines.base import Completion, Prompt
from cai_experiment.errors import BadInputError, EngineError
from cai_experiment.evaluation.detection import measure
from cai_experiment.evaluation.harm.labelled import shipped_sets
from cai_experiment.evaluation.harm_model import UNREADABLE, ModelDetector, RulesDetector
from cai_experiment.evaluation.harm_rules import Span, load_rules
from cai_experiment.judging.judge import Judge
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.records.files import read_examples
from cai_experiment.records.schema import to_line

TAGS = {
    "div", "bdi", "mark", "sup", "del", "ins", "span", "p", "section", "h3", "h4", "details", "summary", "table",
    "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "strong",
}  # fmt: skip
DRAWN = {"svg", "title", "desc", "rect", "path", "text"}
WRITTEN = {"ul", "ol", "li", "code", "pre", "em"}
ATTRIBUTES = {"class", "dir", "title", "role", "scope", "open"}
MEGABYTE = "How do I clean a window? " * 41_944
HOSTILE = {
    "script": "<script>alert(1)</script></div></td></table>",
    "image": "<img src=x onerror=alert(1)> <svg onload=alert(1)>",
    "link": "<a href='javascript:alert(1)'>x</a> [x](javascript:alert(1)) ![x](http://example.com/x.png)",
    "attribute": '" onmouseover="alert(1)" \' onfocus=\'alert(1)',
    "entity": "&lt;script&gt; &#60;b&#62; &amp; &",
    "ansi": "\x1b[31mred\x1b[0m \x1b]8;;http://example.com\x07link \x9b31m",
    "bidi": "user\u202egnp.exe\u2066 \u200fback\u2069 \u061c",
    "nul": "a\x00b\x7fc\x85d\u2028e\rf",
    "surrogate": "half \ud83d of one \udc80",
    "hidden": "a\u200bb\u2060c\xadd\ufeffe \U000e0041\U000e0042 f\ufe0f g\u200dh",
    "megabyte": MEGABYTE,
    "one word": "x" * 1_048_576,
    "loop": "no no " * 175_000,
    "empty": "",
    "blank": " \n\t ",
    "template": "{{ 7*7 }} ${7*7} $$x^2$$ `code` **bold** <!-- x --> <![CDATA[x]]> ]]>",
    "lines": "one\r\ntwo\n\n  three",
}
READABLE = (
    "👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ 1️⃣ 👍🏽 🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", "שלום עולם",
    "مرحبا بالعالم", "می‌خواهم", "क्‍ष", "naïve café", "日本語", "𝔘𝔫𝔦", "e\u0301", "a\tb\nc",
)  # fmt: skip


class Page(HTMLParser):
    """What a browser makes of markup: its tags, its attributes, its text; `titles` are those of the marks."""

    def __init__(self, source: str, tags: Iterable[str] = ()) -> None:
        super().__init__(convert_charrefs=True)
        self.allowed = TAGS | set(tags)
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []  # (class of the nearest element that has one, text)
        self.titles: list[str] = []
        self.classes: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in self.allowed, tag
        drawn = tag in DRAWN
        assert drawn or {name for name, _ in attrs} <= ATTRIBUTES, attrs
        assert not any(name.startswith("on") or name in ("href", "src", "srcdoc") for name, _ in attrs), attrs
        found = dict(attrs)
        self.titles += [found["title"] or ""] if "title" in found else []
        self.open.append(tag)
        self.classes.append(found.get("class") or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.classes.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in DRAWN
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        self.texts.append((next((name for name in reversed(self.classes) if name), ""), data))

    def handle_comment(self, data: str) -> None:
        raise AssertionError(data)

    handle_decl = unknown_decl = handle_pi = handle_comment

    def text(self, without: str = "") -> str:
        return "".join(data for name, data in self.texts if not without or name != without)


def shown(text: str, limit: int) -> str:
    """What a page must show of a text."""
    return markup.visible(text if len(text) <= limit else f"{text[:limit]}... ({len(text):,} characters)")


# ---------------------------------------------------------------- markup


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_text_stays_text(name: str) -> None:
    text = HOSTILE[name]
    spans = [Span(start, start + 5, text, text, text, text) for start in range(0, min(len(text), 60), 3)]
    cell, block = shown(text, markup.CELL), shown(text, markup.SHOWN)
    made: dict[str, tuple[str, str]] = {
        "block": (markup.block(text), block),
        "mono": (markup.block(text, mono=True), block),
        "inline": (markup.inline(text), cell),
        "notice": (markup.notice(text, "bad"), shown(text, 2_000)),
        "card": (markup.card(text, markup.block(text)), cell + block),
        "details": (markup.details(text, markup.block(text)), cell + block),
        "table": (markup.table([text], [[text, markup.inline(text)]]), cell * 3),
        "facts": (markup.facts([(text, text)]), cell * 2),
    }
    for source, expected in made.values():
        assert Page(source).text() == expected
        assert len(source) < 500_000
    marked = Page(markup.highlighted(text, spans))
    assert marked.text(without="cai-axis") == block
    assert len(marked.titles) == sum(name == "cai-axis" for name, _ in marked.texts)
    Page(pages.rendered(text[:5000]), WRITTEN | {"h1", "h2", "hr", "br"})


@pytest.mark.parametrize("name", HOSTILE)
def test_a_diff_of_hostile_texts_holds_both(name: str) -> None:
    text = HOSTILE[name]
    source = markup.word_diff_html(text, f"new {text[::-1]}", labels=(text, "after"))
    assert len(source) < 200_000
    page = Page(source)
    before = shown(text, markup.DIFF).rstrip()
    assert (before or "(empty)") in page.text() and page.text().startswith(shown(text, markup.SHOWN) + before)


@given(st.text())
def test_every_hidden_character_is_shown_and_the_text_comes_back(text: str) -> None:
    seen = markup.visible(text)
    assert Page(markup.escaped(text)).text() == seen
    kept = {"\n", "\r", "\t"}
    assert not [c for c in seen if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c not in kept]


@pytest.mark.parametrize(
    "code", [0x200B, 0x200E, 0x202E, 0x2066, 0x2060, 0xAD, 0xFEFF, 0x180E, 0xE0041, 0x1B, 0xD800, 0xFFF9]
)
def test_a_character_without_a_shape_is_shown_as_its_code(code: int) -> None:
    assert f"{code:02x}" in markup.visible(f"a{chr(code)}b") and chr(code) not in markup.visible(f"a{chr(code)}b")


@pytest.mark.parametrize("text", READABLE)
def test_emoji_and_all_scripts_stay_as_they_are(text: str) -> None:
    assert markup.visible(text) == text
    assert Page(markup.block(text)).text() == text and 'dir="auto"' in markup.block(text)


def test_marks_are_not_stacked_over_the_lines_above() -> None:
    assert markup.visible("Z" + "\u0301" * 200) == "Z" + "\u0301" * 4 + "\\u0301" * 196
    assert markup.visible("a\u0302\u0301 e\u0301") == "a\u0302\u0301 e\u0301"


def test_a_long_text_is_cut_with_its_length() -> None:
    text = "x" * 1_048_576
    for source in (markup.block(text), markup.word_diff_html(text, "short"), markup.highlighted(text, [])):
        assert "... (1,048,576 characters)" in source
    assert "... (1,048,576 characters)" in markup.table(["a"], [[text]])


def test_spans_that_overlap_become_one_mark_that_says_all() -> None:
    text = "Break into the house and kill him. Fine."
    spans = [
        Span(10, 20, "fairness", "hate_speech", "b", "second"), Span(0, 20, "harm_prevention", "theft", "a", "first"),
        Span(25, 33, "harm_prevention", "violence", "c", "third"), Span(30, 99, "truthfulness", "myth", "d", "beyond"),
        Span(35, 35, "fairness", "none", "e", "empty"),
    ]  # fmt: skip
    source = markup.highlighted(text, spans)
    page = Page(source)
    assert page.titles == ["theft: first\nhate speech: second", "violence: third\nmyth: beyond"]
    labels = [data for name, data in page.texts if name == "cai-axis"]
    assert labels == ["harm prevention, fairness", "harm prevention, truthfulness"]
    assert page.text(without="cai-axis") == text
    assert "".join(data for name, data in page.texts if name == "cai-hit") == "Break into the housekill him. Fine."


def test_matches_behind_the_cut_are_counted() -> None:
    spans = [Span(at, at + 3, "fairness", "hate", "a", "why") for at in (0, 95, 98, 200, 300)]
    page = Page(markup.highlighted("x" * 400, spans, limit=100))
    assert "2 more matches" in page.text() and page.text().count("x") == 100


def test_a_diff_names_what_went_and_what_came() -> None:
    source = markup.word_diff_html("Go now, alone.", "Go soon, not alone.", ("first", "second"))
    found = [(name, data) for name, data in Page(source).texts if name in ("cai-gone", "cai-came", "cai-label")]
    assert found == [("cai-label", "first"), ("cai-gone", "now,"), ("cai-label", "second"), ("cai-came", "soon, not")]
    assert "(empty)" in Page(markup.word_diff_html("", "Go.")).text()


def test_a_table_takes_finished_cells_and_names_what_it_leaves_out() -> None:
    many = markup.table(("a",), ([i] for i in range(markup.ROWS + 1)))
    assert many.count("<tr>") == markup.ROWS + 1 and "(501 rows)" in many
    assert "&lt;b&gt;" in markup.table(("a",), [[str(markup.Html("<b>")) + ""]])


# ---------------------------------------------------------------- evaluation


class Speaks:
    """An engine whose verdicts and reasons are given: `yes` are axes, `reason` what it says of them."""

    name = "scripted"

    def __init__(self, yes: Iterable[str] = (), reason: str = "", garbled: bool = False) -> None:
        self.yes, self.reason, self.garbled = set(yes), reason, garbled

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        for prompt in prompts:
            assert prompt is not None
            _, _, axis, order = prompt.id.split("/")
            if not prompt.options:
                yield Completion(prompt.id, self.reason, "stop")
                continue
            odds = (1.0 if axis in self.yes else -1.0) * (1 if order == "yes_first" else -1)
            yield Completion(prompt.id, "", "stop", logprobs=(float("nan"),) if self.garbled else (odds, 0.0))


class One:
    """The demo's models with one engine; `line` not empty: it is not ready, and says so."""

    def __init__(self, engine: Any, name: str = "qwen", line: str = "") -> None:
        self.engine, self.name, self.state_line, self.ready = engine, name, line, not line

    @contextmanager
    def use(self, role: str) -> Iterator[Speaker]:
        assert role == "evaluation"
        yield Speaker(self.engine, self.name)


@pytest.fixture(scope="module")
def nano_models(nano_dir: Path) -> Iterator[Models]:
    models = Models(DemoSettings(), say=lambda line: None)
    assert models.load_evaluation("nano").startswith("✓")
    yield models
    models.close()


def contents(log: ContentLogger, stage: str) -> list[str]:
    return [entry["content"] for entry in log.entries() if entry["stage"] == stage]


def test_the_shipped_model_evaluates_and_says_what_its_word_is_worth(nano_models: Models) -> None:
    log = ContentLogger(0)
    by_model, by_rules, by_both = (evaluate(nano_models, log, EXAMPLES[0], method) for method in (AI, RULES, BOTH))
    assert by_model.row["method"] == "AI (nano)" and by_rules.row["method"] == "rules"
    assert by_both.row["method"] == "AI (nano) and rules" and by_both.row["axes"] == ["harm_prevention"]
    assert by_rules.row["score"] == by_both.row["score"] == 2.0 and not by_rules.row["raw"]
    page = Page(by_both.html).text()
    for said in ("✓ Violation detected", "2.0 (1/4 principles violated)", "theft_and_evasion", "Raw output of nano"):
        assert said in page
    for axis, weight in AXIS_WEIGHTS.items():
        assert f"{axis.replace('_', ' ')} ({weight})" in page
    assert "knows the small household world" in page and "knows the small household world" not in by_rules.html
    assert 'class="cai-hit"' in by_rules.html and "break into a house" in by_rules.html
    assert contents(log, "EVAL-INPUT") == [f'Text to evaluate:\n"{EXAMPLES[0]}"'] * 3
    raw = contents(log, "EVAL-MODEL-RESPONSE")
    assert len(raw) == 2 and raw[0].startswith("nano raw output:\n") and raw[0].count("log P(A) = ") == 8
    decided = contents(log, "EVAL-DECISION")
    wanted = "✓ Violation detected\n  Method: rules\n  Category: theft_and_evasion\n  Principle: harm_prevention"
    assert decided[1].startswith(wanted)


def test_the_examples_are_what_they_are_said_to_be() -> None:
    found = [evaluate(One(None), ContentLogger(0), text, RULES).row["axes"] for text in EXAMPLES]
    assert {axis for axes in found[:4] for axis in axes} == set(AXIS_WEIGHTS) and all(found[:4])
    assert not any(found[4:]) and len(EXAMPLES) == 8


@pytest.mark.slow
def test_the_figures_beside_the_shipped_models_words_are_measured(nano_dir: Path) -> None:
    sets = shipped_sets()
    texts = [(name, text) for name, some in sets.items() for text in some]
    found = {"rules": measure(RulesDetector(), sets).found}
    for name in ("nano", "nano-b"):
        models = Models(DemoSettings(), say=lambda line: None)
        models.load_evaluation(name)
        with models.use("evaluation") as speaker:
            found[name] = measure(ModelDetector(Judge(speaker.engine, name), reasons=False), sets).found
        models.close()
    for name, detections in found.items():
        flagged = [
            (set_name, text.harmful) for (set_name, text), one in zip(texts, detections, strict=True) if one.flagged
        ]
        harmless = sum(not harmful for _, harmful in flagged)
        counts = flagged.count(("obvious", True)), flagged.count(("subtle", True)), harmless
        assert evaluating.FLAGGED[name] == counts


def test_rules_need_no_model_and_both_falls_back_to_them() -> None:
    loading = One(None, line="loading nano ...")
    assert evaluate(loading, ContentLogger(0), EXAMPLES[0], RULES).row["flagged"]
    with pytest.raises(EngineError, match=r"loading nano \.\.\.; method Rules needs no model"):
        evaluate(loading, ContentLogger(0), EXAMPLES[0], AI)
    row = evaluate(loading, ContentLogger(0), EXAMPLES[0], BOTH).row
    assert row["method"] == "rules" and row["notes"] == ["The rules have spoken alone: loading nano ..."]
    none = Models(DemoSettings(), say=lambda line: None)
    with pytest.raises(EngineError):
        evaluate(none, ContentLogger(0), EXAMPLES[0], AI)


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_model_says_is_shown_as_text(name: str) -> None:
    said = HOSTILE[name]
    text = f"You must. {said[:1000]}"
    models = One(Speaks(["autonomy_respect"], f'"You must" {said}'), name=said[:50] or "m")
    done = evaluate(models, ContentLogger(0), text, AI)
    page = Page(done.html)
    assert done.row["axes"] == ["autonomy_respect"] and done.row["method"] == f"AI ({said[:50] or 'm'})"
    marks = "".join(data for kind, data in page.texts if kind == "cai-hit")
    assert "You must" in marks and "autonomy respect" in page.text()  # the words that the model quotes
    assert json.loads(json.dumps(done.row))["text"] == text and len(done.html) < 300_000


def test_an_unreadable_model_is_replaced_by_the_rules_and_named() -> None:
    done = evaluate(One(Speaks(garbled=True)), ContentLogger(0), EXAMPLES[0], AI)
    assert done.row["method"] == UNREADABLE and done.row["axes"] == ["harm_prevention"]
    assert UNREADABLE in Page(done.html).text() and "could not be read" in done.row["notes"][0]


@pytest.mark.parametrize(("text", "said"), [("", "the text is empty"), (" \n\t", "the text is empty")])
def test_an_empty_text_is_one_line(text: str, said: str) -> None:
    log = ContentLogger(0)
    for method in evaluating.METHODS:
        with pytest.raises(BadInputError, match=said):
            evaluate(One(None), log, text, method)
    with pytest.raises(BadInputError, match="use one of AI Evaluation, Rules, Both"):
        evaluate(One(None), log, "Hello", "Guess")
    assert not log.entries()


def test_a_text_longer_than_the_context_is_refused_before_it_is_read(nano_models: Models) -> None:
    with nano_models.use("evaluation") as speaker:
        encoded: list[int] = []

        def encode(text: str, markup: bool) -> list[int]:
            encoded.append(len(text))
            return speaker.engine.renderer.encode(text, markup)  # type: ignore[attr-defined, no-any-return]

        renderer = SimpleNamespace(max_length=2048, encode=encode)
        for text in (MEGABYTE, HOSTILE["one word"], "\ud800" * 100_000):
            with pytest.raises(BadInputError, match="characters does not fit in nano's context of 2,048 tokens"):
                evaluating.check_length(Speaker(SimpleNamespace(renderer=renderer), "nano"), text)
        assert max(encoded) <= 16 * 2048
    row = evaluate(nano_models, ContentLogger(0), MEGABYTE, BOTH).row
    assert row["method"] == "rules" and "does not fit" in row["notes"][-1] and row["text"] == MEGABYTE


def test_a_long_text_is_read_in_pieces_as_if_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join([*EXAMPLES, "Kill him.\nYou must obey me; nobody else loves you.", "x" * 300]) * 3
    whole = load_rules().detect(text)
    monkeypatch.setattr(evaluating, "PIECE", 200)
    found, read = read_by_rules(text)
    assert found == whole and read == len(text) and len(whole.spans) > 12


def test_what_the_rules_had_no_time_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "READ_SECONDS", -1.0)
    done = evaluate(One(None), ContentLogger(0), f"{EXAMPLES[0]}.  " * 5000, RULES)
    read = max(span["end"] for span in done.row["spans"])
    assert read <= evaluating.PIECE and "of 140,000 characters" in done.row["notes"][0]
    assert done.row["flagged"]


# ---------------------------------------------------------------- the Data tab


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one run, made by the pipeline with a scripted engine."""
    folder = tmp_path_factory.mktemp("data")
    make_run(folder / "batch", ScriptedEngine())
    return folder


def put(folder: Path, name: str, lines: Iterable[str | bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() + b"\n" for line in lines))
    return path


def all_ids(settings: DemoSettings, run: str, kind: str, **chosen: str) -> list[str]:
    first = browsing.browse(settings, run, kind, **chosen)
    later = (browsing.browse(settings, run, kind, page=page, **chosen) for page in range(2, first.pages + 1))
    return [id for one in (first, *later) for id in one.ids]


def test_every_example_is_listed_and_each_filter_finds_its_own(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browsing, "PAGE", 5)
    settings = DemoSettings(data_dir=data_dir)
    assert browsing.runs(settings) == ["batch"]
    found = browsing.filters(settings, "batch")
    for kind in browsing.KINDS:
        examples = read_examples(data_dir / "batch" / f"{kind}.jsonl")
        assert all_ids(settings, "batch", kind) == [one.id for one in examples]
        for principle in found.principles:
            with_it = [e.id for e in examples if principle in [one.principle_id for one in e.rounds]]
            assert all_ids(settings, "batch", kind, principle=principle) == with_it
        for reason in found.reasons:
            assert all_ids(settings, "batch", kind, reason=reason) == [
                e.id for e in examples if reason in e.reject_reasons
            ]
        for verdict in found.verdicts:
            with_it = [
                e.id for e in examples if verdict in [rows.change(o.verdict_before, o.verdict_after) for o in e.rounds]
            ]
            assert all_ids(settings, "batch", kind, verdict=verdict) == with_it
    assert "yes → no" in found.verdicts and found.reasons
    assert set(all_ids(settings, "batch", "pairs", principle="any", reason="any", verdict="any")) == set(
        all_ids(settings, "batch", "pairs")
    )
    last = browsing.browse(settings, "batch", "pairs", page=99)
    assert last.page == last.pages == 3 and "pairs 11 to 12 of 12 (page 3 of 3)" in last.line


def test_an_example_is_shown_with_all_that_happened_to_it(data_dir: Path) -> None:
    settings = DemoSettings(data_dir=data_dir)
    names = {one.id: one.name for one in load_constitution().principles}
    for kind in browsing.KINDS:
        for one in read_examples(data_dir / "batch" / f"{kind}.jsonl"):
            page = Page(browsing.example_html(settings, "batch", one.id)).text()
            for text in (one.instruction, one.initial_answer, one.meta["generator"], *one.reject_reasons):
                assert text in page
            for number, part in enumerate(one.rounds, 1):
                assert f"Round {number} of {len(one.rounds)}: {names[part.principle_id]}" in page
                assert part.principle in page and part.critique in page and part.revised_answer in page
                assert browsing.BROKEN[part.verdict_before] in page
            assert page.count("Broken before?") == page.count("Broken after?") == len(one.rounds)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_run_is_shown_as_text(tmp_path: Path, name: str) -> None:
    text = HOSTILE[name]
    one = example(0, text)
    one = replace(
        one, id=f"0 {text[:200]}", reject_reasons=(text[:500] or "empty",),
        rounds=tuple(replace(part, principle_id=text[:500], verdict_before=text[:300]) for part in one.rounds),
        meta=one.meta
        | {"generator": {text[:99]: [text[:99]]}, "guard": text, "final_verdicts": [text[:9]], "gate": None},
    )  # fmt: skip
    line = json.dumps(json.loads(to_line(one)))
    put(tmp_path / "bad", "rejected.jsonl", [line])
    settings = DemoSettings(data_dir=tmp_path)
    found = browsing.browse(settings, "bad", "rejected")
    assert found.ids == [one.id] and all(len(cell) < 1000 for row in found.rows for cell in row)
    hidden = [
        c for row in (found.rows[0], [found.line]) for cell in row for c in cell if unicodedata.category(c) == "Cc"
    ]
    assert not hidden
    options = browsing.filters(settings, "bad")
    assert browsing.browse(
        settings, "bad", "rejected", *(kind[0] for kind in (options.principles, options.reasons))
    ).ids
    page = Page(browsing.example_html(settings, "bad", one.id))
    assert shown(one.initial_answer, markup.SHOWN) in page.text()


def test_a_run_can_be_looked_at_while_it_is_written(tmp_path: Path) -> None:
    settings, lines = DemoSettings(data_dir=tmp_path), [to_line(example(number)) for number in range(4)]
    path = put(tmp_path / "live", "pairs.jsonl", [lines[0], lines[1][:50].encode()])
    found = browsing.browse(settings, "live", "pairs")
    assert found.ids == ["000000"] and "the last line is being written" in found.line
    with open(path, "ab") as file:
        file.write(lines[1][50:].encode() + b"\n" + lines[2].encode() + b"\n")
    found = browsing.browse(settings, "live", "pairs")
    assert found.ids == ["000000", "000001", "000002"] and "written" not in found.line
    put(tmp_path / "live", "pairs.jsonl", [lines[0], lines[3]])  # a resumed run cuts what has changed, and goes on
    assert browsing.browse(settings, "live", "pairs").ids == ["000000", "000003"]
    path.unlink()
    put(tmp_path / "live", "rejected.jsonl", [lines[1]])
    assert browsing.browse(settings, "live", "pairs").line == "no pairs"


def test_a_row_that_is_gone_is_named_and_the_list_mends_itself(tmp_path: Path) -> None:
    settings = DemoSettings(data_dir=tmp_path)
    path = put(tmp_path / "live", "pairs.jsonl", [to_line(example(0))])
    file = rows.row_file(path)
    row = file.rows[0]
    put(tmp_path / "live", "pairs.jsonl", [to_line(example(5))])
    with pytest.raises(BadInputError, match="has changed since the page was made; look again"):
        file.example(row)
    assert browsing.browse(settings, "live", "pairs").ids == ["000005"]
    with pytest.raises(BadInputError, match="live has no example '000000'; choose one of the list"):
        browsing.example_html(settings, "live", "000000")


def test_damaged_rows_are_named_by_line_and_the_rest_is_shown(tmp_path: Path) -> None:
    broken = json.loads(to_line(example(2)))
    del broken["preference_pair"]["chosen"]
    lines: list[str | bytes] = [
        to_line(example(0)), "{not json", to_line(example(1)), json.dumps(broken), "", "[]", b"\xff\xfe\n",
        to_line(example(3)),
    ]  # fmt: skip
    path = put(tmp_path / "run", "pairs.jsonl", lines)
    before = path.read_bytes()
    found = browsing.browse(DemoSettings(data_dir=tmp_path), "run", "pairs")
    assert found.ids == ["000000", "000001", "000003"]
    assert "pairs.jsonl:2 is no JSON" in found.line and 'pairs.jsonl:4 has no "chosen" in preference_pair' in found.line
    assert "pairs.jsonl:6 is no JSON object and 1 more" in found.line
    assert path.read_bytes() == before and [one.name for one in path.parent.iterdir()] == ["pairs.jsonl"]


def test_a_large_run_is_read_once_and_then_by_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = to_line(example(7))
    path = put(tmp_path / "full", "pairs.jsonl", [line.replace("000007", f"{number:06d}") for number in range(5_200)])
    settings, read = DemoSettings(data_dir=tmp_path), [0]
    parse = rows.parse_line

    def counted(raw: bytes) -> dict[str, Any]:
        read[0] += 1
        return parse(raw)

    monkeypatch.setattr(rows, "parse_line", counted)
    assert browsing.browse(settings, "full", "pairs").pages == 208
    read[0] = 0
    assert browsing.browse(settings, "full", "pairs", page=208).ids[-1] == "005199" and read[0] == browsing.PAGE
    assert "Better" in browsing.example_html(settings, "full", "004000") and read[0] == browsing.PAGE + 1
    assert len(browsing.filters(settings, "full").principles) == 1 and read[0] == browsing.PAGE + 1
    with open(path, "ab") as file:
        file.write(line.replace("000007", "005200").encode() + b"\n")
    assert browsing.browse(settings, "full", "pairs", page=209).ids == ["005200"] and read[0] == browsing.PAGE + 3


@pytest.mark.parametrize("run", ["../secret", "..", ".", "", "/etc", "none", "<b>"])
def test_no_other_folder_is_read(tmp_path: Path, run: str) -> None:
    put(tmp_path / "secret", "pairs.jsonl", [to_line(example(0))])
    settings = DemoSettings(data_dir=tmp_path / "data")
    assert browsing.runs(settings) == []
    put(tmp_path / "data" / "mine", "pairs.jsonl", [to_line(example(0))])
    for call in (
        browsing.filters,
        lambda s, r: browsing.browse(s, r, "pairs"),
        lambda s, r: browsing.example_html(s, r, "0"),
    ):
        with pytest.raises(BadInputError, match="there is no run"):
            call(settings, run)
    with pytest.raises(BadInputError, match="no kind of example"):
        browsing.browse(settings, "mine", "../pairs")


# ---------------------------------------------------------------- the Architecture page


def test_the_architecture_page_shows_the_way_the_docs_and_every_principle() -> None:
    page = Page(pages.architecture_html(DemoSettings()), DRAWN | WRITTEN).text()
    for step in pages.STEPS:
        assert step.title in page and step.text in page
    for one in load_constitution().principles:
        assert one.name in page and one.text in page and f"{one.axis.replace('_', ' ')} {one.weight}" in page
    sections = [line[3:] for line in pages.DOCS.read_text().splitlines() if line.startswith("## ")]
    assert len(sections) > 3 and all(title in page for title in sections)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_constitution_is_shown_as_text(tmp_path: Path, name: str) -> None:
    text = html.unescape("A " + HOSTILE[name].encode("utf-8", "replace").decode()[:4000]).strip()
    fields = {"name": text, "text": text, "critique_request": text, "revision_request": text}
    one = {"id": "a", "category": "honesty", "axis": "truthfulness", "weight": 3.5, **fields}
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"principles": [one]}))
    page = Page(pages.architecture_html(DemoSettings(constitution=path)), DRAWN | WRITTEN).text()
    assert shown(text, markup.CELL) in page and "truthfulness 3.5 (honesty)" in page


def test_what_cannot_be_read_is_named_in_its_place(tmp_path: Path) -> None:
    page = Page(pages.architecture_html(DemoSettings(constitution=tmp_path / "none.yaml")), DRAWN | WRITTEN).text()
    assert "none.yaml does not exist" in page and "Floors" in page
    assert "cannot read" in pages.docs_html(tmp_path / "none.md")


def test_markdown_makes_no_markup_links_or_images() -> None:
    source = pages.rendered(
        "[x](http://example.com) ![y](http://example.com/y.png) <b>z</b> <http://example.com>\n\n<div>\n"
    )
    assert Page(source, WRITTEN).text().split() == ["x", "!y", "<b>z</b>", "<http://example.com>", "<div>"]
