"""The places of rows in the outputs of a module, as parts of two sizes prove them."""

import enum
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import (
    SUPPORTED_NODES,
    TreeSpec,
    keystr,
    tree_flatten,
    tree_flatten_with_path,
)

from ._torch import LEAF, as_real, broadcast_dims, different_rows, flatten, has_rows, positional
from ._untuned import ROUNDING, ROUNDING_OF_HALF

#: The types of outputs that pass through, if all workers return the same. A float does not: it is a
#: loss or a score, which depends on the inputs.
CONSTANTS = (type(None), bool, int, str, bytes, enum.Enum, torch.dtype, torch.device)
#: The rows of the two parts that prove a layout. One row would be broadcast, and hide faults.
SIZES = (2, 3)

# The layouts that are proved, by module and structure of inputs.
_PROVED = weakref.WeakKeyDictionary[nn.Module, dict[Any, "Layout"]]()

Path = tuple[int, ...]  # the number of the child at each level of a tree


class Layout:
    """The leaves of a module's output that have no rows, and the lists that have one item per row.

    ``lists`` are the paths of these lists, and ``constants`` the places of tensors without rows.
    """

    def __init__(self, lists: Sequence[Path] = ()) -> None:
        self.lists = lists
        self.spec: TreeSpec | None = None
        self.constants = frozenset[int]()
        self.fixed = dict[int, int]()  #: by place, a hash of each leaf that all parts return alike
        self.is_doubted = False  #: true if later results do not fit it: it is proved again
        self.note = ""  #: a remark on each call: the rows of the module depend on each other

    @property
    def is_tensor(self) -> bool:
        """Whether the output is a single tensor."""
        return self.spec is LEAF

    def flatten(self, value: Any) -> tuple[list[Any], TreeSpec]:
        """Return the leaves, where a list with an item per row is one leaf, and the structure."""
        return flatten(value, self._is_whole(value) if self.lists else None)

    def differing(self, leaves: Sequence[Any], spec: TreeSpec) -> list[int]:
        """Return the places of leaves without rows that are others than in the parts of the proof.

        An output of another structure has none.
        """
        if spec != self.spec:
            return []
        return [i for i, known in self.fixed.items() if _hash_of(leaves[i]) != known]

    def differs(self, value: Any) -> bool:
        """Return whether an output has other leaves without rows than the parts of the proof."""
        return bool(self.fixed and self.differing(*self.flatten(value)))

    def name(self, value: Any, i: int) -> str:
        """Return the Python expression of a leaf of an output."""
        path, _ = tree_flatten_with_path(value, self._is_whole(value))[0][i]
        return "output" + keystr(path)

    def _is_whole(self, value: Any) -> Callable[[Any], bool]:
        whole = {id(node) for node in (_at(value, path) for path in self.lists)}
        return lambda node: id(node) in whole


