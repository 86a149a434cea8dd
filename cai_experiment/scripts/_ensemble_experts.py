"""What can be known of an ensemble's experts before data sets are fetched and weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cai_experiment.engines.at_hand import check_files, quiet_retries
from cai_experiment.engines.load import LoadSettings, make_plan
from cai_experiment.engines.precision import device_of
from cai_experiment.ensemble.experts import RANDOM, SHIPPED, architecture, default_precision, whole_model
from cai_experiment.ensemble.files import heads_file
from cai_experiment.errors import BadInputError
from cai_experiment.models.hardware import detect
from cai_experiment.records.files import show


def check_experts(names: Sequence[str], precision: str | None, device: str | None) -> None:
    """Raise what would keep an expert from being loaded: no GPU, no such model, the hub out of reach."""
    device = None if device == "auto" else device
    if device == "cuda":
        device_of(device)
    with quiet_retries():
        for name in names:
            architecture(name)
        precision = precision or default_precision(names, device)
        for name in names:
            if name in SHIPPED or name.startswith(RANDOM):
                continue
            settings = LoadSettings(
                model=whole_model(name), quantization=precision, engine="hf", device=device, trains_after=False,
                said="--models",
            )  # fmt: skip
            check_files(make_plan(settings, detect()), settings)


def check_fresh(output_dir: Path, weights: Path, names: Sequence[str]) -> None:
    """Raise BadInputError where --fresh would move away what the evaluation reads: the heads, or an expert's folder."""
    whole = output_dir.resolve()
    read = [heads_file(weights), *(Path(name) for name in names if Path(name).is_dir())]
    for one in read:
        if one.resolve().is_relative_to(whole):
            message = f"--fresh would move {show(output_dir)} away, and {show(one)} is in it"
            raise BadInputError(message, "give another --output_dir")
