"""Several frozen experts answer together, token by token; a small head on each says whose word counts."""
