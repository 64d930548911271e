"""Fuzzing: many hostile inputs, each in a process of its own. `python -m tests.fuzz artifacts`."""
