"""WHAT IS GOOD: the principles, and every prompt of the project."""
