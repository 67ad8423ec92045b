"""Experiments: comparisons of codes, the choice of their numbers, plans, simulation and faults.

They import the product, which never imports them, but for public names that are loaded on demand.
"""
