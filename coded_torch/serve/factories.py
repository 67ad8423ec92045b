"""What a served model is made from: a function that gives the module and examples of its inputs."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

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
        ImportError, AttributeError: there is no such function.
        TypeError, ValueError: it does not return a module and a tensor, or some, with rows.
    """
    module, _, name = factory.partition(":")
    if not (module and name):
        raise ValueError(f"MODULE:FACTORY must name both, got {factory!r}")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    made = getattr(importlib.import_module(module), name)()
    model, examples = made if isinstance(made, tuple) and len(made) == 2 else (None, None)
    if isinstance(examples, Tensor):
        examples = (examples,)
    tensors = isinstance(examples, tuple) and all(isinstance(x, Tensor) for x in examples)
    if not (isinstance(model, nn.Module) and examples and tensors):
        raise TypeError(
            f"{factory} must return a module and examples of its inputs, a tensor or a tuple of "
            f"some, got {type(made).__name__}"
        )
    if any(x.dim() < 1 or not len(x) for x in examples):
        raise ValueError(f"the examples of {factory} must have rows, got none")
    return model.eval(), examples


def specs(
    module: nn.Module, examples: tuple[Tensor, ...]
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Inputs and outputs of a module, as it takes and returns them.

    One is called ``input`` or ``output``, several ``input0``, ``input1`` and so on.

    Raises:
        TypeError: it returns something else than tensors.
    """
    with torch.no_grad():
        leaves = pytree.tree_leaves(module(*examples))
    if not all(isinstance(leaf, Tensor) for leaf in leaves):
        raise TypeError("the module must return tensors to be served")

    def named(word: str, batches: Any) -> list[TensorSpec]:
        names = [word] if len(batches) == 1 else [f"{word}{i}" for i in range(len(batches))]
        return [TensorSpec.of(name, x) for name, x in zip(names, batches, strict=True)]

    return named("input", examples), named("output", leaves)


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
