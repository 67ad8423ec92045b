"""What is found of a module on examples: the names, types and sizes of its inputs and outputs."""

from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from torch import nn

from coded_torch.nn import CodedWrapper
from coded_torch.serve import App, TensorSpec, specs
from coded_torch.workers import LocalWorkers

from ..nn.modules import Call
from .servers import Client, serving, tensor


class Both(NamedTuple):
    total: torch.Tensor
    rows: torch.Tensor


class Tokens(nn.Module):
    """Takes tokens and a mask of one length, of at most eight, and a scale by its keyword."""

    def forward(self, tokens, mask=None, *, scale):
        assert tokens.shape[1] <= 8
        rows = tokens * (1 if mask is None else mask)
        return Both(rows.sum(1) * scale, rows.double())


class Features(nn.Module):
    def forward(self, features):
        return {"score": features["user"][:, :2] + features["item"].sum(1, keepdim=True)}


TOKENS, SCALE = torch.arange(24).reshape(3, 8), torch.tensor([1.0, 2.0, 3.0])


def shapes(found):
    return [{spec.name: spec.shape for spec in each} for each in found]


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_inputs_are_named_as_parameters_and_sizes_are_open_where_the_module_allows(kind):
    examples = kind(scale=SCALE, mask=TOKENS, tokens=TOKENS)
    inputs, outputs = shapes(specs(Tokens(), examples))
    assert list(inputs.items()) == [("tokens", (-1,)), ("mask", (-1,)), ("scale", ())]
    assert outputs == {"total": (), "rows": (-1,)}
    inputs, outputs = shapes(specs(Tokens(), examples, fixed_shapes=True))
    assert inputs == {"tokens": (8,), "mask": (8,), "scale": ()}
    assert outputs == {"total": (), "rows": (8,)}


def test_a_dict_that_is_no_keywords_is_an_input():
    examples = {"user": torch.ones(3, 5), "item": torch.ones(3, 5)}
    for given in (examples, (examples,)):
        inputs, outputs = shapes(specs(Features(), given))
        assert inputs == {"user": (-1,), "item": (-1,)}
        assert outputs == {"score": (2,)}


@pytest.mark.parametrize(
    ("module", "examples", "inputs", "outputs"),
    [
        (nn.Linear(4, 2), torch.ones(3, 4), {"input": (4,)}, {"output": (2,)}),
        (nn.Conv2d(1, 2, 3), torch.ones(3, 1, 9, 7), {"input": (1, -1, -1)}, (2, -1, -1)),
        # One of two equal sizes is open.
        (nn.Linear(4, 4), torch.ones(3, 4, 4), {"input": (-1, 4)}, (-1, 4)),
        # A size that is only broadcast is not open, and neither is one that becomes rows.
        (Call(lambda x: x + torch.ones(2)), torch.ones(3, 2), {"args": (2,)}, (2,)),
        (Call(lambda x: x.reshape(-1, 4)), torch.ones(3, 4), {"args": (4,)}, (4,)),
        (Call(lambda *x: (x[0], (x[1],))), (TOKENS, SCALE), {"args0": (-1,), "args1": ()}, None),
        (torch.jit.script(nn.Linear(4, 2)), torch.ones(3, 4), {"input": (4,)}, (2,)),
    ],
)
def test_names_and_sizes(module, examples, inputs, outputs):
    found = shapes(specs(module, examples))
    assert found[0] == inputs
    wanted = outputs if isinstance(outputs, dict) else {"output": outputs}
    assert found[1] == ({"output0": (-1,), "output1.0": ()} if outputs is None else wanted)


@pytest.mark.parametrize(
    ("module", "examples", "message"),
    [
        (nn.Identity(), (TOKENS, TOKENS), r"examples must fit forward\(input.*too many positional"),
        (Tokens(), TOKENS, "examples must fit forward.*missing a required argument: 'scale'"),
        (Tokens(), {"tokens": TOKENS, "scale": "no"}, "'scale' .* with rows, got str"),
        (Tokens(), {"tokens": TOKENS, "scale": SCALE[:2]}, r"'scale' .* have 3 rows, got \[2\]"),
        (nn.Identity(), torch.ones(0, 4), "'input' among examples must have some rows, got"),
        (nn.Identity(), torch.ones(()), "'input' among examples must have some rows, got"),
        (nn.Identity(), {}, r"must be tensors with rows, each of its own name, got \[\]"),
        (Features(), ({"user": {"0": TOKENS}, "user.0": TOKENS},), "own name, got 'user.0'"),
        (Call(lambda x: {"a": {"b": x}, "a.b": x}), TOKENS, "own name, got 'a.b'"),
        (Call(lambda x: (x, "no")), TOKENS, "'output1' among outputs of the module .* got str"),
        (Call(lambda x: {"loss": x.sum()}), TOKENS, r"'loss' .* must have 3 rows, got \[\]"),
    ],
)
def test_errors_name_the_element(module, examples, message):
    with pytest.raises((TypeError, ValueError), match=f"^specs: .*{message}"):
        specs(module, examples)


def test_a_server_takes_keywords_and_sizes_that_the_module_takes():
    coded = CodedWrapper(Tokens(), workers=LocalWorkers(), parts=2)
    examples = {"scale": SCALE, "tokens": TOKENS}
    inputs, outputs = specs(coded.module, examples)
    how = {"inputs": inputs, "outputs": outputs, "examples": examples}
    with serving(App(coded, name="m", deadline=5.0, **how)) as port, Client(port) as client:
        assert client.get("/v2/models/m")[1]["inputs"][0]["shape"] == [-1, -1]
        for tokens in ([[1, 2, 3], [4, 5, 6]], [[1], [2]]):
            given = [tensor([2.0, 3.0], "scale"), tensor(tokens, "tokens", "INT64")]
            status, answer = client.infer({"inputs": given})
            assert status == 200
            total = [sum(row) * scale for row, scale in zip(tokens, (2.0, 3.0), strict=True)]
            assert answer["outputs"][0]["data"] == total
        status, answer = client.infer({"inputs": [given[0], given[1] | {"name": "input2"}]})
        why = "an input must be once one of ['tokens', 'scale'], got 'input2'"
        assert (status, answer["error"]) == (400, why)


def test_inputs_are_of_the_parameters_of_their_names():
    class Minus(nn.Module):
        def forward(self, x, y):
            return x - y

    coded, rows = CodedWrapper(Minus(), workers=LocalWorkers(), parts=1), torch.ones(2, 1)
    y, x, output = (TensorSpec(name, "FP32", (1,)) for name in ("y", "x", "output"))
    how = {"inputs": [y, x], "outputs": [output], "examples": {"y": rows, "x": rows}}
    with serving(App(coded, name="m", deadline=5.0, **how)) as port, Client(port) as client:
        given = [tensor([[1.0]], "y"), tensor([[5.0]], "x")]
        assert client.infer({"inputs": given})[1]["outputs"][0]["data"] == [4.0]


def test_examples_that_are_larger_than_open_sizes_may_be_fit_into_a_body():
    module, examples = nn.ReLU(), torch.ones(2, 2**17)
    coded = CodedWrapper(module, workers=LocalWorkers(), parts=1)
    inputs, outputs = specs(module, examples)
    how = {"inputs": inputs, "outputs": outputs, "max_batch_size": 64}
    assert inputs[0].shape == (-1,)
    most = [
        App(coded, name="m", deadline=1.0, **how, **x).reader.most
        for x in ({}, {"examples": examples})
    ]
    assert most[0] < 2**27 < 64 * 2**17 * 32 < most[1]
