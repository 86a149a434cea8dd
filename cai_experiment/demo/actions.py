"""What the buttons do: one method each, without a word of Gradio, so that all of it is tested without a browser.

A method takes the page's Session (where it needs one) and plain values, and returns finished markup made with markup.py
or plain values. An error that the user can mend becomes one line on the page; any other too, and its traceback goes to
the terminal.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cai_experiment.demo import checkpoints, evaluating, exports, generating, impact
from cai_experiment.demo.markup import Html, Kind, escaped, joined, notice, table
from cai_experiment.demo.models import Models
from cai_experiment.demo.sessions import Session, Sessions
from cai_experiment.demo.trainings import PLANS, Trainings, TrainingState
from cai_experiment.errors import BadInputError, UserError
from cai_experiment.models.hardware import detect

if TYPE_CHECKING:
    from cai_experiment.demo.checkpoints import Checkpoint
    from cai_experiment.demo.settings import DemoSettings

NO_CHECKPOINT = "No checkpoint yet: start a Quick training on the Training tab."
NO_RUN = "No run yet: start a Quick training on the Training tab; its pairs appear here as they come."
NO_TRAINING = "No training yet. Choose a plan and press Start Training."
BASE_ALONE = "base model alone"
CUSTOM, OWN_FILE = "custom", "own file"
ANY = "any"
REDRAW_SECONDS = 0.1  # a page gets a stream's text so often at most
ENDS: dict[str, Kind] = {"finished": "ok", "failed": "bad"}
Role = Literal["evaluation", "generation"]


def said(error: Exception) -> str:
    """One line for the page. What is no UserError is a fault of ours: its traceback goes to the terminal."""
    if isinstance(error, UserError):
        return str(error)
    traceback.print_exception(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}; the terminal shows where"


def tried(work: Callable[[], str], kind: Kind = "ok") -> str:
    """What `work` says in one line, as a notice; a line that begins with ✗, or an error, as a bad one."""
    try:
        line = work()
    except Exception as error:
        return notice(said(error), "bad")
    return notice(line, "bad" if line.startswith("✗") else kind)


def progress(fraction: float, line: str, kind: Kind = "note") -> str:
    """A bar and what it means."""
    percent = round(100 * min(max(fraction, 0.0), 1.0))
    bar = f'<progress class="cai-progress" value="{percent}" max="100" aria-label="progress">{percent}%</progress>'
    return joined(bar, notice(line, kind))


class Actions:
    """Everything behind the page: the models, the trainings, and what each page has."""

    def __init__(self, settings: DemoSettings, say: Callable[[str], None] = print) -> None:
        """`say` prints a line on the server's terminal. Nothing is loaded before `start`."""
        self.settings = settings
        machine = detect()
        self._machine = machine.gpu_name or f"CPU, {machine.cores} cores"
        self.sessions = Sessions(settings)
        self.models = Models(settings, say)
        self.trainings = Trainings(settings, self.models)
        self.models.training = self.trainings.running

    def start(self) -> None:
        """Load the first model, in the background, and remove what earlier servers left behind."""
        self.models.start()
        self.trainings.watch()
        exports.remove_old(self.settings, self.sessions.ids())

    def close(self) -> None:
        """Free the sessions and the models. A training is a process of its own and goes on."""
        self.sessions.close()
        self.models.close()

    def header(self) -> str:
        """Which model is loaded, on what."""
        line = self.models.state_line
        kind: Kind = "bad" if line.startswith("cannot") else "ok" if "ready" in line else "note"
        return notice(f"{line} (this machine: {self._machine})", kind)

    # ---------------------------------------------------------------- Evaluation, Generation

    def evaluate(self, session: Session, text: str, method: str) -> str:
        """The verdict on a text."""
        try:
            return evaluating.evaluate(self.models, session.log, text, method).html
        except Exception as error:
            return notice(said(error), "bad")

    def checkpoints(self) -> list[str]:
        """The labels to choose from, newest first."""
        return [one.label for one in checkpoints.list_checkpoints(self.settings)]

    def checkpoint_notes(self) -> str:
        """What is wrong with adapters that cannot be chosen; or that there is none yet."""
        lines = [notice(line, "bad") for line in checkpoints.problems(self.settings)]
        return joined(*lines) if lines or self.checkpoints() else notice(NO_CHECKPOINT, "note")

    def generate(
        self, session: Session, prompt: str, label: str | None, temperature: float, max_tokens: int, seed: int
    ) -> Iterator[tuple[str, str, str]]:
        """(base answer, trained answer, line) as they grow, as markup."""
        base = trained = ""
        try:
            chosen = None if label in (None, BASE_ALONE) else self._checkpoint(label)
            stream = generating.generate(
                self.models, session.log, prompt, chosen, float(temperature), int(max_tokens), int(seed)
            )
            for state in _thinned(stream):
                base, trained = state.base_html, state.trained_html
                yield base, trained, notice(state.line, "note")
        except Exception as error:
            yield base, trained, notice(said(error), "bad")

    def _checkpoint(self, label: str | None) -> Checkpoint:
        if not label:
            raise BadInputError(NO_CHECKPOINT.rstrip("."))
        return checkpoints.find_checkpoint(self.settings, label)

    # ---------------------------------------------------------------- Training

    def plans(self) -> list[tuple[str, str]]:
        """(label with estimated minutes, name) of each plan."""
        return [*((self.trainings.label(name), name) for name in PLANS), ("Custom", CUSTOM)]

    def start_training(self, plan: str, examples: float, epochs: float) -> str:
        """Start one, unless one is running on this machine."""
        count, passes = PLANS.get(plan, (examples or 0, epochs or 0))  # anything but whole numbers is refused by name
        return tried(lambda: self.trainings.start(count, passes, plan))

    def stop_training(self) -> str:
        """Stop it so that it can be resumed."""
        return tried(self.trainings.stop)

    def resume_training(self, run: str | None) -> str:
        """Go on with a stopped or failed run."""
        if not run:
            return notice("No run to resume: a training that was stopped appears in the list.", "note")
        return tried(lambda: self.trainings.resume(run))

    def training(self, session: Session) -> tuple[TrainingState, str]:
        """How the training stands, and its bar; quick enough to be asked each second."""
        try:
            state = self.trainings.state(session.log.verbosity)
        except Exception as error:
            return TrainingState(), notice(said(error), "bad")
        if state.stage == "none":
            return state, notice(NO_TRAINING, "note")
        return state, progress(state.fraction, state.line, ENDS.get(state.stage, "note"))

    # ---------------------------------------------------------------- Impact

    def take_own_file(self, session: Session, path: str | None, field: str = "") -> str:
        """Keep an uploaded file of prompts for this page and say what is read there; without one forget the last."""
        if path is None:
            session.forget_own_file()
            return ""
        try:
            session.keep_own_file(Path(path))
        except Exception as error:
            return notice(said(error), "bad")
        return self.name_own_field(session, field)

    def name_own_field(self, session: Session, field: str) -> str:
        """Read the uploaded file by a column. If that fails the file is kept: another column may be the right one."""
        if session.own_file is None:
            return ""
        try:
            read = impact.load_own(session.own_file, field.strip() or None)
            return notice(f"{len(read.prompts)} prompts read; Run Comparison uses them", "ok")
        except Exception as error:
            return notice(said(error), "bad")

    def compare(
        self, session: Session, suite: str, label: str | None, method: str, count: float, field: str = ""
    ) -> Iterator[tuple[str, str, str, str]]:
        """(bar, summary, plots, examples) as they come. `field`: the column of the own file, "" for a usual one."""
        session.impact = None
        shown = ("", "", "", "")
        try:
            own = session.own_file if suite == OWN_FILE else None
            if suite == OWN_FILE and own is None:
                raise BadInputError("no file was uploaded", "choose one, or another suite")
            states = impact.compare(
                self.models, session.log, suite, own, self._checkpoint(label), method,
                field=field.strip() or None, count=int(count) or None, seed=self.settings.seed,
            )  # fmt: skip
            for state in states:
                session.impact = state.result
                kind: Kind = "note" if state.result is None else "ok"
                shown = (progress(state.fraction, state.line, kind), state.summary_html, state.plots_html,
                         state.examples_html)  # fmt: skip
                yield shown
        except Exception as error:
            yield notice(said(error), "bad"), *shown[1:]

    def export_impact(self, session: Session, kind: Literal["json", "csv"]) -> tuple[Path | None, str]:
        """The file of this page's last comparison, and a line."""
        if session.impact is None:
            return None, notice("Nothing to export yet: press Run Comparison first.", "note")
        try:
            path = exports.export_impact(self.settings, session.id, session.impact, kind)
        except Exception as error:
            return None, notice(said(error), "bad")
        return path, notice(f"✓ {path.name} is ready", "ok")

    # ---------------------------------------------------------------- Data, Architecture

    def runs(self) -> list[str]:
        """The runs whose examples can be read."""
        from cai_experiment.demo import browsing

        return browsing.runs(self.settings)

    def filters(self, run: str | None) -> tuple[list[str], list[str], list[str]]:
        """The principles, reasons and verdicts to choose from in a run, "any" first."""
        from cai_experiment.demo import browsing

        if not run:
            return [ANY], [ANY], [ANY]
        try:
            found = browsing.filters(self.settings, run)
        except UserError:  # its folder has gone; `browse` says so
            return [ANY], [ANY], [ANY]
        return [ANY, *found.principles], [ANY, *found.reasons], [ANY, *found.verdicts]

    def browse(
        self, session: Session, run: str | None, kind: str, principle: str, reason: str, verdict: str, page: int
    ) -> tuple[str, str, int, int]:
        """(table, line, page, pages) of a run's examples; pages count from 1."""
        from cai_experiment.demo import browsing

        session.ids = []
        if not run:
            return "", notice(NO_RUN, "note"), 1, 1
        try:
            found = browsing.browse(self.settings, run, kind, principle or ANY, reason or ANY, verdict or ANY, page)
        except Exception as error:
            return "", notice(said(error), "bad"), 1, 1
        session.ids = list(found.ids)
        rows = [[_opened_by(row[0]), *row[1:]] for row in found.rows]
        shown = table(found.headers, rows) if rows else ""
        return shown, notice(found.line, "note"), found.page, found.pages

    def example(self, session: Session, run: str | None, row: int) -> str:
        """The whole way of the example in that row of what `browse` gave."""
        from cai_experiment.demo import browsing

        if not run or not 0 <= row < len(session.ids):
            return ""
        try:
            return browsing.example_html(self.settings, run, session.ids[row])
        except Exception as error:
            return notice(said(error), "bad")

    def architecture(self) -> str:
        """How the pipeline works, with the constitution."""
        from cai_experiment.demo import pages

        try:
            return pages.architecture_html(self.settings)
        except Exception as error:
            return notice(said(error), "bad")

    # ---------------------------------------------------------------- models of the two roles

    def load(self, role: Role, key: str) -> Iterator[str]:
        """Load a model for a role, fetching what is missing: first that it begins, then how it ended."""
        yield notice(f"loading {key} ... (what is missing is fetched first)", "note")
        work = self.models.load_evaluation if role == "evaluation" else self.models.load_generation
        yield tried(lambda: work(key))

    def unload(self, role: Role) -> str:
        """Let go of a role's model."""
        return tried(self.models.unload_evaluation if role == "evaluation" else self.models.unload_generation)

    def status(self) -> str:
        """The box Dual Model System Status."""
        return self.models.status_html()

    # ---------------------------------------------------------------- content log

    def set_verbosity(self, session: Session, level: float) -> str:
        """Rule what this page's log shows and the terminal prints, of a training too; the log as it now looks."""
        session.log.set_verbosity(int(level))
        self.trainings.verbosity = int(level)  # one terminal: the last word counts
        return session.log_html()

    def export_logs(self, session: Session) -> tuple[Path | None, str]:
        """content_logs_TIMESTAMP.json with everything logged for this page, and a line."""
        try:
            path = exports.export_logs(self.settings, session.id, session.log)
        except Exception as error:
            return None, notice(said(error), "bad")
        return path, notice(f"✓ {path.name} is ready: everything in full, whatever the verbosity shows", "ok")


def _opened_by(name: str) -> Html:
    """The cell that opens its row; a button, so that a keyboard reaches it."""
    return Html(f'<button type="button" class="cai-open">{escaped(name)}</button>')


def _thinned(stream: Iterator[generating.Generated]) -> Iterator[generating.Generated]:
    """A stream's states at most every REDRAW_SECONDS, and the last one."""
    shown, last = 0.0, None
    for last in stream:
        if time.monotonic() - shown >= REDRAW_SECONDS:
            yield last
            shown, last = time.monotonic(), None
    if last is not None:
        yield last