def prove(outputs: Sequence[Any], out_dims: Any) -> Layout:
    """Return the layout of the outputs of two parts that have :data:`SIZES` rows.

    Raises a ValueError if a leaf neither follows the part along its batch dimension, and nowhere
    else, nor is the same in both, and a TypeError if it is of a type that has no rows.
    """
    layout = Layout([*_row_lists(*outputs)])
    (leaves, layout.spec), (others, spec) = map(layout.flatten, outputs)
    if spec != layout.spec:
        got = " and ".join(" ".join(str(each).split()) for each in (layout.spec, spec))
        raise ValueError(
            "CodedWrapper: output must have the same structure in all parts (lists with one item "
            f"per row may differ in length), got for 2 and 3 rows {got}"
        )
    dims = broadcast_dims("out_dims", out_dims, spec)
    constants = set[int]()
    for i, (leaf, other, dim) in enumerate(zip(leaves, others, dims, strict=True)):
        if dim is None or isinstance(leaf, list | tuple):
            continue
        if isinstance(leaf, Tensor) and isinstance(other, Tensor):
            if not (_is_dense(leaf) and _is_dense(other)) or _follows(leaf, other, dim):
                continue
            if bits(leaf) == bits(other):
                constants.add(i)
                layout.fixed[i] = _hash_of(leaf)
                continue
            got = f"shapes {tuple(leaf.shape)} and {tuple(other.shape)}"
        elif isinstance(leaf, CONSTANTS) and (type(leaf), leaf) != (type(other), other):
            got = f"{leaf!r} and {other!r}"
        elif isinstance(leaf, CONSTANTS):
            layout.fixed[i] = _hash_of(leaf)
            continue
        else:
            raise TypeError(not_joined(layout.name(outputs[0], i), leaf))
        name = layout.name(outputs[0], i)
        if isinstance(leaf, Tensor) and not leaf.dim():
            raise ValueError(
                f"CodedWrapper: {name} must have one row per row of its part, got a scalar that "
                "differs between parts; return one number per row, leave it out of the output, or "
                "say None in out_dims to get the first part's"
            )
        raise ValueError(
            f"CodedWrapper: {name} must have one row per row of its part, at dim {dim} only, or be "
            f"the same in all parts, got {got} for 2 and 3 rows; name its batch dimension in "
            'out_dims, and inputs that belong to the whole batch as "shared" in in_dims'
        )
    layout.constants = frozenset(constants)
    return layout


def not_joined(name: str, leaf: Any) -> str:
    """Return the message that a leaf of an output cannot be joined by rows."""
    if isinstance(leaf, float):
        return (
            f"CodedWrapper: {name} must have one row per row of its part, got a float; return a "
            "tensor with one number per row, leave it out of the output, or say None in out_dims "
            "to get the first part's"
        )
    return (
        f"CodedWrapper: {name} must be a tensor, a list with an item per row, or a constant, got "
        f"{type(leaf).__name__}; leave it out of the output (a cache by use_cache=False), register "
        "its class with torch.utils._pytree, or say None in out_dims"
    )


def proved_of(module: nn.Module) -> dict[Any, Layout]:
    """Return the layouts of a module that are proved, by :func:`structure`."""
    found = _PROVED.get(module)
    if found is not None:
        return found
    return _PROVED.setdefault(module, {})


def structure(leaves: Sequence[Any], dims: Sequence[Any], spec: Any, *others: Any) -> Any:
    """Return a key of inputs that differ in nothing but sizes and numbers, and of ``others``."""
    forms = [(x.dtype, x.dim()) for x in leaves if isinstance(x, Tensor)]
    positionals = positional(len(leaves))[0]
    if spec is positionals or spec == positionals:
        return len(forms), *others, *dims, *forms
    named = (bool, str, type(None))
    rest = [x if isinstance(x, named) else type(x) for x in leaves]
    return spec, *others, *dims, *forms, *rest


def bits(tensor: Tensor) -> tuple[Any, ...]:
    """Return the dtype, the shape and the numbers of a tensor, to be compared."""
    numbers = torch.func.debug_unwrap(tensor).detach().resolve_conj().resolve_neg().cpu()
    flat = numbers.contiguous().reshape(-1)
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


def _hash_of(leaf: Any) -> int:
    """Return a hash of what two leaves without rows have in common if they are alike."""
    if isinstance(leaf, Tensor):
        return hash(bits(leaf))
    if isinstance(leaf, CONSTANTS):
        return hash((type(leaf), leaf))
    return hash(type(leaf))


