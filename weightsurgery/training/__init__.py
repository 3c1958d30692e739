"""Training: the second step of the methods, on a handful of clean examples."""
