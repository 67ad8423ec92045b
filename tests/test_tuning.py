"""Choosing the numbers of a code on unlabelled data."""

import math

import pytest
import torch

from coded_torch import metrics
from coded_torch.codes import KernelCode, SplineCode
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.tuning import tune


def test_chooses_what_does_best_on_other_digits():
    model, (images, _) = lenet5(), digits()
    wrapper = CodedWrapper(model, KernelCode(20, 24), stragglers=Uniform(4, seed=0))
    code = tune(
        wrapper, images[:480].split(240), shrinkages=(0.0, 0.0125), lengths=(0.2, 2.0, 20.0)
    )
    assert wrapper.code.shrinkage == KernelCode(20, 24).shrinkage
    assert (code.shrinkage, code.length) == (0.0125, 2.0)
    errors = {}
    with torch.inference_mode():
        for name, other in (("tuned", code), ("untuned", KernelCode(20, 24, length=0.2))):
            coded = CodedWrapper(model, other, stragglers=Uniform(4, seed=1))
            answers = torch.cat([coded(part) for part in images[480:1200].split(240)])
            errors[name] = metrics.rmse(answers, model(images[480:1200]))
    assert errors["tuned"] < 0.9 * errors["untuned"]


def test_a_tuple_is_several_arguments_and_outputs_may_be_nested(generator):
    class Two(torch.nn.Module):
        def forward(self, x, scale):
            return {"sine": (x * scale).sin(), "none": None}

    x = torch.randn(40, 3, generator=generator)
    coded = CodedWrapper(Two(), KernelCode(5, 8), stragglers=Uniform(2, seed=0), in_dims=(0, None))
    code = tune(coded, [(x, torch.tensor(0.5))], shrinkages=[math.inf], placements=[0.25])
    assert (code.shrinkage, code.placement) == (math.inf, 0.25)


def test_bad_arguments():
    with pytest.raises(TypeError, match="must be of type KernelCode, got SplineCode"):
        tune(CodedWrapper(torch.nn.ReLU(), SplineCode(4, 8)), [torch.ones(4, 1)])
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        tune(CodedWrapper(torch.nn.ReLU(), KernelCode(4, 8)), [])
