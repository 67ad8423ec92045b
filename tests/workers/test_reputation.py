"""What is known of machines after many requests."""

import pickle

import pytest
import torch

from coded_torch.workers import Reputation


def test_a_small_lie_is_named_in_some_requests():
    generator = torch.Generator().manual_seed(0)
    reputation = Reputation()
    named, requests = (), 0
    while not named and requests < 100:
        requests += 1
        z = torch.randn(22, generator=generator)
        z[7] += 3
        named = reputation.update(dict(enumerate(z.tolist())))
    assert named == (7,)
    assert requests <= 6
    reputation.forget(7)
    assert 7 not in reputation.sums
    assert reputation.update({}) == ()


def test_honest_machines_are_named_as_seldom_as_it_says():
    generator = torch.Generator().manual_seed(1)
    reputation, alarms, count = Reputation(false_alarms=1e-3), 0, 0
    for _ in range(2000):
        scores = torch.randn(100, generator=generator).tolist()
        for machine in reputation.update(dict(enumerate(scores))):
            alarms += 1
            reputation.forget(machine)
        count += 100
    assert 0.3e-3 < alarms / count < 0.7e-3


def test_sums_outlive_pickling():
    reputation = Reputation(1e-4)
    reputation.update({1: 5.0})
    again = pickle.loads(pickle.dumps(reputation))
    assert again.sums == {1: 4.5}
    assert again.update({1: 6.0}) == (1,)
    assert repr(again) == "Reputation(false_alarms=0.0001, drift=0.5)"


def test_bad_arguments():
    with pytest.raises(ValueError, match="false_alarms must be between 0 and 1, got 1"):
        Reputation(1)
    with pytest.raises(ValueError, match="drift must be positive and finite, got 0"):
        Reputation(drift=0)
