"""HOW PAIRS ARE MADE: instructions, the stages of one example, the gate, and the runner that streams them."""
