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

from coded_torch import _changes
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


class Twin(Held):
    pass


def comparable():
    """A module that a compiled look can compare: no weak reference refers to the others."""
    module = Held()
    del module.other, module.held
    return module


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
@pytest.mark.parametrize("make", [Held, comparable])
def test_an_attribute_that_is_replaced_is_noticed(make, name, value):
    module = nn.Sequential(make())
    _, before = fingerprint(module)
    for _ in range(3):  # the last looks are compiled
        assert fingerprint(module)[1] == before
    kept = vars(module[0]).get(name)
    setattr(module[0], name, value)
    assert fingerprint(module)[1] != before
    assert kept is not value


@pytest.mark.parametrize("kind", ["parameter", "buffer"])
def test_tensors_that_exchange_their_names_are_noticed(kind):
    """They are the same tensors, in the same order."""
    module = nn.Module()
    tensors = [nn.Parameter(torch.full((2,), value)) for value in (2.0, 5.0)]
    register = module.register_parameter
    if kind == "buffer":
        tensors = [tensor.detach() for tensor in tensors]
        register = module.register_buffer
    for name, tensor in zip(("scale", "shift"), tensors, strict=True):
        register(name, tensor)
    before = [fingerprint(module)[1] for _ in range(3)]  # the last looks are compiled
    del module.scale, module.shift
    for name, tensor in zip(("shift", "scale"), tensors, strict=True):
        register(name, tensor)
    assert fingerprint(module)[1] not in before


@pytest.fixture(params=[True, False], ids=["dlpack", "attributes"])
def has_dlpack(request, monkeypatch):
    """Say whether a compiled look may see tensors as DLPack tells them."""
    if not request.param:
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)


@pytest.mark.usefixtures("has_dlpack")
@pytest.mark.parametrize("make", [Held, comparable])
def test_what_changes_in_place_is_noticed_in_collections_tensors_and_hooks(make):
    module = make()
    for change in (
        lambda: module.sizes.append(3),
        lambda: module.mean.add_(1),
        lambda: module.options.update(k=3.0),
        lambda: module.register_forward_hook(closure(1.0)),
        lambda: module.register_forward_pre_hook(closure(1.0)),
        lambda: setattr(module, "act", Held().scaled),
        lambda: setattr(module, "act", Held().scaled),
        lambda: module._forward_hooks.clear(),
        lambda: module._forward_pre_hooks.clear(),
        lambda: setattr(module, "mean", module.mean.view(torch.int32)),
        lambda: setattr(module, "other", torch.ones(2, dtype=torch.cfloat)),
        lambda: setattr(module, "other", module.other.conj()),
        lambda: setattr(module, "second", module.layer),
        lambda: setattr(module, "second", None),
        lambda: setattr(module, "k", module.k + 1.5),  # perhaps where the last number was
        lambda: setattr(module, "k", module.k + 1.5),
        lambda: setattr(module, "table", torch.arange(4.0).view(2, 2)),
        lambda: setattr(module.table, "data", module.table.data.t()),
        lambda: setattr(module.table, "data", module.table.data.view(torch.int32)),
        lambda: setattr(module.table, "data", module.table.data[:1]),
        lambda: setattr(module.table, "data", torch._neg_view(module.table.data)),
        lambda: vars(module).update(again=vars(module).pop("table")),
        lambda: setattr(module, "__class__", Twin),
        lambda: module.layer.__dict__.update(inplace=True),
        lambda: module._modules.update(layer=nn.ReLU(inplace=True), more=nn.ReLU()),
    ):
        for _ in range(3):
            _, before = fingerprint(module)
        change()
        assert fingerprint(module)[1] != before


@pytest.mark.usefixtures("has_dlpack")
def test_a_module_that_stays_as_it_is_is_walked_twice(monkeypatch):
    module = nn.Sequential(comparable(), nn.Linear(2, 2), nn.BatchNorm1d(2))
    walks = []
    walk = _changes._walk
    monkeypatch.setattr(_changes, "_walk", lambda module: walks.append(module) or walk(module))
    found = [fingerprint(module) for _ in range(5)]
    assert len(walks) == 2
    assert all(key == found[0][1] for _, key in found)
    with torch.no_grad():
        module[1].weight.data[0, 0] += 1  # nothing counts it
    assert fingerprint(module)[1] != found[0][1]
    assert fingerprint(module)[1] == fingerprint(module)[1]
    assert len(walks) == 2


def replace_data(weight):
    weight.data = torch.full_like(weight, 3)


def set_memory(weight):
    weight.set_(torch.full_like(weight, 3))


@pytest.mark.parametrize("change", [replace_data, set_memory])
@pytest.mark.parametrize("is_part", [False, True])
def test_new_memory_of_a_scripts_weight_is_noticed(change, is_part):
    script = torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.Tanh()))
    module = nn.Sequential(script) if is_part else script
    with torch.no_grad():
        for _ in range(3):  # the third one compares in compiled code
            before = fingerprint(module)[1]
        change(next(module.parameters()))
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


