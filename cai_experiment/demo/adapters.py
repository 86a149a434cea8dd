"""Trained adapters over weights that others use: off, but for the passes in which a trained model speaks.

PEFT puts a LoRA adapter into the model itself. With it switched off a layer computes what it computed without it, to
the last bit; so it stays off at rest, and whoever uses the same weights sees them as they were.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cai_experiment.demo.checkpoints import Checkpoint
from cai_experiment.engines.base import Completion, Engine, Prompt
from cai_experiment.errors import BadInputError
from cai_experiment.evaluation.arms import BareRenderer, BothArms
from cai_experiment.observe.progress import Progress
from cai_experiment.records.files import show
from cai_experiment.training import checkpoints as stored

KEPT = 3  # adapters over one model, for sessions that ask several at a time


@dataclass(frozen=True, slots=True)
class Arms:
    """A checkpoint's base and the same with its adapter, both without worked examples (the prompt of training).

    `both` asks both with the same random numbers.
    """

    base: Engine
    trained: Engine
    both: BothArms
    name: str


class Adapters:
    """The adapters over one loaded model. Not for two threads at a time."""

    def __init__(self, engine: Any, seed: int) -> None:
        """`engine` speaks with the model and stays its owner's; `seed` is that of both arms."""
        self.engine, self.seed = engine, seed
        self._peft: Any = None
        self._bare: Any = None
        self._worn: dict[tuple[Path, int], tuple[str, Arms]] = {}  # the latest used last
        self._made = 0

    def bare(self) -> Any:
        """An engine over the same weights without worked examples: the prompt that training used."""
        if self._bare is None:
            self._bare = copy.copy(self.engine)  # which was probed when it was loaded
            self._bare.renderer = BareRenderer(self.engine.renderer)
        return self._bare

    def arms(self, checkpoint: Checkpoint) -> Arms:
        """Both arms of a checkpoint. Raises BadInputError for a damaged adapter."""
        weights = checkpoint.path / stored.ADAPTER_FILES[1]
        key = (checkpoint.path, weights.stat().st_mtime_ns if weights.is_file() else 0)
        name, arms = self._worn.pop(key, ("", None))
        if arms is None:
            base, name = self.bare(), self._put_on(checkpoint.path)
            trained = AdapterOn(base, lambda: self._on(name))
            arms = Arms(base, trained, _Both(base, trained, self.seed), checkpoint.name)
        self._worn[key] = name, arms
        return arms

    def _put_on(self, path: Path) -> str:
        """Load one more adapter, and leave it off; gives its name within the model."""
        from peft import PeftModel

        stored.named(path, stored.ADAPTER_FILES)
        while len(self._worn) >= KEPT:
            oldest, _ = self._worn.pop(next(iter(self._worn)))
            self._peft.delete_adapter(oldest)
        self._made += 1
        name, (model, _) = f"adapter{self._made}", self.engine.release_for_training()
        try:
            if self._peft is None:
                self._peft = PeftModel.from_pretrained(model, str(path), adapter_name=name).eval()
            else:
                self._peft.load_adapter(str(path), name, is_trainable=False)
        except Exception as error:  # of whatever library: half an adapter may be in the model now
            self.take_off()
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()
            raise BadInputError(f"{show(path)} does not go over this model: {reason}"[:400]) from error
        self._peft.base_model.disable_adapter_layers()
        return name

    @contextmanager
    def _on(self, name: str) -> Iterator[None]:
        layers = self._peft.base_model
        if self._peft.active_adapter != name:
            self._peft.set_adapter(name)
        layers.enable_adapter_layers()
        try:
            yield
        finally:
            layers.disable_adapter_layers()

    def take_off(self) -> None:
        """Leave the model as it was before the first adapter: its own layers, and nothing of PEFT."""
        self._worn.clear()
        if self._bare is not None:  # somebody may still hold the copy, which must not hold the weights
            self._bare.model = None
        self._bare = self._peft = None
        model = self.engine.model
        if model is None:  # closed by its owner
            return
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if hasattr(child, "get_base_layer"):
                    setattr(parent, name, child.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config


class AdapterOn:
    """An engine whose adapter is on while it speaks, and off between two completions."""

    def __init__(self, engine: Any, on: Callable[[], AbstractContextManager[None]]) -> None:
        self.engine, self._on = engine, on
        self.name, self.first_line = engine.name, engine.first_line

    def __getattr__(self, name: str) -> Any:
        """Everything else is the engine's own; `grow` only where it has it."""
        if name == "grow" and hasattr(self.engine, "grow"):
            return self._grow
        return getattr(self.engine, name)

    def describe(self) -> dict[str, object]:
        """What the engine says of itself."""
        described: dict[str, object] = self.engine.describe()
        return described

    def stream(self, prompts: Iterable[Prompt | None]) -> Iterator[Completion]:
        """See `base.Engine.stream`."""
        return self._switched(self.engine.stream(prompts))

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[tuple[float, ...]]:
        """See `base.Engine.choose`."""
        with self._on():
            weights: list[tuple[float, ...]] = self.engine.choose(prompts, options)
            return weights

    def close(self) -> None:
        """Nothing: the weights are others' too."""

    def _grow(self, prompt: Prompt) -> Iterator[Completion]:
        return self._switched(self.engine.grow(prompt))

    def _switched(self, completions: Any) -> Iterator[Completion]:
        try:
            while True:
                with self._on():
                    completion = next(completions, None)
                if completion is None:
                    return
                yield completion
        finally:
            completions.close()


class _Both(BothArms):
    """Both arms as two engines over one model, whose adapter is off by itself."""

    def __init__(self, base: Engine, trained: Engine, seed: int) -> None:
        super().__init__(base, None, seed, Progress(0, verbosity=0))
        self._over = BothArms(trained, None, seed, self.progress)

    def base(self, prompts: Sequence[Prompt]) -> list[Completion]:
        return self._speak("base", prompts)

    def trained(self, prompts: Sequence[Prompt]) -> list[Completion]:
        self._over.remembered, self._over.progress = self.remembered, self.progress
        return self._over.trained(prompts)
