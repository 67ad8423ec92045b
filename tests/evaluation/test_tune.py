"""Choosing the numbers of a code on unlabelled data."""

import math
from itertools import islice

import pytest
import torch

from coded_torch.codes import BerrutCode, KernelCode, LagrangeCode, ReplicationCode, SplineCode
from coded_torch.demo.lenet5 import digits, lenet5
from coded_torch.evaluation import scores
from coded_torch.evaluation.tune import received_sets, tune
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.stragglers import Contiguous, ShiftedExponential, Uniform
from coded_torch.workers import LocalWorkers


def error(model, code, batches, **options):
    coded = CodedWrapper(model, code, stragglers=Uniform(4, seed=1), **options)
    with torch.inference_mode():
        return sum(scores.rmse(coded(x), model(x)) ** 2 for x in batches)


def test_a_kernel_code_does_better_on_other_digits():
    model, (images, _) = lenet5(), digits()
    wrapper = CodedWrapper(model, KernelCode(20, 24), stragglers=Uniform(4, seed=0))
    values = {"metric": ("euclidean", "shrunk"), "length": (0.2, 2.0, 20.0)}
    code = tune(wrapper, images[:480].split(240), **values)
    assert wrapper.code.metric == "auto"
    assert (code.metric, code.length) == ("shrunk", 2.0)
    others = images[480:1200].split(240)
    assert error(model, code, others) < 0.9 * error(model, KernelCode(20, 24, length=0.2), others)


@pytest.mark.parametrize(
    ("code", "bad"),
    [
        (SplineCode(20, 24), {"encoder_smoothing": 1e-3, "decoder_smoothing": 1e-2}),
        (BerrutCode(20, 24), {"order": 3}),
        (LagrangeCode(20, 24, decoder_degree=19), {"decoder_degree": 2}),
    ],
    ids=lambda x: type(x).__name__,
)
def test_a_fixed_code_does_better_on_other_digits(code, bad):
    model, (images, _) = lenet5(), digits()
    wrapper = CodedWrapper(model, code, stragglers=Uniform(4, seed=0))
    best, others = tune(wrapper, images[:480].split(240)), images[480:1200].split(240)
    assert type(best) is type(code)
    assert error(model, best, others) < 0.8 * error(model, code.replace(**bad), others)


@pytest.mark.parametrize("code", [SplineCode(5, 9), KernelCode(encoder=SplineCode(5, 9))])
def test_the_module_runs_once_for_each_encoder(code, generator):
    rows, model = [], torch.nn.Tanh()
    model.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    wrapper = CodedWrapper(model, code, stragglers=Uniform(0, seed=0))
    tune(wrapper, [torch.randn(40, 3, generator=generator)])
    encoders = 6 if isinstance(code, SplineCode) else 0
    assert rows == [40] + encoders * [9 * 8]


def test_only_what_is_received_is_computed(generator):
    rows, model = [], torch.nn.Tanh()
    model.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    wrapper = CodedWrapper(model, SplineCode(5, 9), stragglers=Contiguous(4, seed=0), shuffle=False)
    tune(wrapper, [torch.randn(10, 3, generator=generator)], encoder_smoothing=[0.0])
    again = wrapper.replace(workers=LocalWorkers(Contiguous(4, seed=0)))
    sets = islice(received_sets(again), 5)
    assert rows == [10, 2 * len(set().union(*sets))]


def test_what_is_chosen_is_what_the_wrapper_does_best_with(generator):
    """By brute force: the wrapper itself, with every code, on the same draws."""
    x, model = torch.randn(40, 3, generator=generator), torch.nn.Tanh()
    smoothings = (0.0, 1e-5, 1e-3, 0.1)
    chosen, errors = {}, {}
    for ordering in ("arrival", "similarity"):
        law = Uniform(5, seed=3)
        wrapper = CodedWrapper(
            model, SplineCode(5, 12), stragglers=law, ordering=ordering, shuffle=False
        )
        code = tune(wrapper, [x], encoder_smoothing=smoothings, decoder_smoothing=smoothings)
        chosen[ordering] = code.encoder_smoothing, code.decoder_smoothing
        for e in smoothings:
            for d in smoothings:
                coded = wrapper.replace(
                    code=SplineCode(5, 12, encoder_smoothing=e, decoder_smoothing=d),
                    workers=LocalWorkers(Uniform(5, seed=3)),
                )
                squares = [(coded(x) - x.tanh()).square().sum().item() for _ in range(5)]
                errors[ordering, (e, d)] = sum(squares)
    for ordering, numbers in chosen.items():
        least = min(value for (order, _), value in errors.items() if order == ordering)
        assert errors[ordering, numbers] == pytest.approx(least, rel=1e-5)


