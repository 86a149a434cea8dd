"""The demo's two models: loaded in the background, shared by all tabs and sessions, one user at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from cai_experiment.demo import fetching
from cai_experiment.demo.adapters import Adapters, Arms
from cai_experiment.demo.checkpoints import Checkpoint
from cai_experiment.demo.settings import DemoSettings
from cai_experiment.demo.status import at_hand, loaded_lines, offered, status_box, title
from cai_experiment.demo.turns import Turns
from cai_experiment.engines.load import LoadSettings
from cai_experiment.engines.manager import MultiModelManager
from cai_experiment.errors import EngineError, UserError
from cai_experiment.models.choice import resolve_model
from cai_experiment.models.hardware import detect
from cai_experiment.models.roles import DOWNLOADED, ROLES

if TYPE_CHECKING:
    from cai_experiment.engines.base import Engine
    from cai_experiment.engines.placing import Placed

SHIPPED = {"evaluation": "nano-b", "generation": "nano"}  # where nothing can be fetched
USUAL = dict(zip(ROLES, DOWNLOADED, strict=True))
STARTUP = "nano"
BESIDE = "base of a checkpoint"  # a third model, of a checkpoint that was trained on neither of the two
ANSWERS_WITHIN = 1.0  # seconds that the page waits at most for word of a network
WHERE = "Advanced: Dual Model Architecture"


@dataclass(frozen=True, slots=True)
class Speaker:
    """A loaded model of one role, and its name for the page."""

    engine: Engine
    name: str


class Models:
    """The evaluation model and the generation model, by role "evaluation" and "generation"."""

    def __init__(self, settings: DemoSettings, say: Callable[[str], None] = print) -> None:
        """`say` is told each model's first line before it is loaded. Nothing is loaded yet."""
        self.settings = settings
        self._manager = MultiModelManager(settings=LoadSettings(trains_after=False, seed=settings.seed), say=say)
        self._turns, self._one_load = Turns(), {role: Turns() for role in ROLES}
        self._adapters: dict[int, Adapters] = {}  # by id of the engine, which they hold
        self.growing: WeakSet[Any] = WeakSet()  # answers on their way, to be closed where weights have to go
        self._state, self._gone = "no model is loaded", ""
        self._keys: dict[str, str] = {}  # role -> what its model was loaded by
        self._made_room: dict[str, str] = {}  # the same, of models that are to come back
        self._fetches = {role: fetching.Fetch() for role in ROLES}
        self._closed = False
        self.training: Callable[[], str] = lambda: ""  # the run that has the GPU, or ""
        self._network, self._asked = False, threading.Event()

    # ------------------------------------------------------------ starting

    def start(self) -> None:
        """Load the startup model for both roles, in a thread; returns at once."""
        threading.Thread(target=self._ask_network, daemon=True, name="network").start()
        self._state = f"loading {self.settings.model or STARTUP} ..."
        threading.Thread(target=self._start, daemon=True, name="models").start()

    def _ask_network(self) -> None:
        try:
            self._network = fetching.network()
        finally:
            self._asked.set()

    def _start(self) -> None:
        key = self.settings.model or STARTUP
        if detect().kind == "cuda" and self.training():  # of an earlier server
            self._made_room = dict.fromkeys(ROLES, key)
        try:
            for role in reversed(ROLES):  # the generation model first: it is the one that keeps the GPU
                if not self._load(role, key).startswith("✓"):
                    return
            import peft  # here, so that the first trained answer does not wait for it

            assert peft
        except Exception as error:  # nobody waits for this thread: the page says it
            self._state = f"cannot load {key}: {type(error).__name__}: {error}"
            raise

    @property
    def ready(self) -> bool:
        """True once a model can be used."""
        return bool(set(ROLES) & set(self._manager.names()))

    @property
    def state_line(self) -> str:
        """What goes on: "loading nano ...", "fetching ...: 0.4 of 3.1 GB", "nano is ready", "cannot load ...: why"."""
        return self._state

    # ------------------------------------------------------------ loading

    def load_evaluation(self, key: str) -> str:
        """Load (and fetch, if it is not at hand): "✓ Evaluation model loaded: NAME", details below; or "✗ reason"."""
        return self._load("evaluation", key)

    def load_generation(self, key: str) -> str:
        """As `load_evaluation`."""
        return self._load("generation", key)

    def _load(self, role: str, key: str) -> str:
        key = key.strip()
        if not key:
            return "✗ no model is named; choose one"
        with self._one_load[role].turn():
            self._state = f"loading {key} ..."
            try:
                self._check_free(key)
                self._fetched(role, key)
                with self._turns.turn():
                    self._take(role, key)
            except Exception as error:  # whatever it is, the page must not say "loading" for good
                reason = " ".join(str(error).split()) or f"{key} does not fit into memory"
                self._state = self._what_is_ready() if self.ready else f"cannot load {key}: {reason}"
                return f"✗ {reason}"
            self._state = self._what_is_ready()
            return loaded_lines(role, self._manager.get_status_info())

    def _fetched(self, role: str, key: str) -> None:
        """Bring what is not at hand; what the memory does not hold, or the hub does not give, is not begun with."""
        placed, state = self._manager.beforehand(role, key)
        if state == "lacking":
            self._fetches[role] = fetching.Fetch()
            self._fetches[role].run(placed, self._note)

    def _take(self, role: str, key: str) -> None:
        """Load it, and see that it speaks; what stands in its way goes first: adapters hold weights they lie over."""
        if self._closed:
            raise EngineError(f"{key}: the demo is closing")
        self._check_free(key)  # again: a training may have begun while the turn was waited for
        if self._manager.beforehand(role, key)[1] != "loaded":
            self._clear()
        load = self._manager.load_evaluation_model if role == "evaluation" else self._manager.load_generation_model
        ok, message = load(key)
        if not ok:
            raise EngineError(message)
        try:
            self._manager.engine_of(role)
        except UserError:
            self._manager.unload(role)
            raise
        self._gone, self._keys[role] = "", key

    def _check_free(self, key: str) -> None:
        run = self.training()
        if run and detect().kind == "cuda":
            raise EngineError(f"the training of {run} has the GPU", f"load {key} under {WHERE} when it is over")

    def _note(self, line: str) -> None:
        self._state = line

    def _clear(self) -> None:
        """Close what is on its way, since it holds the weights; take off all adapters, and let go of a third model."""
        for answer in list(self.growing):
            answer.close()
        for adapters in self._adapters.values():
            adapters.take_off()
        self._adapters.clear()
        self._manager.unload(BESIDE)

    def unload_evaluation(self) -> str:
        """Let go of it; gives the status line."""
        return self._unload("evaluation")

    def unload_generation(self) -> str:
        """As `unload_evaluation`."""
        return self._unload("generation")

    def _unload(self, role: str) -> str:
        self._fetches[role].stop()
        with self._turns.turn():
            self._clear()
            self._manager.unload(role)
        self._state = self._what_is_ready()
        return f"{role.capitalize()} model unloaded"

    # ------------------------------------------------------------ saying

    def _title(self, role: str) -> str:
        return title(self._manager.names().get(role, ""))

    def _what_is_ready(self) -> str:
        names = dict.fromkeys(self._title(role) for role in ROLES if role in self._manager.names())
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} ready" if names else "no model is loaded"

    def loaded(self, role: str) -> str | None:
        """What loads the model that a role holds: preset, hub id or folder; None if it holds none."""
        return self._keys.get(role) if role in self._manager.names() else None

    def status_html(self) -> str:
        """The box Dual Model System Status: each role's model, its memory and device, and the total memory."""
        return status_box(self._manager.get_status_info() if self.ready else {})  # else torch might be waited for

    def choices(self, role: str) -> list[str]:
        """The names to offer for a role: those that need no download first."""
        return offered()

    def default(self, role: str) -> str:
        """What a role's field names at first: qwen2-1.5b-instruct and phi-2, or the shipped pair without a network."""
        if at_hand(USUAL[role]):
            return USUAL[role]
        self._asked.wait(ANSWERS_WITHIN)
        return USUAL[role] if self._network else SHIPPED[role]

    # ------------------------------------------------------------ using

    @property
    def wanted(self) -> bool:
        """True if somebody waits while another one speaks."""
        return self._turns.wanted

    def let_go(self, answers: Sequence[Any]) -> None:
        """Close answers that nobody waits for any more, when their turn comes; returns at once.

        A page that is closed in mid-answer ends its stream in the web server's own thread, which must not wait.
        """

        def close() -> None:
            with self._turns.turn():
                for answer in answers:
                    answer.close()

        if answers:
            threading.Thread(target=close, daemon=True, name="let go").start()

    def turn(self) -> AbstractContextManager[None]:
        """Nobody else speaks until the block ends; for what must not happen while somebody speaks."""
        return self._turns.turn()

    @contextmanager
    def use(self, role: str) -> Iterator[Speaker]:
        """The model of that role, for this user alone until the block ends. Long work takes it in small portions.

        Raises EngineError, one line, where none is loaded.
        """
        with self._turns.turn():
            yield Speaker(self._engine(role), self._title(role))

    @contextmanager
    def alone(self) -> Iterator[Speaker]:
        """The generation model without worked examples, as `arms` has its base; else as `use`."""
        with self._turns.turn():
            adapters = self._over(self._engine("generation"))
            yield Speaker(adapters.bare(), self._title("generation"))

    @contextmanager
    def arms(self, checkpoint: Checkpoint) -> Iterator[Arms]:
        """The checkpoint's base and the trained model, for this user alone until the block ends.

        Raises UserError, one line: a damaged adapter, a base that is not at hand or does not fit.
        """
        with self._turns.turn():
            yield self._over(self._base_of(checkpoint)).arms(checkpoint)

    def _engine(self, role: str) -> Engine:
        try:
            return self._manager.engine_of(role)
        except EngineError:
            why = self._gone or self._waiting() or f"no {role} model is loaded; load one under {WHERE}"
            raise EngineError(why) from None

    def _waiting(self) -> str:
        busy = self._state.startswith(("loading", "fetching"))
        return f"{self._state}; try again in a moment" if busy else ""

    def _over(self, engine: Engine) -> Adapters:
        if id(engine) not in self._adapters:
            self._adapters[id(engine)] = Adapters(engine, self.settings.seed)
        return self._adapters[id(engine)]

    def _base_of(self, checkpoint: Checkpoint) -> Engine:
        """The model that it was trained on: as a role has it loaded; else beside the two, if it fits."""
        place = resolve_model(checkpoint.base, detect(), "").path_or_id
        role = self._manager.role_with(place)
        if role is not None:
            return self._manager.engine_of(role)
        if self._gone or not self.ready:
            return self._engine("generation")  # which says why there is none
        try:
            placed, state = self._manager.beforehand(BESIDE, checkpoint.base)
            if placed.note:
                raise EngineError(placed.note)
        except UserError as error:
            step = f"load {checkpoint.base} as the generation model under {WHERE}"
            raise EngineError(f"{checkpoint.name} needs its base {checkpoint.base}: {error}", step) from error
        if state == "lacking":
            raise EngineError(f"{checkpoint.name} needs its base {checkpoint.base}, which is not downloaded",
                              f"load it as the generation model under {WHERE}")  # fmt: skip
        return self._beside(placed)

    def _beside(self, placed: Placed) -> Engine:
        if self._manager.role_with(BESIDE):
            self._clear()
        self._manager.load(BESIDE, placed.settings)
        return self._manager.engine_of(BESIDE)

    # ------------------------------------------------------------ giving back

    def make_room(self) -> None:
        """Before another process takes the GPU: unload all. On a CPU nothing."""
        if detect().kind != "cuda":
            return
        with self._turns.turn():
            self._made_room = {role: key for role in ROLES if (key := self.loaded(role))} or self._made_room
            self._clear()
            self._manager.unload_all()
            self._gone = f"the models made room for the training; load them again under {WHERE} when it is over"
            self._state = self._gone

    def come_back(self) -> None:
        """The GPU is free again: load what made room and was not replaced since. Takes as long as loading does."""
        wanted, self._made_room = self._made_room, {}
        for role in reversed(ROLES):
            if role in wanted and self.loaded(role) is None and not self._load(role, wanted[role]).startswith("✓"):
                self._made_room[role] = wanted[role]  # another training was quicker

    def close(self) -> None:
        """Unload all, and end a download. A load that is still going on is not waited for: it ends with the process."""
        self._closed = True
        for fetch in self._fetches.values():
            fetch.stop()
        if self._state.startswith("loading"):
            return
        with self._turns.turn():
            self._clear()
            self._manager.unload_all()


__all__ = ["Arms", "Models", "Speaker", "title"]
