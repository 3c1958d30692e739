"""Estimates of the loss's curvature, one number for each dimension."""