def test_probabilities_are_compared_as_such(generator):
    class Classes(torch.nn.Module):
        def forward(self, x):
            return (5 * x).softmax(-1)

    x = torch.randn(60, 4, generator=generator)
    wrapper = CodedWrapper(
        Classes(), SplineCode(5, 12), stragglers=Uniform(4, seed=0), link="softmax", shuffle=False
    )
    code = tune(wrapper, [x], encoder_smoothing=[0.0])
    errors = {}
    for smoothing in SplineCode(5, 12).candidates()["decoder_smoothing"]:
        other = SplineCode(5, 12, decoder_smoothing=smoothing)
        coded = wrapper.replace(code=other, workers=LocalWorkers(Uniform(4, seed=0)))
        squares = [(coded(x) - Classes()(x)).square().sum().item() for _ in range(5)]
        errors[smoothing] = sum(squares)
    assert errors[code.decoder_smoothing] == pytest.approx(min(errors.values()), rel=1e-4)


def test_a_tuple_is_several_arguments_and_outputs_may_be_nested(generator):
    class Two(torch.nn.Module):
        def forward(self, x, scale):
            return {"sine": (x * scale).sin(), "none": None, "first": x[:, 0]}

    batches = [(torch.randn(40, 3, generator=generator), torch.tensor(0.5))]
    for code, number, good, bad in (
        (KernelCode(5, 8), "length", 3.0, 1e-3),
        (SplineCode(5, 8), "decoder_smoothing", 1e-6, 1e3),
    ):
        coded = CodedWrapper(Two(), code, stragglers=Uniform(2, seed=0), in_dims=(0, None))
        assert getattr(tune(coded, batches, **{number: [bad, good]}), number) == good


class Own(KernelCode):
    """A code with an argument more."""

    def __init__(self, name, metric="shrunk", length=1.0):
        super().__init__(5, 8, metric=metric, length=length)
        self.name = name


def test_the_code_remains_what_it_is(generator):
    coded = CodedWrapper(torch.nn.Tanh(), Own("mine"), stragglers=Uniform(2, seed=0))
    x = torch.randn(40, 3, generator=generator)
    code = tune(coded, [x], metric=["spread"], length=[3.0])
    assert type(code) is Own
    assert (code.name, code.metric, code.length) == ("mine", "spread", 3.0)


def test_a_code_without_numbers_is_kept_and_nothing_runs():
    def forbidden(*_):
        raise AssertionError

    model = torch.nn.Tanh()
    model.register_forward_hook(forbidden)
    code = tune(CodedWrapper(model, ReplicationCode(4, 8)), [torch.ones(4, 1)])
    assert repr(code) == "ReplicationCode(num_data=4, num_workers=8)"


def test_as_large_batches_as_the_workers_take_and_nothing_else_is_called(generator):
    def forbidden(*_):
        raise AssertionError

    rows, model = [], torch.nn.Tanh()
    model.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    workers = LocalWorkers(Uniform(2, seed=0), max_batch_size=8)
    coded = CodedWrapper(model, SplineCode(5, 8), workers=workers)
    coded.register_forward_hook(forbidden)
    tune(coded, [torch.randn(40, 3, generator=generator)])
    assert max(rows) <= 8
    assert coded.last_run is None


def test_gradients_are_not_kept(generator):
    module = torch.nn.Linear(3, 2)
    coded = CodedWrapper(module, SplineCode(5, 8), stragglers=Uniform(2, seed=0))
    tune(coded, [torch.randn(20, 3, generator=generator, requires_grad=True)])
    assert all(parameter.grad is None for parameter in module.parameters())


