"""What a run is asked for, and what it came to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from cai_experiment.constitution.grid import HOUSEHOLD
from cai_experiment.pipeline.evaluation_sets import EvaluationSet
from cai_experiment.pipeline.gate import GateSettings
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.mix import Part
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.records.manifest import Manifest


@dataclass(frozen=True, slots=True)
class RunSettings:
    """One run. Instructions come from `mix`, or are all written by the model, until `pairs` were accepted or
    `max_draws` were drawn; with `instructions` every row is used once. With `every_draw` all of `max_draws` are drawn,
    however many pass, and each gets its line (`pairs` is then no target).

    The names are what the manifest says of files: their names and hashes. `evaluation_sets` must not be trained on.
    With `allow_evaluation_sets` the shipped ones are not among them.
    `grid` names the grid from which the model's own instructions are drawn: HOUSEHOLD or BROAD.
    `guard` names the guard that reads the pairs afterwards; "" for none. While it has not read all, `spare` pairs more
    are made, in place of those that it will turn down, and with `whole_blocks` those of a block of `match_lengths` that
    are not wanted themselves are written for it: which pairs of a block are left out depends on them. Both say how far
    a session goes, not what it writes, and are not recorded.
    """

    pairs: int
    max_draws: int
    stages: StageSettings = field(default_factory=StageSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    instructions: tuple[Instruction, ...] | None = None
    instructions_name: str = ""
    mix: tuple[Part, ...] = ()
    mix_name: str = ""
    grid: str = HOUSEHOLD
    evaluation_sets: tuple[EvaluationSet, ...] = ()
    match_lengths: bool = False
    guard: str = ""
    spare: int = 0
    whole_blocks: bool = False
    allow_evaluation_sets: bool = False
    every_draw: bool = False
    seed: int = 0
    price_per_hour: float = 0.0

    @property
    def whole_list(self) -> bool:
        """True if the run ends with its list of instructions, False if it ends with `pairs` accepted ones."""
        return self.every_draw or self.instructions is not None

    def recorded(self) -> dict[str, object]:
        """What the manifest holds and a resumed run must not change."""
        stages = asdict(self.stages)
        stages.pop("seed")
        if self.stages.critique:
            stages.pop("critique")  # as in runs before there was a choice
        gate = {f"gate_{name}": value for name, value in asdict(self.gate).items()}
        source: dict[str, object] = {
            "instructions": self.instructions_name, "mix": self.mix_name, "grid": self.grid,
            "exclude": [one.name for one in self.evaluation_sets],
        }  # fmt: skip
        if self.allow_evaluation_sets:
            source["allow_evaluation_sets"] = True
        if self.every_draw:
            source["every_draw"] = True
        after = {"match_lengths": self.match_lengths, "guard": self.guard or "none"}
        return {"pairs": self.pairs, "max_draws": self.max_draws, **stages, **gate, **source, **after}


@dataclass(frozen=True, slots=True)
class RunResult:
    """What stands in the folder. `complete`: the pairs were reached, or the whole list of instructions was used."""

    accepted: int
    rejected: int
    reasons: dict[str, int]  # of the rejected examples; one example may have several
    refused: dict[str, int]  # instructions that were not used, by reason
    ran_out: dict[str, int]  # sources of a mix that had no more, and after how many instructions
    candidates: int
    complete: bool
    tokens: dict[str, int]  # of this session: prompt, computed, completion
    wall_seconds: float  # of this session
    manifest: Manifest

    @property
    def drawn(self) -> int:
        """How many instructions it took."""
        return self.accepted + self.rejected
