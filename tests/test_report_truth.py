"""What the report claims: nothing stale, nothing clear without a p, nothing kept without a margin, its units."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from report_tools import ITEMS, facts, harmbench_found, outcomes, rate_found, rows_of, training_found, write_run

from cai_experiment.evaluation.found import Evaluation, Table
from cai_experiment.evaluation.gates import Gate
from cai_experiment.evaluation.report import print_report, write_report
from cai_experiment.evaluation.reporting import compare, compare_report, page, summary, tables, words
from cai_experiment.evaluation.reporting.naming import named, scaled_rows
from cai_experiment.evaluation.reporting.significance import part_tests
from cai_experiment.judging.result import Result, holm, mcnemar, paired_p_value, paired_rate_difference


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without plots, which take most of their time."""
    monkeypatch.setattr(page, "report_plots", lambda *_: [])


def expected_difference(name: str, share: float, seed: int = 0) -> float:
    base, trained = outcomes(seed, 0.6, share)
    return (sum(trained) - sum(base)) / ITEMS


# ---------------------------------------------------------------- nothing stale


def test_a_second_evaluation_brings_its_own_differences(tmp_path: Path) -> None:
    first = write_report(tmp_path, {"training": rate_found("flawed_answers", 0.6, 0.5)}, facts())
    second = write_report(tmp_path, {"training": rate_found("flawed_answers", 0.6, 0.1)}, facts())
    for report, share in ((first, 0.5), (second, 0.1)):
        found = report["differences"]["flawed_answers"]["value"]
        metrics = report["metrics"]
        assert found == pytest.approx(expected_difference("flawed_answers", share))
        assert found == pytest.approx(
            metrics["flawed_answers_trained"]["value"] - metrics["flawed_answers_base"]["value"]
        )
    other = write_report(tmp_path, {"training": rate_found("arithmetic", 0.9, 0.8)}, facts())
    assert other["differences"].keys() == other["tests"].keys() == {"arithmetic"}


def test_of_another_adapter_no_difference_stays(tmp_path: Path) -> None:
    write_report(tmp_path, {"training": rate_found("flawed_answers", 0.6, 0.5)}, facts(adapter="aa"))
    report = write_report(tmp_path, {"training": rate_found("flawed_answers", 0.6, 0.1)}, facts(adapter="bb"))
    found = report["differences"]["flawed_answers"]["value"]
    assert found == pytest.approx(expected_difference("flawed_answers", 0.1))


def test_what_no_part_owns_is_gone_with_its_part(tmp_path: Path) -> None:
    report = write_report(tmp_path, {"training": training_found()}, facts())
    metric = Result.rate(3, 10).to_json()
    report["metrics"] |= {"on_topic_trained": metric, "critique_meaningful": metric}
    report["differences"]["on_topic"] = metric
    for parts in (False, True):  # a report of before names no parts, one of between only those measured since
        old = report if parts else {name: value for name, value in report.items() if name != "parts"}
        (tmp_path / "report.json").write_text(json.dumps(old), encoding="utf-8")
        found = write_report(tmp_path, {"training": rate_found("arithmetic", 0.9, 0.8)}, facts())
        assert found["metrics"].keys() == {"critique_meaningful", "arithmetic_base", "arithmetic_trained"}
        assert found["differences"].keys() == {"arithmetic"} and found["parts"].keys() == {"generation", "training"}


# ---------------------------------------------------------------- what is clear


def test_means_have_a_p_of_the_same_family(tmp_path: Path) -> None:
    report = write_report(tmp_path, {"training": training_found(), "harmbench": harmbench_found()}, facts())
    assert report["differences"].keys() == report["tests"].keys(), "every difference has a p"
    items = training_found().items["answers"]
    p = paired_p_value([row["base"]["words"] for row in items], [row["trained"]["words"] for row in items])
    assert report["tests"]["words"] == {"p_value": p, "p_holm": report["tests"]["words"]["p_holm"]}
    values = [test["p_value"] for test in report["tests"].values()]
    assert [test["p_holm"] for test in report["tests"].values()] == holm(values)


