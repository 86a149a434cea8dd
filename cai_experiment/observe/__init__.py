"""WHAT IS SEEN: the content log and the progress bar."""
