"""Fast DPO: what a packed pass is, and how attention, adapter layers, head and reference are computed in it."""
