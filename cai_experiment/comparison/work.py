"""The work itself: which model is loaded next, what it is asked, until every cell and every detection is there.

A model that is in memory does all that can be done with it before another one is loaded: m models are loaded about
3 m - 1 times (it answers and criticises, revises what the others criticised, judges what they revised).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from cai_experiment.comparison.cells import Cell, Wanted
from cai_experiment.comparison.said import Counted, Said, Silent
from cai_experiment.evaluation.arms import Remembering
from cai_experiment.evaluation.detection import Measured, measure
from cai_experiment.evaluation.harm.labelled import Sets
from cai_experiment.evaluation.harm_model import ModelDetector
from cai_experiment.judging.judge import Judge
from cai_experiment.observe.progress import Progress

DETECTION = "detection"  # its role among what is remembered
Load = Callable[[str], Any]  # a model's engine, known to `Said` and counted; to be closed


@dataclass
class Work:
    """All that is to be done. `load` gives a model's engine; `models` are their names in order."""

    models: Sequence[str]
    cells: Sequence[Cell]
    sets: Sets
    said: Said
    load: Load
    verbosity: int = 1
    failures: dict[str, int] = field(default_factory=dict)  # verdicts on the labelled texts that an engine failed at
    _done: dict[str, Measured] = field(default_factory=dict)

    def run(self) -> None:
        """Do what is missing. Raises what loading and speaking raise; what was said is kept."""
        previous: str | None = None
        while True:
            wanted = self._wanted()
            left = [one for one in self.models if one in wanted or self.detection(one) is None]
            if not left:
                return
            previous = self._next(left, previous)
            engine = self.load(previous)
            try:
                self._all_of(previous, engine)
            finally:
                engine.close()

    def _next(self, left: Sequence[str], previous: str | None) -> str:
        """The one after the previous in the models' order, going round."""
        start = 0 if previous is None else self.models.index(previous) + 1
        return next(one for one in [*self.models[start:], *self.models[:start]] if one in left)

    def _wanted(self) -> dict[str, dict[str, Wanted]]:
        """What is missing, by model and key; the same prompt of several cells once."""
        found: dict[str, dict[str, Wanted]] = {}
        for wanted in chain.from_iterable(cell.advance(self.said.get) for cell in self.cells):
            known = wanted.model in self.said.of
            key = self.said.key(wanted.model, wanted.prompt) if known else wanted.prompt.id
            found.setdefault(wanted.model, {})[key] = wanted
        return found

    def _all_of(self, model: str, engine: Any) -> None:
        """Everything that this model can do now."""
        while wanted := self._wanted().get(model):
            weighed = {key: one for key, one in wanted.items() if one.prompt.options}
            spoken = {key: one for key, one in wanted.items() if key not in weighed}
            for some, noun in ((spoken, "turns"), (weighed, "verdicts")):
                self._ask(model, engine, some, f"{noun} of {model}")
        if self.detection(model) is None:
            with Progress(sum(map(len, self.sets.values())), f"texts to {model}", self.verbosity) as progress:
                self._done[model] = self._detect(model, engine, progress)

    def _ask(self, model: str, engine: Any, wanted: Mapping[str, Wanted], noun: str) -> None:
        """Ask and write down. The prompts go by their key: those of two cells may share an id."""
        from dataclasses import replace

        if not wanted:
            return
        prompts = []
        for key, one in wanted.items():
            sampling = replace(one.prompt.sampling, key=one.prompt.sampling.key or one.prompt.id)
            prompts.append(replace(one.prompt, id=key, sampling=sampling))
        prompts.sort(key=lambda prompt: prompt.turns[0].text)  # what shares a stem stands together
        tokens, asked = 0, set(wanted)
        with Progress(len(prompts), noun, self.verbosity) as progress:
            for done in engine.stream(prompts):
                tokens += done.completion_tokens
                asked.discard(done.id)
                self.said.keep(model, done.id, replace(done, id=wanted[done.id].prompt.id))
                progress.update(len(prompts) - len(asked), tokens)
        for key in asked:
            self.said.keep(model, key, _missing(wanted[key].prompt.id))

    # ------------------------------------------------------------ detection

    def detection(self, model: str) -> Measured | None:
        """What the model said of the labelled texts; None if it has not said all."""
        if model not in self._done and model in self.said.of:
            silent = Silent()
            measured = self._detect(model, silent, None)
            if not silent.asked:
                self._done[model] = measured
        return self._done.get(model)

    def _detect(self, model: str, engine: Any, progress: Progress | None) -> Measured:
        counted: Any = Counted(Remembering(engine, self.said.of[model], DETECTION))
        judge = Judge(counted, model)
        measured = measure(ModelDetector(judge, reasons=False), self.sets, progress)
        self.failures[model] = counted.failed
        return measured


def _missing(id: str) -> Any:
    from cai_experiment.engines.base import Completion

    return Completion(id, "", "error", error="no answer came back")
