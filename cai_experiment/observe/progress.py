"""How far a run is: a bar on a terminal, plain lines elsewhere; pairs done, tokens/s, time left and cost."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Callable

from rich.console import Console

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LINE_SECONDS = 10.0  # between two plain lines
BAR_PER_SECOND = 2.0  # a slow bar costs nothing beside a model


class Progress:
    """Shows `done` of `total` while the `with` block lasts; silent at verbosity 0.

    with Progress(total=10, price_per_hour=1.74) as progress:
        progress.update(done=3, tokens=12_000)

    Tokens per second and the time left are of this session; the cost is of the whole run, in US dollars.
    """

    def __init__(
        self,
        total: int,
        noun: str = "pairs",
        verbosity: int = 2,
        price_per_hour: float = 0.0,
        done: int = 0,
        seconds_before: float = 0.0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`done` and `seconds_before` are what earlier sessions of a resumed run did; a price of 0 shows no cost.

        `console` (default: standard output) and `clock` (seconds) can be given by tests.
        """
        self.total, self.noun, self.verbosity = total, noun, verbosity
        self.price_per_hour, self.seconds_before = price_per_hour, seconds_before
        self.done = self._done_before = done
        self.tokens = 0
        self._console, self._clock = console or Console(file=sys.stdout), clock
        self._started = self._last_line = clock()
        self._last_text = ""
        self._bar: Bar | None = None

    def __enter__(self) -> Progress:
        self._started = self._last_line = self._clock()
        if self.verbosity == 0:
            return self
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = self._make_bar(self._console)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif self.verbosity > 0 and self.status() != self._last_text:
            self._print_line()

    def update(self, done: int, tokens: int = 0) -> None:
        """Say where the run is: `done` of the whole run, `tokens` of this session; both are totals."""
        self.done, self.tokens = done, tokens
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done)
        elif self.verbosity > 0 and self._clock() - self._last_line >= LINE_SECONDS:
            self._print_line()

    def status(self) -> str:
        """One line: "3/10 pairs · 412 tokens/s · 2 min 05 s left · $0.03"."""
        elapsed = self._clock() - self._started
        parts = [f"{self.done}/{self.total} {self.noun}"]
        if self.tokens and elapsed > 0:
            parts.append(f"{self.tokens / elapsed:,.0f} tokens/s")
        if self.done >= self.total:
            parts.append(f"{duration(elapsed)}")
        elif self.done > self._done_before:
            left = elapsed / (self.done - self._done_before) * (self.total - self.done)
            parts.append(f"{duration(left)} left")
        if self.price_per_hour > 0:
            parts.append(f"${(self.seconds_before + elapsed) / 3600 * self.price_per_hour:.2f}")
        return " · ".join(parts)

    def _print_line(self) -> None:
        self._last_line, self._last_text = self._clock(), self.status()
        self._console.print(self._last_text, soft_wrap=True, markup=False, highlight=False)

    def _make_bar(self, console: Console) -> Bar:
        from rich.progress import BarColumn, ProgressColumn, Task
        from rich.progress import Progress as Bar
        from rich.text import Text

        outer = self

        class Status(ProgressColumn):
            """The status line, made anew at every refresh, so that time and cost run on between two updates."""

            def render(self, task: Task) -> Text:
                return Text(outer.status(), no_wrap=True)

        bar = Bar(BarColumn(bar_width=24), Status(), console=console, refresh_per_second=BAR_PER_SECOND)
        bar.add_task(self.noun, total=self.total, completed=self.done)
        return bar


def duration(seconds: float) -> str:
    """Seconds as people say them: "12 s", "3 min 20 s", "1 h 05 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
