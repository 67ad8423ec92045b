"""Numbers of this room that were chosen once, and not tuned."""

# Seconds after which a part of a proof that has not replied is asked again.
PROOF_PATIENCE = (1.0, 4.0, float("inf"))
ROWS_OF_PROOF = 16  # rows that the rows of a proof are chosen from
CLOSING_SECONDS = 10.0  # a pool that closes waits so long for its threads
PATIENCE = 0.5  # seconds at a part, after which no failed part waits for the worker
# Seconds between two looks whether a part has begun, and for a worker that may take a failed part.
LOOK = 0.005
AGAIN = 0.1
BEATS = 4  # signs of life per ``hang_timeout``: some may be late on a busy machine
LONGEST_BEAT = 10.0  # seconds between signs of life, at most
RECENT = 10.0  # seconds since its last part began, for which a module still has calls
FAILED_STARTS = 3  # in a row, after which waiting parts fail, instead of at their timeout
LONGEST_PAUSE = 5.0  # seconds between attempts to start: .2, .4, ..., at most this
# Seconds for a server of workers to import its packages, to take a request while it imports, and to
# fork a worker later, perhaps behind some hundred others; and for news of an end.
IMPORT_SECONDS = 120
SEND_SECONDS = 10.0
FORK_SECONDS = 5.0
ENDING_SECONDS = 0.5
# Pickles of messages that are known with their forms, and their bytes, at most.
MOST_FORMS = 256
LONGEST_FORM = 1 << 12
# Seconds from a failure to the first probe of an endpoint; the pause doubles up to the second
# number, or the third while no endpoint is up. A probe is one small request.
PROBE_SECONDS = 0.25
MOST_PROBE_SECONDS = 30.0
ALONE_PROBE_SECONDS = 1.0
# Doubts in a row after which an endpoint counts as failed: one per part that it left unanswered
# while others answered, more per part that it refused and others computed.
MOST_DOUBTS = 16
DOUBTS_OF_REFUSAL = 6
