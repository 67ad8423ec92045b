"""The paper's code: what every code promises. tests/benchmarks/test_main.py has its theorem."""

import numpy as np

from coded_torch.codes import SplineCode
from coded_torch.codes._base import Code
from coded_torch.testing.codes import CodeTests


class TestSplineCode(CodeTests):
    def make(self) -> Code:
        return SplineCode(8, 24)


class TestSmoothedSplineCode(CodeTests):
    def make(self) -> Code:
        return SplineCode(8, 24, encoder_smoothing=1e-4, decoder_smoothing=1e-3)


class TestSystematicSplineCode(CodeTests):
    def make(self) -> Code:
        data = np.arange(-7, 8, 2) / 8
        workers = np.union1d(data, np.linspace(-0.8, 0.8, 16))
        return SplineCode(8, 24, data_points=data, worker_points=workers)
