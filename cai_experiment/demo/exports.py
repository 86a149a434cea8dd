"""Files to take away: logs and comparisons, each below the folder of its session, whose name nobody can guess.

A session's folder is exports/ID with an ID of 192 random bits, readable by the server's user alone; the server gives
out files of `settings.exports` and of no other place. What a day has passed over is removed.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.impact import Impact
from cai_experiment.evaluation.impact_found import Figure, ImpactRow, Said
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.records.files import writing_error

if TYPE_CHECKING:
    from cai_experiment.demo.settings import DemoSettings

DAY = 86_400.0  # seconds
_ID = re.compile(r"[A-Za-z0-9_-]{32}")
# A spreadsheet runs a cell that begins so, some also behind blanks or as a full-width sign; "'" makes it text.
_FORMULA = re.compile("^\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20'|]|^[\t\r\n]")
_COLUMNS = (
    "record", "id", "suite", "kind", "prompt", "compared",
    "base_text", "base_score", "base_axes", "base_flaws", "base_refused", "base_finish",
    "trained_text", "trained_score", "trained_axes", "trained_flaws", "trained_refused", "trained_finish", "method",
    "label", "base", "trained", "difference", "low", "high", "p_value", "p_holm", "n", "unparsed",
)  # fmt: skip


# ---------------------------------------------------------------- folders


def new_session_id() -> str:
    """A name that nobody guesses: 192 random bits."""
    return secrets.token_urlsafe(24)


def session_folder(settings: DemoSettings, session_id: str) -> Path:
    """The session's folder (mode 0700), made if need be.

    Raises BadInputError for an id of another form and for a folder that is a link, DiskError where it cannot be made.
    """
    if not _ID.fullmatch(session_id):
        raise BadInputError(f"session {session_id[:40]!r} is none of ours", "reload the page")
    folder = settings.exports / session_id
    try:
        settings.exports.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.mkdir(exist_ok=True, mode=0o700)
    except OSError as error:
        raise writing_error(folder, error) from error
    if folder.is_symlink():
        raise BadInputError(f"{folder} is a link", "remove it and reload the page")
    return folder


def remove_old(settings: DemoSettings, keep: Collection[str] = (), age: float = DAY) -> list[Path]:
    """Remove sessions' folders that nothing was written to for `age` seconds, but those named in `keep` (the open
    sessions). Returns them. What is not named as a session is left alone, and links are never followed."""
    if not settings.exports.is_dir():
        return []
    before, removed = time.time() - age, []
    for folder in settings.exports.iterdir():
        ours = _ID.fullmatch(folder.name) and folder.name not in keep and not folder.is_symlink() and folder.is_dir()
        if ours and _written(folder) < before:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _written(folder: Path) -> float:
    """When the newest thing in a folder was written, in seconds since 1970."""
    newest = folder.lstat().st_mtime
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            newest = max(newest, path.lstat().st_mtime)
    return newest


def _new_file(settings: DemoSettings, session_id: str, stem: str, suffix: str) -> Path:
    """An empty file of its own in the session's folder (mode 0600), named by the second; "-2" where that is taken."""
    folder, stamp = session_folder(settings, session_id), datetime.now(UTC).strftime("%Y%m%d_%H%M%S")
    number = 1
    while True:
        path = folder / f"{stem}_{stamp}{'' if number == 1 else f'-{number}'}{suffix}"
        try:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
            return path
        except FileExistsError:
            number += 1
        except OSError as error:
            raise writing_error(path, error) from error


# ---------------------------------------------------------------- files


def export_logs(settings: DemoSettings, session_id: str, log: ContentLogger) -> Path:
    """Everything logged as content_logs_TIMESTAMP.json (UTC, mode 0600). Raises DiskError, and BadInputError for a
    session whose log was removed."""
    place = log.get_summary()["file"]
    if place is not None and not Path(place).is_file():
        raise BadInputError("this page's log was removed after a day without use", "reload the page")
    path = _new_file(settings, session_id, "content_logs", ".json")
    log.export_logs(path)
    return path


def export_impact(settings: DemoSettings, session_id: str, result: Impact, kind: Literal["json", "csv"]) -> Path:
    """Everything measured as impact_SUITE_TIMESTAMP (UTC, mode 0600): as JSON, or as CSV with a row for each figure
    and each example (column "record"). Raises DiskError."""
    if kind not in ("json", "csv"):
        raise BadInputError(f"kind {kind!r} is unknown", "use json or csv")
    suite = re.sub(r"[^A-Za-z0-9_-]+", "_", result.suite)[:40] or "own"
    if kind == "json":
        content = json.dumps(result.to_json(), ensure_ascii=False, indent=2, default=str) + "\n"
    else:
        content = "\ufeff" + _csv(result)  # a spreadsheet reads UTF-8 only behind this mark
    path = _new_file(settings, session_id, f"impact_{suite}", f".{kind}")
    try:
        path.write_bytes(content.encode("utf-8", "backslashreplace"))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise writing_error(path, error) from error
    return path


def cell(value: Any) -> Any:
    """A value as a CSV cell: a text that a spreadsheet would run as a formula gets a "'" before it (and so does one
    that has one, so that `plain` gives back every text). Numbers stay numbers."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def plain(text: str) -> str:
    """The text of a cell that `cell` wrote."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text[1:]) else text


def _csv(result: Impact) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, _COLUMNS, restval="")
    writer.writeheader()
    for row in _records(result):
        writer.writerow({name: cell(value) for name, value in row.items() if value is not None})
    return file.getvalue()


def _records(result: Impact) -> Iterator[dict[str, Any]]:
    for one in result.verdicts:
        yield {"record": "verdict", "id": one.name, "label": one.line}
    for figure in (*result.figures, *result.guards):
        yield _figure(figure)
    for note in result.notes:
        yield {"record": "note", "label": note}
    for row in result.rows:
        yield _example(row)


def _figure(figure: Figure) -> dict[str, Any]:
    low, high = figure.difference.interval or (None, None)
    return {
        "record": "figure", "id": figure.name, "label": figure.named.label, "base": figure.base.value,
        "trained": figure.trained.value, "difference": figure.difference.value, "low": low, "high": high,
        "p_value": figure.p_value, "p_holm": figure.p_holm, "n": figure.base.n, "unparsed": figure.base.unparsed,
    }  # fmt: skip


def _example(row: ImpactRow) -> dict[str, Any]:
    own = {"record": "example", "id": row.id, "suite": row.suite, "kind": row.kind, "prompt": row.prompt,
           "compared": row.compared, "method": row.base.found.method}  # fmt: skip
    return {**own, **_said("base", row.base), **_said("trained", row.trained)}


def _said(arm: str, said: Said) -> dict[str, Any]:
    fields = {
        "text": said.text, "score": said.found.score, "axes": "|".join(said.found.axes), "flaws": "|".join(said.flaws),
        "refused": said.refused, "finish": said.finish,
    }  # fmt: skip
    return {f"{arm}_{name}": value for name, value in fields.items()}
