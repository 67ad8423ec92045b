"""Numbers of codes that were chosen once, and not tuned."""

ROW_SUM = 1e-6  # a row's sum is off from 1 by so much of its numbers at most
CACHED_DECODERS = 256  # of a code; one for 20 of 24 workers holds some 10 KB
PRIOR = 8  # left-out errors that count as much as the usual weight of a midpoint
NEIGHBOURS = 6  # on each side of a worker: its residual is compared with theirs
ROUNDING = 1e-3  # of the spread of the outputs, by which copies differ at most
MOST_PAIRS = 8  # dropped workers of which all pairs are tried
MOST_SIZE = 1e4  # times the median, to which larger results are reduced
