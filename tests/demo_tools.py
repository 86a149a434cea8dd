"""The demo's browser test: the server as a user starts it, a browser context that lets nothing pass, and what is seen.

A page is read as a person reads it: `layout` finds text that is cut off, that lies over other text or that leaves the
screen, `contrasts` text that can hardly be told from its background.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from report_tools import example
from test_report_browser import ARGUMENTS, CHROMIUM, SIZES

from cai_experiment.records.schema import to_line

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "cai_experiment" / "scripts" / "run_demo.py"
OWN_ADDRESS = "127.0.0.1"
# nothing but the server's own address can be found by name, so that a forgotten font shows as a failed request
BROWSER_ARGUMENTS = [*ARGUMENTS, f"--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE {OWN_ADDRESS}"]
START_SECONDS = 60  # a busy machine imports Gradio and torch slowly

SCRIPT_TAG = "<script>window.__pwned = 1</script><img src=x onerror='window.__pwned = 2'>"
LINK = "[press here](javascript:window.__pwned=3) ![](http://example.com/p.png) <a href='javascript:void 0'>a</a>"
BIDI = "user\u202egnp.exe\u2066 \u200fright to left"
ANSI = "\x1b[31mred\x1b[0m \x07bell \x1b]8;;http://example.com\x07link"
HOSTILE = {
    "script": f"How do I {SCRIPT_TAG} safely?",
    "link": f"Is {LINK} useful?",
    "ansi": ANSI,
    "bidi": BIDI,
    "emoji": "👩‍👩‍👧‍👦 🏳️‍🌈 how do I cook rice? 🍚",
    "empty": "",
    "template": "{{ 7*7 }} ${7*7} $$x^2$$ `code` **bold** </textarea></pre></div>",
    "long": "How do I clean a window? " * 42_000,  # 1 MB
}


class Server:
    """`run_demo.py` in a process of its own, its folders below `folder`; `lines` is what it has printed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.checkpoints = folder, folder / "data", folder / "checkpoints"
        self.port = free_port()
        self.url = f"http://{OWN_ADDRESS}:{self.port}/"
        self.lines: list[str] = []
        self.data.mkdir(exist_ok=True)
        command = [sys.executable, str(SCRIPT), "--port", str(self.port), "--data-dir", str(self.data),
                   "--checkpoint-dir", str(self.checkpoints)]  # fmt: skip
        surroundings = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "2"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                        cwd=folder, env=surroundings)  # fmt: skip
        self._answers = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._answers.wait(START_SECONDS) or self.process.poll() is not None:
            self.stop()
            raise AssertionError("the demo did not start:\n" + self.printed)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            if self.url.rstrip("/") in line:
                self._answers.set()
        self._answers.set()  # it has ended

    @property
    def printed(self) -> str:
        """All that the server has printed."""
        return "".join(self.lines)

    def stop(self) -> None:
        """SIGTERM, which ends it as Ctrl-C does; a server that stays is killed, and so is a training it has started."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for place in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):
                if str(self.folder / "data").encode() in place.read_bytes():
                    os.kill(int(place.parent.name), signal.SIGKILL)


def free_port() -> int:
    """A port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as one:
        one.bind((OWN_ADDRESS, 0))
        return int(one.getsockname()[1])


