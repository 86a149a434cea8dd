"""-v on every script: what the screen shows. The content log's file holds everything at any level."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

DEFAULT = 2


def add_verbosity(parser: argparse.ArgumentParser) -> None:
    """The flag -v; `silenced` sees to its level 0."""
    parser.add_argument("-v", "--verbosity", type=int, choices=range(4), default=DEFAULT, metavar="0..3",
                        help="what is printed: 0 errors alone, 1 final results, 2 key stages too, 3 every stage "
                             "(default: %(default)s)")  # fmt: skip


@contextmanager
def silenced(argv: Sequence[str]) -> Iterator[None]:
    """Within it nothing reaches standard output if `argv` holds -v 0. Errors are on stderr, as ever."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-v", "--verbosity", default="")
    parser.add_argument("-h", "--help", action="store_true")
    try:
        asked, _ = parser.parse_known_args(argv)
    except (argparse.ArgumentError, SystemExit):  # the script's own parser says what is wrong
        asked = argparse.Namespace(verbosity="", help=False)
    if asked.verbosity != "0" or asked.help:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        yield


def last_word(verbosity: int, line: str) -> None:
    """At level 0, where nothing else is printed: say on stderr what must be known when a run ends."""
    if verbosity == 0:
        print(line, file=sys.stderr, flush=True)
