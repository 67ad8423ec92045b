"""Changes of a module are noticed."""

import functools
import gc
import types
import weakref

import numpy as np
import pytest
import torch
from torch import nn, optim
from torch.nn import functional

from coded_torch._changes import fingerprint


def closure(k):
    return lambda *_: k


class Held(nn.Module):
    """A module with attributes of all kinds."""

    def __init__(self):
        super().__init__()
        self.k, self.sizes, self.mean = 2.0, [1, (2, None)], torch.zeros(2)
        self.act, self.kind, self.name = functional.relu, torch.float32, "a"
        self.layer, self.other = nn.ReLU(), object()
        self.options, self.held = {"k": 2.0}, types.SimpleNamespace(k=2.0)
        self.zero = 0.0, None

    def forward(self, x):
        return x * self.k

    def scaled(self, x):
        return x * self.k


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("k", k) for k in (3.0, 2, None, np.float64(2.0))),
        *(("sizes", sizes) for sizes in ([1, (3, None)], (1, (2, None)), [1])),
        *(("act", act) for act in (functional.gelu, abs, lambda x: x)),
        *(("zero", (zero, None)) for zero in (-0.0, complex(-0.0, 0.0), np.float64(-0.0))),
        ("mean", torch.zeros(2)),
        ("kind", torch.float64),
        ("name", "b"),
        ("layer", nn.GELU()),
        ("other", nn.Identity),
        ("new", True),
        ("options", {"k": 3.0}),
        ("options", {}),
        ("held", types.SimpleNamespace(k=3.0)),
        ("act", closure(3.0)),
        ("act", [].append),
    ],
)
def test_an_attribute_that_is_replaced_is_noticed(name, value):
    module = nn.Sequential(Held())
    _, before = fingerprint(module)
    assert fingerprint(module)[1] == before
    kept = vars(module[0]).get(name)
    setattr(module[0], name, value)
    assert fingerprint(module)[1] != before
    assert kept is not value


def test_what_changes_in_place_is_noticed_in_collections_tensors_and_hooks():
    module = Held()
    for change in (
        lambda: module.sizes.append(3),
        lambda: module.mean.add_(1),
        lambda: module.options.update(k=3.0),
        lambda: module.register_forward_hook(closure(1.0)),
        lambda: module.register_forward_pre_hook(closure(1.0)),
        lambda: setattr(module, "act", Held().scaled),
        lambda: setattr(module, "act", Held().scaled),
        lambda: setattr(module, "mean", module.mean.view(torch.int32)),
        lambda: setattr(module, "other", torch.ones(2, dtype=torch.cfloat)),
        lambda: setattr(module, "other", module.other.conj()),
        lambda: setattr(module, "second", module.layer),
        lambda: setattr(module, "second", None),
    ):
        _, before = fingerprint(module)
        change()
        assert fingerprint(module)[1] != before


def test_collections_may_hold_themselves_and_each_other():
    module, shared = Held(), [1.0]
    for _ in range(40):
        shared = [shared, shared]  # 2^40 paths lead to the number
    module.options = {"own": module.options, "shared": shared, "table": [[[1.0]] * 2] * 99}
    module.options["own"] = module.options
    for change in (
        lambda: module.options["table"][1][0].append(2.0),
        lambda: module.options.update(own=None),
    ):
        _, before = fingerprint(module)
        assert fingerprint(module)[1] == before
        change()
        assert fingerprint(module)[1] != before


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad])
def test_steps_of_fused_optimizers_are_noticed(make):
    module = nn.Linear(2, 2)
    optimizer = make(module.parameters(), lr=0.1, fused=True)
    _, before = fingerprint(module)
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert fingerprint(module)[1] != before


def test_weights_that_a_step_leaves_alone_can_still_be_differentiated():
    one, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    fingerprint(nn.ParameterList([one, other]))
    losses = [(x * x).sum() for x in (one, other)]
    losses[0].backward()
    optim.SGD([one, other], lr=0.1).step()
    losses[1].backward()
    assert torch.equal(other.grad, torch.full((2,), 2.0))


def test_a_fingerprint_keeps_no_module_alive():
    def made():
        module = Held()
        module.act, module.forward = functools.partial(module), lambda x: module(x)
        return weakref.ref(module), fingerprint(module)

    module, _ = made()
    gc.collect()
    assert module() is None
