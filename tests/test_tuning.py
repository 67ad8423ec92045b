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
from coded_torch.workers import LocalWorkers


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


class Own(KernelCode):
    """A code with an argument more."""

    def __init__(self, name):
        super().__init__(5, 8)
        self.name = name


def test_the_code_remains_what_it_is(generator):
    coded = CodedWrapper(torch.nn.Tanh(), Own("mine"), stragglers=Uniform(2, seed=0))
    x = torch.randn(40, 3, generator=generator)
    code = tune(coded, [x], shrinkages=[0.5], lengths=[3.0], placements=[0.25])
    assert type(code) is Own
    assert (code.name, code.shrinkage, code.length, code.placement) == ("mine", 0.5, 3.0, 0.25)
    assert code.max_run == KernelCode(5, 8, placement=0.25).max_run
    assert code.replace(placement=0.0).max_run == KernelCode.max_run
    with pytest.raises(ValueError, match=r"Own: placement must be in \[0, 1\], got 2"):
        code.replace(placement=2)


def test_as_large_batches_as_the_workers_take_and_nobody_hears_of_it(generator):
    def deaf(*_):
        raise AssertionError

    seen, model = [], torch.nn.Tanh()
    model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    workers = LocalWorkers(Uniform(2, seed=0), max_batch_size=8)
    coded = CodedWrapper(model, KernelCode(5, 8), workers=workers, on_run=deaf)
    coded.register_forward_hook(deaf)
    x = torch.randn(40, 3, generator=generator)
    tune(coded, [x], shrinkages=[0.0, 0.5], placements=[0.0, 0.5])
    assert max(seen) <= 8
    coded.on_run, coded._forward_hooks = None, {}
    twin = CodedWrapper(model, KernelCode(5, 8))
    coded(x), twin(x)
    assert coded._shuffler.random() == twin._shuffler.random()


def test_one_input_that_is_far_longer_does_not_choose(generator):
    class Ramp(torch.nn.Module):
        def forward(self, x):
            return x.sum(1, keepdim=True)

    x = torch.randn(60, 3, generator=generator)
    lengths = [0.1, 3.0]
    for factor in (1, 1e4):
        x[0] *= factor
        coded = CodedWrapper(Ramp(), KernelCode(5, 8), stragglers=Uniform(2, seed=0))
        assert tune(coded, [x], lengths=lengths, placements=[0.0]).length == 3.0


@pytest.mark.parametrize("argument", ["shrinkages", "lengths", "placements"])
def test_nothing_to_choose_from(argument):
    coded = CodedWrapper(torch.nn.ReLU(), KernelCode(4, 8))
    with pytest.raises(ValueError, match=f"tune: {argument} must hold at least one, got none"):
        tune(coded, [torch.ones(4, 1)], **{argument: []})
    with pytest.raises(TypeError, match=r"KernelCode: .* must .*, got 'auto'"):
        tune(coded, [torch.ones(4, 1)], **{argument: ["auto"]})


def test_bad_arguments():
    with pytest.raises(TypeError, match="must be of type KernelCode, got SplineCode"):
        tune(CodedWrapper(torch.nn.ReLU(), SplineCode(4, 8)), [torch.ones(4, 1)])
    with pytest.raises(ValueError, match="tune: batches must hold at least one, got none"):
        tune(CodedWrapper(torch.nn.ReLU(), KernelCode(4, 8)), [])
