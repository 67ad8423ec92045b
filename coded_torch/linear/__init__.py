r"""Linear maps along one dimension of a tensor: the seam between codes and kernels.

A code says *what* its encoder and decoders are; a :class:`LinearMap` knows *how* to apply them to
tensors of millions of columns. Maps are planned once, on the host, in float64, and are immutable.
Nothing above this package calls ``ops``.
"""

from .base import LinearMap
from .maps import MatrixMap, SelectMap
from .spline import SplineMap

__all__ = ["LinearMap", "MatrixMap", "SelectMap", "SplineMap"]
