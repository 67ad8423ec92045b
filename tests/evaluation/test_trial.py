"""A wrapped module on one batch, run no more than needed."""

import pytest
import torch

from coded_torch.codes import BerrutCode, KernelCode, ReplicationCode, SplineCode
from coded_torch.evaluation.trial import Trial
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.workers import LocalWorkers


@pytest.fixture
def x(generator):
    return torch.randn(16, 3, generator=generator)


def wrapped(module, **options):
    return CodedWrapper(module, ReplicationCode(8, 10), shuffle=False, **options)


class Counted(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rows = []

    def forward(self, x):
        assert not torch.is_grad_enabled()
        self.rows.append(len(x))
        return x.tanh()


def test_the_module_runs_once_for_all_codes_with_one_encoder(x):
    module, few, many = Counted(), [0, 3, 4, 7, 9], [0, 1, 3, 4, 5, 7, 8, 9]
    trial = Trial(wrapped(module), (x,), [few, many])
    unmixed = [ReplicationCode(8, 10), KernelCode(8, 10), KernelCode(8, 10, length=1.0)]
    splines = [SplineCode(8, 10, decoder_smoothing=s) for s in (0.0, 1e-6, 1e-3)]
    # Berrut's encoder is another, the regression's is the spline's.
    for code in (*unmixed, *splines, KernelCode(encoder=splines[0]), BerrutCode(8, 10)):
        for received in (few, many):
            trial.decode(code, received, num_stragglers=2)
    # The batch; then the eight workers that are in a set, two groups each, for each encoder. The
    # spline's is there twice: KernelCode measures its own distances, which order as the others do.
    assert module.rows == [16, 16, 16]


@pytest.mark.parametrize("ordering", ["similarity", "arrival"])
@pytest.mark.parametrize(
    "code",
    [SplineCode(8, 10), KernelCode(8, 10), KernelCode(encoder=SplineCode(8, 10))],
    ids=["spline", "kernel", "both"],
)
def test_answers_are_those_of_the_wrapper(x, code, ordering):
    law = Uniform(3, seed=0)
    coded = CodedWrapper(torch.nn.Tanh(), code, stragglers=law, ordering=ordering, shuffle=False)
    received = Uniform(3, seed=0).sample(10).isfinite().nonzero().flatten().tolist()
    trial = Trial(coded, (x,), [received])
    (answers,), expected = trial.decode(code, received, num_stragglers=3)
    torch.testing.assert_close(answers, coded(x))
    assert torch.equal(trial.exact[0], x.tanh())
    if expected is None:
        assert coded.last_run.expected_rmse is None
    else:
        assert expected == pytest.approx(coded.last_run.expected_rmse)


def test_a_stage_is_what_is_decoded(x):
    code, received = SplineCode(8, 10), [0, 1, 2, 4, 5, 6, 8]
    trial = Trial(wrapped(torch.nn.Tanh()), (x,), [received])
    (staged,), _ = trial.decode(code, received, stage=torch.exp)

    class Staged(torch.nn.Module):
        def forward(self, x):
            return x.tanh().exp()

    (wanted,), _ = Trial(wrapped(Staged()), (x,), [received]).decode(code, received)
    torch.testing.assert_close(staged, wanted)


def test_dimensions_leaves_and_batches_are_the_wrappers(x):
    class Two(torch.nn.Module):
        def forward(self, x, scale):
            assert x.shape[1] <= 4
            return {"sine": (x * scale).sin(), "none": None}

    workers = LocalWorkers(max_batch_size=4)
    coded = wrapped(Two(), in_dims=(1, None), out_dims=1, workers=workers)
    trial = Trial(coded, (x.T, torch.tensor(2.0)), [[0, 1, 2]])
    assert trial.mixable
    assert [leaf.shape for leaf in trial.inputs] == [x.shape]
    assert len(trial.exact) == 1
    torch.testing.assert_close(trial.exact[0], (2 * x).sin())


def test_integers_are_no_inputs_to_mix(x):
    tokens = torch.arange(16)

    class Embedded(torch.nn.Module):
        def forward(self, tokens):
            return tokens.double()[:, None]

    trial = Trial(wrapped(Embedded()), (tokens,), [[0, 1]])
    assert (trial.mixable, trial.inputs) == (False, [])
    (answers,), _ = trial.decode(ReplicationCode(8, 10), [0, 1], ordering="arrival")
    assert answers.flatten()[:2].tolist() == [0, 1]
    with pytest.raises(ValueError, match="inputs must hold a floating-point tensor"):
        trial.decode(SplineCode(8, 10), [0, 1])


def test_results_that_cannot_be_decoded_are_an_error(x):
    class Broken(torch.nn.Module):
        def forward(self, x):
            return x * torch.inf

    with pytest.raises(RuntimeError, match="not finite"):
        Trial(wrapped(Broken()), (x,))
    with pytest.raises(TypeError, match="must be a floating-point tensor to be decoded"):
        Trial(wrapped(torch.nn.Identity()), (torch.arange(16),))
