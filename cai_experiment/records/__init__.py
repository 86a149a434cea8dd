"""WHAT WAS WRITTEN: the lines, files, folders and manifests of a run. Imports no torch."""
