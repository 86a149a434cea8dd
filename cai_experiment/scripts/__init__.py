"""WHAT A USER RUNS: one thin script per thing."""
