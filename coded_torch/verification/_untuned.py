"""The constants of this package that were chosen once and not tuned."""

# A worker that is new, restarted or at fault is checked so many times as often as others, until so
# many of its rows were clean. More finds faults sooner and costs work at the start.
OFTEN = 10
TRIAL = 30
# An output's spread is at least so much of that of its whole tensor; of one in half precision the
# second, because roundings of earlier layers are alike in all outputs.
LEAST_SPREAD = 1e-4
LEAST_SPREAD_OF_HALF = 0.25
# A worker whose outputs are spread so many times as widely as those of the usual worker tells
# nothing of their spread.
MOST_SPREAD = 4
# Rows from which the spread of outputs is taken: of all workers, and of each at least.
SAMPLE = 64
SAMPLE_EACH = 8
# Added to the correlations of outputs, so that they can be inverted.
RIDGE = 0.05
# Bounds of one call.
DISPUTES = 8  # more disputes than faulty workers explain stay undecided
# A check or a vote is waited for four times the hedging threshold, or four times the call so far,
# if that is longer: a worker that hangs must not hold the call.
PATIENCE = 4
