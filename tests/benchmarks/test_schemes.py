"""What benchmarks compare, and that it is what the wrapper does."""

import pytest
import torch

from benchmarks import schemes
from benchmarks.schemes import Scheme, Scores, received_by
from benchmarks.subjects import subject
from coded_torch import codes
from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.workers import LocalWorkers


@pytest.fixture(scope="module")
def of():
    return subject("lenet5", quick=True)


def tried(of, batches, sets, some):
    return schemes.evaluate(of.model, batches, lambda index: sets, lambda key: some)


@pytest.mark.parametrize(
    "code",
    [
        codes.SplineCode(8, 10, ordering="arrival", shuffle=False),
        codes.RegressionCode(8, 10, shuffle=False),
    ],
    ids=["paper", "RegressionCode"],
)
@torch.no_grad()
def test_a_scheme_answers_as_the_wrapper_does(of, code):
    batch = next(of.batches("held_out", 40, 1))
    sets = {"": [received_by(Uniform(3, seed=5), 10)]}
    score = tried(of, [batch], sets, {"it": Scheme(code, 3)})[""]["it"]
    wrapper = CodedWrapper(of.model, code, workers=LocalWorkers(Uniform(3, seed=5)))
    again = Scores()
    again.add(wrapper(batch.images), of.model(batch.images), batch.labels)
    assert score.columns[3] == pytest.approx(again.columns[3], rel=1e-3)
    assert score.columns[0] == again.columns[0]


def test_baselines_are_what_they_are_called(of):
    """The batch's mean; own answers or none; no copies, so that workers beyond K do nothing."""
    case = (10, 8, 2)
    batch = next(of.batches("held_out", 40, 1))
    both = {"all": [list(range(10))], "few": [[0, 1, 2, 3, 4, 5, 8, 9]]}
    scores = tried(of, [batch], both, schemes.unmixed(case))
    for name, of_scheme in scores["all"].items():
        assert of_scheme.columns[3] == pytest.approx(0, abs=1e-6), name
    few = {name: of_scheme.columns[:, 0] for name, of_scheme in scores["few"].items()}
    agreement, mse = few["uncoded"][2:4]
    assert agreement == 6 / 8  # the first K workers have an input of each group, two are lost
    assert mse != mse
    variance = few["replication, batch mean"][5]
    assert few["no redundancy, regression"][3] < 0.5 * variance
    assert few["KernelCode"][3] < few["replication, batch mean"][3] < variance


def test_a_tuned_code_has_other_numbers_only(of):
    code = codes.SplineCode(4, 6, encoder_smoothing=0.01, ordering="arrival")
    found = schemes.tuned(of.model, of.batches("tuning", 24, 1), code, 1)
    assert (found.num_data, found.num_workers, found.ordering) == (4, 6, "arrival")
    assert repr(found) != repr(code)


def test_scores_are_by_key_and_scheme(of):
    batches = list(of.batches("held_out", 24, 2))
    code = codes.RegressionCode(4, 6)
    sets = {"one": [[0, 1, 2, 3]], "two": [[0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]}
    found = tried(of, batches, sets, {"a": Scheme(code), "b": Scheme(code)})
    assert found["one"]["a"].columns.shape == (7, 2)
    assert found["two"]["b"].columns.shape == (7, 4)
    assert (found["two"]["a"].columns == found["two"]["b"].columns).all()
