"""What a served model is made from: a function that gives the module and examples of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._console import UsageError, find_factory
from ..demo.lenet5 import digits, lenet5
from .tensors import TensorSpec, to_json

__all__ = ["example_request", "lenet5_and_digits", "load", "specs"]


def lenet5_and_digits() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The embedded LeNet-5, and a digit of each kind, in order."""
    images, labels = digits()
    rows = [int((labels == digit).nonzero()[0]) for digit in range(10)]
    return lenet5(), (images[rows],)


def load(factory: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Call a function that is named MODULE:FACTORY, and check what it gives.

    Raises:
        UsageError: there is no such function, or it does not return a module and a tensor, or
            some, with rows.
    """
    made = find_factory("serve", factory)()
    model, examples = made if isinstance(made, tuple) and len(made) == 2 else (None, None)
    if isinstance(examples, Tensor):
        examples = (examples,)
    tensors = isinstance(examples, tuple) and all(isinstance(x, Tensor) for x in examples)
    if not (isinstance(model, nn.Module) and examples and tensors):
        raise UsageError(
            f"coded-torch serve: {factory} must return a module and examples of its inputs, a "
            f"tensor or a tuple of some, got {type(made).__name__}"
        )
    if any(x.dim() < 1 or not len(x) for x in examples):
        raise UsageError(f"coded-torch serve: the examples of {factory} must have rows, got none")
    return model.eval(), examples


def specs(
    module: nn.Module, examples: tuple[Tensor, ...], names: Sequence[str] | None = None
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a module, as it takes and returns them.

    Args:
        module: is called.
        examples: of its inputs. One is named ``input``, several ``input0``, ``input1`` and so on.
        names: of the outputs. Defaults to the keys of a dict, the fields of a named tuple, and
            otherwise ``output``, or ``output0``, ``output1`` and so on.

    Raises:
        UsageError: it returns something else than tensors that the protocol has a name for, or
            another number of them than ``names`` has.
    """
    with torch.no_grad():
        made = module(*examples)
    leaves = pytree.tree_leaves(made)
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise UsageError("coded-torch serve: the module must return tensors to be served")
    keys = list(made) if isinstance(made, Mapping) else getattr(made, "_fields", ())
    if names is None:
        flat = len(keys) == len(leaves)  # else some are nested
        names = [str(key) for key in keys] if flat else _numbered("output", len(leaves))
    if len(names) != len(leaves):
        raise UsageError(
            f"coded-torch serve: --output-names must be {len(leaves)}, one an output, got {names}"
        )
    try:
        return (
            list(map(TensorSpec.of, _numbered("input", len(examples)), examples)),
            list(map(TensorSpec.of, names, leaves)),
        )
    except TypeError as error:
        raise UsageError(f"coded-torch serve: {error}") from None


def _numbered(word: str, count: int) -> list[str]:
    return [word] if count == 1 else [f"{word}{i}" for i in range(count)]


def example_request(
    inputs: list[TensorSpec], examples: tuple[Tensor, ...], row: int
) -> dict[str, Any]:
    """A request with one row of the examples, as JSON has it."""
    return {
        "id": f"example {row}",
        "inputs": [
            {
                "name": spec.name,
                "datatype": spec.datatype,
                "shape": [1, *x.shape[1:]],
                "data": to_json(x[row]),
            }
            for spec, x in zip(inputs, examples, strict=True)
        ],
    }
