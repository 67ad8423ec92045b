"""The wrapper as a stand-in for the module."""

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper, Waiting
from coded_torch.codes import RegressionCode, SplineCode
from coded_torch.stragglers import Uniform
from coded_torch.testing.workers import PolynomialCode
from coded_torch.workers import DeviceWorkers, LocalWorkers

from .modules import EXACT, linear, rand


def network(**options: Any) -> CodedWrapper:
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
    return CodedWrapper(module, PolynomialCode(2, 4), **options).eval()


def test_functional_call_takes_the_names_of_the_parameters():
    coded, x = network(), rand(4, 3)
    tensors = {k: v + 1 for k, v in [*coded.named_parameters(), *coded.named_buffers()]}
    wanted = copy.deepcopy(coded.module)
    wanted.load_state_dict({k.removeprefix("module."): v for k, v in tensors.items()})
    torch.testing.assert_close(torch.func.functional_call(coded, tensors, x), wanted(x), **EXACT)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize(
    "options",
    [
        dict,
        lambda: {"workers": LocalWorkers(Uniform(1)), "waiting": Waiting.first(1)},
        lambda: {"workers": DeviceWorkers(["cpu", "cpu"]), "waiting": Waiting(deadline=60.0)},
    ],
)
def test_copies_and_pickles(twin, options):
    coded, x = network(**options()), rand(5, 3)
    wanted = coded(x)
    other = twin(coded)
    with coded.workers, other.workers:
        torch.testing.assert_close(other(x), wanted, **EXACT)
        assert other.module[0].weight is not coded.module[0].weight
        assert other.waiting == coded.waiting
        assert other.last_run.received


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("make", [SplineCode, RegressionCode])
def test_a_compiled_wrapper_runs_as_it_is_and_may_compile_its_module(make, mode):
    torch.compiler.reset()
    module, x = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), rand(12, 3).float()

    def wrapper():
        return CodedWrapper(module, make(4, 6), workers=LocalWorkers(Uniform(1, seed=0)))

    with mode():
        wanted = wrapper()(x)
        compiled = torch.compile(coded := wrapper())
        assert torch.equal(compiled(x), wanted)
        assert coded.last_run.received
        assert list(coded.children()) == [module]
        coded.module = nn.Sequential(nn.Linear(3, 2))
        assert not torch.equal(compiled(x), wanted)
        inside = wrapper()
        inside.compile()
        torch.testing.assert_close(inside(x), wanted)


@pytest.mark.parametrize("bigger", [False, True])
def test_the_state_dict_is_that_of_the_module_both_ways(bigger):
    """On its own, and as a part of a bigger module."""

    def model(part: nn.Module) -> nn.Module:
        head = nn.Linear(2, 2).double()
        return nn.ModuleDict({"head": head, "module": part}) if bigger else part

    bare, coded = model(network().module), model(network())
    with torch.no_grad():
        for parameter in bare.parameters():
            parameter.add_(1)
    state, file = bare.state_dict(), io.BytesIO()
    assert list(coded.state_dict()) == list(state)
    assert coded.state_dict()._metadata == state._metadata
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert str(coded.load_state_dict(loaded)) == "<All keys matched successfully>"
    for a, b in zip(coded.state_dict().values(), state.values(), strict=True):
        assert torch.equal(a, b)
    bare.load_state_dict(coded.state_dict())
    twice = model(CodedWrapper(network(), PolynomialCode(2, 4)))
    twice.load_state_dict(state)
    assert all(map(torch.equal, twice.parameters(), bare.parameters()))
    bias = "module.2.bias" if bigger else "2.bias"
    with pytest.raises(RuntimeError, match=rf'Missing key.*{bias}"(.|\n)*Unexpected key.*"more'):
        coded.load_state_dict({k: v for k, v in state.items() if k != bias} | {"more": 1})


@pytest.mark.parametrize(
    ("part", "matters"),
    [(nn.BatchNorm1d(4), True), (nn.Dropout(0.5), True), (nn.Dropout(0.0), False)],
)
def test_a_part_in_training_is_warned_of(part, matters):
    coded = CodedWrapper(nn.Sequential(nn.Linear(3, 4), part).double(), PolynomialCode(2, 4))
    if matters:
        said = (
            r"got submodule '1' \((BatchNorm1d|Dropout)\) in training mode, .* eval\(\) on the mod"
        )
        with pytest.warns(UserWarning, match=said) as seen:
            coded(rand(4, 3))
        assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (coded.eval() if matters else coded)(rand(4, 3))


def test_modes_devices_dtypes_and_hooks_reach_the_module():
    coded, calls = CodedWrapper(linear().eval(), PolynomialCode(2, 4)), []
    assert not coded.training
    assert coded.train().module.training
    coded.module.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    coded.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    coded(rand(5, 3))
    assert calls == [2, 3, 12, 5]  # small parts prove the rows of outputs
    assert coded.half().module.weight.dtype == torch.float16
    assert coded.to("meta").module.weight.device.type == "meta"
    assert [name for name, _ in coded.named_parameters()] == ["module.weight", "module.bias"]
