"""The runner: streams every example through its stages, writes each completion down, and resumes from what is written.

No stage waits for a batch: after each completion its example's next prompts go in. The journal is the only memory. A
resumed run starts every machine anew and answers from the journal what stands there, so it cannot tell the
difference; what is written follows from the completions alone, never from their order.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from pathlib import Path

from cai_experiment.constitution.principles import Constitution
from cai_experiment.engines.base import Completion, Engine, Prompt
from cai_experiment.errors import EngineError
from cai_experiment.observe.content_logger import ContentLogger
from cai_experiment.observe.progress import Progress
from cai_experiment.pipeline.example import Origin, to_example, turned_down, weights_name
from cai_experiment.pipeline.lanes import Lanes
from cai_experiment.pipeline.length_matching import LengthMatcher
from cai_experiment.pipeline.outputs import Outputs
from cai_experiment.pipeline.replay import END, RESUMED, Replies, is_given_up, is_prompts_fault
from cai_experiment.pipeline.settings import RunResult, RunSettings
from cai_experiment.pipeline.stages import ExampleStages, Steps, role_of
from cai_experiment.pipeline.story import Story
from cai_experiment.pipeline.work_list import WorkList
from cai_experiment.records.manifest import Manifest, Session, open_manifest, reopen_manifest
from cai_experiment.records.schema import Example
from cai_experiment.records.store import RunFolder

OPEN_EXAMPLES = 256  # more than one engine's batch, so no slot waits; and it bounds memory
AHEAD = 8  # times as many may be begun and not written: one that takes for ever must not let the others pile up
MAX_FAILURES = 30  # prompts that failed first with no success between: then it is the engine that is broken
CANDIDATE = 10**9  # rank of instruction candidates in the queue: behind every example
MANIFEST_SECONDS = 60.0
CLOSE_SECONDS = 5.0  # for a lane's thread; a signal must end a run within 10 s, and closing its engine frees the thread
END_SECONDS = 60.0  # for engines elsewhere to drop what was asked in vain, when a run has come to its end


def run_pipeline(
    settings: RunSettings, folder: RunFolder, generator: Engine, critic: Engine, constitution: Constitution,
    logger: ContentLogger, progress: Progress,
) -> RunResult:  # fmt: skip
    """Run or resume `settings` in `folder` (entered); `generator` and `critic` may be the same engine.

    Raises BadInputError if the folder was begun with other settings, DiskError, EngineError if the engine is broken.
    An interrupt (KeyboardInterrupt) passes through; the journal then holds every finished completion.
    """
    models = {"generator": generator.describe(), "critic": critic.describe()}
    file = {"file": Path(constitution.path).name, "sha256": constitution.sha256}
    manifest = open_manifest(folder.path / "manifest.json", Manifest(settings.recorded(), settings.seed, models, file))
    engines = {"generator": generator, "critic": critic}
    return _to_its_end(_Run(settings, folder, engines, constitution, logger, progress, manifest))


def replay_pipeline(
    settings: RunSettings, folder: RunFolder, constitution: Constitution, logger: ContentLogger, progress: Progress
) -> RunResult:
    """Write the files of a run anew from its journal alone, with all verdicts of the guard that stand there by now.

    Not `complete` in the result: more has to be generated. `settings` are those of the run (their extent may differ).
    Raises DiskError.
    """
    manifest = reopen_manifest(folder.path / "manifest.json")
    return _to_its_end(_Run(settings, folder, {}, constitution, logger, progress, manifest))


def _to_its_end(run: _Run) -> RunResult:
    """Work, and close; only when all is written the manifest says that it is, as the very last thing."""
    finished = False
    try:
        run.work()
        run.outputs.finish()
        run.lanes.close(END_SECONDS)
        finished = True
    finally:
        run.close()
        result = run.result(finished)  # after an interrupt too: the manifest says how far the run came
    return result


@dataclass(slots=True)
class _Open:
    """An example in progress: its machine, and the completions of its current step."""

    index: int
    stages: ExampleStages
    steps: Steps
    missing: set[str] = field(default_factory=set)
    got: dict[str, Completion] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)


class _Run:
    """The state of one session. `work` is the loop; everything else is called from it, in one thread."""

    def __init__(
        self, settings: RunSettings, folder: RunFolder, engines: dict[str, Engine], constitution: Constitution,
        logger: ContentLogger, progress: Progress, manifest: Manifest,
    ) -> None:  # fmt: skip
        """Without `engines` nothing is asked: what the journal does not hold stays unanswered."""
        self.settings, self.constitution = settings, constitution
        self.progress, self.manifest, self.folder = progress, manifest, folder
        self.origin = Origin(settings.seed, *(weights_name(manifest.models[role]) for role in ("generator", "critic")))
        self.journal = folder.journal
        self.replies = Replies(folder.journal)
        if self.replies.ends_in_failures:
            self.journal.append({"kind": RESUMED})
        whole = settings.whole_list
        log = folder.path / "content_log.jsonl"
        self.story = Story(logger, log, constitution.principles, None if whole else settings.pairs)
        matcher = LengthMatcher() if settings.match_lengths else None
        pairs = settings.pairs + settings.spare
        self.outputs = Outputs(folder.path, None if whole else pairs, matcher, settings.whole_blocks)
        widths = [getattr(engine, "width", 0) for engine in engines.values()]  # prompts that it wants at a time
        self.open_examples = max([OPEN_EXAMPLES, *(2 * width for width in widths)])
        self.goal = settings.max_draws if whole else pairs  # what the bar counts to
        self.asks = bool(engines)
        self.work_list = WorkList(settings)
        self.lanes = Lanes(engines)
        self.owners: dict[str, tuple[Prompt, _Open | None]] = {}  # prompts asked and not answered
        self.replayed: deque[Completion] = deque()
        self.failures = self.replies.failures
        self.failing: set[str] = set()  # prompts that failed for the first time, since the last success
        self.failure: Completion | None = None  # the last one, unless a success followed
        self.succeeded = len(self.replies) > 0  # whether the engine ever spoke in this run
        self.begun = self.finished = self.accepted = 0
        self.unwritten: dict[int, _Open] = {}  # finished, while an earlier one is not
        self.tokens: Counter[str] = Counter(prompt=0, computed=0, completion=0)
        self.started = self.saved = time.monotonic()

    # ------------------------------------------------------------ the loop

    def work(self) -> None:
        """Until enough pairs stand in the file, or nothing is left to do."""
        while not self.outputs.complete:
            self._begin_more()
            if self.replayed:
                self._deliver(self.replayed.popleft())
                continue
            if not self.owners:
                self._write(self.outputs.rest())
                break
            if not self.asks:
                break
            self._receive(self.lanes.next())
        if self.failure is not None:
            if not self.succeeded:
                raise self._broken(self.failure)
            self.journal.append({"kind": END})  # the last failures count: the engine was not broken

    def _begin_more(self) -> None:
        """Begin examples, and ask for the instructions that they need, as far as they will be wanted."""
        wanted = self._wanted()
        while wanted > 0 and (instruction := self.work_list.next()) is not None:
            self.outputs.list_instruction(instruction)
            stages = ExampleStages(instruction, self.constitution.principles, self.settings.stages)
            index, self.begun = self.begun, self.begun + 1
            wanted -= 1
            self._advance(_Open(index, stages, stages.steps()))
        if wanted > 0:
            for prompt in self.work_list.prompts(wanted):
                self._ask(CANDIDATE, prompt, None)

    def _wanted(self) -> int:
        """How many more examples to begin now.

        The share that passes is estimated with those in progress counted as passing: too careful at first, right in the
        end, so few are begun in vain. It moves no byte of the files, which end with the last wanted pair.
        """
        open_now = self.begun - self.finished
        most = min(self.open_examples - open_now, AHEAD * self.open_examples - (self.begun - self.outputs.taken))
        if self.outputs.wanted is None:
            return most
        share = (self.accepted + open_now + 1) / (self.begun + 1)
        return min(most, math.ceil((self.outputs.wanted - self.accepted) / share) - open_now)

    # ------------------------------------------------------------ prompts and completions

    def _ask(self, rank: int, prompt: Prompt, example: _Open | None) -> None:
        self.owners[prompt.id] = prompt, example
        known = self.replies.get(prompt.id)
        if known is not None:
            self.replayed.append(known)
        elif self.asks:
            self.lanes.put(role_of(prompt), rank, prompt)

    def _receive(self, completion: Completion) -> None:
        """A completion from an engine: written down first, then asked again if it failed, else delivered."""
        self.journal.append(completion.as_dict())
        self._count(completion)
        if completion.finish != "error":
            self.failing.clear()
            self.failure, self.succeeded = None, True
        elif not is_prompts_fault(completion) and self._asks_again(completion):
            return
        self._deliver(completion)

    def _asks_again(self, completion: Completion) -> bool:
        """Count a failure of the engine, and ask again unless that was often enough. Raises EngineError: it is broken.

        A retry goes behind all that was begun, so that what fails at once does not fail three times in one breath. That
        it fails again says little of the engine: the hopeless rows come together at a run's end.
        """
        id = completion.id
        self.failures[id] += 1
        self.failure = completion
        if self.failures[id] == 1:
            self.failing.add(id)
        if len(self.failing) >= MAX_FAILURES:
            raise self._broken(completion)
        if is_given_up(completion, self.failures[id]):
            return False
        prompt, example = self.owners[id]
        self.lanes.put(role_of(prompt), self.begun if example else CANDIDATE, prompt)
        return True

    def _broken(self, last: Completion) -> EngineError:
        return EngineError(f"the engine failed {len(self.failing)} times running, each time on another prompt, "
                           f"last on {last.id}: {last.error}", "mend it; the same command resumes")  # fmt: skip

    def _count(self, completion: Completion) -> None:
        self.tokens["prompt"] += completion.prompt_tokens
        self.tokens["computed"] += completion.computed_tokens
        self.tokens["completion"] += completion.completion_tokens
        self._show()
        if time.monotonic() - self.saved >= MANIFEST_SECONDS:
            self._save_manifest()

    def _deliver(self, completion: Completion) -> None:
        _, example = self.owners.pop(completion.id)
        if example is None:
            self.work_list.take(completion)
            return
        example.got[completion.id] = completion
        example.missing.discard(completion.id)
        if not example.missing:
            self._advance(example)

    # ------------------------------------------------------------ examples

    def _advance(self, example: _Open) -> None:
        """Send an example's completions to its machine, and ask for what it needs next."""
        try:
            prompts = example.steps.send(example.got) if example.got else next(example.steps)
        except StopIteration:
            self._finish(example)
            return
        example.got, example.missing = {}, {p.id for p in prompts}
        for prompt in prompts:
            self._ask(example.index, prompt, example)

    def _finish(self, example: _Open) -> None:
        line = to_example(example.stages.draft, self.settings.gate, self.origin)
        if self.settings.guard:
            line = turned_down(line, self.replies.turned_down(line))
        self.finished += 1
        self.accepted += not line.reject_reasons
        self.unwritten[example.index] = example
        self._write(self.outputs.take(example.index, line))
        self._show()

    def _write(self, written: list[tuple[int, Example]]) -> None:
        """Tell of what was written just now."""
        for index, line in written:
            example = self.unwritten.pop(index)
            place = (index + 1, self.goal)
            self.story.tell(example.stages.draft, line, place, time.monotonic() - example.began)

    def _show(self) -> None:
        """Move the bar: pairs that passed, or instructions of the whole list that are done."""
        done = self.finished if self.outputs.target is None else self.accepted
        self.progress.update(min(done, self.goal), self.tokens["completion"])

    # ------------------------------------------------------------ the end

    def _save_manifest(self, finished: bool = False) -> Manifest:
        """Write the manifest of the run as it stands, this session included."""
        work = self.work_list
        counts = {
            "accepted": self.outputs.accepted, "rejected": self.outputs.rejected, "candidates": work.writer.decided,
            **{f"refused/{reason}": count for reason, count in sorted(work.refused.items())},
            **{f"ran_out/{Path(name).name}": drawn for name, drawn in work.ran_out.items() if self.settings.mix},
        }  # fmt: skip
        self.saved = time.monotonic()
        session = Session(counts, self.tokens, self.saved - self.started, self.settings.price_per_hour)
        now = replace(self.manifest.after(session), finished=finished)
        now.write(self.folder.path / "manifest.json")
        return now

    def _used_up(self) -> bool:
        """True if every instruction of the list was used and stands in the files."""
        return self.work_list.ended and self.outputs.written == self.work_list.drawn

    def close(self) -> None:
        """Close files and streams as they stand."""
        self.lanes.close(CLOSE_SECONDS)
        self.outputs.close()

    def result(self, finished: bool) -> RunResult:
        """What was reached; the manifest is written with it."""
        manifest = self._save_manifest(finished)
        return RunResult(
            accepted=self.outputs.accepted,
            rejected=self.outputs.rejected,
            reasons=dict(sorted(self.outputs.reasons.items())),
            refused=dict(sorted(self.work_list.refused.items())),
            ran_out={Path(name).name: n for name, n in self.work_list.ran_out.items()} if self.settings.mix else {},
            candidates=self.work_list.writer.decided,
            complete=self.outputs.complete or (self.outputs.target is None and self._used_up()),
            tokens=dict(self.tokens),
            wall_seconds=self.saved - self.started,
            manifest=manifest,
        )
