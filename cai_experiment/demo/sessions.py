"""What belongs to one page in one browser, and to no other: its content log, its results, its own file.

A page that was closed loses its session after a while; files that it wrote stay until exports.remove_old takes them.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.demo import exports
from cai_experiment.demo.markup import block, notice
from cai_experiment.observe.content_logger import ContentLogger, shown_at

if TYPE_CHECKING:
    from cai_experiment.demo.settings import DemoSettings
    from cai_experiment.evaluation.impact import Impact

LOG_FILE = "content_log.jsonl"
ENTRIES_SHOWN = 60  # of the log, in the page
CHARACTERS_SHOWN = 20_000
MOST = 200  # sessions; beyond it the one used least lately ends
IDLE_SECONDS = 12 * 3600.0  # an open page asks each second; a laptop may sleep for a night
LEFT_SECONDS = 600.0
TOLD_AGAIN_AFTER = 15.0  # seconds


class Session:
    """One page's own things. Its verbosity rules its log view and what the server prints of its work."""

    def __init__(self, settings: DemoSettings, say: Callable[[str], None] | None = None) -> None:
        """Makes the session's folder and log file; `say` prints what the verbosity shows (default: stdout)."""
        self.id = exports.new_session_id()
        self.folder = exports.session_folder(settings, self.id)
        self.log = ContentLogger(settings.verbosity, self.folder / LOG_FILE, say)
        self.impact: Impact | None = None
        self.own_file: Path | None = None
        self.ids: list[str] = []  # of the examples that the Data tab lists
        self._shown: dict[str, tuple[Any, float]] = {}  # part -> what this page was told, and when
        self._log_view: tuple[tuple[int, int], str] = ((-1, -1), "")  # of how many entries, at which verbosity
        self._lock = threading.Lock()

    def news(self, part: str, value: Any, again: bool = True) -> bool:
        """True if `value` is to be sent to the page: it is not what it was told of `part`, or that is a while ago.

        A reply can be lost (a laptop that slept, a tunnel that broke), so everything is told `again` now and then.
        """
        now = time.monotonic()
        with self._lock:
            told, when = self._shown.get(part, (self, 0.0))
            if told == value and not (again and now - when >= TOLD_AGAIN_AFTER):
                return False
            self._shown[part] = (value, now)
            return True

    def log_html(self) -> str:
        """The newest entries that the verbosity shows, as escaped text; the whole log is in the export."""
        state = (self.log.get_summary()["entries"], self.log.verbosity)
        if self._log_view[0] != state:
            self._log_view = (state, self._made_log_html())
        return self._log_view[1]

    def _made_log_html(self) -> str:
        entries = self.log.tail(ENTRIES_SHOWN)
        shown = [text for text in (shown_at(entry, self.log.verbosity) for entry in entries) if text is not None]
        if not shown:
            why = "Verbosity 0 shows nothing." if self.log.verbosity == 0 else "Evaluate a text to see entries here."
            return notice(f"Nothing to show yet. {why}", "note")
        text = "\n".join(shown).strip("\n")
        cut = text[-CHARACTERS_SHOWN:]
        return block(cut if cut == text else f"... (what is older is in the export)\n{cut}", len(cut) + 100, mono=True)

    def keep_own_file(self, path: Path) -> Path:
        """Take an uploaded file out of the upload folder; it is removed when it is replaced or the session ends."""
        self.forget_own_file()
        self.own_file = self.folder / f"own_prompts{path.suffix.lower()}"
        shutil.move(path, self.own_file)
        return self.own_file

    def forget_own_file(self) -> None:
        """Remove the uploaded file."""
        if self.own_file is not None:
            self.own_file.unlink(missing_ok=True)
            self.own_file = None

    def close(self) -> None:
        """Free what the session holds. A folder in which nothing was logged or exported is removed."""
        self.forget_own_file()
        self.log.close()
        self.impact = None
        self._shown.clear()
        left = list(self.folder.iterdir()) if self.folder.is_dir() else []
        if all(path.name == LOG_FILE and path.stat().st_size == 0 for path in left):
            shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """The open sessions, each under the name that its page has with the server."""

    def __init__(self, settings: DemoSettings, say: Callable[[str], None] | None = None) -> None:
        self._settings, self._say = settings, say
        self._open: dict[str, Session] = {}  # the one used last at the end
        self._ends: dict[str, float] = {}  # when each is freed if nothing more is heard of its page
        self._lock = threading.Lock()

    def get(self, page: str) -> Session:
        """The session of a page, a new one where it has none (any more). Two pages never share one."""
        with self._lock:
            is_new = page not in self._open
            session = self._open.pop(page, None) or Session(self._settings, self._say)
            self._open[page], self._ends[page] = session, time.monotonic() + IDLE_SECONDS
            surplus = len(self._open) - MOST
            over = [name for at, name in enumerate(self._open) if at < surplus or self._ends[name] < time.monotonic()]
        for name in over:
            self.end(name)
        if is_new:
            exports.remove_old(self._settings, self.ids())  # what closed pages left a day ago
        return session

    def left(self, page: str) -> None:
        """A page has gone: closed, or cut off for a while (a laptop asleep), so its session waits a little."""
        with self._lock:
            if page in self._open:
                self._ends[page] = time.monotonic() + LEFT_SECONDS

    def end(self, page: str) -> None:
        """Free the session of a page."""
        with self._lock:
            session = self._open.pop(page, None)
            self._ends.pop(page, None)
        if session is not None:
            session.close()

    def ids(self) -> set[str]:
        """The ids of the open sessions."""
        with self._lock:
            return {session.id for session in self._open.values()}

    def close(self) -> None:
        """End all sessions."""
        for page in list(self._open):
            self.end(page)
