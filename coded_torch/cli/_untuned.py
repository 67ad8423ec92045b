"""The constants of this package that were chosen once and not tuned."""

ERROR_CHARACTERS = 1000  # characters of an error, at most
MOST_OPEN = 64  # files
# A file of more bytes that has less than a 64th of them on the disk would take long to read, and
# nobody wrote it as it is.
LARGE_FILE = 2**30
HOLES = 64
MOST_NAMES = 2**20  # bytes beside the numbers of a file of torch.save
MOST_CLAIM = 2**20  # bytes
MOST_LINES = 100  # of wrong batches
# Deadlines of one part after which a worker counts as hung, but at least a second. A kill costs a
# restart, so it waits for ten times as long as any client.
HANG_DEADLINES = 10
# The rows of a batch: on 240 digits, groups of 20 inputs divide evenly.
BATCH_SIZE = 240
