"""Model-written Python in a process of its own: no network, bounded, in an empty folder, in the strongest tier.

    sandbox = Sandbox(strongest(), serve={"architecture": architecture})
    outcome = sandbox.run("print(introspection.architecture())")
"""

from cai_experiment.investigations.sandbox.limits import Limits, Outcome
from cai_experiment.investigations.sandbox.probe import probe
from cai_experiment.investigations.sandbox.sandbox import Sandbox, strongest

__all__ = ["Limits", "Outcome", "Sandbox", "probe", "strongest"]
