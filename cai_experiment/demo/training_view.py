"""What the Training tab shows of a run's files: its pairs as they come, loss and margin, the content log.

Every page asks once a second, so only what a file has grown by is read, and markup is made anew only then. Reading
changes nothing: a line that is being written is not there yet.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cai_experiment.demo.markup import Html, block, card, details, inline, joined, notice, word_diff_html
from cai_experiment.demo.training_job import OUTPUT
from cai_experiment.observe.content_logger import shown_at
from cai_experiment.training.dpo import CONTENT_LOG
from cai_experiment.training.settings import METRICS

PAIRS_SHOWN = 6
ENTRIES_SHOWN, CHARACTERS_SHOWN = 60, 20_000  # of the content log
LOG_BYTES = 1 << 19  # of the content log's end, where it is looked at for the first time or has run ahead
CHUNK = 1 << 23  # bytes of a file in one look
POINTS = 400  # of a line in a plot
RATE_SECONDS = 20.0  # over which tokens a second are counted
_TOKENS = re.compile(rb'"completion_tokens": (\d+)')  # a text of a model cannot hold it: its quotes are escaped
_STEPS = re.compile(r"(?m)^step \d+/(\d+)  |; (\d+) steps of ")  # training/watch.py, train_dpo.py
_UNDER_WAY = threading.Lock()  # one plot at a time


class Growing:
    """The whole lines that a file has grown by since the last look."""

    def __init__(self, path: Path, last: int | None = None) -> None:
        """`last`: a look passes over all but so many bytes of the end."""
        self.path, self.last = path, last
        self.place = 0
        self.is_behind = False  # the last look left something

    def look(self) -> tuple[list[bytes], bool]:
        """(new lines, at most CHUNK bytes of them; True if the file was written anew, so that these are the first)."""
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                anew = size < self.place
                begin = 0 if anew else self.place
                if self.last is not None and size - begin > self.last:
                    begin = size - self.last
                    file.seek(begin)
                    begin += len(file.readline())  # a part of a line
                file.seek(begin)
                data = file.read(CHUNK)
        except OSError:
            return [], False
        whole = data.rfind(b"\n") + 1
        self.is_behind = len(data) == CHUNK
        self.place = begin + whole
        return data[:whole].splitlines(), anew


def logs_of(data: Path, checkpoints: Path, from_now_on: bool = False) -> list[Growing]:
    """The content logs of both scripts."""
    logs = [Growing(folder / CONTENT_LOG, LOG_BYTES) for folder in (data, checkpoints)]
    for log in logs:
        log.place = log.path.stat().st_size if from_now_on and log.path.exists() else 0
    return logs


def new_entries(logs: Sequence[Growing]) -> list[dict[str, Any]]:
    """What the content logs have grown by."""
    rows = [row for log in logs for row in map(_row, log.look()[0])]
    return [row for row in rows if "stage" in row and "content" in row]


class TrainingView:
    """Follows the files of one run. Not safe for threads: Trainings holds a lock around it."""

    def __init__(self, data: Path, checkpoints: Path) -> None:
        """`data` is DATA_DIR/RUN, `checkpoints` CHECKPOINT_DIR/RUN; neither need be there yet."""
        self._pairs, self._journal = Growing(data / "pairs.jsonl"), Growing(data / "journal.jsonl")
        self._metrics, self._output = Growing(checkpoints / METRICS), Growing(data / OUTPUT)
        self._logs = logs_of(data, checkpoints)
        self._entries: dict[int, deque[str]] = {level: deque(maxlen=ENTRIES_SHOWN) for level in (1, 2, 3)}
        self._newest: deque[bytes] = deque(maxlen=PAIRS_SHOWN)
        self._rates: deque[tuple[float, int]] = deque()
        self._was_behind = True
        self._made: dict[str, tuple[object, Html]] = {}  # markup, and of what it was made
        self._plot = Html("")
        self._plotted = -1
        self.pairs = 0  # lines of pairs.jsonl
        self.tokens = 0  # written by the models while the pairs are made
        self.steps: dict[int, dict[str, Any]] = {}  # rows of metrics.jsonl
        self.total_steps = 0  # 0 while it is not known

    def refresh(self) -> None:
        """Read what the files have grown by."""
        self._refresh_pairs()
        lines, anew = self._journal.look()
        self.tokens = sum(int(n) for line in lines for n in _TOKENS.findall(line)) + (0 if anew else self.tokens)
        self._note_rate(time.monotonic())
        lines, anew = self._metrics.look()
        self.steps = {} if anew else self.steps
        self.steps |= {row["step"]: row for row in map(_row, lines) if "step" in row}
        for line in self._output.look()[0]:
            for found in _STEPS.finditer(line.decode(errors="replace")):
                self.total_steps = int(found[1] or found[2])
        for entry in new_entries(self._logs):
            for level, shown in self._entries.items():
                if (text := shown_at(entry, level)) is not None:
                    shown.append(text)

    @property
    def step(self) -> int:
        """The last step in metrics.jsonl."""
        return max(self.steps, default=0)

    def tokens_per_second(self) -> float:
        """Written by the models over the last RATE_SECONDS; 0 where nothing was."""
        (then, before), (now, tokens) = self._rates[0], self._rates[-1]
        return (tokens - before) / (now - then) if now > then else 0.0

    # ------------------------------------------------------------ markup

    def pairs_html(self) -> Html:
        """The newest pairs: instruction, principle, both answers as a word diff; the rest is in the Data tab."""
        return self._once("pairs", (self.pairs, len(self._newest)), self._make_pairs)

    def log_html(self, verbosity: int) -> Html:
        """The newest entries of the content log that this verbosity shows, as escaped text."""
        entries = self._entries.get(verbosity)
        if not entries:
            return notice("Verbosity 0 shows nothing." if verbosity == 0 else "Nothing is logged yet.")
        return self._once(f"log {verbosity}", (len(entries), entries[-1]), lambda: _log(entries))

    def plot_html(self, wait: bool = False) -> Html:
        """Loss and margin over steps as inline SVG; "" before the second step.

        Drawn in a thread, so that nobody waits for it: the newest that is ready, or with `wait` the last word.
        """
        known = len(self.steps)
        if known < 2 or known == self._plotted:
            return self._plot if known >= 2 else Html("")
        history = [self.steps[step] for step in sorted(self.steps)]
        if wait:
            with _UNDER_WAY:
                self._draw(history)
        elif _UNDER_WAY.acquire(blocking=False):
            threading.Thread(target=self._draw_aside, args=(history,), daemon=True).start()
        return self._plot

    # ------------------------------------------------------------ parts of the above

    def _refresh_pairs(self) -> None:
        lines, anew = self._pairs.look()
        if anew:
            self.pairs = 0
            self._newest.clear()
        self.pairs += len(lines)
        self._newest.extend(lines)

    def _note_rate(self, now: float) -> None:
        was_behind, self._was_behind = self._was_behind, self._journal.is_behind
        if not self.tokens or was_behind:  # the model is being loaded, or the past was read
            self._rates.clear()
        self._rates.append((now, self.tokens))
        while len(self._rates) > 2 and now - self._rates[1][0] > RATE_SECONDS:
            self._rates.popleft()

    def _once(self, name: str, of: object, make: Any) -> Html:
        if name not in self._made or self._made[name][0] != of:
            self._made[name] = (of, make())
        return self._made[name][1]

    def _make_pairs(self) -> Html:
        if not self.pairs:
            return notice("No pair yet: the models answer, criticise and revise first.")
        more = f", the newest {len(self._newest)} of them here" if self.pairs > len(self._newest) else ""
        head = notice(f"{self.pairs} pair{'s' * (self.pairs > 1)}{more}.")
        shown = [_pair(_row(line), place == 0) for place, line in enumerate(reversed(self._newest))]
        return joined(head, *shown)

    def _draw_aside(self, history: Sequence[dict[str, Any]]) -> None:
        try:
            self._draw(history)
        finally:
            _UNDER_WAY.release()

    def _draw(self, history: Sequence[dict[str, Any]]) -> None:
        made = joined(*(
            card(title, _line(history, key, title)) for key, title in (("loss", "Loss"), ("margin", "Margin"))
        ))  # fmt: skip
        self._plot, self._plotted = made, len(history)


def _row(line: bytes) -> dict[str, Any]:
    """The object in a line; {} if there is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _pair(row: dict[str, Any], is_open: bool) -> Html:
    pair = row.get("preference_pair") or {}
    rejected, chosen = str(pair.get("rejected", "")), str(pair.get("chosen", ""))
    principle = joined(Html('<p class="cai-note">Principle: '), inline(str(row.get("principle", ""))), Html("</p>"))
    both = word_diff_html(rejected, chosen, ("first answer (rejected)", "revision (chosen)"))
    return details(str(row.get("instruction", "")), joined(principle, both), is_open)


def _log(entries: Sequence[str]) -> Html:
    text = "\n".join(entries).strip("\n")
    cut = text[-CHARACTERS_SHOWN:]
    return block(cut if cut == text else f"... (what is older is in the run's content_log.jsonl)\n{cut}",
                 len(cut) + 100, mono=True)  # fmt: skip


def _line(history: Sequence[dict[str, Any]], key: str, title: str) -> Html:
    """One measure over steps: the batch's, and the held-out pairs' where they were measured."""
    from cai_experiment.evaluation.reporting.plots import BLUE, FEW_POINTS, ORANGE, finished, new_axes

    figure, axes = new_axes("step", "")
    for name, label, colour in ((key, "of the step's pairs", BLUE), (f"held_out_{key}", "of held-out pairs", ORANGE)):
        points = [(row["step"], row[name]) for row in history if row.get(name) is not None]
        points = points[:: len(points) // POINTS + 1] + points[-1:]
        marker = "o" if len(points) < FEW_POINTS else None
        steps, values = [x for x, _ in points], [y for _, y in points]
        axes.plot(steps, values, color=colour, label=label, marker=marker, markersize=4)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return Html(finished(figure, axes, f"live_{key}", f"{title} over {history[-1]['step']} steps").svg)
