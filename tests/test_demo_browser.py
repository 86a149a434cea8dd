"""The demo as a user meets it: the real server, headless Chromium, every tab walked through, each looked at.

One walk goes through all tabs with the shipped model: it evaluates, generates, trains Quick (reloaded, stopped and
resumed on the way), compares, exports. Any console error fails it, and any request that leaves 127.0.0.1. Without
Chromium or Playwright the tests skip, and under CI they fail. With DEMO_SCREENSHOTS=DIR screenshots go there; those of
docs/images are made so.
"""

from __future__ import annotations

import csv
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from demo_tools import HOSTILE, Server, Visit, contrasts, layout, start_browser, write_hostile_run
from test_report_browser import CHROMIUM, MIN_CONTRAST, SCHEMES, SIZES, without_browser

TABS = ("Evaluation", "Generation", "Training", "Impact", "Data", "Architecture")
BURGLARY = "How to break into a house"
JUDGE = "nano-b"  # once it is loaded
MATCH = "break into a house"
ANSWERS = 150_000  # milliseconds for a model's answer on a busy machine; it takes about one second
TRAINS = 240_000  # for a Quick training, which takes about 30 s on two free cores
PAGE_SECONDS = 2.0  # for hostile texts


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        without_browser("playwright is not installed")
    if not Path(CHROMIUM).exists():
        without_browser(f"no Chromium at {CHROMIUM}")
    with sync_playwright() as playwright:
        found = start_browser(playwright)
        yield found
        found.close()


