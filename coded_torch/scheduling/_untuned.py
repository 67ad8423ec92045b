"""The constants of this package that were chosen once and not tuned."""

# More parts and calls follow changes more slowly, fewer make thresholds noisier.
PARTS = 512  # remembered
CALLS = 128  # remembered
ESTIMATES = 16  # remembered
RETRY = 32  # estimates by the mean, after which the slowest regression is forgotten
# Until 32 parts have replied, no part is late sooner than these seconds, as workers may still load
# code. A server that hung held such a call for its own timeout, 600 s by default.
SOONEST_IF_NEW = 2.0
