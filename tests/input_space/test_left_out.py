"""Metrics that cannot be used are left out, and the report says so."""

import math

import torch
from torch import nn

from coded_torch import CodedWrapper, codes, stragglers, workers


def test_a_metric_whose_features_are_not_finite_is_left_out_with_a_note():
    def unknown(x):
        return torch.full((len(x), 2), math.nan)

    x = torch.randn(24, 3, generator=torch.Generator().manual_seed(0))
    with workers.LocalWorkers(stragglers.Uniform(6, seed=0)) as pool, torch.no_grad():
        code = codes.RegressionCode(24, 24, metric=[unknown])
        _, report = CodedWrapper(nn.Identity(), code, workers=pool).run(x)
    (note,) = report.notes
    assert note.startswith("the metric unknown was left out: its features are not finite")
