"""A code of one's own, by the steps of :class:`coded_torch.codes.Code`, from end to end."""

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

from coded_torch._arguments import count
from coded_torch.codes import CurveCode
from coded_torch.experiments import scores
from coded_torch.experiments._tune import tune
from coded_torch.linear import MatrixMap, SplineMap
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.testing.codes import CodeTests
from coded_torch.workers import LocalWorkers


class BSplineCode(CurveCode):  # 1. inputs and workers sit at points of a curve
    """B-splines with the inputs for coefficients, after arXiv 2601.10616.

    Local support: a coded input mixes ``degree + 1`` neighbouring inputs at most. The decoder is
    the interpolating spline, smoothing 0.
    """

    default_worker_points = staticmethod(lambda n: np.arange(1 - n, n, 2) / n)

    def __init__(self, num_data, num_workers, *, degree=3, **options):  # 2. checked, and kept
        super().__init__(num_data, num_workers, **options)
        self.degree = count(self, "degree", degree, most=self.num_data - 1)
        inner = np.linspace(-1, 1, self.num_data - self.degree + 1)
        self._knots = np.pad(inner, self.degree, mode="edge")
        # Where each B-spline has its centre; with these, straight lines are reproduced.
        windows = np.lib.stride_tricks.sliding_window_view(self._knots[1:-1], self.degree)
        self.data_points = self._points("data_points", windows.mean(1), self.num_data)

    def _make_encoder(self):  # 3. linear maps
        basis = BSpline.design_matrix(self.worker_points, self._knots, self.degree)
        return MatrixMap(basis.toarray())

    def _curve(self, nodes, points):
        return SplineMap(nodes, points)

    def candidates(self):  # 4. what is worth tuning
        return {"degree": range(1, min(4, self.num_data))}


class TestBSplineCode(CodeTests):  # 5. the suite
    def make(self):
        return BSplineCode(8, 24)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_local_support(degree):
    matrix = BSplineCode(12, 40, degree=degree).encoder.matrix()
    assert int((matrix != 0).sum(1).max()) == degree + 1
    assert (matrix >= 0).all()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="BSplineCode: degree must be at most 2, got 3"):
        BSplineCode(3, 5)
    with pytest.raises(ValueError, match="BSplineCode: num_workers must be at least num_data, 8"):
        BSplineCode(8, 5)


def test_it_runs_and_tunes_like_any_other(generator):
    x = torch.randn(64, 2, dtype=torch.float64, generator=generator)
    module = torch.nn.Tanh()
    coded = CodedWrapper(module, BSplineCode(8, 24), workers=LocalWorkers(Uniform(4, seed=0)))
    mean = module(x).mean(0).expand_as(x)
    assert scores.rmse(coded(x), module(x)) < 0.5 * scores.rmse(mean, module(x))
    assert tune(coded, [x]).degree in (1, 2, 3)
