"""The constants of this package that were chosen once and not tuned."""

# At so many numbers, NumPy is as fast as torch, and keeps the interpreter's lock: an operator of
# torch lets other threads take it, and waits to get it back.
FEW = 512