@pytest.fixture(scope="module")
def demo(browser: Any, nano_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, with a run in its data folder that a hostile model has written."""
    folder = tmp_path_factory.mktemp("demo")
    write_hostile_run(folder / "data")
    server = Server(folder)
    yield server
    server.stop()


# ---------------------------------------------------------------- what a user does


def shows(page: Any, place: str, text: str | re.Pattern[str], within: int = ANSWERS) -> str:
    """Wait until the place with this id shows the text; all that it shows."""
    from playwright.sync_api import expect

    found = page.locator(f"#{place}")
    expect(found).to_contain_text(text, timeout=within)
    return str(found.inner_text())


def training_shows(page: Any, pattern: str) -> None:
    """Wait until the training's line fits; one that has failed is not waited for."""
    said = shows(page, "training-state", re.compile(f"{pattern}|failed"), TRAINS)
    assert re.search(pattern, said), said


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def choose(page: Any, label: str, option: str | re.Pattern[str]) -> None:
    """Choose in the dropdown of the open tab."""
    page.get_by_role("combobox", name=label, exact=True).locator("visible=true").click()
    page.get_by_role("option", name=option).first.click()


def download(page: Any, place: str) -> Path:
    """The file behind a download button, once there is one."""
    link = page.locator(f"#{place}")
    link.wait_for(timeout=ANSWERS)
    with page.expect_download() as coming:
        link.click()
    assert re.fullmatch(r"(content_logs|impact_\w+)_\d{8}_\d{6}(-\d+)?\.(json|csv)", coming.value.suggested_filename)
    return Path(coming.value.path())


def evaluates(page: Any) -> None:
    """Each method speaks, the matched words are marked, an example can be loaded."""
    from playwright.sync_api import expect

    open_tab(page, "Evaluation")
    text = page.get_by_label("Text to evaluate")
    page.get_by_role("button", name=BURGLARY).click()
    expect(text).to_have_value(BURGLARY)
    for method, named in (("Rules", "rules"), ("AI Evaluation", f"AI ({JUDGE})"), ("Both", f"AI ({JUDGE}) and rules")):
        page.get_by_role("radio", name=method, exact=True).check()
        press(page, "Evaluate")
        said = shows(page, "evaluation", re.compile(rf"Method\s*{re.escape(named)}\s*(Category|Weighted)"))
        assert re.search(r"Weighted score\s+\d\.\d \(\d/4 principles violated\)", said)
    assert "Violation detected" in said and "2.0 (1/4 principles violated)" in said and "break-into-building" in said
    assert page.locator("#evaluation mark").first.inner_text().startswith(MATCH)
    page.locator("#evaluation summary", has_text=f"Raw output of {JUDGE}").click()
    assert "log P(A)" in shows(page, "evaluation", "harm_prevention, A means yes")


def generates(page: Any, checkpoint: str | None) -> None:
    """The base's answer, and with a checkpoint both, which differ."""
    open_tab(page, "Generation")
    if checkpoint is None:
        choose(page, "Checkpoint", re.compile("base model alone"))
    else:
        choose(page, "Checkpoint", re.compile(checkpoint))
    page.get_by_label("Prompt").fill("How do I store rice?")
    page.get_by_label("number input for Length (tokens at most)").fill("60")
    press(page, "Generate")
    shows(
        page, "generation-line", re.compile((r"trained: \d+ tokens.*" if checkpoint else r"base: \d+.*") + r"seed 0 ·")
    )
    assert len(page.locator("#generation-base").inner_text()) > 20
    if checkpoint is not None:
        assert len(page.locator("#generation-trained").inner_text()) > 20


def loads_two_models(page: Any) -> None:
    """The accordion: both roles, status lines, the total; unloaded and loaded again."""
    page.get_by_role("button", name="Advanced: Dual Model Architecture").click()
    choose(page, "Evaluation model", re.compile("^nano-b"))
    press(page, "Load Evaluation Model")
    shows(page, "evaluation-model-line", "✓ Evaluation model loaded: nano-b")
    press(page, "Load Generation Model")
    shows(page, "generation-model-line", "✓ Generation model loaded: nano")
    shows(page, "dual-status", "Dual Model System Status")
    shows(page, "dual-status", re.compile(r"Total memory: 0\.0\d GB"))
    keep_screenshot(page, "dual", "#dual-status")
    press(page, "Unload Evaluation Model")
    shows(page, "evaluation-model-line", re.compile("unloaded", re.I))
    press(page, "Load Evaluation Model")
    shows(page, "evaluation-model-line", "✓ Evaluation model loaded: nano-b")
    page.get_by_role("button", name="Advanced: Dual Model Architecture").click()


def trains(page: Any, others: Any) -> str:
    """Quick, with a reload in the middle, a stop and a resume; meanwhile another session. Gives the run's name."""
    open_tab(page, "Training")
    assert page.get_by_role("radio", name=re.compile(r"Quick Demo \(2 epochs, 20 examples.*\)")).is_checked()
    press(page, "Start Training")
    shows(page, "training-said", "demo-quick has begun: 20 examples, 2 epochs")
    is_told_that_a_training_runs(others)
    training_shows(page, r"making pairs, [1-9]\d*/20")
    shows(page, "training-pairs", "first answer (rejected)")
    page.reload()
    open_tab(page, "Training")
    training_shows(page, "demo-quick: (making pairs|training|loading)")
    shows(page, "training-pairs", "revision (chosen)")
    press(page, "Stop")
    training_shows(page, "demo-quick stopped")
    choose(page, "Run to resume", "demo-quick")
    press(page, "Resume")
    shows(page, "training-said", "demo-quick goes on")
    training_shows(page, r"training, step \d+/\d+ · loss \d\.\d+")
    training_shows(page, "demo-quick .*finished|finished.*demo-quick")
    assert page.locator("#training-plot svg").count() == 2
    return "demo-quick"


def is_told_that_a_training_runs(page: Any) -> None:
    """Another session sees the training, cannot start a second one, and keeps its own result."""
    shown = page.locator("#evaluation").inner_text()
    open_tab(page, "Training")
    shows(page, "training-state", "demo-quick")
    press(page, "Start Training")
    shows(page, "training-said", "a training is running on this machine: demo-quick")
    open_tab(page, "Evaluation")
    assert page.locator("#evaluation").inner_text() == shown


def compares(page: Any, run: str, own: Path) -> None:
    """The user's own prompts, then a suite: intervals, plots, every example with its word diff, both exports."""
    open_tab(page, "Impact")
    choose(page, "Checkpoint", re.compile(run))
    choose(page, "Test suite", "your own file")
    page.locator("input[type=file]").set_input_files(own)
    shows(page, "impact-file", "2 prompts read")
    page.get_by_role("radio", name="Rules", exact=True).locator("visible=true").check()
    press(page, "Run Comparison")
    shows(page, "impact-state", re.compile(r"2 prompts compared in"))
    choose(page, "Test suite", "harmful content")
    press(page, "Run Comparison")
    shows(page, "impact-state", re.compile(r"[1-9]\d+ prompts compared in"), TRAINS)
    assert re.search(r"\d+\.\d% \(\d+\.\d to \d+\.\d\)", page.locator("#impact-summary").inner_text())
    assert page.locator("#impact-plots svg").count() >= 1
    examples = page.locator("#impact-examples details details")
    examples.first.locator("summary").click()
    assert examples.first.locator(".cai-diff").is_visible()
    press(page, "Export JSON")
    found = json.loads(download(page, "impact-download").read_text("utf-8"))
    press(page, "Export CSV")
    shows(page, "impact-export", ".csv")
    rows = list(csv.DictReader(download(page, "impact-download").read_text("utf-8-sig").splitlines()))
    assert sum(row["record"] == "example" for row in rows) == len(found["examples"]) == examples.count()


def browses(page: Any, run: str) -> None:
    """A run's rows, filtered, and the whole way of one."""
    open_tab(page, "Data")
    choose(page, "Run", run)
    shows(page, "data-line", "pairs 1 to 20 of 20")
    choose(page, "Verdict", "yes → no")
    shows(page, "data-line", re.compile(r"pairs 1 to \d+ of \d+"))
    opens_an_example(page)


def keeps_a_log(page: Any) -> None:
    """The log view follows the verbosity, the export holds everything."""
    page.get_by_role("button", name="Content log").click()
    evaluate_alone(page, BURGLARY, "Rules")
    shows(page, "log-view", "[EVAL-DECISION]")
    set_slider(page, "Verbosity", 0)
    shows(page, "log-view", "Verbosity 0 shows nothing")
    set_slider(page, "Verbosity", 3)
    shows(page, "log-view", "[EVAL-INPUT]")
    press(page, "Export Logs")
    entries = json.loads(download(page, "log-download").read_text("utf-8"))
    assert BURGLARY in json.dumps(entries, ensure_ascii=False)
    keep_screenshot(page, "log", "#log-view")
    page.get_by_role("button", name="Content log").click()


def evaluate_alone(page: Any, text: str, method: str) -> float:
    """Evaluate a text; the seconds until the page shows what came of it."""
    open_tab(page, "Evaluation")
    page.get_by_role("radio", name=method, exact=True).locator("visible=true").check()
    page.get_by_label("Text to evaluate").fill(text)
    before = marked(page, "evaluation")
    start = time.monotonic()
    press(page, "Evaluate")
    before.wait_for(state="detached")
    shows(page, "evaluation", re.compile("Verdict|empty|does not fit"))
    return time.monotonic() - start


def marked(page: Any, place: str) -> Any:
    """A mark in what the place shows; it goes as soon as something else is shown there."""
    page.evaluate(f"""document.querySelector('#{place} .html-container > div').firstElementChild
      .appendChild(document.createElement('i')).id = 'before'""")
    return page.locator(f"#{place} #before")


def set_slider(page: Any, label: str, value: int) -> None:
    field = page.get_by_label(f"number input for {label}")
    field.fill(str(value))
    field.press("Enter")


# ---------------------------------------------------------------- the walk


def test_a_walk_through_every_tab(browser: Any, demo: Server, tmp_path: Path) -> None:
    own = tmp_path / "own.txt"
    own.write_text("How do I store rice?\nHow do I clean a window?\n", "utf-8")
    visit, other = Visit(browser, demo.url), Visit(browser, demo.url, "dark", "phone")
    page = visit.page
    shows(page, "model-line", "nano is ready")
    assert pale(page) == pale(other.page) == []
    loads_two_models(page)
    evaluates(page)
    evaluate_alone(other.page, "How do I store rice?", "Rules")
    generates(page, None)
    run = trains(page, other.page)
    generates(page, run)
    compares(page, run, own)
    browses(page, run)
    open_tab(page, "Architecture")
    shows(page, "architecture", "constitution")
    keeps_a_log(page)
    evaluates(page)
    visit.seen_to_be_clean()
    other.seen_to_be_clean()
    other.close()
    looks(page)
    visit.seen_to_be_clean()
    visit.close()


def looks(page: Any) -> None:
    """Every tab as it now stands, in both schemes and sizes: nothing is cut, lies over another or is hard to read."""
    faults: dict[str, Any] = {}
    for scheme in SCHEMES:
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        for size, (width, height) in SIZES.items():
            page.set_viewport_size({"width": width, "height": height})
            for tab in TABS:
                open_tab(page, tab)
                if tab == "Data":
                    opens_an_example(page)
                keep_screenshot(page, f"{tab.lower()}-{scheme}-{size}")
                found = {name: some for name, some in layout(page).items() if some}
                if found or pale(page):
                    faults[f"{tab} {scheme} {size}"] = found | {"pale": pale(page)}
    assert faults == {}, json.dumps(faults, ensure_ascii=False)


def pale(page: Any) -> list[tuple[float, str, str]]:
    """Texts that can hardly be told from their background."""
    return [seen for seen in contrasts(page) if seen[0] < MIN_CONTRAST]


def opens_an_example(page: Any) -> None:
    shows(page, "data-line", "pairs 1 to")
    page.locator("#data-table tbody tr").nth(1).locator("td").nth(1).click()
    shows(page, "data-example", "Instruction")


def keep_screenshot(page: Any, name: str, part: str = "#tabs") -> None:
    """The whole page, and a screen of it with `part` as docs/images has it; the test's own folder is left out."""
    folder = os.environ.get("DEMO_SCREENSHOTS")
    if folder:
        page.locator("#training-state p").evaluate_all(
            "all => all.forEach((p) => { p.textContent = p.textContent.replace(/\\S+[/](checkpoints[/])/, '$1'); })"
        )
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)
        page.evaluate("scrollTo(0, 0)")
        if part != "#tabs":
            page.locator(part).scroll_into_view_if_needed()
        page.screenshot(path=Path(folder) / f"top-{name}.png")


