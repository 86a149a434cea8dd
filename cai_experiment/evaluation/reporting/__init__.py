"""THE REPORT in detail: merging parts, names, tables, plots, pages, the terminal, runs compared."""
