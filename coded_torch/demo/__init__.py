"""The demo: a small network, real digits, and every code under the same lost workers."""
