"""Hostile bytes without end: what is fuzzed (`targets`), with what (`shapes`), and for long."""
