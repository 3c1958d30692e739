"""Faults on the way of an output to the disk: failing calls, kills, races.

`python -m tests.faults` kills runs at random and lets runs race; see `--help`.
"""
