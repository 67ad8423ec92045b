"""Distances between inputs, orders of a batch, and regressions on them."""
