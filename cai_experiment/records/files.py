"""JSON and JSONL files: every fault named by file and line; whole files written aside and renamed into place."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Iterable, Iterator, Mapping, NamedTuple, overload

from cai_experiment.errors import BadInputError, DiskError, UserError
from cai_experiment.records.schema import RERUN, Example, from_row

CHUNK = 1 << 20  # bytes handed to the kernel at once
# what a path that cannot be used answers; anything else while writing (no space, quota, I/O error) is the disk's fault
UNUSABLE_PATH = {
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST,
    errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


class Fault(NamedTuple):
    """A line that is no row: its number (from 1), its bytes, and what it "is" or "has"."""

    number: int
    raw: bytes
    why: str

    @property
    def torn(self) -> bool:
        """True for a last line without its newline: the writer was killed in the middle of it."""
        return not self.raw.endswith(b"\n")


def show(path: str | Path) -> str:
    """The path as messages name it: relative to the working folder where it lies below it."""
    try:
        return str(Path(path).absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def writing_error(path: str | Path, error: OSError) -> UserError:
    """The user's error for a failed write: BadInputError for a path that cannot be used, else DiskError."""
    message = f"cannot write {show(path)}: {error.strerror or error}"
    if error.errno in UNUSABLE_PATH:
        return BadInputError(message, "choose a place that you may write to")
    return DiskError(message, "make room and run the same command again (everything finished is kept)")


# ---------------------------------------------------------------- reading


def read_text(path: Path) -> str:
    """A user's text file, without a byte order mark. BadInputError: it cannot be read, or which line is not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        wrong = f"byte {error.object[error.start]:#04x} is not UTF-8"
        raise BadInputError(f"{show(path)}:{line}: {wrong}", "save the file as UTF-8") from None
    except OSError as error:
        raise BadInputError(f"{show(path)}: cannot be read ({error.strerror})", "check the path") from None


def read_jsonl(path: str | Path, repair: bool = True) -> list[dict[str, Any]]:
    """All rows (JSON objects) of a JSONL file; blank lines are passed over.

    `repair=True` is for files that this project wrote: a torn last line is cut, a bad line is moved to `<file>.bad`,
    and each is named on stderr, so that its work is redone. `repair=False` is for files of the user: they are never
    changed, and the first bad line raises BadInputError with file and line. A missing file raises it too.
    """
    if repair:
        return [row for _, row in mended_rows(path)]
    return [row for _, row in _sound_rows(path, "correct or remove that line")]


def mended_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, row) of every row of a file that this project wrote; after the last one the file is mended.

    See `read_jsonl` for what mending does. The offsets are those of the mended file. Nothing is kept in memory but the
    faulty lines, so a journal of any length can be walked through.
    """
    faults: list[Fault] = []
    offset = 0
    for number, raw in _lines(path):
        try:
            if raw.strip():
                yield offset, parse_line(raw)
            offset += len(raw)
        except ValueError as error:
            faults.append(Fault(number, raw, str(error)))
    _repair(Path(path), faults)


def read_examples(path: str | Path, next_step: str = RERUN) -> list[Example]:
    """The examples of a pairs.jsonl or rejected.jsonl; a bad line raises BadInputError. The file is never changed."""
    return list(_examples(path, next_step))


class ExampleFile(Sequence[Example]):
    """The examples of a file, read anew at each pass, so that a report on 50,000 of them holds one at a time.

    Iterating raises BadInputError at a bad line. An index or a slice reads the file up to there.
    """

    def __init__(self, path: str | Path) -> None:
        """Counts the lines. Raises BadInputError for a file that cannot be read."""
        self.path = Path(path)
        self._count = sum(1 for _, raw in _lines(path) if raw.strip())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Example]:
        return _examples(self.path, RERUN)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return list(islice(self, *index.indices(self._count)))
        return next(islice(self, range(self._count)[index], None))


def _examples(path: str | Path, next_step: str) -> Iterator[Example]:
    for number, row in _sound_rows(path, next_step):
        yield from_row(row, f"{show(path)}:{number}", next_step)


