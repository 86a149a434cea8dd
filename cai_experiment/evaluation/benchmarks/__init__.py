"""BENCHMARKS in detail: fetched files, rows, classifiers and grades."""
