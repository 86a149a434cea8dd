"""A Constitutional AI lab for one rented GPU: answer, critique, revise, pair, DPO, evaluate."""

__version__ = "0.1.0"
