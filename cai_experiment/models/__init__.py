"""WHAT CAN RUN: hardware, presets, and the arithmetic of memory, time and cost. Imports no torch."""

from cai_experiment.models.hardware import (
    get_hardware_profile,
    list_available_models,
    print_model_comparison,
    recommend_model_for_hardware,
)
from cai_experiment.models.presets import get_model_preset

__all__ = [
    "get_hardware_profile", "get_model_preset", "list_available_models", "print_model_comparison",
    "recommend_model_for_hardware",
]  # fmt: skip