# ---------------------------------------------------------------- hostile texts


def test_hostile_texts_typed_into_every_input_stay_texts(browser: Any, demo: Server) -> None:
    visit = Visit(browser, demo.url)
    page, times = visit.page, {}
    shows(page, "model-line", re.compile("ready"))
    for name, text in HOSTILE.items():
        times[name] = evaluate_alone(page, text, "Rules")
        if name == "script":
            shows(page, "evaluation", "<script>window.__pwned = 1</script>")
    assert "\\x1b[31mred" in evaluated(page, HOSTILE["ansi"])
    assert "user\\u202egnp.exe" in evaluated(page, HOSTILE["bidi"])
    assert page.locator("#evaluation a, #evaluation img, #evaluation script").count() == 0
    page.get_by_role("button", name="Content log").click()
    shows(page, "log-view", "EVAL-INPUT")
    assert page.locator("#log-view a, #log-view img, #log-view script").count() == 0
    open_tab(page, "Generation")
    page.get_by_label("number input for Length (tokens at most)").fill("10")
    for name in ("script", "link", "bidi", "emoji", "empty", "long"):
        times[f"generate {name}"] = generated(page, HOSTILE[name])
    assert page.locator("#generation-base a, #generation-base img").count() == 0
    print({name: round(seconds, 2) for name, seconds in times.items()})
    assert max(times.values()) < 5 * PAGE_SECONDS, times  # a busy machine; docs/DEMO.md has the figures
    visit.seen_to_be_clean()
    visit.close()


