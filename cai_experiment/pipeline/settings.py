"""What a run is asked for, and what it came to."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from cai_experiment.pipeline.gate import GateSettings
from cai_experiment.pipeline.instruct import Instruction
from cai_experiment.pipeline.stages import StageSettings
from cai_experiment.records.manifest import Manifest


@dataclass(frozen=True, slots=True)
class RunSettings:
    """One run. Without `instructions` the model writes them until `pairs` were accepted or `max_draws` were used."""

    pairs: int
    max_draws: int
    stages: StageSettings = field(default_factory=StageSettings)
    gate: GateSettings = field(default_factory=GateSettings)
    instructions: tuple[Instruction, ...] | None = None
    instructions_name: str = ""  # what the manifest says of them: file name and hash
    seed: int = 0
    price_per_hour: float = 0.0

    def recorded(self) -> dict[str, object]:
        """What the manifest holds and a resumed run must not change."""
        stages = asdict(self.stages)
        stages.pop("seed")
        gate = {f"gate_{name}": value for name, value in asdict(self.gate).items()}
        source = {"instructions": self.instructions_name}
        return {"pairs": self.pairs, "max_draws": self.max_draws, **stages, **gate, **source}


@dataclass(frozen=True, slots=True)
class RunResult:
    """What stands in the folder. `complete`: the pairs were reached, or every row of a file was used."""

    accepted: int
    rejected: int
    reasons: dict[str, int]  # of the rejected examples; one example may have several
    refused: dict[str, int]  # written instructions that were not used, by reason
    candidates: int
    complete: bool
    tokens: dict[str, int]  # of this session: prompt, computed, completion
    wall_seconds: float  # of this session
    manifest: Manifest

    @property
    def drawn(self) -> int:
        """How many instructions it took."""
        return self.accepted + self.rejected