def test_one_input_that_is_far_longer_does_not_choose(generator):
    class Ramp(torch.nn.Module):
        def forward(self, x):
            return x.sum(1, keepdim=True)

    x = torch.randn(60, 3, generator=generator)
    for factor in (1, 1e4):
        x[0] *= factor
        coded = CodedWrapper(Ramp(), KernelCode(5, 8), stragglers=Uniform(2, seed=0))
        assert tune(coded, [x], length=[0.1, 3.0]).length == 3.0


def test_large_batches_and_an_order_of_ones_own(generator):
    class Small(KernelCode):
        max_chunk = 32

    x = torch.randn(100, 2, generator=generator)
    for ordering in ("similarity", "arrival", x[:, 0].argsort()):
        coded = CodedWrapper(
            torch.nn.Tanh(), Small(5, 8), stragglers=Uniform(2, seed=0), ordering=ordering
        )
        assert tune(coded, [x], length=[1e-6, 2.0], metric=["shrunk"]).length == 2.0


def test_received_sets_follow_the_wrapper():
    law = ShiftedExponential(1.0, 1.0, seed=0)
    code = SplineCode(4, 10)
    for waiting, most in ((Waiting.first(3), 7), (Waiting.first(0, deadline=1.5), 9)):
        wrapper = CodedWrapper(torch.nn.Tanh(), code, stragglers=law, waiting=waiting)
        sets = list(islice(received_sets(wrapper), 20))
        assert max(map(len, sets)) <= most
        assert all(list(received) == sorted(set(received)) for received in sets)
        assert len(set(sets)) > 10
    wrapper = CodedWrapper(torch.nn.Tanh(), code, waiting=Waiting.first(3))
    assert {len(received) for received in islice(received_sets(wrapper), 20)} == {7}
    for shuffle, runs in ((False, True), (True, False)):
        wrapper = CodedWrapper(
            torch.nn.Tanh(), code, stragglers=Contiguous(4, seed=0), shuffle=shuffle
        )
        blocks = [{(i + j) % 10 for j in range(4)} for i in range(10)]
        sets = islice(received_sets(wrapper), 9)
        assert all({*range(10)} - {*workers} in blocks for workers in sets) is runs


def test_bad_arguments():
    x = torch.ones(4, 1)
    coded = CodedWrapper(torch.nn.ReLU(), SplineCode(4, 8), stragglers=Uniform(2, seed=0))
    for arguments, numbers, kind, message in (
        ((None, None), {}, TypeError, "tune: wrapper must be of type CodedWrapper, got NoneType"),
        (
            (coded, None),
            {},
            TypeError,
            "tune: batches must be a sequence of batches, such as .x., got NoneType",
        ),
        ((coded, []), {}, ValueError, "tune: batches must hold at least one, got none"),
        (
            (coded, [x]),
            {"length": [1.0]},
            ValueError,
            "must be among encoder_smoothing, decoder_smoothing, got 'length'",
        ),
        (
            (coded, [x]),
            {"decoder_smoothing": 1.0},
            TypeError,
            "tune: decoder_smoothing must be a sequence of values, got 1.0",
        ),
        (
            (coded, [x]),
            {"decoder_smoothing": []},
            ValueError,
            "tune: decoder_smoothing must hold at least one value, got none",
        ),
        (
            (coded, [x]),
            {"decoder_smoothing": [-1.0]},
            ValueError,
            "SplineCode: decoder_smoothing must be .*, got -1.0",
        ),
    ):
        with pytest.raises(kind, match=message):
            tune(*arguments, **numbers)


def test_no_code_that_can_decode_what_is_received(generator):
    code = LagrangeCode(4, 8, decoder_degree=7)
    law = Uniform(3, seed=0)
    coded = CodedWrapper(torch.nn.ReLU(), code, stragglers=law, waiting=Waiting.first(0))
    x = torch.randn(8, 2, generator=generator)
    with pytest.raises(ValueError, match="must be able to decode what is received, got too few"):
        tune(coded, [x], decoder_degree=[6, 7])
    assert tune(coded, [x], decoder_degree=[7, 4]).decoder_degree == 4
    assert math.isfinite(tune(coded, [x]).decoder_degree)
