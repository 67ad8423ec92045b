"""The demo: a small network and real digits."""
