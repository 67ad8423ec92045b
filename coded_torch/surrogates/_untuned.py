"""The constants of this package that were chosen once and not tuned."""

HELD_OUT = 10  # one row of so many is held out
# New rows after which the regression is made again, and the share of time for it.
FRESH = 256
SHARE = 0.02
