"""Numbers of the files beside this one that were chosen once, and not tuned."""

# Seconds between two warnings of a cause, causes, and characters of each.
LOG_SECONDS = 60.0
MOST_CAUSES = 256
CAUSE_CHARACTERS = 200
# Elements, and collections, of an attribute that are compared by value, at most.
MOST_ELEMENTS = 100
MOST_NESTED = 256
# The shares of the largest output by which rows that are alone and beside others may differ. With
# bfloat16, transformers of 12 random layers stay below a third of the first, and float32 below a
# hundredth of the second.
ROUNDING_OF_HALF = 0.1
ROUNDING = 1e-3
# Seconds of a fault: long enough to watch, short enough to wait for.
FAULT_SECONDS = 10.0
# A delayed worker runs for a tenth of the time, in turns of so many seconds.
TURN_SECONDS = 0.1
# Numbers of the examples or of their outputs, at most: about 1 MB of JSON.
MOST_NUMBERS = 100_000
