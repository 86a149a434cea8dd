"""The three experts that ship: the world that they learned, how they were trained, their weights."""
