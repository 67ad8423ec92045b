"""A module on one batch, tried with any code."""

import pytest
import torch

from coded_torch.codes import BerrutCode, RegressionCode, ReplicationCode, SplineCode
from coded_torch.experiments.tune import Trial
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.workers import LocalWorkers


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


@pytest.mark.parametrize("ordering", ["similarity", "arrival"])
@pytest.mark.parametrize("kind", [SplineCode, RegressionCode, ReplicationCode])
def test_answers_are_those_of_the_wrapper(x, kind, ordering):
    code = kind(8, 10, ordering=ordering, shuffle=False)
    coded = CodedWrapper(torch.nn.Tanh(), code, workers=LocalWorkers(Uniform(3, seed=0)))
    received = Uniform(3, seed=0).sample(10).isfinite().nonzero().flatten().tolist()
    trial = Trial(torch.nn.Tanh(), (x,), [received])
    (answers,) = trial.decode(code, received, num_stragglers=3)
    torch.testing.assert_close(answers, coded(x))
    assert torch.equal(trial.exact[0], x.tanh())
    if not code.mixes:
        missing = coded.last_run.estimated
        assert torch.equal(trial.missing(code, received, num_stragglers=3), missing)


def test_residuals_of_a_surrogate_are_decoded(x):
    code, received = RegressionCode(8, 10, shuffle=False), [0, 1, 2, 4, 5, 6, 8]
    trial = Trial(torch.nn.Tanh(), (x,), [received])
    cheap = trial.run(lambda x: x.tanh() - 0.5)
    (answers,) = trial.decode(code, received, 3, cheap)
    torch.testing.assert_close(answers, x.tanh())
    (alone,) = trial.decode(code, received, 3)
    assert (alone - x.tanh()).abs().max() > 0.01


def test_dimensions_and_leaves_are_the_callers(x):
    class Two(torch.nn.Module):
        def forward(self, x, scale):
            return {"sine": (x * scale).sin(), "none": None}

    trial = Trial(Two(), (x.T, torch.tensor(2.0)), [[0, 1, 2]], in_dims=(1, None), out_dims=1)
    assert trial.mixable
    assert [leaf.shape for leaf in trial.inputs] == [x.shape]
    (exact,) = trial.exact
    torch.testing.assert_close(exact, (2 * x).sin())
    (answers,) = trial.decode(ReplicationCode(2, 3), [0, 1, 2])
    torch.testing.assert_close(answers, exact)


def test_results_that_cannot_be_decoded_are_an_error(x):
    class Broken(torch.nn.Module):
        def forward(self, x):
            return x * torch.inf

    with pytest.raises(RuntimeError, match="not finite"):
        Trial(Broken(), (x,))
    with pytest.raises(TypeError, match="the module must return floating-point tensors"):
        Trial(torch.nn.Identity(), (torch.arange(16),))