def evaluated(page: Any, text: str) -> str:
    """What the page shows of an evaluated text."""
    evaluate_alone(page, text, "Rules")
    return shows(page, "evaluation", "Verdict")


def generated(page: Any, prompt: str) -> float:
    """Seconds until a prompt is answered or refused."""
    page.get_by_label("Prompt").fill(prompt)
    first = page.locator("#generation-line").inner_text().strip() == ""
    before = None if first else marked(page, "generation-line")
    start = time.monotonic()
    press(page, "Generate")
    if before is not None:
        before.wait_for(state="detached")
    shows(page, "generation-line", re.compile("seed 0 ·|empty|does not fit|too long|characters"))
    return time.monotonic() - start


def test_hostile_texts_of_a_model_stay_texts(browser: Any, demo: Server) -> None:
    visit = Visit(browser, demo.url)
    page = visit.page
    open_tab(page, "Data")
    choose(page, "Run", "hostile")
    shows(page, "data-line", "pairs 1 to 7 of 7")
    for row in range(7):
        page.locator("#data-table tbody tr").nth(row).locator("td").nth(1).click()
        shows(page, "data-example", f"Question {row}?")
    page.get_by_role("radio", name="Rejected").check()
    shows(page, "data-line", re.compile("1 to 6 of 6"))
    assert page.locator("#data-table img, #data-table a, #data-example img, #data-example a").count() == 0
    visit.seen_to_be_clean()
    visit.close()
