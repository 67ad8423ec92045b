"""The best linear decoder, learnt from some of the shipped digits, on the others."""

import functools

import pytest
import torch
from torch import nn

from coded_torch import metrics, points
from coded_torch.calibration import calibrate
from coded_torch.codes import CalibratedCode, KernelCode, NotEnoughResults, SplineCode
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.workers import LocalWorkers

K, N, S = 20, 24, 4
SPLINE = SplineCode(K, N, data_points=points.equidistant(K), worker_points=points.equidistant(N))
ORDERINGS = ("similarity", "arrival")


def rows(start, stop, size, number, seed=0):
    images, _ = digits()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        yield images[start + torch.randperm(stop - start, generator=generator)[:size]]


@functools.cache
def learnt(ordering, number, size=240):
    coded = CodedWrapper(lenet5(), SPLINE, ordering=ordering)
    return calibrate(coded, rows(0, 1000, size, number))


@torch.no_grad()
def measured(code, ordering):
    """The error on the other digits, and the one expected."""
    model, late = lenet5(), torch.Generator().manual_seed(0)
    coded = CodedWrapper(model, code, ordering=ordering, stragglers=Uniform(S), generator=late)
    answers, exact, expected = [], [], []
    for images in rows(1000, 2000, 240, 8, seed=1):
        answers.append(coded(images))
        exact.append(model(images))
        expected.append(coded.last_run.expected_rmse or 0.0)
    return metrics.rmse(torch.cat(answers), torch.cat(exact)), torch.tensor(expected)


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_it_beats_the_spline_on_other_digits(ordering):
    spline, _ = measured(SPLINE, ordering)
    error, expected = measured(learnt(ordering, 10), ordering)
    assert error < 0.93 * spline
    assert float(expected.square().mean().sqrt()) == pytest.approx(error, rel=0.15)


@pytest.mark.parametrize("ordering", ORDERINGS)
def test_a_single_group_does_no_harm(ordering):
    code = learnt(ordering, 1, size=K)
    assert code.num_groups == 1
    assert measured(code, ordering)[0] < 1.03 * measured(SPLINE, ordering)[0]


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 1, 28, 28)]])
def test_nothing_to_learn_from(batches):
    with pytest.raises(ValueError, match="calibrate: batches must hold at least one input, got no"):
        calibrate(CodedWrapper(lenet5(), SPLINE), batches)


def test_no_group_no_change():
    code = CalibratedCode(SPLINE)
    assert measured(code, "similarity")[0] == pytest.approx(
        measured(SPLINE, "similarity")[0], rel=0.01
    )


def moments(code, model, inputs):
    """In arrival order, without the wrapper."""
    groups = inputs.unflatten(0, (-1, code.num_data)).movedim(1, 0)  # [K, G, ...]
    everything = torch.cat([code.encode(groups), groups])
    outputs = model(everything.flatten(0, 1)).unflatten(0, everything.shape[:2]).double()
    centred = (outputs - outputs[code.num_workers :].mean((0, 1))).flatten(1)
    return centred @ centred.T


def test_what_it_measures():
    model, batches = lenet5(), list(rows(0, 2000, 60, 2))
    coded = CodedWrapper(model, SPLINE, ordering="arrival", stragglers=Uniform(S), shuffle=True)
    code = calibrate(coded, batches)
    with torch.no_grad():
        expected = sum(moments(SPLINE, model, x) for x in batches) / 6
    assert code.num_groups == 6
    assert code.code is SPLINE
    torch.testing.assert_close(code.moments, expected, rtol=1e-4, atol=1e-4)
    again = calibrate(CodedWrapper(model, code, ordering="arrival"), batches)
    assert torch.equal(again.moments, code.moments)


class Several(nn.Module):
    def forward(self, x, shift):
        return {"y": x.sin() + shift, "z": [x.T.cos(), None]}


def test_batches_are_what_the_wrapper_is_called_with():
    spline = SplineCode(2, 3)
    coded = CodedWrapper(
        Several(), spline, ordering="arrival", in_dims=(0, None), out_dims={"y": 0, "z": 1}
    )
    x = torch.linspace(0, 3, 8, dtype=torch.float64)[:, None]
    code = calibrate(coded, [(x, torch.ones(1))])
    expected = moments(spline, torch.sin, x) + moments(spline, torch.cos, x)
    assert code.num_groups == 4
    torch.testing.assert_close(code.moments, expected / 4)


def test_probabilities_count_as_logits():
    logits = nn.Linear(1, 3).double()
    spline, x = SplineCode(2, 3), torch.linspace(0, 3, 8, dtype=torch.float64)[:, None]
    with_link = CodedWrapper(
        nn.Sequential(logits, nn.Softmax(-1)), spline, link="softmax", ordering="arrival"
    )
    plain = CodedWrapper(nn.Sequential(logits, nn.LogSoftmax(-1)), spline, ordering="arrival")
    torch.testing.assert_close(calibrate(with_link, [x]).moments, calibrate(plain, [x]).moments)


def test_a_model_that_is_not_finite():
    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt()

    with pytest.raises(NotEnoughResults):
        calibrate(CodedWrapper(Root(), SplineCode(2, 3), ordering="arrival"), [-torch.ones(2, 1)])


def test_only_fixed_codes_can_be_calibrated():
    with pytest.raises(TypeError, match="must be of type FixedCode, got KernelCode"):
        calibrate(CodedWrapper(lenet5(), KernelCode(2, 3)), [])


def test_as_large_batches_as_the_workers_take_and_nobody_hears_of_it():
    def deaf(*_):
        raise AssertionError

    seen, model = [], nn.Identity()
    model.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    coded = CodedWrapper(
        model, SplineCode(4, 6), workers=LocalWorkers(max_batch_size=7), on_run=deaf
    )
    coded.register_forward_hook(deaf)
    assert calibrate(coded, [torch.randn(40, 3)]).num_groups == 10
    assert max(seen) <= 7


def test_nothing_is_left_in_the_wrapper():
    coded = CodedWrapper(lenet5(), SPLINE, ordering="arrival", stragglers=Uniform(S))
    before = dict(vars(coded))
    calibrate(coded, rows(0, 100, 20, 1))
    assert vars(coded) == before
