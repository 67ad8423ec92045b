"""What benchmarks compare, and that it is what the wrapper does."""

import pytest
import torch

from benchmarks import schemes
from benchmarks.schemes import Scheme
from benchmarks.subjects import subject
from coded_torch import codes
from coded_torch.evaluation.compare import received_by
from coded_torch.evaluation.scores import Scores
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform


@pytest.fixture(scope="module")
def of():
    return subject("lenet5", quick=True)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(codes.SplineCode(8, 10), "arrival"),
        Scheme(codes.KernelCode(8, 10)),
        Scheme(codes.KernelCode(encoder=codes.SplineCode(8, 10))),
    ],
    ids=["paper", "KernelCode", "paper's encoder"],
)
@torch.no_grad()
def test_a_scheme_answers_as_the_wrapper_does(of, scheme):
    batch = next(of.batches("held_out", 40, 1))
    received = received_by(Uniform(3, seed=5), 10)
    tried = schemes.trial(of.model, batch, [received])
    answers, _ = schemes.decode(tried, scheme, received, 3)
    wrapper = CodedWrapper(
        of.model,
        scheme.code,
        stragglers=Uniform(3, seed=5),
        ordering=scheme.ordering,
        shuffle=False,
    )
    scale = tried.exact[0].abs().max()
    torch.testing.assert_close(answers, wrapper(batch.images), rtol=0, atol=1e-4 * scale)


@torch.no_grad()
def test_replication_with_the_batchs_mean_is_that(of):
    """Equal copies; what no worker answered is the mean of all inputs that one did."""
    batch = next(of.batches("held_out", 40, 1))
    received = received_by(Uniform(5, seed=0), 10)
    tried = schemes.trial(of.model, batch, [received])
    scheme = schemes.unmixed((10, 8, 5))["replication, batch mean"]
    answers, _ = schemes.decode(tried, scheme, received, 5)
    exact = tried.exact[0]
    own = (answers == exact).all(1)
    assert 0 < int((~own).sum()) < 30
    mean = exact[own].mean(0, keepdim=True)
    torch.testing.assert_close(answers[~own], mean.expand(int((~own).sum()), -1))


def test_uncoded_answers_are_the_models_own_or_missing(of):
    batch = next(of.batches("held_out", 24, 1))
    received = [0, 2, 9, 11]
    tried = schemes.trial(of.model, batch, [received])
    answers, _ = schemes.decode(tried, Scheme(schemes.Uncoded(8, 12), "arrival"), received, 8)
    answered = torch.arange(24) % 8 < 3
    answered &= torch.arange(24) % 8 != 1
    torch.testing.assert_close(answers[answered], tried.exact[0][answered])
    assert answers[~answered].isnan().all()
    scores = Scores()
    scores.add(answers, tried.exact[0], batch.labels)
    assert scores.summary()["agreement"][0] == 0.25
    assert scores.summary()["rmse"] == [None, None]


def test_a_tuned_scheme_has_other_numbers_only(of):
    batches = list(of.batches("tuning", 40, 2))
    scheme = Scheme(codes.SplineCode(8, 10), "arrival")
    tuned = schemes.tuned(of.model, batches, scheme, 2)
    assert tuned.ordering == "arrival"
    assert isinstance(tuned.code, codes.SplineCode)
    assert tuned.code.decoder_smoothing > 0


def test_scores_are_by_law_and_scheme(of):
    def received(index):
        return {"few": [0, 1], "many": list(range(10))}

    some = {"replication": Scheme(codes.ReplicationCode(8, 10), "arrival")}
    scores = schemes.evaluate(of.model, of.batches("held_out", 16, 3), some, 2, received)
    assert {law: list(found) for law, found in scores.items()} == {
        "few": ["replication"],
        "many": ["replication"],
    }
    assert scores["many"]["replication"].columns.shape == (7, 3)
    assert scores["many"]["replication"].summary()["agreement"] == [1.0, 0.0]
    summary = schemes.summaries(
        {**scores["few"], "other": scores["many"]["replication"]}, ["other"]
    )
    assert summary["replication"]["against other"]["relative_accuracy"][0] < 0
