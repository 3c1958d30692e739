"""Evaluation: what a model gets right, and what a trigger makes of it."""