def _sound_rows(path: str | Path, next_step: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of every row; the first line that is none raises BadInputError."""
    for number, raw in _lines(path):
        try:
            if raw.strip():
                yield number, parse_line(raw)
        except ValueError as error:
            raise BadInputError(f"{show(path)}:{number} {error}", next_step) from None


def read_json(path: str | Path, next_step: str = RERUN) -> dict[str, Any]:
    """The object in a JSON file; BadInputError names the file if it is missing or is no JSON object."""
    try:
        return parse_line(Path(path).read_bytes())
    except OSError as error:
        raise BadInputError(f"cannot read {show(path)}: {error.strerror}", next_step) from None
    except ValueError as error:
        raise BadInputError(f"{show(path)} {error}", next_step) from None


def parse_line(raw: bytes) -> dict[str, Any]:
    """One JSON object from strict UTF-8; ValueError says what is wrong ("is no JSON: ..."). NaN and Infinity pass."""
    try:
        row = json.loads(raw.decode("utf-8"))  # json.loads(bytes) would let broken UTF-8 through (surrogatepass)
    except UnicodeDecodeError as error:
        wrong, place = raw[error.start], error.start + 1
        raise ValueError(f"has a byte that is not UTF-8 (0x{wrong:02x}, byte {place} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("is no JSON that can be read (nested too deeply)") from None
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    return row


def _lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers (from 1); BadInputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            yield from enumerate(file, 1)
    except OSError as error:
        raise BadInputError(f"cannot read {show(path)}: {error.strerror}", "check the path") from None


def _repair(path: Path, faults: list[Fault]) -> None:
    """Cut a torn last line, move bad lines to `<file>.bad`, give a whole last line its newline; say so on stderr."""
    bad = [fault for fault in faults if not fault.torn]
    try:
        if bad:
            with open(path.with_name(path.name + ".bad"), "ab") as file:
                file.writelines(fault.raw for fault in bad)
                file.flush()
                os.fsync(file.fileno())
        if faults:
            gone = {fault.number for fault in faults}
            with open(path, "rb") as file:
                write_atomic(path, (raw for number, raw in enumerate(file, 1) if number not in gone))
        _end_with_newline(path)
    except OSError as error:
        raise writing_error(path, error) from error
    for fault in faults:
        done = "cut (the run was stopped while it wrote this line)" if fault.torn else f"moved to {path.name}.bad"
        print(f"{show(path)}:{fault.number} {fault.why}: {done}; its work is redone", file=sys.stderr)


def _end_with_newline(path: Path) -> None:
    if not ends_whole(path):
        with open(path, "ab") as file:
            file.write(b"\n")


def ends_whole(path: Path) -> bool:
    """True if the file is empty or its last byte is a newline."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


# ---------------------------------------------------------------- writing


def encode_line(row: Mapping[str, Any], strict: bool = False) -> bytes:
    """One row as UTF-8 JSON with its newline. Text stays readable; only a lone surrogate becomes an escape (\\udc80).

    `strict` writes NaN and infinities as null, for files that other programs read (JSON knows neither); the
    journal keeps them (Python's dialect), so that a resumed run sees the very same numbers.
    """
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=not strict)
    except ValueError:
        text = json.dumps(_finite(row), ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def write_jsonl(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write all rows, or leave the old file as it is. Raises DiskError or BadInputError."""
    write_atomic(path, (encode_line(row, strict=True) for row in rows))


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write one object, indented for people, or leave the old file as it is. Raises DiskError or BadInputError."""
    text = json.dumps(_finite(value), ensure_ascii=False, indent=2)
    write_atomic(path, [text.encode("utf-8", "backslashreplace") + b"\n"])


def write_atomic(path: str | Path, pieces: Iterable[bytes]) -> None:
    """Write a temporary file beside, fsync, rename over `path`: after any crash the old or the new file is there."""
    path = Path(path)
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "wb", buffering=CHUNK) as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        sync_folder(path.parent)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, UserError):
            raise writing_error(path, error) from error
        raise


def sync_folder(folder: Path) -> None:
    """fsync the folder, so that a new name in it survives a power cut; file systems that cannot are let be."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def _finite(value: Any) -> Any:
    """The value with null for every NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def make_folder(folder: Path) -> None:
    """Make the folder and those above it. Raises DiskError or BadInputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise writing_error(folder, error) from error
