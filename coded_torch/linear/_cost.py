"""The choice between sweeping columns and multiplying them by a dense matrix on a GPU."""

__all__ = ["dense_instructions", "prefers_matrix", "sweep_instructions"]

# Instructions of a warp for its 32 columns, float32, counted in the PTX that nvcc 13.0 writes for
# sm_90 (csrc/README.md): of the sweeps for each knot and each point, and of the product for each
# entry of the matrix, a quarter of 88 for 16 entries and four columns a thread.
_PER_KNOT = 80
_PER_POINT = 30
_PER_ENTRY = 1.4
# Matrices have their rows in multiples of this number (kDenseRows in dense_block.h).
_ROWS = 16
# How many times longer an instruction of a sweep takes. Its threads wait for states and
# coefficients, and few of them fit a multiprocessor. By a model of an H100, not yet measured.
_WAITING = 2.0


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
