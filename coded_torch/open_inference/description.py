"""The inputs and outputs of a module, found by calls on examples."""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._arguments import arguments, check, named, signature_of
from . import TensorSpec

Place = tuple[Any, int]  # a tensor, by its number or name, and one of its dimensions
Run = Callable[[Sequence[Tensor]], dict[str, Tensor]]


def bind(owner: object, module: nn.Module, examples: Any) -> inspect.BoundArguments:
    """Return examples as arguments of a module's ``forward``; a TypeError if they do not fit."""
    given = tuple(examples) if isinstance(examples, list) else examples
    args, kwargs = arguments(given, module)
    signature = signature_of(module)
    try:
        return signature.bind(*args, **kwargs)
    except TypeError as error:
        owner = owner if isinstance(owner, str) else type(owner).__name__
        must = f"examples must fit forward{signature}"
        raise TypeError(f"{owner}: {must}, got {type(examples).__name__}: {error}") from None


def in_order(inputs: Sequence[TensorSpec], call: inspect.BoundArguments) -> Sequence[TensorSpec]:
    """Return specs in the order of a call's leaves if they have their names, else as they are."""
    names, by_name = _inputs_of(call), {spec.name: spec for spec in inputs}
    return [by_name[name] for name in names] if names.keys() == by_name.keys() else inputs


def _inputs_of(call: inspect.BoundArguments) -> dict[str, Any]:
    """Return the leaves by their names, in the order of ``forward``'s parameters."""
    inputs: dict[str, Any] = {}
    for parameter, value in call.arguments.items():
        inputs |= named("specs", value, parameter)
    return inputs


def specs(
    module: nn.Module, examples: Any, *, fixed_shapes: bool = False
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the specs of a module's inputs and outputs, leaf by leaf.

    Inputs have the names of ``forward``'s parameters, outputs of the keys of a dict or the fields
    of a named tuple, else ``output``, or ``output0``, ``output1`` and so on. Keys name the inputs
    in a dict, too. The module is tried on two rows in other sizes. A dimension in which it takes
    other sizes is -1.

    Args:
        module: the module, which is called without gradients.
        examples: rows of each input: a tensor ``[B, ...]``, several in a list or tuple, or keyword
            arguments in a mapping, such as an encoding of Hugging Face.
        fixed_shapes: whether no other sizes are tried. Defaults to False.

    Raises:
        TypeError: the examples do not fit ``forward``, or an input or an output is not a tensor.
        ValueError: a tensor has another number of rows than the first input, or none.
    """
    call = bind("specs", module, examples)
    leaves, form = pytree.tree_flatten((call.args, call.kwargs))
    inputs = _inputs_of(call)
    _check("examples", inputs, len(leaves))

    def run(values: Sequence[Tensor]) -> dict[str, Tensor]:
        args, kwargs = pytree.tree_unflatten(values, form)
        with torch.no_grad():
            made = named("specs", module(*args, **kwargs), "output")
        _check("outputs of the module", made, rows=len(values[0]))
        return made

    outputs, is_open = run(leaves), set[Place]()
    if not fixed_shapes:
        is_open = _open_places(run, [x[:2] for x in leaves], outputs)
    found = []
    for places, tensors in ((range(len(leaves)), inputs), (outputs, outputs)):
        found.append([TensorSpec.of(name, x) for name, x in tensors.items()])
        for i, (place, spec) in enumerate(zip(places, found[-1], strict=True)):
            sizes = (-1 if (place, d) in is_open else n for d, n in enumerate(spec.shape, 1))
            found[-1][i] = dataclasses.replace(spec, shape=tuple(sizes))
    return found[0], found[1]


def _check(what: str, tensors: Mapping[str, Any], number: int = 0, rows: int = 0) -> None:
    for name, leaf in tensors.items():
        must = f"{name!r} among {what} must be a tensor with rows"
        check("specs", isinstance(leaf, Tensor), must, type(leaf), TypeError)
        rows = rows or (len(leaf) if leaf.dim() else 0)
        must = f"{name!r} among {what} must have {rows or 'some'} rows"
        check("specs", rows and leaf.shape[:1] == (rows,), must, [*leaf.shape])
    must = f"{what} must be tensors with rows, each of its own name"
    check("specs", len(tensors) >= max(number, 1), must, [*tensors], TypeError)


def _open_places(run: Run, leaves: Sequence[Tensor], outputs: Mapping[str, Tensor]) -> set[Place]:
    """Return the dimensions of inputs in which two other sizes work, and of outputs that follow.

    Dimensions of one size may have to be equal, such as the lengths of tokens and of their mask, so
    they are tried together first, and else one by one.
    """
    found = set[Place]()
    for size in sorted({n for x in leaves for n in x.shape[1:] if n > 1}):
        # Smaller, as a sequence may be the longest; but not 1, as torch broadcasts that size.
        others = (size - 1, (size + 1) // 2) if size > 3 else (size + 1, 2 * size)
        sizes = ((i, d, n) for i, x in enumerate(leaves) for d, n in enumerate(x.shape) if d)
        alike = [(i, d) for i, d, n in sizes if n == size]
        for places in (alike, *([place] for place in alike)):
            with contextlib.suppress(Exception):  # the module's own, of any kind
                made = [run(_resized(leaves, places, other)) for other in others]
                if all(_kinds(each) == _kinds(outputs) for each in made):
                    found |= {*places}
                    for name, x in (pair for each in made for pair in each.items()):
                        usual = outputs[name].shape
                        found |= {(name, d) for d in range(1, x.dim()) if x.shape[d] != usual[d]}
                    if places is alike:
                        break
    return found


def _resized(leaves: Sequence[Tensor], places: Sequence[Place], size: int) -> list[Tensor]:
    values = list(leaves)
    for i, d in places:
        values[i] = torch.cat([values[i]] * 2, d).narrow(d, 0, size)
    return values


def _kinds(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: (x.dtype, x.dim()) for name, x in tensors.items()}
