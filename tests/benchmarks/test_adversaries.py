"""The peers that look for machines which lie, where it is known what they must find."""

import torch

from benchmarks.locators import Copies, Trial, approxifer, oracle, reweighted, undefended
from coded_torch.codes import BerrutCode, SplineCode
from coded_torch.input_space.ordering import Grouping

LIAR = 7


def trial(code, lie=True):
    """Results of two smooth functions of the machines' points, one of which is a lie."""
    at = torch.from_numpy(code.worker_points.copy())
    results = torch.stack([at**2 + 1, 2 - at], 1)[:, None]  # [N, 1, 2]
    if lie:
        results[LIAR] = torch.tensor([9.0, -5.0])
    plan = code.fit(Grouping.arrival(code.num_data, code.num_data))
    return Trial(plan, results, list(range(code.num_workers)), (LIAR,), 1, {})


def test_the_error_locator_finds_one_lie_of_a_polynomial():
    assert approxifer(trial(BerrutCode(4, 16)), degree=3).dropped == (LIAR,)


def test_weights_leave_a_lie_out():
    code = SplineCode(4, 16)
    answer = reweighted(trial(code), smoothing=1e-4)
    assert answer.dropped == (LIAR,)
    at = torch.from_numpy(code.data_points.copy())
    torch.testing.assert_close(
        answer.values, torch.stack([at**2 + 1, 2 - at], 1), rtol=0.05, atol=0.02
    )


def test_the_median_of_three_copies_ignores_a_lie():
    code = Copies(2, 6)
    plan = code.fit(Grouping.arrival(2, 2))
    results = plan.encode(torch.tensor([[1.0], [2.0]]))  # [6, 1, 1]
    results[3] = 100.0
    answers = undefended(Trial(plan, results, list(range(6)), (3,), 1, {})).values
    assert answers.flatten().tolist() == [1.0, 2.0]


def test_what_was_answered_without_a_lie_is_not_taken_for_what_is_with_it():
    code, honest = SplineCode(4, 16), {}
    good, bad = trial(code, lie=False), trial(code)
    good, bad = good._replace(liars=(), honest=honest), bad._replace(honest=honest)
    assert not torch.equal(undefended(good).values, undefended(bad).values)
    assert torch.equal(oracle(good._replace(liars=(LIAR,))).values, oracle(bad).values)