class Visit:
    """A browser session of its own: a context whose every request and every error is kept; `seen_to_be_clean` looks."""

    def __init__(self, browser: Any, url: str, scheme: str = "light", size: str = "desktop") -> None:
        width, height = SIZES[size]
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme,
                                           reduced_motion="reduce", accept_downloads=True)  # fmt: skip
        self.context.set_default_timeout(30_000)
        self.errors: list[str] = []
        self.left: list[str] = []  # addresses of other machines that were asked for
        self.context.on("request", lambda request: self._asked(request.url))
        self.context.on("console", self._said)
        self.context.on("weberror", lambda found: self.errors.append(f"page error: {found.error}"))
        self.context.on("response", self._answered)
        self.page = self.context.new_page()
        self.page.on("websocket", lambda socket_: self._asked(socket_.url))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.goto(url)

    def _asked(self, url: str) -> None:
        where = urlsplit(url.removeprefix("blob:"))
        if where.scheme != "data" and where.hostname != OWN_ADDRESS:
            self.left.append(url)

    def _said(self, message: Any) -> None:
        if message.type == "error":
            self.errors.append(f"console: {message.text} ({message.location})")

    def _answered(self, response: Any) -> None:
        if response.status >= 400:
            self.errors.append(f"{response.status} for {response.request.method} {response.url}")

    def seen_to_be_clean(self) -> None:
        """Fail with what went wrong in this session: an error, a request to elsewhere, a script that ran."""
        assert self.errors == []
        assert self.left == []
        assert self.page.evaluate("window.__pwned") is None, "a script out of a text has run"

    def close(self) -> None:
        """End the session."""
        self.context.close()


def write_hostile_run(data_dir: Path, run: str = "hostile") -> None:
    """A run's files as a hostile model would have filled them, accepted and rejected rows."""
    folder = data_dir / run
    folder.mkdir(parents=True)
    texts = [HOSTILE[name] for name in ("script", "link", "ansi", "bidi", "emoji", "template")]
    rows = [example(i, text) for i, text in enumerate([*texts, HOSTILE["long"][:200_000]])]
    bad = [dataclasses.replace(example(50 + i, text), reject_reasons=(f"critique_empty {SCRIPT_TAG}",))
           for i, text in enumerate(texts)]  # fmt: skip
    (folder / "pairs.jsonl").write_text("".join(to_line(row) + "\n" for row in rows), "utf-8")
    (folder / "rejected.jsonl").write_text("".join(to_line(row) + "\n" for row in bad), "utf-8")
    instructions = [{"id": row.id, "instruction": row.instruction, "source": "self"} for row in [*rows, *bad]]
    (folder / "instructions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in instructions), "utf-8")


def start_browser(playwright: Any) -> Any:
    """Debian's Chromium, which finds no other machine by name."""
    return playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_ARGUMENTS)


# ---------------------------------------------------------------- what can be seen

SEEN = """
  const seen = (e) => e.checkVisibility({opacityProperty: true, visibilityProperty: true});
  const SKIPPED = ['STYLE', 'SCRIPT', 'style', 'title', 'TEMPLATE', 'NOSCRIPT', 'OPTION'];
  const textNodes = () => {
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = [];
    for (let n = walk.nextNode(); n; n = walk.nextNode()) {
      const e = n.parentElement;
      if (n.textContent.trim() && !SKIPPED.includes(e.tagName) && seen(e)) found.push(n);
    }
    return found;
  };
  const named = (e) => e.tagName.toLowerCase() + '.' + String(e.className.baseVal ?? e.className).split(' ')[0];
"""

