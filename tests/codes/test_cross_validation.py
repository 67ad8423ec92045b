"""The spline code that chooses its decoder's smoothing by the results."""

import functools
import pickle

import numpy as np
import pytest
import torch

from coded_torch import points
from coded_torch.codes import SplineCode, spline
from coded_torch.linear import SplineMap

from .code_tests import DTYPES, CodeTests, normal


def chosen(code, results, received):
    """The smoothing, by the definition: a dense smoother for each on the grid."""
    knots = code.worker_points[received]
    columns = results.double().flatten(1)
    scores = {}
    for smoothing in spline._GRID * (np.ptp(knots) / 2) ** 3:
        # Interpolation leaves no residual and no freedom; the ratio has a limit.
        at = smoothing or 1e-15
        smoother = SplineMap(knots, knots, smoothing=float(at)).matrix()
        n = len(knots)
        residual = (columns - smoother @ columns).square().sum() / n
        scores[smoothing] = float(residual / (1 - smoother.trace() / n) ** 2)
    return min(scores, key=scores.get)


class TestCrossValidatedSplineCode(CodeTests):
    """Decoding is linear only for the smoothing that was chosen."""

    def make(self):
        return SplineCode(8, 24, decoder_smoothing="gcv")

    @pytest.mark.parametrize("shape", [(1,), (5,), (2, 3)])
    def test_maps_along_any_dim(self, code, received, shape):
        results = self.rough(code, received, *shape)
        smoothing = chosen(code, results, received)
        twin = SplineCode(8, 24, decoder_smoothing=float(smoothing))
        assert torch.equal(code.decode(results, received), twin.decode(results, received))
        last = results.movedim(0, -1).contiguous()
        torch.testing.assert_close(
            code.decode(last, received, -1).movedim(-1, 0), twin.decode(results, received)
        )

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_dtypes(self, code, received, dtype):
        results = self.rough(code, received, 20).to(dtype)
        answers = code.decode(results, received)
        assert answers.dtype == dtype
        twin = SplineCode(8, 24, decoder_smoothing=float(chosen(code, results, received)))
        torch.testing.assert_close(answers, twin.decode(results, received))

    def test_layout_of_the_values_does_not_matter(self, code, received):
        results = self.rough(code, received, 4, 6)
        strided = results.movedim(0, 2).contiguous().movedim(2, 0)
        torch.testing.assert_close(code.decode(strided, received), code.decode(results, received))

    def test_constants_are_reproduced(self, code, received):
        for workers in (received, range(24), [3], [3, 5], [0, 1, 2]):
            lines = torch.stack([torch.ones(24), torch.tensor(code.worker_points)], 1)
            answers = code.decode(lines[list(workers)][:, : len(workers)], workers)
            expected = torch.stack([torch.ones(8), torch.tensor(code.data_points)], 1)
            torch.testing.assert_close(answers, expected[:, : len(workers)])

    def test_adjoint_is_the_transpose(self, code, received):
        decoder = code.decoder(received)
        with pytest.raises(ValueError, match="must be a number for a decoder with adjoint"):
            decoder.adjoint(normal(8, 2))
        with pytest.raises(ValueError, match="must be a number for a decoder with matrix"):
            decoder.matrix()
        results = normal(len(received), 2)
        assert torch.equal(decoder(results), code.decode(results, received))

    @staticmethod
    def rough(code, received, *shape):
        t = torch.tensor(code.worker_points[received]).view(-1, *[1] * len(shape))
        return (3 * t + normal(*shape)).sin() + 0.1 * normal(len(received), *shape, seed=1)


NOISES = (0.0, 0.01, 0.1, 1.0)


