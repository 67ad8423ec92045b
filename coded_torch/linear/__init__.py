r"""Linear maps along one dimension of a tensor, planned once, on the host, in float64.

A code has an encoder and decoders; a :class:`LinearMap` applies them to millions of columns.
"""

from .maps import LinearMap, MatrixMap
from .spline import SplineMap

__all__ = ["LinearMap", "MatrixMap", "SplineMap"]
