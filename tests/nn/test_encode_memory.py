"""Coded inputs are written where those of the last call were, if nothing can hold these."""

import copy
import threading

import pytest
import torch
from torch import nn

from coded_torch.codes import KernelCode, LagrangeCode, ReplicationCode
from coded_torch.nn import CodedWrapper, Waiting
from coded_torch.workers import LocalWorkers

COLUMNS = 180_000  # so many that memory is kept


class Notes(nn.Module):
    """Notes where its inputs lie, and keeps them if it is made to."""

    def __init__(self, keep: bool = False) -> None:
        super().__init__()
        self.keep, self.kept, self.addresses = keep, [], []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.addresses.append(x.data_ptr())
        if self.keep:
            self.kept.append((x, x.clone()))
        return x * 2


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def wrapped(module, code=None, **options):
    options = {"ordering": "arrival", "workers": LocalWorkers(), **options}
    return CodedWrapper(module, code or LagrangeCode(4, 6, degree=1), **options)


def batch(seed=0, rows=4, **options):
    return torch.randn(rows, COLUMNS, generator=torch.Generator().manual_seed(seed), **options)


@pytest.mark.parametrize(
    "code", [LagrangeCode(4, 6, degree=1), KernelCode(4, 6), ReplicationCode(4, 6)]
)
@pytest.mark.parametrize("inference", [False, True])
def test_the_memory_is_the_same_in_every_call(code, inference):
    module = Notes()
    coded = wrapped(module, code)
    with torch.inference_mode(inference), torch.no_grad():
        for seed in range(5):
            x = batch(seed)
            torch.testing.assert_close(coded(x), 2 * x, rtol=0, atol=1e-4)
    assert len(set(module.addresses)) == 1


def test_what_the_module_keeps_is_not_written():
    module = Notes(keep=True)
    coded = wrapped(module)
    for seed in range(5):
        coded(batch(seed))
    assert len(set(module.addresses)) == 5
    assert all(torch.equal(kept, was) for kept, was in module.kept)


def test_what_a_graph_has_saved_is_not_written():
    torch.manual_seed(0)
    module = nn.Linear(COLUMNS, 3)
    coded = wrapped(module)
    xs = [batch(seed) for seed in range(4)]
    answers = [coded(x).sum() for x in xs]  # of the weights' gradients, the inputs are a part
    for x, answer in zip(xs, answers, strict=True):
        (got,) = torch.autograd.grad(answer, module.weight)
        (want,) = torch.autograd.grad(module(x).sum(), module.weight)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)


def test_gradients_pass_to_the_inputs():
    x = batch(dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(wrapped(Double())(x).sum(), x)
    torch.testing.assert_close(grad, torch.full_like(x, 2.0))
    grad = torch.func.grad(lambda x: wrapped(Double())(x).sum())(x.detach())
    torch.testing.assert_close(grad, torch.full_like(x, 2.0))
    _, tangent = torch.func.jvp(wrapped(Double()), (x.detach(),), (x.detach(),))
    torch.testing.assert_close(tangent, 2 * x.detach())


def test_answers_that_are_held_stay_what_they_are():
    for code in (LagrangeCode(4, 6, degree=1), ReplicationCode(4, 6)):
        for module in (nn.Identity(), Notes()):
            coded = wrapped(module, code)
            answers = [coded(batch(seed)) for seed in range(4)]
            copies = [answer.clone() for answer in answers]
            for seed in range(4, 8):
                coded(batch(seed))
            assert all(torch.equal(x, y) for x, y in zip(answers, copies, strict=True))


def test_what_passes_through_is_not_written():
    class Both(nn.Module):
        def forward(self, x):
            return x * 2, x

    coded = wrapped(Both(), out_dims=(0, None))
    passed = [coded(batch(seed))[1] for seed in range(4)]
    copies = [tensor.clone() for tensor in passed]
    coded(batch(9))
    assert all(torch.equal(x, y) for x, y in zip(passed, copies, strict=True))


def test_several_inputs_and_the_batch_elsewhere():
    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y.movedim(1, 0)[:, :, 0].float()

    coded = wrapped(Sum(), in_dims=(0, 1))
    x, y = batch(0), torch.randn(COLUMNS, 4, 3, dtype=torch.float64)
    y = y.movedim(0, 1).contiguous().movedim(0, 1)
    for _ in range(3):
        torch.testing.assert_close(coded(x, y), x + y[:, :, 0].T.float(), rtol=1e-4, atol=1e-4)


def test_an_audit_row_is_among_the_inputs():
    coded = wrapped(
        Notes(), ReplicationCode(2, 8), max_adversaries=1, audit=True, waiting=Waiting.first()
    )
    for seed in range(3):
        x = batch(seed)
        assert torch.equal(coded(x), 2 * x)


def test_threads_do_not_share_it():
    coded = wrapped(Notes())
    wrong = []

    def work(seed):
        x = batch(seed)
        for _ in range(20):
            if not torch.allclose(coded(x), 2 * x, atol=1e-4):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_copies_have_their_own():
    coded = wrapped(Notes())
    coded(batch())
    other = copy.deepcopy(coded)
    torch.testing.assert_close(other(batch(1)), 2 * batch(1), rtol=0, atol=1e-4)
    assert other.module.addresses[-1] != coded.module.addresses[-1]