@functools.cache
def errors(noise):
    """Of x sin x at 8 inputs and 6 of 64 workers late, by smoothing."""
    inputs = torch.linspace(0, 4, 8, dtype=torch.float64)[:, None] + 0.1 * torch.arange(20)
    rng = np.random.default_rng(0)
    received = [np.sort(rng.choice(64, 58, replace=False)) for _ in range(20)]
    found = {}
    for smoothing in ("gcv", *spline._GRID.tolist()):
        code = SplineCode(8, 64, decoder_smoothing=smoothing)
        total = 0.0
        for seed, workers in enumerate(received):
            coded = code.encode(inputs)[torch.from_numpy(workers)]
            results = coded * coded.sin() + noise * normal(*coded.shape, seed=seed)
            error = code.decode(results, workers) - inputs * inputs.sin()
            total += float(error.square().mean()) / len(received)
        found[smoothing] = total**0.5
    return found


@pytest.mark.parametrize("noise", NOISES)
def test_as_good_as_the_best_in_hindsight(noise):
    found = errors(noise)
    assert found["gcv"] < 1.1 * min(found.values())


def test_which_no_number_is_for_all_noises():
    for smoothing in spline._GRID.tolist():
        assert any(errors(n)[smoothing] > 1.2 * errors(n)["gcv"] for n in NOISES)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_unit_of_the_points_does_not_matter(scale):
    data, workers = points.equidistant(8), points.equidistant(24)
    code = SplineCode(8, 24, decoder_smoothing="gcv", data_points=data, worker_points=workers)
    scaled = SplineCode(
        8,
        24,
        decoder_smoothing="gcv",
        data_points=scale * data,
        worker_points=scale * workers,
    )
    results = normal(24, 5)
    torch.testing.assert_close(scaled.decode(results, range(24)), code.decode(results, range(24)))


def test_no_gradient_passes_through_the_choice():
    code, received = SplineCode(8, 24, decoder_smoothing="gcv"), list(range(24))
    results = TestCrossValidatedSplineCode.rough(code, received, 3).requires_grad_()
    smoothing = float(chosen(code, results.detach(), received))
    twin = SplineCode(8, 24, decoder_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(code.decode(results, received).square().sum(), results)
    (expected,) = torch.autograd.grad(twin.decode(results, received).square().sum(), results)
    assert torch.equal(gradient, expected)


def test_decoders_travel():
    code = SplineCode(8, 24, decoder_smoothing="gcv")
    decoder, results = code.decoder(range(20)), normal(20, 3)
    assert torch.equal(pickle.loads(pickle.dumps(decoder))(results), decoder(results))


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (torch.float16, [1e-2, 1e3, 2.5e4]),
        (torch.bfloat16, [1e-30, 1e-10, 1e10, 1e30]),
        (torch.float32, [1e-35, 1e-24, 1e-19, 1e19, 1e30]),
        (torch.float64, [1e-300, 1e-170, 1e170, 1e300]),
    ],
    ids=str,
)
def test_the_unit_of_the_results_does_not_matter(dtype, scales):
    code = SplineCode(8, 24, decoder_smoothing="gcv")
    decoder = code.decoder(range(24))
    results = torch.linspace(0, 3, 24).sin()[:, None, None] + 0.3 * normal(24, 1, 500).float()
    want = decoder._choose(results)
    assert want > 0
    for scale in scales:
        scaled = (results.double() * scale).to(dtype)
        assert scaled.isfinite().all()
        assert decoder._choose(scaled) == want
        assert decoder(scaled).isfinite().all()


def test_results_that_are_all_zero_are_answered_by_zero():
    code = SplineCode(8, 24, decoder_smoothing="gcv")
    assert not code.decode(torch.zeros(24, 3), range(24)).any()
    assert code.decode(torch.zeros(24, 0), range(24)).shape == (8, 0)


def test_results_that_are_not_finite_do_not_stop_it():
    code = SplineCode(8, 24, decoder_smoothing="gcv")
    results = normal(24, 3)
    results[5, 1] = float("nan")
    assert code.decode(results, range(24))[:, 1].isnan().any()


def test_no_other_word_will_do():
    with pytest.raises(TypeError, match="decoder_smoothing must be real numbers, got 'reml'"):
        SplineCode(8, 24, decoder_smoothing="reml")