def difference(outputs: Sequence[Any], layout: Layout, out_dims: Any, is_half: bool) -> str:
    """Say which output of two rows is another one behind a third; "" if none is.

    The first output is of two rows in reverse order. Computing may be in half precision, whatever
    the dtype of the outputs.
    """
    (leaves, spec), (others, _) = map(layout.flatten, outputs)
    dims = broadcast_dims("out_dims", out_dims, spec)
    for i, (leaf, other, dim) in enumerate(zip(leaves, others, dims, strict=True)):
        if dim is None or i in layout.constants:
            continue
        pairs = list[tuple[Any, Any]]()
        if isinstance(leaf, Tensor) and _is_dense(leaf) and _is_dense(other):
            pairs.append((leaf.movedim(dim, 0).flip(0), other.movedim(dim, 0)[-2:]))
        elif isinstance(leaf, list | tuple):
            items, form = flatten([*leaf[::-1]])
            other_items, other_form = flatten([*other[-2:]])
            pairs += zip(items, other_items, strict=False)
            if form != other_form:
                pairs.append((str(form), str(other_form)))
        off = max((_distance(one, two, is_half) for one, two in pairs), default=0.0)
        if off:
            much = ""
            if off != math.inf:
                much = f", by {off:.2g}"
            name = layout.name(outputs[0], i)
            return f"{name} of a row depends on the other rows of its part{much}"
    return ""


def _distance(one: Any, two: Any, is_half: bool) -> float:
    """Return how far two results of one row are from each other; 0 if rounding explains it.

    It is infinite if that is no number, and 0 between objects of types that cannot be compared.
    """
    if isinstance(one, float) and isinstance(two, float):  # perhaps of a tensor in single precision
        one = torch.tensor(one, dtype=torch.float32, device="cpu")
        two = torch.tensor(two, dtype=torch.float32, device="cpu")
    if not (isinstance(one, Tensor) and isinstance(two, Tensor)):
        is_comparable = isinstance(one, CONSTANTS) or isinstance(two, CONSTANTS)
        if is_comparable and (type(one), one) != (type(two), two):
            return math.inf
        return 0.0
    if not (_is_dense(one) and _is_dense(two)):  # in a list
        return 0.0
    if one.shape != two.shape or one.dtype != two.dtype:
        return math.inf
    first, second = (
        as_real(torch.func.debug_unwrap(x).detach()).cpu().double() for x in (one, two)
    )
    is_rounded = one.dtype.is_floating_point or one.dtype.is_complex
    eps = torch.finfo(one.dtype).eps if is_rounded else 0.0
    both = first.isfinite() & second.isfinite()
    off = (first - second)[both].abs().max().item() if both.any() else 0.0
    largest = first[both].abs().max().item() if both.any() else 0.0
    share = ROUNDING_OF_HALF if is_half or one.dtype.itemsize == 2 else ROUNDING
    if off > (share * largest + math.sqrt(eps)) * is_rounded:
        return off
    return 0.0


