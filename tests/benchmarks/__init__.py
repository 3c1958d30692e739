"""How fast and how lean `wsurg` is, against rivals; run with `python -m tests.benchmarks`."""
