"""The report and the comparison in a real browser: headless Chromium, both colour schemes, phone and desktop width.

Without Chromium or Playwright the tests skip, and under CI they fail. With REPORT_SCREENSHOTS=DIR screenshots go there.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_tools import HOSTILE, facts, harmbench_found, training_found, write_run

from cai_experiment.evaluation.report import write_report
from cai_experiment.scripts import _compare

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-dev-shm-usage"]
SIZES = {"phone": (375, 812), "desktop": (1280, 900)}
SCHEMES = ("light", "dark")
MIN_CONTRAST = 4.5  # WCAG 2.2, level AA
WORD = "unbreakable" * 40  # wider than any screen

# [contrast, text, tag] of every element that shows text of its own, against the nearest background behind it
CONTRASTS = """() => {
  const channel = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const parse = (text) => (text.match(/[0-9.]+/g) || []).map(Number);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.body.querySelectorAll('*')) {
    const own = [...e.childNodes].filter((n) => n.nodeType === 3).map((n) => n.textContent.trim()).join('');
    if (!own || ['STYLE', 'SCRIPT', 'style'].includes(e.tagName) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e);
    const ink = parse(e.ownerSVGElement ? style.fill : style.color), ground = behind(e);
    const [high, low] = [light(ink), light(ground)].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), own.slice(0, 40), e.tagName]);
  }
  return found;
}"""


def without_browser(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


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
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with every section, one with hostile text and words without a break, and a comparison."""
    folder = tmp_path_factory.mktemp("pages")
    write_run(folder, "mvp")
    write_run(folder, "mvp-direct", flawed=0.4, critique=False, note=WORD)
    (folder / "hostile").mkdir()
    parts = {"training": training_found(f"{HOSTILE} {WORD}"), "harmbench": harmbench_found((0.2, 0.5))}
    write_report(folder / "hostile", parts, facts(run=WORD, settings={WORD: HOSTILE}))
    _compare.run(argparse.Namespace(compare=["mvp", "mvp-direct"], data_dir=folder))
    return {
        "report": folder / "mvp" / "report.html", "hostile": folder / "hostile" / "report.html",
        "compare": folder / "compare-mvp-mvp-direct" / "compare.html",
    }  # fmt: skip


def opened(browser: Any, place: Path, scheme: str, size: str) -> tuple[Any, list[str]]:
    """The page, and the addresses that it asked for beside its own file; each of them is refused."""
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion="reduce")
    asked: list[str] = []

    def watch(route: Any) -> None:
        if route.request.url == place.as_uri():
            route.continue_()
        else:
            asked.append(route.request.url)
            route.abort()

    page.route("**/*", watch)
    page.goto(place.as_uri())
    return page, asked


def keep_screenshot(page: Any, name: str) -> None:
    if os.environ.get("REPORT_SCREENSHOTS"):
        page.screenshot(path=Path(os.environ["REPORT_SCREENSHOTS"]) / f"{name}.png", full_page=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["report", "hostile", "compare"])
def test_page_fits_asks_for_nothing_and_can_be_read(
    browser: Any, pages: dict[str, Path], name: str, scheme: str, size: str
) -> None:
    page, asked = opened(browser, pages[name], scheme, size)
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    keep_screenshot(page, f"{name}-{scheme}-{size}")
    page.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, "it scrolls to the side"
    contrasts = page.evaluate(CONTRASTS)
    low = [(round(ratio, 2), text, tag) for ratio, text, tag in contrasts if ratio < MIN_CONTRAST]
    assert len(contrasts) > 50 and low == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) > 600) == (scheme == "light")
    assert asked == [] and errors == []
    page.close()


def test_details_open_by_click_and_by_key(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["report"], "light", "phone")
    kind = page.locator("details.kind").first
    assert not kind.get_by_text("case 0 Rinse it.").is_visible()
    kind.locator("summary").first.click()
    inner = kind.locator("details").first
    assert inner.is_visible() and inner.evaluate("e => e.open") is False
    inner.locator("summary").press("Enter")
    assert inner.evaluate("e => e.open") is True and inner.locator("p.text").first.is_visible()
    page.close()


def test_contents_lead_to_their_sections_and_print_shows_everything(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["report"], "dark", "desktop")
    for link in page.locator("nav a").all():
        link.click()
        target = page.locator(link.get_attribute("href"))
        assert target.count() == 1 and target.evaluate("e => e.tagName") == "H2"
    page.emulate_media(media="print")
    assert not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.close()


def test_the_verdict_and_the_answers_stand_on_the_first_screen(browser: Any, pages: dict[str, Path]) -> None:
    page, _ = opened(browser, pages["report"], "light", "desktop")
    for text in ("milestone mvp", "Did it help?", "How sure is that?", "What did it cost?"):
        box = page.get_by_text(text).first.bounding_box()
        assert box is not None and box["y"] + box["height"] < SIZES["desktop"][1], text
    page.close()
