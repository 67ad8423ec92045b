"""The inputs and outputs of a module, found by calls on examples."""

from __future__ import annotations

import inspect
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._arguments import arguments, signature_of
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


def specs(
    module: nn.Module, examples: Any, *, fixed_shapes: bool = False
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """Return the specs of a module's inputs and outputs, leaf by leaf.

    Inputs have the names of ``forward``'s parameters. Outputs are named ``output``, or ``output0``,
    ``output1`` and so on. Keys of dicts and fields of named tuples are names, too. The module is
    tried on two rows in other sizes. A dimension in which it takes other sizes is -1.

    Args:
        module: the module, which is called without gradients.
        examples: rows of each input: a tensor ``[B, ...]``, several in a list or tuple, or keyword
            arguments in a mapping, such as an encoding of Hugging Face.
        fixed_shapes: whether no other sizes are tried. Defaults to False.

    Raises:
        TypeError: the examples do not fit ``forward``, or an input or an output is no tensor.
        ValueError: a tensor has another number of rows than the first input, or none.
    """
    call = bind("specs", module, examples)
    leaves, form = pytree.tree_flatten((call.args, call.kwargs))
    inputs = _named("examples", dict(call.arguments), "input")

    def run(values: Sequence[Tensor]) -> dict[str, Tensor]:
        args, kwargs = pytree.tree_unflatten(values, form)
        with torch.no_grad():
            made = module(*args, **kwargs)
        return _named("outputs of the module", made, "output", len(values[0]))

    outputs, is_open = run(leaves), set[Place]()
    if not fixed_shapes:
        is_open = _open_places(run, [x[:2] for x in leaves], outputs)
    found = [TensorSpec.of(name, x) for each in (inputs, outputs) for name, x in each.items()]
    for number, (place, spec) in enumerate(
        zip([*range(len(inputs)), *outputs], found, strict=True)
    ):
        sizes = (-1 if (place, d) in is_open else n for d, n in enumerate(spec.shape, 1))
        found[number] = TensorSpec(spec.name, spec.datatype, tuple(sizes))
    return found[: len(inputs)], found[len(inputs) :]


def _named(what: str, tree: Any, word: str, rows: int = 0) -> dict[str, Tensor]:
    """Return the leaves by their names: the last key or field, else the word."""
    paths = pytree.tree_flatten_with_path(dict(tree) if isinstance(tree, Mapping) else tree)[0]
    bases = [next((x for key in path[::-1] if (x := _text(key))), word) for path, _ in paths]
    times, numbers, found = Counter(bases), defaultdict[str, Any](itertools.count), {}
    for base, (_, leaf) in zip(bases, paths, strict=True):
        name = f"{base}{next(numbers[base])}" if times[base] > 1 else base
        if not isinstance(leaf, Tensor):
            got = type(leaf).__name__
            raise TypeError(f"specs: {what} must be tensors with rows, got {got} as {name!r}")
        rows = rows or (len(leaf) if leaf.dim() else 0)
        if leaf.shape[:1] != (rows,) or not rows:
            must = f"have {rows or 'some'} rows"
            raise ValueError(f"specs: {what} must {must}, got shape {[*leaf.shape]} of {name!r}")
        found[name] = leaf
    if not found:
        raise TypeError(f"specs: {what} must be tensors with rows, got {type(tree).__name__}")
    return found


def _text(key: Any) -> str:
    """Return a key of a dict or a field of a named tuple, and "" for a number of a sequence."""
    return "" if hasattr(key, "idx") else str(getattr(key, "key", getattr(key, "name", "")))


def _open_places(run: Run, leaves: Sequence[Tensor], outputs: Mapping[str, Tensor]) -> set[Place]:
    """Return the dimensions of inputs in which others sizes work, and of outputs that follow.

    Dimensions of one size may have to be equal, such as the lengths of tokens and of their mask, so
    they are tried together first, and else one by one.
    """
    found = set[Place]()
    for size in sorted({n for x in leaves for n in x.shape[1:] if n > 1}):
        sizes = ((i, d, n) for i, x in enumerate(leaves) for d, n in enumerate(x.shape) if d)
        alike = [(i, d) for i, d, n in sizes if n == size]
        for places in (alike, *([place] for place in alike)):
            followed = _tried(run, leaves, places, size, outputs)
            if followed is not None:
                found |= {*places, *followed}
                if places is alike:
                    break
    return found


def _tried(
    run: Run, leaves: Sequence[Tensor], places: Any, size: int, outputs: Mapping[str, Tensor]
) -> set[Place] | None:
    """Return the dimensions of outputs that two other sizes of inputs change; None if one fails."""
    changed = set[Place]()
    # Smaller, as a sequence may be the longest; but not 1, as torch broadcasts that size.
    for other in (size - 1, (size + 1) // 2) if size > 3 else (size + 1, 2 * size):
        values = list(leaves)
        for i, d in places:
            values[i] = torch.cat([values[i]] * 2, d).narrow(d, 0, other)
        try:
            found = run(values)
        except Exception:  # the module's own, of any kind
            return None
        kinds = [{k: (x.dtype, x.dim()) for k, x in each.items()} for each in (found, outputs)]
        if kinds[0] != kinds[1]:
            return None
        changed |= {
            (name, d)
            for name, x in found.items()
            for d, n in enumerate(x.shape)
            if d and n != outputs[name].shape[d]
        }
    return changed
