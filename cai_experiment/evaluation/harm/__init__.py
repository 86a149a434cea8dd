"""HARM in detail: how the rules are read from their files, answers scored, the labelled sets."""
