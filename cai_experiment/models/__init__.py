"""WHAT CAN RUN: hardware, presets, and the arithmetic of memory, time and cost. Imports no torch."""