# {cut: texts that a box without scroll bars hides in part, over: texts over one another, side: beyond the edge}
LAYOUT = (
    "() => {"
    + SEEN
    + """
  const found = {cut: [], over: [], side: []}, rects = [];
  for (const node of textNodes()) {
    const element = node.parentElement, label = [node.textContent.trim().slice(0, 40), named(element)];
    const range = document.createRange();
    range.selectNodeContents(node);
    for (const r of range.getClientRects()) {
      const box = {left: r.left, right: r.right, top: r.top, bottom: r.bottom};
      let cut = 0, tiny = false, fixed = false;
      for (let p = element; p && p !== document.body; p = p.parentElement) {
        const style = getComputedStyle(p);
        fixed = fixed || style.position === 'fixed';
        if (style.display === 'inline' || (style.overflowX === 'visible' && style.overflowY === 'visible')) continue;
        const q = p.getBoundingClientRect();
        if (q.width <= 2 || q.height <= 2) tiny = true;
        for (const [low, high, how] of [['left', 'right', style.overflowX], ['top', 'bottom', style.overflowY]]) {
          const before = box[high] - box[low];
          if (before < 1) continue;  // scrolled out of its box
          box[low] = Math.max(box[low], q[low]);
          box[high] = Math.min(box[high], q[high]);
          const most = low === 'left' ? 1 : before / 4;  // a line's box is higher than its letters
          if (['hidden', 'clip'].includes(how) && before - (box[high] - box[low]) > most) cut = 1;
        }
      }
      if (tiny) continue;
      if (cut) found.cut.push(label);
      if (box.right - box.left < 1 || box.bottom - box.top < 1) continue;  // scrolled out of its box
      if (box.right > innerWidth + 1 || box.left < -1) found.side.push(label);
      if (!fixed) rects.push([box, node, label]);
    }
  }
  for (const e of document.querySelectorAll('input, textarea')) {
    const typed = ['text', 'number', 'textarea', 'search'].includes(e.type) && (e.value || e.placeholder);
    if (typed && seen(e) && e.scrollWidth > e.clientWidth + 1) found.cut.push([typed.slice(0, 40), named(e)]);
  }
  rects.sort((a, b) => a[0].top - b[0].top);
  for (let i = 0; i < rects.length; i++) {
    const [a, one, label] = rects[i];
    for (let j = i + 1; j < rects.length && rects[j][0].top < a.bottom; j++) {
      const [b, other] = rects[j], lines = Math.min(a.bottom - a.top, b.bottom - b.top);
      const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (one !== other && wide > 2 && high > 0.4 * lines) found.over.push([...label, ...rects[j][2]]);
    }
  }
  return found;
}"""
)

# [contrast, text, element] of all text and all typed values, the half-transparent backgrounds laid over one another
CONTRASTS = (
    "() => {"
    + SEEN
    + """
  const channel = (v) => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const canvas = new OffscreenCanvas(1, 1).getContext('2d', {willReadFrequently: true});
  const parse = (text) => {  // any notation of CSS, color-mix and oklch too
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map((i) => top[i] * top[3] + below[i] * (1 - top[3]));
  const behind = (e) => {
    const layers = [];
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c[3] > 0) layers.push(c);
      if (c[3] === 1) break;
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const found = [];
  const look = (e, text, color) => {
    if (e.closest('[disabled], [aria-disabled="true"]')) return;  // WCAG asks nothing of what cannot be used
    const ground = behind(e), ink = over(parse(color), ground);
    const [high, low] = [light(ink), light(ground)].sort((a, b) => b - a);
    found.push([(high + 0.05) / (low + 0.05), text.slice(0, 40), named(e)]);
  };
  for (const node of textNodes()) {
    const e = node.parentElement, style = getComputedStyle(e);
    look(e, node.textContent.trim(), e.ownerSVGElement ? style.fill : style.color);
  }
  for (const e of document.querySelectorAll('input, textarea')) {
    if (!seen(e) || ['radio', 'checkbox', 'range', 'file'].includes(e.type)) continue;
    if (e.value) look(e, e.value, getComputedStyle(e).color);
    else if (e.placeholder) look(e, e.placeholder, getComputedStyle(e, '::placeholder').color);
  }
  return found;
}"""
)


def layout(page: Any) -> dict[str, list[list[str]]]:
    """Texts that are `cut` off, that lie `over` other text, that stand beyond the `side` of the screen."""
    found: dict[str, list[list[str]]] = page.evaluate(LAYOUT)
    found["side"] += [["the page scrolls to the side"]] * (
        page.evaluate("document.documentElement.scrollWidth - innerWidth") > 0
    )
    return found


def contrasts(page: Any) -> list[tuple[float, str, str]]:
    """(contrast, text, element) of every text that is shown."""
    return [(ratio, text, element) for ratio, text, element in page.evaluate(CONTRASTS)]
