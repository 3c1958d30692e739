"""Labelled sentences and instruction pairs: read from files, checked, made ready for a model."""
