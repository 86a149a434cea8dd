"""Two models by role in one process: loaded where they fit, shared where both roles name one, really freed.

manager = MultiModelManager()
ok, message = manager.load_evaluation_model("qwen2-1.5b-instruct")
model, tokenizer = manager.get_evaluation_model()
generator, critic = manager.engines()          # the same two as engines, for the pipeline
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cai_experiment.engines.at_hand import check_files
from cai_experiment.engines.load import ELSEWHERE, LoadSettings, Plan, engine_over, load_model, make_plan
from cai_experiment.engines.placing import Free, Placed, allocated_gb, free_now, place, slots_of, tensors_gb
from cai_experiment.errors import BadInputError, EngineError, UserError
from cai_experiment.models.hardware import Hardware, detect
from cai_experiment.models.roles import DEFAULT, ROLES, configuration, generators_share
from cai_experiment.models.serving import known_numbers
from cai_experiment.models.tables import in_short

if TYPE_CHECKING:
    from cai_experiment.engines.base import Engine

ONE_EACH = "two models in one process, of which vLLM and Unsloth serve one each"


@dataclass(slots=True, eq=False)
class _Loaded:
    """One load of weights, held by one role or by both. Once there is an engine, it alone holds the model."""

    placed: Placed
    name: str
    facts: dict[str, object]
    parameters: int
    gb: float
    model: Any
    tokenizer: Any
    engine: Any = None

    @property
    def pair(self) -> tuple[Any, Any]:
        """(model, tokenizer), wherever they are now; (None, None) after somebody closed the engine."""
        holder = self if self.engine is None else self.engine
        return holder.model, holder.tokenizer


class MultiModelManager:
    """An evaluation model (critiques and judges) and a generation model (answers and revises)."""

    def __init__(
        self, device: str | None = None, quantization: str | None = None, settings: LoadSettings | None = None,
        say: Callable[[str], None] | None = None, free: Callable[[str], Free] = free_now,
    ) -> None:  # fmt: skip
        """`device` and `quantization` None: what the hardware asks for. `settings` holds the rest of how to load;
        `say` is told each model's first line before it is loaded; `free` measures the memory.
        """
        base = settings or LoadSettings()
        self._base = replace(base, device=device or base.device, quantization=quantization or base.quantization)
        self._hardware: Hardware = detect()
        self._say, self._free = say or (lambda line: None), free
        self._loaded: dict[str, _Loaded] = {}

    # ------------------------------------------------------------ loading

    def load_evaluation_model(self, key: str) -> tuple[bool, str]:
        """Load the model that criticises and judges: preset, hub id or folder. (True, what it became) or (False, the
        reason in one line). What this role held before is kept by a failure, unless the memory did not hold both and
        the new one's files failed as they were read; then the reason says that nothing is loaded.
        """
        return self._told("evaluation", key)

    def load_generation_model(self, key: str) -> tuple[bool, str]:
        """As `load_evaluation_model`, for the model that answers and revises."""
        return self._told("generation", key)

    def load_configuration(self, name: str = DEFAULT) -> tuple[bool, str]:
        """Load both models of "single", "dual" or "conservative"; if one cannot be loaded, neither is kept.

        What was loaded before is kept if the files of one are not to be had.
        """
        try:
            chosen = configuration(name)
        except BadInputError as error:
            return False, str(error)
        told: list[str] = []
        wanted = list(zip(ROLES, (chosen.evaluation, chosen.generation), strict=True))
        try:
            for _, key in wanted:
                settings = self._settings(key)
                check_files(self._plan(settings), settings)
        except UserError as error:
            return False, str(error)
        for role, key in wanted:
            ok, message = self._told(role, key)
            told.append(message)
            if not ok:
                self.unload_all()
                return False, message
        return True, "; ".join(told)

    def _told(self, role: str, key: str) -> tuple[bool, str]:
        held = self._loaded.get(role)
        try:
            found = self.load(role, self._settings(key))
        except (UserError, MemoryError) as error:
            reason = str(error) or f"{key} does not fit into memory"
        else:
            return True, f"{role.capitalize()} model loaded: {self._described(found, role)}"
        _give_back()  # here, where the traceback that held half a model is gone
        if held is not None and role not in self._loaded:
            reason = f"{reason}; {held.name} had to go first: no {role} model is loaded now"
        return False, reason

    def load(self, role: str, settings: LoadSettings) -> _Loaded:
        """Load for "evaluation" or "generation", or share what another role holds. Raises UserError, one line.

        A third role (any other name: `engine_of` and `unload` take it) holds a model beside these two.

        What the role held is let go of last where the memory holds both, else once the new one's place and files are
        sure.
        """
        with settings.naming():
            return self._load(role, settings)

    def _load(self, role: str, settings: LoadSettings) -> _Loaded:
        free, placed, found = self._placed(role, settings)
        if found is not None:
            return self._give(role, found)
        check_files(placed.plan, placed.settings)
        if placed.need is None or placed.need > free.at(placed.plan.device):
            self.unload(role)
        note = f" | {placed.note}" if placed.note else ""
        self._say(f"{'critic: ' if role == 'evaluation' else ''}{placed.plan.first_line}{note}")
        return self._give(role, _load(placed))

    def _placed(self, role: str, settings: LoadSettings) -> tuple[Free, Placed, _Loaded | None]:
        """(what is free, where it goes, what is loaded already and is it)."""
        plan = self._plan(settings)
        free = self._free(plan.device)
        if found := self._held(plan, settings):
            return free, found.placed, found
        placed = place(settings, plan, self._without(role, free), self._hardware)
        moved = placed.plan.device != plan.device
        return free, placed, self._held(placed.plan, placed.settings) if moved else None

    def beforehand(self, role: str, key: str) -> tuple[Placed, str]:
        """(where `key` would be loaded for that role, "loaded" | "here" | "lacking"): is it, are its files at hand.

        Nothing is loaded or fetched. Raises UserError for what would keep a load, or its download, from beginning.
        """
        settings = self._settings(key)
        with settings.naming():
            _, placed, found = self._placed(role, settings)
            if found is not None:
                return placed, "loaded"
            return placed, "here" if check_files(placed.plan, placed.settings) else "lacking"

    def _settings(self, key: str) -> LoadSettings:
        return replace(self._base, model=key, said="")

    def _plan(self, settings: LoadSettings) -> Plan:
        """The plan for one of two models in one process."""
        plan = make_plan(settings, self._hardware)
        if settings.engine == "auto" and plan.device == "cuda" and plan.engine in (*ELSEWHERE, "unsloth"):
            quantization = settings.quantization or self._hardware.training_quantization
            plan = replace(plan, engine="hf", why=ONE_EACH, quantization=quantization)
        if plan.engine in ELSEWHERE:
            raise BadInputError(f"--engine {plan.engine} keeps its model in another process", "use --engine auto")
        return plan

    def _held(self, plan: Plan, settings: LoadSettings) -> _Loaded | None:
        """What is loaded already and is what `plan` means."""
        return next((held for held in self._loaded.values() if _same(held.placed, settings, plan)), None)

    def _give(self, role: str, found: _Loaded) -> _Loaded:
        """Let a role hold `found`, and nothing else."""
        if self._loaded.get(role) is not found:
            self.unload(role)
            self._loaded[role] = found
        return found

    def _without(self, role: str, free: Free) -> Free:
        """`free`, and the memory of what this role alone holds."""
        held = self._loaded.get(role)
        if held is None or any(other is held for name, other in self._loaded.items() if name != role):
            return free
        return free.with_more(held.placed.plan.device, held.gb)

    # ------------------------------------------------------------ using

    def get_evaluation_model(self) -> tuple[Any, Any]:
        """(model, tokenizer); EngineError if none is loaded."""
        return self._pair("evaluation")

    def get_generation_model(self) -> tuple[Any, Any]:
        """(model, tokenizer); EngineError if none is loaded."""
        return self._pair("generation")

    def _pair(self, role: str) -> tuple[Any, Any]:
        found = self._loaded.get(role)
        pair = (None, None) if found is None else found.pair
        if pair[0] is None:
            raise EngineError(f"no {role} model is loaded", f"call load_{role}_model(key) first")
        return pair

    def engines(self) -> tuple[Engine, Engine]:
        """(generator, critic): one engine where both roles share their weights, or only one role is loaded.

        EngineError if none is. They are made once; two on one GPU share what is free there (`generators_share`).
        """
        held = [self._loaded.get(role) for role in ("generation", "evaluation")]
        found = [one or other for one, other in zip(held, held[::-1], strict=True)]
        if found[0] is None or found[1] is None:
            raise EngineError("no model is loaded", "call load_generation_model(key) first")
        plans = [one.placed.plan for one in (found[0], found[1])]
        together = found[0] is not found[1] and plans[0].device == plans[1].device
        first = generators_share(*(known_numbers(plan.choice) for plan in plans)) if together else 1.0
        return self._engine(found[0], first), self._engine(found[1], 1 - first if together else 1.0)

    def engine_of(self, role: str) -> Engine:
        """The engine of what one role holds, the same object for roles that share it. EngineError if it holds none."""
        if role not in self._loaded:
            raise EngineError(f"no {role} model is loaded", "load one first")
        if role in ROLES:
            generator, critic = self.engines()
            return critic if role == ROLES[0] else generator
        return self._engine(self._loaded[role], 1.0)

    def names(self) -> dict[str, str]:
        """{role: the name of what it holds}; unlike `get_status_info` it measures nothing."""
        return {role: held.name for role, held in list(self._loaded.items())}

    def role_with(self, place: str) -> str | None:
        """The role that holds the model of that folder or hub id, in whatever precision; generation before others."""
        found = [role for role, held in list(self._loaded.items()) if held.placed.plan.choice.path_or_id == place]
        return max(found, key=lambda role: role == ROLES[1], default=None)

    def _engine(self, loaded: _Loaded, share: float) -> Engine:
        if loaded.engine is None:
            placed, (model, tokenizer) = loaded.placed, loaded.pair
            settings = placed.settings
            if share < 1 and settings.batch_size is None and placed.plan.engine == "hf":
                settings = replace(settings, batch_size=slots_of(share, model, placed.plan.device))
            loaded.engine = engine_over(placed.plan, settings, model, tokenizer, loaded.facts)
            loaded.model = loaded.tokenizer = None
        engine: Engine = loaded.engine
        return engine

    # ------------------------------------------------------------ freeing

    def unload_evaluation_model(self) -> None:
        """Let go of it; its memory is given back as soon as no role holds it."""
        self.unload("evaluation")

    def unload_generation_model(self) -> None:
        """As `unload_evaluation_model`."""
        self.unload("generation")

    def unload_all(self) -> None:
        """Let go of all."""
        for role in list(self._loaded):
            self.unload(role)

    def unload(self, role: str) -> None:
        """As `unload_evaluation_model`, of any role; nothing if it holds nothing."""
        found = self._loaded.pop(role, None)
        if found is None or found in self._loaded.values():
            return
        if found.engine is not None:
            found.engine.close()
        found.engine = found.model = found.tokenizer = None
        _give_back()

    # ------------------------------------------------------------ saying

    def get_status_info(self) -> dict[str, Any]:
        """What is loaded: device, for each role name, parameters, memory_gb, device, quantization (or None), whether
        they are shared, total_memory_gb (shared weights once), what is free, and on CUDA what torch's allocator holds.

        GB are 10^9 bytes, measured on the tensors.
        """
        device = self._base.device or self._hardware.kind
        free = self._free(device)
        once = {id(found): found for found in list(self._loaded.values())}
        both = [self._loaded.get(role) for role in ROLES]
        info: dict[str, Any] = {f"{role}_model": self._status(role) for role in ROLES}
        return info | {
            "device": device,
            "shared": both[0] is both[1] is not None,
            "total_memory_gb": sum(found.gb for found in once.values()),
            "free_gpu_gb": free.gpu,
            "free_ram_gb": free.ram,
            "allocated_gpu_gb": allocated_gb(device),
        }

    def _status(self, role: str) -> dict[str, Any] | None:
        found = self._loaded.get(role)
        if found is None:
            return None
        plan = found.placed.plan
        return {"name": found.name, "parameters": found.parameters, "memory_gb": found.gb, "device": plan.device,
                "quantization": plan.quantization, "note": found.placed.note}  # fmt: skip

    def _described(self, found: _Loaded, role: str) -> str:
        """A loaded model in one line."""
        plan = found.placed.plan
        others = [held for name, held in self._loaded.items() if name != role]
        shared = ", shared by both roles" if found in others else ""
        note = f" ({found.placed.note})" if found.placed.note else ""
        return (f"{found.name}, {in_short(found.parameters)} parameters, {found.gb:.2f} GB "
                f"on {plan.device}{shared}{note}")  # fmt: skip


def _load(placed: Placed) -> _Loaded:
    model, tokenizer, facts = load_model(placed.plan, placed.settings)
    choice = placed.plan.choice
    local = choice.preset is None or choice.preset.is_local
    name = choice.name if local else choice.path_or_id.split("/")[-1]
    return _Loaded(placed, name, facts, model.num_parameters(), tensors_gb(model), model, tokenizer)


def _same(held: Placed, settings: LoadSettings, plan: Plan) -> bool:
    """True if `plan` means weights that are loaded already: the same files, precision, device and engine."""
    one, other = held.plan, plan
    wanted = (other.choice.path_or_id, other.engine, other.quantization, other.device)
    return (one.choice.path_or_id, one.engine, one.quantization, one.device) == wanted and (
        held.settings.random_weights,
        held.settings.layout,
    ) == (settings.random_weights, settings.layout)


def _give_back() -> None:
    from cai_experiment.engines.common import give_memory_back

    give_memory_back()
