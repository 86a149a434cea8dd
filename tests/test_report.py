"""The report: its parts, its page, its tables and figures for a paper, and runs compared item by item."""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_tools import (
    HOSTILE,
    ITEMS,
    facts,
    harmbench_found,
    outcomes,
    rate_found,
    training_found,
    write_run,
)

from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.found import Evaluation, Table
from cai_experiment.evaluation.gates import Gate
from cai_experiment.evaluation.report import print_report, read_report, write_report
from cai_experiment.evaluation.reporting import compare, naming, summary, tables, words
from cai_experiment.evaluation.reporting import page as pages
from cai_experiment.evaluation.reporting.page import render_page
from cai_experiment.evaluation.reporting.plots import forest_plot, rates_plot, table_plot
from cai_experiment.judging.result import Result, holm, mcnemar, paired_difference
from cai_experiment.scripts import _compare


@pytest.fixture()
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without plots, which take most of their time."""
    monkeypatch.setattr(pages, "report_plots", lambda *_: [])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole report."""
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, {"training": training_found(), "harmbench": harmbench_found()}, facts())
    return folder


def screen_of(report: dict[str, Any], width: int = 80, colours: bool = False) -> str:
    from rich.console import Console

    file = io.StringIO()
    print_report(report, Console(file=file, width=width, force_terminal=colours))
    return file.getvalue()


