"""Choosing the parameters of a code on unlabelled data."""

import math
from itertools import islice

import pytest
import torch

from coded_torch.codes import LagrangeCode, RegressionCode, ReplicationCode, SplineCode
from coded_torch.experiments._tune import received_sets, tune
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.stragglers import Contiguous, ShiftedExponential, Uniform
from coded_torch.workers import LocalWorkers

from ..nn.modules import Call


def wrapped(module, code, delays=None, **options):
    return CodedWrapper(module, code, workers=LocalWorkers(delays or Uniform(2, seed=0)), **options)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (torch.nn.Tanh(), {"ordering": "arrival"}),
        (torch.nn.Tanh(), {}),
        (Call(lambda x: (5 * x).softmax(-1)), {"link": "softmax"}),
    ],
    ids=str,
)
def test_the_choice_is_what_the_wrapper_does_best_with(model, options, generator):
    """By brute force: the wrapper itself, with every code, on the same draws."""
    x = torch.randn(40, 3, generator=generator)
    smoothings = (0.0, 1e-5, 1e-3, 0.1)
    code = SplineCode(5, 12, shuffle=False, **options)
    found = tune(
        wrapped(model, code, Uniform(5, seed=3)),
        [x],
        encoder_smoothing=smoothings,
        decoder_smoothing=smoothings,
    )
    errors = {}
    for e in smoothings:
        for d in smoothings:
            other = code.replace(encoder_smoothing=e, decoder_smoothing=d)
            coded = wrapped(model, other, Uniform(5, seed=3))
            squares = [(coded(x) - model(x)).square().sum().item() for _ in range(5)]
            errors[e, d] = sum(squares)
    chosen = errors[found.encoder_smoothing, found.decoder_smoothing]
    assert chosen == pytest.approx(min(errors.values()), rel=1e-4)


def test_a_code_without_numbers_is_kept_and_nothing_runs():
    def forbidden(*_):
        raise AssertionError

    model = torch.nn.Tanh()
    model.register_forward_hook(forbidden)
    code = tune(wrapped(model, ReplicationCode(4, 8)), [torch.ones(4, 1)])
    assert repr(code) == "ReplicationCode(num_data=4, num_workers=8)"


def test_received_sets_follow_the_wrapper():
    delays = ShiftedExponential(1.0, 1.0, seed=0)
    code = SplineCode(4, 10)
    for waiting, most in ((Waiting.first(3), 7), (Waiting.first(0, deadline=1.5), 9)):
        wrapper = wrapped(torch.nn.Tanh(), code, delays, waiting=waiting)
        sets = list(islice(received_sets(wrapper, wrapper.code), 20))
        assert max(map(len, sets)) <= most
        assert all(list(received) == sorted(set(received)) for received in sets)
        assert len(set(sets)) > 10
    wrapper = CodedWrapper(torch.nn.Tanh(), code, workers=LocalWorkers(), waiting=Waiting.first(3))
    assert {len(received) for received in islice(received_sets(wrapper, wrapper.code), 20)} == {7}
    for shuffle, runs in ((False, True), (True, False)):
        wrapper = wrapped(torch.nn.Tanh(), code.replace(shuffle=shuffle), Contiguous(4, seed=0))
        blocks = [{(i + j) % 10 for j in range(4)} for i in range(10)]
        sets = islice(received_sets(wrapper, wrapper.code), 9)
        assert all({*range(10)} - {*workers} in blocks for workers in sets) is runs


def test_no_code_that_can_decode_what_is_received(generator):
    code = LagrangeCode(4, 8, decoder_degree=7)
    coded = wrapped(torch.nn.ReLU(), code, Uniform(3, seed=0), waiting=Waiting.first(0))
    x = torch.randn(8, 2, generator=generator)
    with pytest.raises(ValueError, match="able to decode the received results, got too few"):
        tune(coded, [x], decoder_degree=[6, 7])
    assert tune(coded, [x], decoder_degree=[7, 4]).decoder_degree == 4
    assert math.isfinite(tune(coded, [x]).decoder_degree)


@pytest.mark.parametrize(
    ("values", "end"),
    [([1.0, 10.0, 100.0], "smallest"), ([0.0, 10.0, 100.0], ""), ([1.0, 10.0], "")],
    ids=str,
)
def test_a_number_at_the_edge_of_its_values_is_said(values, end, generator, recwarn):
    x, code = torch.randn(40, 3, generator=generator), SplineCode(10, 20)
    numbers = {"encoder_smoothing": [0.0], "decoder_smoothing": values}
    tune(wrapped(torch.nn.Tanh(), code, Uniform(4, seed=0)), [x], **numbers)
    said = [str(warning.message) for warning in recwarn]
    assert [f"is the {end} that was tried" in text for text in said] == [True] * bool(end)
    assert all("decoder_smoothing" in text for text in said)


def test_midpoints_are_chosen_where_they_are_better_and_allowed(generator):
    x, code = torch.randn(64, 3, generator=generator), RegressionCode(2, 3)
    pairs = torch.cat([x, x + 0.3 * torch.randn(64, 3, generator=generator)])
    numbers = {"metric": ["shrunk"], "length": [2.0]}

    def kind(module, x, **options):
        return tune(wrapped(module, code, Uniform(1, seed=0), **options), [x], **numbers).redundancy

    smooth = Call(lambda x: (4 * x).sin())
    assert kind(smooth, pairs) == "midpoints"
    assert kind(smooth, pairs, surrogate=torch.nn.Linear(3, 3)) == "copies"
    assert kind(Call(lambda x: (50 * x).sin()), x) == "copies"
    numbers["redundancy"] = ["midpoints"]
    with pytest.raises(ValueError, match="tune: the code must not mix inputs beside a surrogate"):
        kind(smooth, x, surrogate=torch.nn.Linear(3, 3))
    del numbers["redundancy"]
    assert kind(torch.nn.Embedding(9, 2), x[:, 0].long() % 9) == "copies"
