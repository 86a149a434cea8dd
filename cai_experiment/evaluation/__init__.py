"""DID IT HELP: preference, held-out answers, truth on the shipped model, gates and the report."""
