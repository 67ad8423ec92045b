"""The best linear decoder: what every code promises, and that nothing linear is better."""

import io

import numpy as np
import pytest
import torch

from coded_torch import points
from coded_torch.codes import BerrutCode, KernelCode, LagrangeCode, ReplicationCode, SplineCode
from coded_torch.codes.calibrated import CalibratedCode
from coded_torch.metrics import rmse

from .code_tests import CodeTests, normal


def outputs(code, num_groups, *, length=0.4, num_outputs=3, seed=0):
    """Results and answers ``[N + K, G, C]`` of a stationary random model along the curve."""
    t = np.concatenate([code.worker_points, code.data_points])
    covariance = np.exp(-np.abs(t[:, None] - t) / length)
    values, vectors = np.linalg.eigh(covariance)
    root = torch.from_numpy(vectors * np.sqrt(values.clip(0)))
    drawn = normal(len(t), num_groups * num_outputs, seed=seed)
    return (root @ drawn).view(len(t), num_groups, num_outputs) + torch.arange(num_outputs)


def calibrated(code, num_groups, **model):
    data = outputs(code, num_groups, **model)
    columns = (data - data[code.num_workers :].mean((0, 1))).flatten(1)
    return CalibratedCode(code, columns @ columns.T / num_groups, num_groups)


class TestCalibratedCode(CodeTests):
    def make(self):
        return calibrated(SplineCode(8, 24), 40)


class TestUncalibrated(CodeTests):
    def make(self):
        return CalibratedCode(SplineCode(8, 24))


class TestCalibratedReplication(CodeTests):
    def make(self):
        return CalibratedCode(ReplicationCode(6, 21))


SPLINE = SplineCode(6, 12, data_points=points.equidistant(6), worker_points=points.equidistant(12))
RECEIVED = [0, 2, 3, 5, 6, 8, 11]


def error(code, data, received=RECEIVED):
    answers = code.decode(data[received], received)
    return rmse(answers, data[code.num_workers :])


@pytest.mark.parametrize("length", [0.1, 1.0])
def test_no_linear_decoder_is_better(length):
    """Least squares on the test data itself, with constants reproduced, is the bound."""
    data = outputs(SPLINE, 4000, length=length, seed=1)
    results, answers = data[RECEIVED].flatten(1), data[12:].flatten(1)
    differences = (results - results[:1])[1:]  # all that decoders of row sum 1 can use
    fit = torch.linalg.lstsq(differences.T, (answers - results[:1]).T).solution
    bound = rmse((differences.T @ fit + results[:1].T)[None], answers.T[None])
    code = calibrated(SPLINE, 4000, length=length)
    scale = 3**0.5  # of the norm of three outputs
    assert scale * bound / 6**0.5 == pytest.approx(error(code, data), rel=0.02)
    assert error(code, data) < 0.95 * error(SPLINE, data)


def test_more_groups_are_better_and_few_do_no_harm():
    data = outputs(SPLINE, 2000, length=0.2, seed=1)
    errors = [error(calibrated(SPLINE, n, length=0.2, seed=2), data) for n in (1, 10, 100, 1000)]
    spline = error(SPLINE, data)
    assert errors[0] < 1.05 * spline
    assert sorted(errors[1:], reverse=True) == errors[1:]
    assert errors[1] < spline
    assert errors[3] < 0.93 * spline


@pytest.mark.parametrize(
    "code",
    [
        SPLINE,
        SplineCode(20, 100),
        SplineCode(3, 9, data_points=[5.0, 5.5, 7.0], worker_points=np.linspace(4, 8, 9)),
    ],
)
def test_without_calibration_it_is_the_spline(code):
    received = {*range(1, code.num_workers, 2), code.num_workers - 1}
    received = sorted(received)
    results = outputs(code, 500)[received]
    spread = code.decode(results, received).std()
    difference = CalibratedCode(code).decode(results, received) - code.decode(results, received)
    assert difference.square().mean().sqrt() < 0.01 * spread


def test_one_result_is_everybodys():
    for code in (CalibratedCode(SPLINE), calibrated(SPLINE, 5)):
        assert code.decoder([4]).matrix().tolist() == [[1.0]] * 6


def test_the_encoder_is_the_codes():
    assert CalibratedCode(SPLINE).encoder is SPLINE.encoder


def test_results_of_uncoded_inputs_are_their_answers():
    data = points.equidistant(4)
    code = SplineCode(4, 7, data_points=data, worker_points=points.systematic(data, 7))
    results = normal(7, 5)
    hits = np.isin(code.worker_points, data)
    answers = calibrated(code, 100).decode(results, range(7))
    torch.testing.assert_close(answers, results[torch.from_numpy(hits)], atol=1e-6, rtol=0)