OPTIMIZERS = ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "RAdam", "Adamax", "Adadelta"]
OPTIMIZERS += ["ASGD", "Rprop"]
FUSED = "SGD", "Adam", "AdamW", "Adagrad"
WAYS = [(name, way) for name in OPTIMIZERS for way in ("plain", "foreach", "bfloat16")]
WAYS += [(name, "fused") for name in FUSED] + [("SGD", "sparse"), ("SparseAdam", "sparse")]


def stale(module, change, steps):
    """Return how many steps changed weights and not the fingerprint."""
    unseen = 0
    for _ in range(steps):
        before = [x.detach().clone() for x in module.state_dict().values()]
        for _ in range(3):
            _, key = fingerprint(module)
        change()
        after = module.state_dict().values()
        changed = not all(map(torch.equal, before, after))
        unseen += changed and fingerprint(module)[1] == key
    return unseen


@pytest.mark.parametrize("steps", [10, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("clears", [False, True])
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_every_step_of_an_optimizer_is_seen(name, way, clears, steps):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if way == "bfloat16" else torch.float32
    module = nn.Linear(40, 30, dtype=dtype)
    x = torch.randn(4, 40, dtype=dtype)
    if way == "sparse":
        module = nn.Embedding(40, 30, sparse=True)
        x = torch.randint(40, (4,))
    options = {way: True} if way in ("foreach", "fused") else {}
    optimizer = getattr(optim, name)(module.parameters(), lr=1e-3, **options)
    if clears:
        optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())

    def step():
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()

    assert stale(module, step, steps) == 0


def test_gradients_that_a_closure_makes_and_a_hook_clears_are_seen():
    module = nn.Linear(40, 30)
    optimizer = optim.Adam(module.parameters(), fused=True)
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())

    def closure():
        module(torch.randn(4, 40)).square().sum().backward()

    assert stale(module, lambda: optimizer.step(closure), 10) == 0


@torch.no_grad()
def by_fused_operator(module):
    weights = [module.weight]
    numbers = {"weight_decay": 0.0, "momentum": 0.0, "lr": 0.1, "dampening": 0.0}
    numbers |= {"nesterov": False, "maximize": False, "is_first_step": True}
    torch._fused_sgd_(weights, [torch.ones_like(x) for x in weights], [], **numbers)


@torch.inference_mode()
def in_inference_mode(module):
    module.weight.add_(1)


def by_lora(module):
    low, high = torch.randn(40, 2), torch.randn(2, 30)
    module.weight.data += (low @ high).T


def by_quantising(module):
    scale = module.weight.detach().abs().max() * (0.5 + torch.rand(())) / 127
    module.weight.data.copy_((module.weight.detach() / scale).round() * scale)


@pytest.mark.parametrize("steps", [10, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "change",
    [
        by_fused_operator,
        in_inference_mode,
        by_lora,
        by_quantising,
        lambda m: m.weight.data.mul_(0.999),
        lambda m: torch.from_dlpack(m.weight.detach()).add_(1),
        lambda m: np.add(m.weight.detach().numpy(), 1, out=m.weight.detach().numpy()),
        lambda m: m.weight.t().data.add_(1),
        lambda m: torch.utils.swap_tensors(m.weight, nn.Parameter(torch.randn(30, 40))),
    ],
)
def test_every_change_of_a_whole_weight_is_seen(change, steps):
    torch.manual_seed(0)
    module = nn.Linear(40, 30)
    assert stale(module, lambda: change(module), steps) == 0


@pytest.mark.parametrize("steps", [10, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("average", [None, optim.swa_utils.get_ema_multi_avg_fn(0.9)])
def test_averages_of_weights_are_seen(average, steps):
    module = optim.swa_utils.AveragedModel(nn.Linear(40, 30), multi_avg_fn=average)
    change = nn.Linear(40, 30)

    def update():
        with torch.no_grad():
            change.weight.normal_()
        module.update_parameters(change)

    assert stale(module, update, steps) == 0


@pytest.mark.parametrize("shape", [(3,), (30, 40), (1, 70_001)])
def test_samples_are_of_the_tensor_alone(shape):
    module = nn.Module()
    whole = torch.zeros(2, *shape)
    module.register_buffer("part", whole[0])
    module.register_buffer("expanded", torch.zeros(1).expand(1000, 1000))
    module.register_buffer("freed", torch.zeros(9)[3:])
    module.freed.untyped_storage().resize_(0)
    _, key = fingerprint(module)
    whole[1].numpy()[:] = 1
    assert fingerprint(module)[1] == key
    for place in (0, -1):
        whole[0].view(-1).numpy()[place] += 1
        assert fingerprint(module)[1] != key
        _, key = fingerprint(module)


def test_a_fingerprint_keeps_no_module_alive():
    def made():
        module = Held()
        module.act, module.forward = functools.partial(module), lambda x: module(x)
        found = [fingerprint(module) for _ in range(3)]
        return weakref.ref(module), found

    module, _ = made()
    gc.collect()
    assert module() is None
