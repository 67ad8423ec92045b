"""The choice between sweeping columns and multiplying them by a dense matrix on a GPU."""

__all__ = ["dense_instructions", "prefers_matrix", "sweep_instructions"]

# Instructions of a warp for 32 columns of float32, counted in the PTX that nvcc 13.0 writes for
# sm_90, moves left out: of the sweeps for each knot and each point, and of the product for each
# entry of the matrix. The product takes 75 for 16 rows of the matrix and four columns a thread.
_PER_KNOT = 90
_PER_POINT = 35
_PER_ENTRY = 1.2
# Matrices have their rows in multiples of this number (kDenseRows in dense_block.h).
_ROWS = 16
# How many times longer an instruction of a sweep takes, since it depends on the one before. By the
# model of an H100 that `python -m benchmarks.kernels --model` prints, not yet measured.
_WAITING = 1.5


def sweep_instructions(num_knots: int, num_points: int) -> float:
    """Return the instructions of a warp that sweeps its 32 columns."""
    return _PER_KNOT * num_knots + _PER_POINT * num_points


def dense_instructions(num_knots: int, num_points: int) -> float:
    """Return the instructions for 32 columns of the product with the dense matrix."""
    return _PER_ENTRY * num_knots * -(-num_points // _ROWS) * _ROWS


def prefers_matrix(num_knots: int, num_points: int) -> bool:
    """Return whether a GPU multiplies by the dense matrix of a plan rather than sweep.

    The number of columns has no say: a column's result must not depend on it.
    """
    dense = dense_instructions(num_knots, num_points)
    return 0 < dense <= _WAITING * sweep_instructions(num_knots, num_points)
