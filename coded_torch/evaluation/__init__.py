"""Comparisons of codes, the choice of their numbers, and plans of redundancy."""
