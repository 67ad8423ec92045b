"""Workers that fail on purpose."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from coded_torch.nn import CodedWrapper
from coded_torch.stragglers import Uniform
from coded_torch.workers import FaultyWorkers, LocalWorkers

from .workers_tests import PolynomialCode, WorkersTests


class TestFaultyWorkers(WorkersTests):
    def make(self) -> FaultyWorkers:
        return FaultyWorkers(LocalWorkers())


def test_the_law_is_that_of_the_delays_or_of_the_pool():
    inner, law = LocalWorkers(Uniform(2)), Uniform(1)
    assert FaultyWorkers(inner).stragglers is inner.stragglers
    assert FaultyWorkers(inner, delays=law).stragglers is law
    coded = CodedWrapper(nn.Identity(), PolynomialCode(2, 5), workers=FaultyWorkers(inner))
    coded(torch.ones(2, 1))
    assert len(coded.last_run.received) == 3


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"pool": 3}, TypeError, "pool must be of type Workers, got int"),
        ({"delays": 0.1}, TypeError, "delays must be of type Stragglers or None, got float"),
        ({"seed": 0.5}, TypeError, "seed must be an integer, got 0.5"),
        ({"rates": {"nan": "x"}}, TypeError, r"rates\['nan'\] must be a probability .* got 'x'"),
        ({"rates": {"nan": 1.5}}, ValueError, r"rates\['nan'\] must be a probability .* got 1.5"),
        ({"rates": {"nap": 0.5}}, ValueError, "rates must be of crash, .*, got 'nap'"),
        ({"rates": {"nan": 0.6, "crash": 0.6}}, ValueError, "rates must be at most 1 in sum"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=f"FaultyWorkers: {match}"):
        FaultyWorkers(**{"pool": LocalWorkers(), **options})
