"""HOW WEIGHTS CHANGE: DPO on preference pairs, and checkpoints that survive."""
