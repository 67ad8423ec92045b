"""Says whether tensors are finite, by few passes over memory and few waits for a device."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._torch import as_real
from ._untuned import FEW

# Dtypes of which torch adds up several tensors on a CUDA device by three launches in all.
_SUMMED_TOGETHER = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def finite(leaf: Tensor) -> bool:
    """Return whether all of a tensor is finite; integers are."""
    if leaf.dtype.is_complex:
        leaf = as_real(leaf)
    if not leaf.dtype.is_floating_point:
        return True
    wraps = type(leaf) is not Tensor or torch._C._are_functorch_transforms_active()
    if leaf.is_cpu and leaf.numel() <= FEW and not wraps:  # NumPy would see other numbers
        try:
            return bool(np.logical_and.reduce(np.isfinite(leaf.numpy()), None))
        except (RuntimeError, TypeError):  # NumPy has no bfloat16, no sparse tensors, no gradients
            pass
    if leaf.requires_grad:
        leaf = leaf.detach()
    # A value that is not finite stays so in every sum; a sum may overflow without one.
    return math.isfinite(leaf.sum().item()) or bool(leaf.isfinite().all())


def has_numbers(leaf: object) -> bool:
    """Return whether a leaf is a tensor that may hold NaN or infinity."""
    return isinstance(leaf, Tensor) and (leaf.dtype.is_floating_point or leaf.dtype.is_complex)


def runs(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, in lists of tensors that lie end to end in one memory."""
    run = list[Tensor]()
    at = end = -1
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        is_next = bool(run) and tensor.data_ptr() == at and tensor.is_contiguous()
        # The next allocation may adjoin by chance.
        if is_next and at + size <= end and tensor.dtype == run[0].dtype:
            run.append(tensor)
        else:
            if run:
                yield run
            run = [tensor]
            memory = tensor.untyped_storage()
            end = -1
            if tensor.is_contiguous():
                end = memory.data_ptr() + memory.nbytes()
        at = tensor.data_ptr() + size
    if run:
        yield run


def sums_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return sums, which are finite only if the tensors are, without waiting for a device.

    Tensors that lie end to end, such as parts of one batch, have one sum together. A sum, on CUDA
    of absolute values, may overflow although its tensors are finite.
    """
    numbers = [as_real(tensor.detach()) for tensor in tensors]
    is_plain = not torch._C._are_functorch_transforms_active()
    is_plain &= all(type(tensor) is Tensor for tensor in numbers)
    if is_plain:
        numbers.sort(key=Tensor.data_ptr)
        found = list(runs(numbers))
        for place, run in enumerate(found):
            if len(run) > 1:
                size = sum(tensor.numel() for tensor in run)
                found[place] = [run[0].as_strided((size,), (1,))]
        numbers = [tensor for run in found for tensor in run]
    groups = defaultdict[tuple[Any, ...], list[Tensor]](list)
    for place, x in enumerate(numbers):
        is_grouped = is_plain and x.is_cuda and x.dtype in _SUMMED_TOGETHER
        groups[(x.device, x.dtype) if is_grouped else (place,)].append(x)
    sums = list[Tensor]()
    for group in groups.values():
        dtype = torch.promote_types(group[0].dtype, torch.float32)
        if len(group) > 1:
            sums += torch._foreach_norm(group, 1, dtype)
        else:
            sums.append(group[0].sum(dtype=dtype))
    return sums


def all_finite(sums: Sequence[Tensor]) -> bool:
    """Return whether sums are finite; the host waits once for their device."""
    together = torch.stack([x.to(sums[0].device) for x in sums]) if len(sums) > 1 else sums[0]
    return bool(together.cpu().isfinite().all())
