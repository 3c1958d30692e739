"""Keeps pytest out of here: nothing is a test, and psutil is no requirement of the tests."""

collect_ignore_glob = ["*.py", "rivals/*.py"]
