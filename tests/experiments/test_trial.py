"""A module on one batch, tried with any code."""

import pytest
import torch

from coded_torch.codes import BerrutCode, RegressionCode, ReplicationCode, SplineCode
from coded_torch.experiments._tune import Trial

from ..nn.modules import Call


@pytest.fixture
def x(generator):
    return torch.randn(16, 3, generator=generator)


class Rows(torch.nn.Module):
    """Remembers how many rows it was given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x):
        self.rows.append(len(x))
        return x.tanh()


def test_the_module_runs_once_for_each_encoder_on_what_is_received(x):
    module, few, many = Rows(), [0, 1, 2, 4, 5, 6, 8], [1, 2, 3, 4, 5, 6, 8]
    trial = Trial(module, (x,), [few, many])
    splines = [SplineCode(8, 10, decoder_smoothing=s) for s in (0.0, 1e-6, 1e-3)]
    for code in (ReplicationCode(8, 10), RegressionCode(8, 10), *splines, BerrutCode(8, 10)):
        for received in (few, many):
            trial.decode(code, received, num_stragglers=2)
    # The batch; then the eight workers that are in a set, two groups each, for each encoder.
    assert module.rows == [16, 16, 16]


def test_dimensions_and_leaves_are_the_callers(x):
    two = Call(lambda x, scale: {"sine": (x * scale).sin(), "none": None})
    trial = Trial(two, (x.T, torch.tensor(2.0)), [[0, 1, 2]], in_dims=(1, None), out_dims=1)
    assert trial.mixable
    assert [leaf.shape for leaf in trial.inputs] == [x.shape]
    (exact,) = trial.exact
    torch.testing.assert_close(exact, (2 * x).sin())
    (answers,) = trial.decode(ReplicationCode(2, 3), [0, 1, 2])
    torch.testing.assert_close(answers, exact)


def test_results_that_cannot_be_decoded_are_an_error(x):
    with pytest.raises(RuntimeError, match=r"finite outputs, got NaN or infinity in output\['b'\]"):
        Trial(Call(lambda x: {"a": x, "b": x * torch.inf}), (x,))
    with pytest.raises(TypeError, match="the module must return floating-point tensors"):
        Trial(torch.nn.Identity(), (torch.arange(16),))