def test_what_is_common_to_all_has_no_influence():
    code = calibrated(SPLINE, 10)
    shifted = CalibratedCode(SPLINE, code.moments + 100, 10)
    expected = code.decoder(RECEIVED).matrix()
    torch.testing.assert_close(shifted.decoder(RECEIVED).matrix(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("length", [0.1, 1.0])
@pytest.mark.parametrize("received", [RECEIVED, [0, 5, 11], list(range(12))])
def test_the_error_is_as_expected(length, received):
    code, data = calibrated(SPLINE, 1000, length=length), outputs(SPLINE, 2000, length=length)
    measured = error(code, data, received)
    assert code.expected_rmse(received, data[received]) == pytest.approx(measured, rel=0.1)
    deviation = 3**0.5  # of an output vector
    assert code.expected_rmse(received) * deviation == pytest.approx(measured, rel=0.1)
    # The results say when a batch is ten times as rough as the calibration data.
    tenfold = code.expected_rmse(received, 10 * data[received])
    assert tenfold == pytest.approx(10 * measured, rel=0.1)


def test_repeated_results_do_not_make_it_sure():
    code = calibrated(SPLINE, 500)
    twice = SplineCode(6, 24, data_points=SPLINE.data_points)
    repeated = torch.cat([torch.arange(12).repeat_interleave(2), torch.arange(12, 18)])
    moments = code.moments[repeated][:, repeated]
    data = outputs(SPLINE, 500, seed=1)[repeated]
    double = CalibratedCode(twice, moments, 500)
    received = [2 * n + i for n in RECEIVED for i in (0, 1)]
    assert double.expected_rmse(received, data[received]) == pytest.approx(
        error(double, data, received), rel=0.15
    )


def test_the_expected_error_of_many_outputs_is_sampled_well():
    code = calibrated(SPLINE, 100)
    results = outputs(SPLINE, 10, num_outputs=1000)[RECEIVED]
    few = [code.expected_rmse(RECEIVED, results[..., i::100]) for i in range(100)]
    whole = code.expected_rmse(RECEIVED, results)
    assert whole == pytest.approx(sum(e**2 for e in few) ** 0.5, rel=0.03)


def test_an_error_is_expected_only_where_the_scale_is_known():
    code = CalibratedCode(SPLINE)
    assert code.expected_rmse(RECEIVED) is None
    assert code.expected_rmse([3], normal(1, 4, 2)) is None
    assert code.expected_rmse([2, 9], normal(2, 4, 2)) > 0
    code = calibrated(SPLINE, 100)
    assert code.expected_rmse([3], normal(1, 4, 2)) == pytest.approx(
        code.expected_rmse([3]) * 3**0.5, rel=0.1
    )


def test_a_model_whose_outputs_never_change():
    code = CalibratedCode(SPLINE, torch.zeros(18, 18), 10)
    assert code.expected_rmse(RECEIVED) == 0
    assert torch.equal(code.decode(torch.ones(7), RECEIVED).round(decimals=6), torch.ones(6))


@pytest.mark.parametrize(
    "code", [ReplicationCode(1, 1), ReplicationCode(1, 5), LagrangeCode(3, 9), SplineCode(1, 2)]
)
def test_any_fixed_code(code):
    for received in ([0], list(range(code.num_workers))):
        rows = CalibratedCode(code).decoder(received).matrix().sum(1)
        torch.testing.assert_close(rows, torch.ones_like(rows))


def test_saved_and_loaded_without_pickled_code():
    code, file = calibrated(SPLINE, 7), io.BytesIO()
    torch.save(code.state_dict(), file)
    file.seek(0)
    twin = CalibratedCode(SPLINE, **torch.load(file, weights_only=True))
    assert twin.num_groups == 7
    assert torch.equal(twin.decoder(RECEIVED).matrix(), code.decoder(RECEIVED).matrix())


@pytest.mark.parametrize(
    "other",
    [BerrutCode(6, 12), SplineCode(6, 12), SplineCode(6, 13), ReplicationCode(6, 12)],
    ids=str,
)
def test_what_one_code_has_learnt_is_not_for_another(other):
    state = calibrated(SPLINE, 7).state_dict()
    with pytest.raises(
        ValueError, match=r"encoder must be that of code, .*Code\(.*got another one"
    ):
        CalibratedCode(other, **state)


MOMENTS = torch.eye(18, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((KernelCode(2, 3),), TypeError, "code must be of type FixedCode, got KernelCode"),
        ((SPLINE, [[1.0]]), TypeError, "moments must be a floating-point tensor, got list"),
        ((SPLINE, MOMENTS.long()), TypeError, r"moments must be .*, got torch\.int64"),
        ((SPLINE, MOMENTS[1:]), ValueError, r"must have shape \(18, 18\), got \(17, 18\)"),
        ((SPLINE, MOMENTS * np.nan), ValueError, "moments must be finite, symmetric"),
        ((SPLINE, -MOMENTS), ValueError, "moments must be .* positive semidefinite"),
        ((SPLINE, MOMENTS.cumsum(0)), ValueError, "moments must be .* symmetric"),
        ((SPLINE, MOMENTS, -1), ValueError, "num_groups must be at least 0, got -1"),
        ((SPLINE, MOMENTS, 1.5), TypeError, "num_groups must be an integer, got 1.5"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=f"CalibratedCode: .*{message}"):
        CalibratedCode(*arguments)