def dependent_output(
    leaves: Sequence[Any], compute: Callable[[list[Any], list[tuple[int, ...]]], list[Any]]
) -> str | None:
    """Say which output is another one if two rows are computed together.

    Return None if none is. Raises a RuntimeError if the inputs or the outputs do not tell.

    Args:
        leaves: the inputs; of tensors with rows, two that differ are compared.
        compute: returns the outputs for some batches, given the inputs of four rows, and the
            numbers of the rows of each batch.
    """
    divided = list(filter(has_rows, leaves))
    if len({len(x) for x in divided}) != 1:
        raise RuntimeError("the inputs of the example must have one size at dimension 0")
    rows = different_rows(divided)
    if len(rows) == 1:
        got = f"{len(divided[0])} equal rows"
        raise RuntimeError(f"the example must have two different rows, got {got}")
    sizes = [float(x[rows].abs().max()) for x in divided if x.dtype.is_floating_point and x.numel()]
    scale = max(sizes, default=1.0)
    inputs = [x[rows * 2] if has_rows(x) else x for x in leaves]
    trees = compute(inputs, [(0,), (1,), (0, 1)])
    found = dict[int, tuple[Any, ...]]()
    layout = Layout([*_row_lists(trees[0], trees[2], sizes=(1, 2))])
    name = functools.partial(layout.name, trees[0])
    forms = [layout.flatten(tree) for tree in trees]
    for _, form in forms:
        if form != forms[0][1]:
            usual, other = (" ".join(str(each).split()) for each in (forms[0][1], form))
            return f"the form of the output depends on the rows: {usual}, {other}"
    for i, each in enumerate(zip(*[leaves for leaves, _ in forms], strict=True)):
        one, _, two = each
        by_rows = all(map(has_rows, each)) and [*map(len, each)] == [1, 1, 2]
        if by_rows:
            one = tuple(one.shape[1:])
            two = tuple(two.shape[1:])
        if (by_rows or isinstance(one, bool | int | float | str)) and one != two and one == one:
            what = f"{'the shape of a row of ' * by_rows}{name(i)}"
            return f"{what} depends on the number of rows: {one} for one, {two} for two"
        if by_rows:
            first, second, both = map(_real, each)
            if both.numel() and first.shape == second.shape:
                is_rounded = each[0].dtype.is_floating_point or each[0].dtype.is_complex
                eps = torch.finfo(each[0].dtype).eps if is_rounded else 0.0
                found[i] = both, torch.cat([first, second]), eps
    if not found:
        raise RuntimeError("no output has a row for each row of the example at dimension 0")
    if all(bool(((x - y).abs() <= eps * x.abs()).all()) for x, y, eps in found.values()):
        return None
    # Batches of another size are rounded differently, but batches of one size mostly are not.
    others = [layout.flatten(tree)[0] for tree in compute(inputs, [(0, 2), (1, 3), (0, 1)])]
    for i, (both, alone, eps) in found.items():
        first, second, again = (_real(leaves[i]) for leaves in others)
        twin = torch.cat([first[:1], second[1:]])
        chance, rounding = ((x - y).abs().max() for x, y in ((again, both), (twin, alone)))
        limit = (ROUNDING_OF_HALF * twin.abs().max() + math.sqrt(eps) * scale) * bool(eps)
        if chance > limit:
            raise RuntimeError("the outputs differ from call to call")
        rounding = rounding * bool(eps)
        effect = (both - twin).abs()
        if not eps:  # equal rows at two places of a batch, as integers tell by no rounding
            effect = torch.maximum(effect, (twin - torch.cat([first[1:], second[:1]])).abs())
        if rounding > limit or (effect > 4 * (chance + rounding + eps * twin.abs())).any():
            off = float((both - alone).abs().max())
            return f"{name(i)} of a row depends on the other rows of its batch, by {off:.2g}"
    return None


def _real(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor, in single precision or better, all finite."""
    tensor = as_real(tensor).detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)).nan_to_num()


def _is_dense(leaf: Tensor) -> bool:
    is_plain = not (leaf.is_meta or leaf.is_quantized or leaf.is_nested)
    return leaf.layout is torch.strided and is_plain


def _follows(leaf: Tensor, other: Tensor, dim: int) -> bool:
    """Return whether leaves differ in the size of the batch dimension, and nowhere else."""
    if leaf.dim() != other.dim() or not -leaf.dim() <= dim < leaf.dim():
        return False
    shapes = [list(x.shape) for x in (leaf, other)]
    return tuple(shape.pop(dim) for shape in shapes) == SIZES and shapes[0] == shapes[1]


def _children(node: Any) -> list[Any]:
    leaves: list[Any] = tree_flatten(node, lambda child: child is not node)[0]
    return leaves


def _at(value: Any, path: Path) -> Any:
    """Return the node at a path; None if there is none."""
    for place in path:
        children = _children(value)
        if place >= len(children) or children == [value]:
            return None
        value = children[place]
    return value


def _row_lists(
    one: Any, two: Any, path: Path = (), sizes: tuple[int, int] = SIZES
) -> Iterator[Path]:
    """Yield the paths of lists and tuples that have as many items as the two parts have rows."""
    if type(one) is not type(two) or isinstance(one, Tensor):
        return
    if type(one) in (list, tuple) and (len(one), len(two)) == sizes:
        yield path
        return
    if type(one) not in SUPPORTED_NODES and not isinstance(one, tuple):
        return
    children = _children(one)
    others = _children(two)
    if len(children) == len(others):
        for place, pair in enumerate(zip(children, others, strict=True)):
            if pair[0] is not one:
                yield from _row_lists(*pair, (*path, place), sizes)
