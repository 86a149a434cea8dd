"""The scripted engine of scripts/kill_test.py, under the name by which tests import it."""

from cai_experiment.scripts._scripted_engine import ScriptedEngine, number, script

__all__ = ["ScriptedEngine", "number", "script"]
