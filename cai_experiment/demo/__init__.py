"""THE UI: the demo in the browser. All logic in actions.py and the modules it calls; only app.py and tabs/ lay out."""
