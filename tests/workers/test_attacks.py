"""What workers that lie answer: on the virtual clock, where worker n has part n."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

from coded_torch.testing.workers import task_of
from coded_torch.workers import FaultyWorkers, LocalWorkers, Reply
from coded_torch.workers.faults import ATTACKS


class Pair(nn.Module):
    """Two outputs, one of them with the batch last."""

    def forward(self, x):
        return {"a": 2 * x, "b": (x + 1).T, "n": None}


def replies(pool, batch, rows=4, module=None):
    """The values by worker of one request for all units of ``rows`` rows."""
    module = module or nn.Identity()
    with torch.no_grad():
        return {
            reply.worker: reply.value
            for reply in pool.run(module, task_of(batch.unflatten(0, (-1, rows))))
            if isinstance(reply, Reply)
        }


def batch(seed=0):
    return torch.randn(20, 6, generator=torch.Generator().manual_seed(seed))


def lying(attack, workers=(1, 3), **options):
    return FaultyWorkers(LocalWorkers(), attack=attack, adversaries=workers, **options)


@pytest.mark.parametrize("attack", ATTACKS)
def test_only_those_lie_that_are_said_to_and_in_the_right_form(attack):
    x = batch()
    truth = replies(LocalWorkers(), x)
    told = replies(lying(attack), x)
    assert {m for m in truth if not torch.equal(truth[m], told[m])} == {1, 3}
    for value in told.values():
        assert value.shape == (4, 6)
        assert value.dtype == torch.float32
        assert value.isfinite().all()


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_depend_on_seed_and_request_only(attack):
    options = {"workers": range(5), "seed": 3}
    one, other = lying(attack, **options), pickle.loads(pickle.dumps(lying(attack, **options)))
    for i in range(3):
        told, again = replies(one, batch(i)), replies(other, batch(i))
        assert all(torch.equal(told[m], again[m]) for m in told)
    assert copy.deepcopy(one).adversaries == (0, 1, 2, 3, 4)


def test_noise_is_of_a_standard_deviation():
    x = 5 * torch.randn(2, 50_000, generator=torch.Generator().manual_seed(0))
    (value,) = replies(lying("noise", (0,)), x, rows=2).values()
    assert abs(float((value - x).std() / x.std()) - 1) < 0.01


def test_what_is_said_of_each_attack():
    x = batch()
    parts = list(x.split(4))
    swapped = replies(lying("swap"), x)[1]
    assert torch.equal(swapped.sort(1).values, parts[1].sort(1).values)
    assert torch.equal(swapped.topk(2).values, parts[1].topk(2).values)
    assert (swapped.argmax(1) != parts[1].argmax(1)).all()
    assert int((replies(lying("one_row"), x)[1] != parts[1]).any(1).sum()) == 1


def test_pytrees_and_other_batch_dimensions():
    task = task_of(batch().unflatten(0, (-1, 4)))
    task = dataclasses.replace(task, out_dims={"a": 0, "b": 1, "n": None})
    pool = lying("swap")
    with torch.no_grad():
        told = {r.worker: r.value for r in pool.run(Pair(), task)}
    assert told[1]["n"] is None
    assert torch.equal(told[1]["a"] / 2 + 1, told[1]["b"].T)
    assert not torch.equal(told[1]["a"], 2 * batch()[4:8])
    assert torch.equal(told[2]["a"], 2 * batch()[8:12])


def test_an_attack_of_ones_own_is_a_callable():
    def attack(rows, generator):
        return rows + torch.rand(rows.shape, generator=generator)

    x = batch()
    truth, told = replies(LocalWorkers(), x), replies(lying(attack), x)
    assert {m for m in truth if not torch.equal(truth[m], told[m])} == {1, 3}
    again = replies(lying(attack), x)
    assert all(torch.equal(told[m], again[m]) for m in told)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"FaultyWorkers: attack must be one of noise.*got 'lie'"):
        FaultyWorkers(LocalWorkers(), attack="lie")
    with pytest.raises(ValueError, match="adversaries must come with an attack, got"):
        FaultyWorkers(LocalWorkers(), adversaries=(1,))
    with pytest.raises(ValueError, match="adversaries must be at least 0, got -1"):
        FaultyWorkers(LocalWorkers(), attack="noise", adversaries=(-1,))


@pytest.mark.parametrize(("attack", "most"), [("one_output", 1), ("exponent", 1), ("mantissa", 1)])
def test_a_single_number_is_wrong(attack, most):
    x = batch()
    truth, told = replies(LocalWorkers(), x), replies(lying(attack), x)
    for worker in (1, 3):
        assert 0 < (truth[worker] != told[worker]).sum() <= most


def test_a_block_is_wrong_in_all_rows():
    x = batch()
    truth, told = replies(LocalWorkers(), x), replies(lying("block"), x)
    wrong = truth[1] != told[1]
    assert wrong.any(1).all()
    assert wrong.any(0).sum() == 1  # a quarter of 6