def test_a_p_comes_from_the_part_or_from_all_rows_by_question() -> None:
    change = Result(1.0, 4, (0.5, 1.5))
    rows = [{"question_id": i // 2, "base": 1.0, "trained": 2.0} for i in range(4)]
    assert part_tests(Evaluation(differences={"x": change}, items={"x": rows}))["x"] == {"p_value": 0.5}, "2 questions"
    apart = [{"base": 1.0, "trained": 2.0} for _ in range(4)]
    assert part_tests(Evaluation(differences={"x": change}, items={"x": apart}))["x"] == {"p_value": 0.125}
    assert part_tests(Evaluation(differences={"x": change}, items={"x": rows}, p_values={"x": 0.3}))["x"] == {
        "p_value": 0.3
    }
    assert part_tests(Evaluation(differences={"x": change}, items={"x": rows[:3]})) == {}, "rows of other items"


def test_a_mean_without_a_difference_gets_it_from_its_rows(tmp_path: Path) -> None:
    base, trained = [4.0, 5.0, 4.0], [4.0, 4.0, 3.0]
    found = Evaluation({"sentences_base": Result.mean(base), "sentences_trained": Result.mean(trained)})
    found.items["world"] = rows_of("w", [{"sentences": b} for b in base], [{"sentences": t} for t in trained])
    report = write_report(tmp_path, {"training": found}, facts())
    assert report["differences"]["sentences"]["value"] == pytest.approx(-2 / 3)
    assert report["parts"]["training"]["differences"] == ["sentences"], "so it goes when the part does"


def effect(name: str, interval: list[float], p: float = 1.0, base: float = 0.5, n: int = 200) -> summary.Effect:
    metric = {"value": base, "n": n, "interval": None, "unparsed": 0}
    change = {"value": sum(interval) / 2, "n": n, "interval": interval, "unparsed": 0}
    return summary.Effect(name, named(name), named(name).rate, metric, metric, change, p)


@pytest.mark.parametrize(
    "name, interval, kept",
    [
        ("arithmetic", [-0.02, 0.01], True), ("arithmetic", [-0.09, 0.05], False), ("arithmetic", [0.01, 0.05], True),
        ("refusal", [-0.09, 0.04], True), ("refusal", [-0.01, 0.06], False), ("words", [-1.0, 1.0], False),
        ("clean_nll", [-0.01, 0.09], True), ("clean_nll", [-0.01, 0.12], False),
        ("distinct_2", [-0.09, 0.1], True), ("distinct_2", [-0.11, 0.1], False), ("clean_perplexity", [-1, 0], False),
    ],
)  # fmt: skip
def test_kept_is_what_has_lost_less_than_the_margin_at_worst(name: str, interval: list[float], kept: bool) -> None:
    assert effect(name, interval).kept is kept


def test_few_items_prove_no_keeping(tmp_path: Path) -> None:
    few = [True] * 18 + [False] * 2
    found = Evaluation(
        {"gsm8k_base": Result.rate(18, 20), "gsm8k_trained": Result.rate(18, 20)}, tests={"gsm8k": mcnemar(few, few)}
    )
    shown = dict(summary.in_short(write_report(tmp_path, {"training": found}, facts())))["What did it cost?"]
    assert any(line.startswith("Cannot be told from so few items: GSM8K") for line in shown)
    assert not any("No measured loss" in line or "Kept" in line for line in shown)
    found.metrics = {"gsm8k_base": Result.rate(360, 400), "gsm8k_trained": Result.rate(360, 400)}
    found.tests = {"gsm8k": mcnemar(few * 20, few * 20)}
    shown = dict(summary.in_short(write_report(tmp_path, {"training": found}, facts())))["What did it cost?"]
    assert shown[0].startswith("No measured loss. Kept, within 5 points or what is tolerated: GSM8K")


def test_a_longer_answer_is_no_loss(tmp_path: Path) -> None:
    report = write_report(tmp_path, {"training": training_found()}, facts())
    words_effect = next(one for one in summary.effects(report) if one.name == "words")
    assert words_effect.direction == words_effect.says == "moved"
    short = dict(summary.in_short(report))
    assert not any("Words an answer" in line for line in short["What did it cost?"])
    assert "1 clearly moved (neither gain nor loss)" in short["How sure is that?"][0]
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<span class="soft">moved</span>' in html and "✗ moved" not in html
    assert named("words_harmbench_trained").group == "other" and named("distinct_1").better == "up"


# ---------------------------------------------------------------- the first lines


def test_a_go_says_what_it_does_not_prove(tmp_path: Path) -> None:
    same = rate_found("flawed_answers", 0.6, 0.58)
    same.alarms = ["look here"]
    same.gates = [Gate("g", 1.0, ">=", 1.0, None, 1, "training")]
    report = write_report(tmp_path, {"training": same}, facts())
    assert report["verdict"] == "go"
    said = "The one gate passed. No measure of safety is clearly better. 1 alarm."
    assert summary.headline(report) == said and said in screen_of(report)
    same.gates.append(Gate("no collapse", 1.0, "=", 0.0, None, 9, "training"))
    broken = summary.headline(write_report(tmp_path, {"training": same}, facts()))
    assert broken.startswith("1 of 2 gates did not pass: no collapse. The trained model's language has collapsed:")
    better = write_report(tmp_path, {"training": training_found(), "harmbench": harmbench_found()}, facts())
    assert summary.headline(better) == "All 2 gates passed. 2 alarms."


def test_safety_stands_in_a_fixed_order_and_shortcuts_beside_the_preference(tmp_path: Path) -> None:
    found = Evaluation()
    for name in ("harm_score", "harm_flagged", "false_alarm", "flawed_answers"):
        found += rate_found(name, 0.5, 0.4)
    found += training_found()
    found.metrics |= {"length_only_accuracy": Result.rate(32, 60), "bag_of_words_accuracy": Result.rate(55, 60)}
    report = write_report(tmp_path, {"training": found, "harmbench": harmbench_found()}, facts())
    helped = dict(summary.in_short(report))["Did it help?"]
    starts = ("HarmBench requests", "Answers with a flaw", "Answers flagged", "Weighted harm", "Held-out pairs")
    assert [line.startswith(start) for line, start in zip(helped, starts, strict=True)] == [True] * 5
    beside = "by their words alone 91.7% (n\u00a0=\u00a060), by length alone 53.3% (n\u00a0=\u00a060)"
    assert helped[-1].endswith(beside) and beside in screen_of(report)


def test_the_judges_fitness_comes_first_and_chance_is_named(tmp_path: Path) -> None:
    names = ("meaningful_kappa", "judge_kappa", "win_rate_kappa", "judge_fitness")
    found = Evaluation({name: Result(0.8, 100, (0.7, 0.9)) for name in names})
    found.metrics["meaningful_kappa"] = Result(0.05, 100, (-0.1, 0.2))
    lines = dict(summary.in_short(write_report(tmp_path, found, facts())))["How sure is that?"]
    assert lines[0].startswith("Judge right on known answers") and "near chance" not in lines[0]
    assert lines[-1].startswith("Near chance (kappa is low too where nearly all judgements are alike): Judge agrees")
    found.metrics["judge_fitness"] = Result(0.05, 100, (-0.1, 0.2))
    lines = dict(summary.in_short(write_report(tmp_path, found, facts())))["How sure is that?"]
    assert lines[0].startswith("Judge right on known answers") and lines[0].endswith(", near chance")


# ---------------------------------------------------------------- units


def test_a_result_knows_its_scale() -> None:
    assert Result.rate(1, 3).to_json()["scale"] == "rate" and "scale" not in Result.mean([0.0, 1.0]).to_json()
    assert paired_rate_difference([True, False], [True, True]).scale == "points"
    assert Result.rate(1, 2) == Result(0.5, 2, Result.rate(1, 2).interval), "the scale is no part of the figure"


def test_cells_are_shown_by_their_own_scale_and_old_ones_by_column() -> None:
    rows = (("a", Result.rate(0, 20), Result.mean([0.0, 0.0])), ("b", Result.rate(9, 20), Result.mean([0.0, 1.6])))
    table = Table("t", "T", ("row", "flagged", "score (0 to 5.5)"), rows).to_json()
    shown = [[words.scaled_value(cell) for cell in row[1:]] for row in scaled_rows(table)]
    assert shown == [["0.0%", "0"], ["45.0%", "0.8"]]
    old = {**table, "rows": [[r[0], *({k: v for k, v in c.items() if k != "scale"} for c in r[1:])]
                             for r in table["rows"]]}  # fmt: skip
    assert [[words.scaled_value(cell) for cell in row[1:]] for row in scaled_rows(old)] == shown
    assert r"9, 45.0\%" not in tables.latex_text(table) and r"45.0\% [" in tables.latex_text(table)
    assert words.figure(999.6) == "1,000"


def test_gates_speak_in_the_units_of_their_figure(tmp_path: Path) -> None:
    found = rate_found("arithmetic", 0.98, 0.95, 1)
    base, trained = outcomes(1, 0.98, 0.95)
    change = paired_rate_difference(base, trained)
    found.differences["arithmetic"] = change
    assert change.interval is not None and change.value is not None
    rate = found.metrics["arithmetic_trained"]
    found.gates = [
        Gate("lower end", change.interval[0], ">", -0.05, change.interval, change.n, "training"),
        Gate("kept", rate.value, ">=", 0.9, rate.interval, rate.n, "training"),
        Gate("kappa", 0.87, ">=", 0.4, (0.8, 0.9), 200, "training"),
    ]
    report = write_report(tmp_path, {"training": found}, facts())
    low, kept, kappa = (words.gate_cells(gate, report) for gate in report["gates"])
    points = [f"{100 * value:.1f}".replace("-", "−") for value in (change.interval[0], change.value)]
    assert low.value == f"{points[0]} points (lower end of {points[1]})" and low.asked == "> −5.0 points"
    assert kept.value.endswith("%") and kept.asked == ">= 90.0%" and kept.interval.endswith("%")
    assert (kappa.value, kappa.asked, kappa.interval) == ("0.87", ">= 0.4", "0.8 to 0.9")


def test_latex_fits_the_page_and_pdflatex() -> None:
    columns = ("measure", "name", "base", "trained", "difference", "p", "alarm")
    table = Table("t", "Title.", columns, (("机器 é", "raw_name", "a", "b", "c", "d", "e"),), "an alarm.").to_json()
    text = tables.latex_text(table)
    assert r"\caption{Title. An alarm. 95\% intervals in brackets.}" in text
    assert r"\resizebox{\linewidth}{!}{%" in text and r"\end{tabular}}" in text and "raw" not in text
    assert "[U+673A][U+5668] é" in text and "机器" in tables.csv_text(table) and "raw_name" in tables.csv_text(table)


# ---------------------------------------------------------------- 80 columns


def screen_of(report: dict[str, Any], width: int = 80) -> str:
    from rich.console import Console

    file = io.StringIO()
    print_report(report, Console(file=file, width=width))
    return file.getvalue()


def marks_of(table: str) -> list[str]:
    """The last characters of the lines that hold a figure; no line is longer than 80."""
    lines = table.splitlines()
    assert max(map(len, lines)) <= 80
    return [line.rstrip()[-1] for line in lines if re.search(r"\d +(< )?[\d.]+ +[✓✗–~]$|\d+ +[✓✗–~]$", line.rstrip())]


def test_both_tables_show_their_marks_at_80_columns(tmp_path: Path) -> None:
    from rich.console import Console

    found = training_found()
    small = Result(-0.00366, ITEMS, (-0.00782, 0.000486))  # the widest interval that there is
    found.metrics |= {"distinct_1_base": Result(0.0765, ITEMS, (0.07, 0.08)), "distinct_1_trained": small}
    found.differences["distinct_1"], found.p_values["distinct_1"] = small, 0.08
    report = write_report(tmp_path, {"training": found, "harmbench": harmbench_found()}, facts())
    table = screen_of(report).split("base and trained")[1].split("✓ clearly")[0]
    assert "…" not in table and marks_of(table) == ["✓", "✓", "–", "~", "–"]
    write_run(tmp_path, "mvp")
    write_run(tmp_path, "mvp-direct-without-critiques", flawed=0.4)
    file = io.StringIO()
    compared = compare_report.compare_runs(tmp_path, ["mvp", "mvp-direct-without-critiques"])
    compare_report.print_comparison(compared, Console(file=file, width=80))
    table = file.getvalue().split("rates in % and points")[1].split("✓ clearly")[0]
    assert "…" not in table and {"✗", "–"} <= set(marks_of(table)), "the change, and what has not changed"


# ---------------------------------------------------------------- runs compared


def test_other_pairs_are_no_same_items(tmp_path: Path) -> None:
    for run, chosen in (("mvp", "Rinse it."), ("direct", "Rinse it."), ("other", "Wash it.")):
        rows = [{"id": f"{i:06d}", "instruction": "How?", "chosen": chosen, "rejected": "Hit it.",
                 "trained": {"preference_accuracy": i % 3 > 0}} for i in range(30)]  # fmt: skip
        found = Evaluation({"preference_accuracy": Result.rate(20, 30)}, items={"preference": rows})
        (tmp_path / run).mkdir()
        write_report(tmp_path / run, {"training": found}, facts(run=run))
    one, two = compare.compare(compare.read_runs(tmp_path, ["mvp", "direct", "other"]))
    assert [each.paired for each in one] == [True] and [each.paired for each in two] == [False]


def test_the_turns_of_a_question_are_one_item(tmp_path: Path) -> None:
    for run, grade in (("mvp", 5.0), ("direct", 7.0)):
        rows = [{"id": f"{i}/{turn}", "instruction": f"Turn {turn} of {i}", "question_id": i, "trained": grade + turn}
                for i in range(20) for turn in (1, 2)]  # fmt: skip
        found = Evaluation({"mt_bench_trained": Result(grade + 1.5, 40, None)}, items={"mt_bench": rows})
        (tmp_path / run).mkdir()
        write_report(tmp_path / run, {"mtbench": found}, facts(run=run))
    (one,) = compare.compare(compare.read_runs(tmp_path, ["mvp", "direct"]))[0]
    assert one.paired and one.effect.base["n"] == 20 and one.effect.change is not None
    assert (one.effect.change["value"], one.effect.direction) == (2.0, "better")


def test_a_comparison_says_on_which_items_and_what_counts(tmp_path: Path) -> None:
    for run, share in (("mvp", 0.1), ("direct", 0.5)):
        found = rate_found("win_rate", 0.5, share) + rate_found("evasive", 0.5, share, 3)
        found.metrics["win_rate"] = found.metrics.pop("win_rate_trained")
        rows = found.items["win_rate"]
        rows = rows[:40] if run == "mvp" else rows[5:]  # decided by the judge
        found = Evaluation(found.metrics, items={"win_rate": rows, "evasive": found.items["evasive"]})
        found.metrics |= {"clean_perplexity_trained": Result(2.0 + share, 50, (1.9 + share, 2.1 + share))}
        found.metrics |= {"judge_kappa": Result(share, 50, (share - 0.01, share + 0.01))}
        (tmp_path / run).mkdir()
        write_report(tmp_path / run, {"training": found}, facts(run=run, settings={"exclude": run, "loss": "ipo"}))
    part = {"generation": Evaluation({"accepted_pairs": Result(3, 3, None)})}
    write_report(tmp_path / "mvp", part, facts(run="mvp", settings={"rounds": 2, "adapter": "x"}))
    runs = compare.read_runs(tmp_path, ["mvp", "direct"])
    assert compare.differing_settings(runs) == [("generation", ["made", "not made in this run"])]
    found = {one.effect.name: one for one in compare.compare(runs)[0]}
    assert found["win_rate"].note == "on the 35 items that count in both runs (40 and 55)"
    assert found["win_rate"].effect.direction == "better"
    assert found["clean_perplexity"].effect.direction == "none", "there is no p"
    assert found["judge_kappa"].effect.direction == found["evasive"].effect.direction == "none", "no outcome"
    compared = compare_report.compare_runs(tmp_path, ["mvp", "direct"])
    lines = compare_report.short_lines("mvp", "direct", compared.against[0])
    assert "1 are clearly better in direct than in mvp, 0 clearly worse" in lines[0]
    assert lines[1].startswith("Held-out answers: trained preferred")
