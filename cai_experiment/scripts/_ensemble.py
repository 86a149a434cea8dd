"""`--model ensemble:FOLDER`: what turns the name into an engine. Scripts that serve it hand `make_ensemble` in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cai_experiment.models.ensembles import ENSEMBLE

if TYPE_CHECKING:
    from cai_experiment.engines.load import LoadSettings, Plan


def make_ensemble(plan: Plan, settings: LoadSettings) -> Any:
    """The engine of `ensemble:FOLDER` (LoadSettings.ensemble). Raises BadInputError, EngineError, DiskError.

    Prints what a user should know of how the heads meet their experts.
    """
    from cai_experiment.engines.at_hand import check_files
    from cai_experiment.ensemble.engine import open_engine
    from cai_experiment.ensemble.model import MultiModelWithScalarHeads

    check_files(plan, settings)  # of all experts, before minutes of the first one's loading
    heads = Path(plan.choice.path_or_id.removeprefix(ENSEMBLE))
    model = MultiModelWithScalarHeads.from_pretrained(None, heads, precision=plan.quantization, device=plan.device)
    for note in model.notes:
        print(f"{plan.choice.name}: {note}", flush=True)
    return open_engine(model, plan.choice, settings)