class Page(HTMLParser):
    """A page's tags, text, ids and links, and the text of every cell of figures; checks nesting."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.cells: list[str] = []
        self.levels: list[int] = []
        self.text, self.in_cell = "", False
        self.rows: list[list[str]] = []  # cells of figures in tables without a column of their own for n
        self.head: list[str] = []
        self.feed(html)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        named = dict(attrs)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag == "thead":
            self.head = []
        if tag == "tr":
            self.rows.append([])
        if tag == "td" and named.get("class") == "number":
            self.in_cell = True
            self.cells.append("")
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag
        if tag == "td" and self.in_cell and "n" not in self.head:
            self.rows[-1].append(self.cells[-1])
        self.in_cell = self.in_cell and tag != "td"

    def handle_data(self, data: str) -> None:
        self.text += data
        if "thead" in self.stack and self.stack[-1] == "th":
            self.head.append(data)
        if self.in_cell:
            self.cells[-1] += data


# ---------------------------------------------------------------- parts


def test_a_part_adds_to_a_report_and_measuring_it_again_replaces_its_own(tmp_path: Path, no_plots: None) -> None:
    write_report(tmp_path, {"training": training_found()}, facts(settings_part="training"))
    both = write_report(tmp_path, {"harmbench": harmbench_found()}, facts(settings_part="harmbench", history=[]))
    assert [gate["part"] for gate in both["gates"]] == ["training", "harmbench"] and both["history"]
    assert both["alarms"] == ["collapse: Rinse it.", "over-refusal rose"]
    assert [table["name"] for table in both["tables"]] == ["by_principle", "harmbench_by_category"]
    assert both["settings"].keys() == {"training", "harmbench"} and both["answers"] and both["methods"]["HarmBench"]
    again = rate_found("attack_success", 0.5, 0.1, seed=2)
    again.gates = [Gate("HarmBench better", 0.1, "<", 0.5, None, ITEMS, "harmbench")]
    third = write_report(tmp_path, {"harmbench": again}, facts(settings_part="harmbench"))
    assert third == read_report(tmp_path) == json.loads(json.dumps(third))
    assert len(third["gates"]) == 2 and third["alarms"] == ["collapse: Rinse it."]
    assert [table["part"] for table in third["tables"]] == ["training"] and "HarmBench" not in third["methods"]
    assert [case["part"] for case in third["cases"]] == ["training"] and third["notes"] == both["notes"]
    assert third["metrics"]["attack_success_trained"]["value"] == again.metrics["attack_success_trained"].value


def test_what_is_no_longer_measured_is_gone(tmp_path: Path, no_plots: None) -> None:
    write_report(tmp_path, {"training": training_found(), "harmbench": harmbench_found()}, facts())
    less = write_report(tmp_path, {"training": rate_found("arithmetic", 0.9, 0.9)}, facts())
    assert {"words_base", "flawed_answers_base"}.isdisjoint(less["metrics"]) and "words" not in less["differences"]
    assert {"arithmetic_base", "attack_success_base"} <= less["metrics"].keys() and less["answers"] == []
    assert less["parts"].keys() == {"training", "harmbench"}


def test_p_values_are_adjusted_over_all_tests_of_the_report(tmp_path: Path, no_plots: None) -> None:
    write_report(tmp_path, {"training": training_found()}, facts())
    report = write_report(tmp_path, {"harmbench": harmbench_found()}, facts())
    expected = holm([test["p_value"] for test in report["tests"].values()])
    assert report["tests"].keys() == {"flawed_answers", "arithmetic", "words", "attack_success"}, "one family"
    assert [test["p_holm"] for test in report["tests"].values()] == expected


def test_of_another_adapter_only_generation_is_kept(tmp_path: Path, no_plots: None) -> None:
    generation = Evaluation({"accepted_pairs": Result(3, 5, None)})
    generation.gates = [Gate("accepted pairs", 3, ">=", 3, None, 5, "generation")]
    write_report(tmp_path, generation, facts(seconds={"generation": 9.0}))
    write_report(tmp_path, {"harmbench": harmbench_found()}, facts(adapter="aa", seconds={"harmbench": 5.0}))
    same = write_report(tmp_path, {"training": training_found()}, facts(adapter="aa"))
    assert {gate["part"] for gate in same["gates"]} == {"generation", "training", "harmbench"}
    other = write_report(tmp_path, {"training": training_found()}, facts(adapter="bb"))
    assert {gate["part"] for gate in other["gates"]} == {"generation", "training"} == other["parts"].keys()
    assert "attack_success_base" not in other["metrics"] and other["metrics"]["accepted_pairs"]["value"] == 3
    assert other["seconds"] == {"generation": 9.0, "training": 60.0}


def test_a_rate_gets_its_paired_difference_from_the_tests_counts(tmp_path: Path, no_plots: None) -> None:
    report = write_report(tmp_path, training_found(), facts())
    base, trained = outcomes(0, 0.6, 0.05)
    expected = paired_difference([float(b) for b in base], [float(t) for t in trained])
    found = report["differences"]["flawed_answers"]
    assert found["value"] == pytest.approx(expected.value) and found["n"] == ITEMS and found["unparsed"] == 2
    assert found["interval"] == pytest.approx(list(expected.interval or ()), abs=0.02), "the same but for resampling"


def test_items_and_cases_stand_in_files_that_the_figures_name(tmp_path: Path, no_plots: None) -> None:
    report = write_report(tmp_path, {"training": training_found()}, facts())
    file = report["metrics"]["arithmetic_trained"]["items"]
    rows = [json.loads(line) for line in (tmp_path / file).read_text().splitlines()]
    assert file == "evaluation/arithmetic.jsonl" and len(rows) == ITEMS
    assert sum(row["trained"] for row in rows) / ITEMS == report["metrics"]["arithmetic_trained"]["value"]
    assert report["metrics"]["words_base"]["items"] == "evaluation/answers.jsonl", "whose rows hold words"
    kind = report["cases"][0]
    assert (kind["count"], len(kind["shown"])) == (53, 50)
    assert len((tmp_path / kind["file"]).read_text().splitlines()) == 53


def test_a_report_of_before_is_still_read() -> None:
    gate = {"name": "loss falls", "value": 0.6, "threshold": 0.69, "interval": None, "n": 10, "passed": True,
            "rule": "<", "part": "training"}  # fmt: skip
    metric = {"value": 0.5, "n": 10, "interval": [0.24, 0.76], "unparsed": 0}
    old = {"verdict": "go", "milestone": "batch", "run": "batch", "gates": [gate], "next": "x", "notes": ["ALARM: low"],
           "metrics": {"arithmetic_base": metric, "arithmetic_trained": metric},
           "counts": {"accepted": 1, "rejected": 0, "reasons": {}}, "settings": {}, "seconds": {},
           "cost": {"hours": 0.1, "dollars": 0.0, "budget_hours": 1.0, "budget_dollars": 1.74}}  # fmt: skip
    assert "short sums right" in screen_of(old) and "ALARM: Low" in screen_of(old)
    assert "short sums right" in Page(render_page(old, [])).text
    assert "nothing" not in screen_of({"verdict": "no-go", "milestone": "mvp", "run": "r"})


# ---------------------------------------------------------------- page and terminal


def test_the_page_answers_three_questions_and_its_contents_lead_somewhere(written: Path) -> None:
    html = (written / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    order = ["Go", "Did it help?", "How sure is that?", "What did it cost?", "Alarms", "Gates", "Is it safer?",
             "Is it still helpful?", "What did it lose?"]  # fmt: skip
    places = [page.text.find(one) for one in order if one != "Is it still helpful?"]
    assert places == sorted(places) and -1 not in places
    assert page.links and all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert len(page.ids) == len(set(page.ids)), "ids of plots and sections are distinct"
    assert page.levels[0] == 1 and all(b - a <= 1 for a, b in zip(page.levels, page.levels[1:], strict=False))
    assert "53, the first 50 here, all in evaluation/cases_training.jsonl" in page.text
    assert page.tags.count("svg") == 8, "rates, differences, two tables, loss, margin, log-probability, lengths"
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org/", "")


def test_no_rate_stands_without_interval_and_n(written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    bare = [cell for row in page.rows for cell in row if "%" in cell and "n\u00a0=\u00a0" not in cell]
    assert bare == [] and any("% to" in cell or " to " in cell for cell in page.cells)
    assert sum("n\u00a0=\u00a060" in cell for cell in page.cells) >= 9


def test_hostile_text_stays_text_everywhere(tmp_path: Path) -> None:
    found = training_found(HOSTILE)
    found.metrics[f"{HOSTILE}_base"] = found.metrics[f"{HOSTILE}_trained"] = Result.rate(3, ITEMS)
    found.gates[0] = Gate(HOSTILE, 0.1, "<", 0.6, None, ITEMS, "training")
    found.items[HOSTILE] = [{"id": HOSTILE, "base": True, "trained": True}]
    report = write_report(tmp_path, {"training": found}, facts(run=HOSTILE, settings={HOSTILE: HOSTILE}))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "script" not in Page(html).tags and "\x1b" not in html and "\u202e" not in html and ">49<" not in html
    assert "<script>alert(1)</script>" in Page(html).text and "{{ 7*7 }}" in Page(html).text
    assert "\x1b" not in screen_of(report, 200) and "[bold]x[/]" in screen_of(report, 200)
    assert not [path for path in tmp_path.rglob("*") if re.search(r"[^\w.-]", path.name)], "file names are tame"
    assert "\x1b" not in (tmp_path / "tables" / "by_principle.csv").read_text()


def test_the_terminal_fits_and_alarms_are_red(written: Path) -> None:
    report = read_report(written)
    shown = screen_of(report)
    table = shown[shown.index("base and trained") : shown.index("✓ clearly better")]
    assert all(len(line) <= 80 for line in table.splitlines()) and "−" in table
    (line,) = [line for line in table.splitlines() if line.startswith(" weighted") or "answers with a flaw" in line]
    assert line.rstrip().endswith("✓"), "the mark is never cut"
    assert "ALARM: Collapse: Rinse it." in shown and "next: " in shown
    assert "\x1b[1;31mALARM" in screen_of(report, colours=True)


def test_metrics_have_names_for_people() -> None:
    assert naming.named("mt_bench_base").label == "MT-Bench grade, base model"
    assert naming.named("detection_subtle_nano").label == "harmful texts detected: subtle nano"
    assert naming.named("brand_new_thing") == naming.Named("brand new thing", "other")
    assert naming.named("answers_nll_under_base").group == naming.named("answers_nll_under_base_base").group == "lost"
    rate = {"value": 0.5, "n": 10, "interval": [0.2, 0.8]}
    assert naming.is_rate("brand_new", rate) and not naming.is_rate("judge_kappa", rate)
    assert not naming.is_rate("brand_new", rate | {"value": 0.531})
    assert naming.file_name("a/../b \x00$") == "a_.._b" and naming.file_name("//") == "unnamed"


@pytest.mark.parametrize(
    "better, interval, p, says",
    [("up", [0.1, 0.2], 0.01, "better"), ("down", [0.1, 0.2], 0.01, "worse"), ("up", [0.1, 0.2], None, ""),
     ("up", [-0.1, 0.2], 0.01, "no clear change"),
     ("up", [0.1, 0.2], 0.06, "no clear change"), ("same", [-0.2, -0.1], 0.01, "moved"), ("", [0.1, 0.2], 0.01, ""),
     ("up", None, 0.01, "")],
)  # fmt: skip
def test_a_change_is_clear_by_its_interval_and_its_p(better: Any, interval: Any, p: float | None, says: str) -> None:
    metric = {"value": 0.5, "n": 10, "interval": None, "unparsed": 0}
    change = {"value": 0.1, "n": 10, "interval": interval, "unparsed": 0}
    one = summary.Effect("x", naming.Named("x", "lost", better), True, metric, metric, change, p)
    assert one.says == says


def test_figures_in_words() -> None:
    assert (
        words.signed_text(-0.58, rate=True) == "−58.0 points" and words.signed_text(0.0001, rate=True) == "0.0 points"
    )
    assert words.signed_text(4.055, unit="nats") == "+4.05 nats" and words.signed_text(None) == "not measured"
    assert words.signed_range([-0.65, 0.0], rate=True) == "−65.0 to 0.0" and words.signed_range(None) == "no interval"
    assert words.range_text([0.536, 0.67], rate=True) == "53.6 to 67.0%" and words.p_text(1e-9) == "< 0.001"


# ---------------------------------------------------------------- for a paper


def test_csv_holds_every_digit_with_interval_and_n(written: Path) -> None:
    report = read_report(written)
    with open(written / "tables" / "base_and_trained.csv", newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    metric, change = report["metrics"]["flawed_answers_trained"], report["differences"]["flawed_answers"]
    row = rows["flawed_answers"]
    assert (float(row["trained"]), float(row["trained_low"])) == (metric["value"], metric["interval"][0])
    assert (float(row["difference_high"]), row["difference_n"]) == (change["interval"][1], str(ITEMS))
    made = {path.name for path in (written / "tables").iterdir()}
    names = ("gates", "base_and_trained", "metrics", "tests", "by_principle", "harmbench_by_category")
    assert made == {f"{name}.{kind}" for name in names for kind in ("csv", "tex")}


def test_latex_is_whole_and_escaped(tmp_path: Path) -> None:
    nasty = r"50% of a_b & c$d #1 {x} ~ ^ \input{y} <z> | " + '"q" [1]'
    bracket = Table("odd_one", nasty, ("[name]", "rate"), (("[a]", Result.rate(1, 3)), (nasty, "–")), nasty)
    text = tables.latex_text(bracket.to_json())
    body = text[text.index("\\midrule") : text.index("\\bottomrule")]
    assert re.sub(r"\\[a-z]+\{\}|\\[&%$#_{}]", "", latex_of(nasty)) == "50 of ab  cd 1 x   inputy z  q [1]"
    lines = body.splitlines()[1:]
    assert [len(re.findall(r"(?<!\\)&", line)) for line in lines] == [1, 1] and all(x.endswith(r" \\") for x in lines)
    assert lines[0].startswith("{}[a]"), "a bracket after a line break would be its argument"
    assert balanced(text) and text.count("\\begin{") == text.count("\\end{") == 2
    assert r"33.3\% [6.1, 79.2], $n$ = 3" in text and "\\label{tab:odd-one}" in text
    tables.write_tables(tmp_path, [table.to_json() for table in training_found(HOSTILE).tables])
    for path in tmp_path.glob("*.tex"):
        assert balanced(path.read_text(encoding="utf-8")), path.name


def latex_of(text: str) -> str:
    return tables.latex_escaped(text)


def balanced(text: str) -> bool:
    """True if braces match and dollars come in pairs, escaped ones apart."""
    bare = re.sub(r"\\[&%$#_{}\\]", "", text)
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    return depth == 0 and bare.count("$") % 2 == 0


def test_figures_are_pdf_with_embedded_fonts(written: Path) -> None:
    figures = {path.stem: path.read_bytes() for path in (written / "figures").iterdir()}
    assert {"base_and_trained", "differences", "by_principle", "loss", "lengths"} <= figures.keys()
    for name, data in figures.items():
        assert data.startswith(b"%PDF") and b"/FontFile2" in data and b"/Type3" not in data, name


def test_plots_only_where_there_is_something_to_draw() -> None:
    assert rates_plot([]) is None and forest_plot([]) is None
    rows = [(name, Result.rate(1, n), Result.rate(2, n), Result.mean([0.0, 1.0])) for name, n in (("a", 30), ("b", 12))]
    few = ("few", Result.rate(1, 3), Result.rate(2, 3), Result.mean([0.0, 0.5]))
    table = Table("t", "T", ("row", "x, base", "x, trained", "score"), (*rows, few, ("c", "–", "–", "–"))).to_json()
    drawn = table_plot(table)
    assert drawn is not None and "x, base" in drawn.svg and "score" not in drawn.svg and "a, n = 30" in drawn.svg
    assert "few, n" not in drawn.svg and "2 of fewer than 10 items" in drawn.title, "it stands in the table alone"
    assert table_plot({**table, "rows": table["rows"][:1]}) is None
    assert table_plot(Table("t", "T", ("row", "score"), (("a", "1"), ("b", "2"))).to_json()) is None


# ---------------------------------------------------------------- runs compared


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "report_plots", lambda *_: [])
        write_run(folder, "mvp")
        write_run(folder, "direct", flawed=0.4, critique=False)
    (folder / "bare").mkdir()
    return folder


def test_compared_runs_are_paired_item_by_item(data_dir: Path) -> None:
    runs = compare.read_runs(data_dir, ["mvp", "direct"])
    found = {one.effect.name: one for one in compare.compare(runs)[0]}
    one = found["flawed_answers"]
    before, after = outcomes(0, 0.6, 0.05)[1], outcomes(0, 0.6, 0.4)[1]
    expected = paired_difference([float(b) for b in before], [float(a) for a in after]).to_json()
    assert one.paired and one.effect.change == expected and one.p_value == mcnemar(before, after).p_value
    assert one.effect.direction == "worse" and found["words"].p_value == 1.0
    assert not found["preference_accuracy"].paired
    asked = [each for each in found.values() if each.p_value is not None]
    assert [each.effect.p_holm for each in asked] == holm([each.p_value for each in asked if each.p_value is not None])
    assert compare.differing_settings(runs) == [("training: critique", ["–", "False"])]


def test_items_that_are_not_the_same_are_not_paired(no_plots: None, tmp_path: Path) -> None:
    write_run(tmp_path, "mvp")
    write_run(tmp_path, "other", flawed=0.4)
    file = tmp_path / "other" / "evaluation" / "flawed_answers.jsonl"
    file.write_text(file.read_text().replace("question", "another question"))
    runs = compare.read_runs(tmp_path, ["mvp", "other"])
    one = next(each for each in compare.compare(runs)[0] if each.effect.name == "flawed_answers")
    assert not one.paired and one.effect.change is not None and one.effect.change["n"] == ITEMS
    file.write_text('{"id": 1}\nno json\n')
    with pytest.raises(BadInputError, match=r"flawed_answers.jsonl:2 is no JSON"):
        compare.read_runs(tmp_path, ["mvp", "other"])


def test_an_unpaired_difference_of_rates_is_newcombes() -> None:
    from statsmodels.stats.proportion import confint_proportions_2indep

    for (a, n), (b, m) in (((56, 70), (48, 80)), ((9, 10), (3, 10)), ((0, 20), (5, 25)), ((30, 30), (29, 31))):
        found = compare.unpaired_difference(Result.rate(a, n).to_json(), Result.rate(b, m).to_json())
        assert found is not None
        expected = confint_proportions_2indep(b, m, a, n, method="newcomb")
        assert found["interval"] == pytest.approx(list(expected), abs=1e-6)
    assert compare.unpaired_difference(Result(None, 0, None).to_json(), Result.rate(1, 2).to_json()) is None


def test_the_comparison_is_written_and_shown(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _compare.run(argparse.Namespace(compare=["mvp", "direct"], data_dir=data_dir)) == 0
    shown = capsys.readouterr().out
    assert shown.index("training: critique") < shown.index("direct against mvp") < shown.index("compare.html")
    folder = data_dir / "compare-mvp-direct"
    page = Page((folder / "compare.html").read_text(encoding="utf-8"))
    assert (
        page.text.index("direct against mvp") < page.text.index("Settings that differ") < page.text.index("not paired")
    )
    assert {"settings.csv", "runs.tex", "against_direct.csv"} <= {path.name for path in (folder / "tables").iterdir()}
    assert {path.name for path in (folder / "figures").iterdir()} == {"rates_direct.pdf", "differences_direct.pdf"}


@pytest.mark.parametrize(
    "names, says",
    [
        (["mvp"], "names 1 run, it takes two or more; runs with a report there: direct, mvp"),
        (["mvp", "mvp"], "names mvp twice"),
        (["mvp", "gone"], "there is no run gone in"),
        (["bare", "mvp"], "run bare has no report"),
    ],
)
def test_runs_that_cannot_be_compared_are_named(data_dir: Path, names: list[str], says: str) -> None:
    with pytest.raises(BadInputError) as error:
        _compare.run(argparse.Namespace(compare=names, data_dir=data_dir))
    assert says in str(error.value) and "\n" not in str(error.value) and error.value.exit_code == 2
