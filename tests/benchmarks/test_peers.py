import numpy as np
import pytest
import torch

from benchmarks.peers import Located, peers, wrong_workers
from coded_torch.codes.curves import chebyshev_second

RECEIVED = [0, 2, 3, 4, 5, 7, 8, 9, 11]


def dense_spline(nodes, points, smoothing):
    """The minimiser of the penalised mean squared error, in the basis |t - t_j|^3 and lines."""
    n = len(nodes)

    def cubes(z):
        return np.abs(z[:, None] - nodes) ** 3 / 12

    lines = np.stack([np.ones(n), nodes], 1)
    system = np.block(
        [[cubes(nodes) + n * smoothing * np.eye(n), lines], [lines.T, np.zeros((2, 2))]]
    )
    solved = np.linalg.solve(system, np.eye(n + 2, n))
    return np.hstack([cubes(points), np.stack([np.ones(len(points)), points], 1)]) @ solved


@pytest.mark.parametrize(("encoder", "decoder"), [(0.0, 0.0), (1e-4, 1e-3), (1e-2, 1e-6)])
def test_nercc_nests_two_penalised_regressions(encoder, decoder):
    code = peers(6, 12)["NeRCC"]
    code = code.replace(encoder_smoothing=encoder, decoder_smoothing=decoder)
    alpha, beta = code.data_points, code.worker_points
    np.testing.assert_allclose(code.encoder.matrix(), dense_spline(alpha, beta, encoder), atol=1e-9)
    decode = dense_spline(beta[RECEIVED], alpha, decoder)
    np.testing.assert_allclose(code.decoder(RECEIVED).matrix(), decode, atol=1e-9)


def test_sbacc_is_the_papers_formula():
    code, (k, n) = peers(6, 12)["SBACC"], (6, 12)
    # The paper numbers points from the right.
    alpha = np.cos((2 * np.arange(k) + 1) * np.pi / (2 * k))[::-1]
    beta = np.cos((2 * np.arange(n) + 1) * np.pi / (2 * n))[::-1]

    def berrut(nodes, z):
        terms = (-1.0) ** np.arange(len(nodes)) / (z[:, None] - nodes)
        return terms / terms.sum(1, keepdims=True)

    values = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(code.encode(values), torch.from_numpy(berrut(alpha, beta)) @ values)
    want = berrut(beta[RECEIVED], alpha)
    np.testing.assert_allclose(code.decoder(RECEIVED).matrix(), want, atol=1e-11)


def test_the_error_locator_finds_one_wrong_result_of_a_polynomial():
    points = chebyshev_second(16)
    at = torch.from_numpy(points.copy())
    results = torch.stack([at**2 + 1, 2 - at], 1)[:, None]  # [N, 1, 2]
    results[7] = torch.tensor([9.0, -5.0])
    assert wrong_workers(results, points, num_data=3, most=1) == [7]


def test_approxifer_has_the_workers_and_points_of_its_authors():
    located = Located(12, 2)
    assert located.num_workers == 2 * 12 + 2 * 2 - 1
    want = sorted(np.cos(np.arange(27) * np.pi / 27))
    np.testing.assert_allclose(located.code.worker_points, want, atol=1e-15)
