"""One module a tab: `build(actions)` lays it out and wires its buttons to Actions. No logic here."""
