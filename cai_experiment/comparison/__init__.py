"""One work, several models: the same instructions, critiques and texts, one model at a time in memory."""
