"""Trained adapters for elsewhere: merged, for vLLM, GGUF, the hub; each held against the adapter model first."""
