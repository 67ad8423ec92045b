r"""Trials of schemes on batches, and the choice of a code's parameters by its error on them."""

from __future__ import annotations

import copy
import itertools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from .._arguments import check, instance, shown, warn
from .._torch import as_called, broadcast_dims, check_batch, leaf_name, on_host
from ..codes import BatchPlan, Code
from ..input_space._regression import to_scale
from ..nn import CodedWrapper
from ..nn._division import Inputs, training_part
from ..stragglers import Uniform
from ._faults import Attack

SETS = 5  #: received sets of a batch. Rare ones decide the error; more than 5 were not measured.


@on_host()
def tune(
    wrapper: CodedWrapper,
    batches: Iterable[Any],
    *,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
    **values: Sequence[Any],
) -> Code:
    """Choose the parameters of a wrapper's code that answer best on batches without labels.

    The code has the least squared error against the module's own answers; it is the first of
    equals. A warning says if a float is the largest or smallest of its values.

    Args:
        wrapper: a wrapped module with a code. It stays as it is; another code is returned.
        batches: a few batches like the later ones, also in size. Each is an input, or a tuple.
        progress: called with the list of batches, returns them one by one, such as ``tqdm.tqdm``.
        values: by the name of a number, the values to choose it from. Defaults to
            :meth:`~coded_torch.codes.Code.candidates`.
    """
    instance("tune", "wrapper", wrapper, CodedWrapper)
    code = wrapper.code
    if code is None:
        raise ValueError("tune: wrapper must have a code, got a wrapper without one")
    calls = calls_of("tune", wrapper.module, batches)
    if not calls:
        raise ValueError(f"tune: batches must hold at least one batch, got {shown(calls)}")
    draws = received_sets(wrapper, code)
    trials = (
        Trial(
            wrapper.module,
            x,
            [*itertools.islice(draws, SETS)],
            in_dims=wrapper.in_dims,
            out_dims=wrapper.out_dims,
            owner="tune",
        )
        for x in progress(calls)
    )
    mixes = code.mixes or not wrapper.surrogate  # which codes that mix do not take
    best = chosen("tune", code, trials, wrapper.num_stragglers, values, mixes=mixes)
    for name, tried in {**code.candidates(), **values}.items():
        # Orders end where the code does, and nothing is below 0.
        if len(tried) > 2 and all(type(x) is float for x in tried):
            ends = {max(tried): "largest", min(tried) or None: "smallest"}
            if end := ends.get(getattr(best, name)):
                warn(f"tune: {name} of {best} is the {end} that was tried; try others, too")
    return best


def chosen(
    owner: str,
    code: Code,
    trials: Iterable[Trial],
    num_stragglers: int,
    values: Mapping[str, Sequence[Any]] | None = None,
    *,
    mixes: bool = True,
) -> Code:
    """Return the code with the parameters of least squared error on trials; it may mix inputs."""
    options = dict(code.candidates())
    for name, numbers in (values or {}).items():
        known = ", ".join(options) or "none"
        if name not in options:
            raise ValueError(
                f"tune: the parameters of {code} must be among {known}, got {shown(name)}"
            )
        if isinstance(numbers, str | bytes) or not isinstance(numbers, Sequence) or not numbers:
            raise TypeError(
                f"tune: {name} must be a sequence that is not empty, got {shown(numbers)}"
            )
        options[name] = numbers
    combinations = itertools.product(*options.values())
    variants = [
        code.replace(**dict(zip(options, numbers, strict=True))) for numbers in combinations
    ]
    variants = [variant for variant in variants if mixes or not variant.mixes]
    check(owner, variants, "the code must not mix inputs beside a surrogate", values)
    if len(variants) == 1:
        return variants[0]
    errors = np.zeros(len(variants))
    decodable = False
    for trial, received in ((each, received) for each in trials for received in each.sets):
        found = np.zeros(len(variants))
        for i, variant in enumerate(variants):
            if variant.mixes and not trial.mixable:
                found[i] = math.inf
                continue
            pairs = zip(trial.decode(variant, received, num_stragglers), trial.exact, strict=True)
            found[i] = sum(float((a.double() - e.double()).square().sum()) for a, e in pairs)
        if np.isfinite(found).any():  # no variant decodes other sets
            errors = errors + found
            decodable = True
    if not (decodable and np.isfinite(errors).any()):
        requirement = f"{code} must be able to decode the received results"
        raise ValueError(f"{owner}: {requirement}, got too few results")
    return variants[int(np.nan_to_num(errors, nan=np.inf).argmin())]


def received_sets(wrapper: CodedWrapper, code: Code) -> Iterator[tuple[int, ...]]:
    """Yield sets of workers whose results may be decoded, drawn from the workers' delays."""
    n = code.num_workers
    lost = wrapper.num_stragglers
    # A copy keeps the draws of the wrapper's own calls.
    delays = copy.deepcopy(wrapper.workers.stragglers) or Uniform(lost, seed=0)
    latest = (wrapper.waiting and wrapper.waiting.deadline) or sys.float_info.max
    shuffler = random.Random(0)
    while True:
        latencies = delays.sample(n).tolist()
        first = sorted(range(n), key=latencies.__getitem__)[: n - lost]
        place = shuffler.sample(range(n), n) if code.shuffle else range(n)
        yield tuple(sorted(place[worker] for worker in first if latencies[worker] <= latest))


@as_called()
def calls_of(owner: str, module: nn.Module, batches: Any) -> list[tuple[Any, ...]]:
    """Return the positional arguments of a call for each of ``batches``, which are checked."""
    are_many = not isinstance(batches, Tensor | np.ndarray | str | bytes)
    requirement = "batches must be a sequence of batches, such as [x]"
    check(owner, are_many and isinstance(batches, Iterable), requirement, type(batches), TypeError)
    learning = training_part(module)
    if learning is not None:
        raise ValueError(
            f"{owner}: module must be in evaluation mode, got {learning} in training mode, which "
            "changes with each call; call eval() on the module"
        )
    random = training_part(module, dropout=True)
    if random is not None:
        warn(
            f"{owner}: module should be in evaluation mode, got {random} in training mode, so "
            "answers depend on chance; call eval() on the module"
        )
    calls = [batch if isinstance(batch, tuple) else (batch,) for batch in batches]
    for i, args in enumerate(calls):
        sizes = [x.shape[:1] for x in tree_leaves(args) if isinstance(x, Tensor)]
        requirement = f"batches[{i}] must hold a tensor, and at least one input"
        check(owner, sizes and not any(0 in size for size in sizes), requirement, args)
    return calls


class Trial:
    """One batch: the module's answers, and the answers that schemes give.

    The module runs once on the batch, and once for each distinct encoder, on the coded inputs of
    the workers in ``sets``, the received sets to be tried. ``exact`` are its own answers, ``[B,
    ...]`` for every decoded output. Codes can mix the inputs if the batch is ``mixable``.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        sets: Sequence[Sequence[int]] = (),
        *,
        in_dims: Any = 0,
        out_dims: Any = 0,
        owner: str = "compare",
    ) -> None:
        # A code that mixes checks the inputs itself; the batch goes to the module as it is.
        self._inputs = Inputs(args, {}, in_dims)
        self._module = module
        self._out_dims = out_dims
        self._owner = owner
        self.sets = sets
        self._workers = sorted(set().union(*sets))
        self._plans: dict[Any, tuple[BatchPlan, list[Tensor]]] = {}
        self._results: dict[int, list[Tensor]] = {}
        self.attack: tuple[Attack, int, int] | None = None  # the number of workers, the seed
        self.inputs = self._inputs.floating()
        self.mixable = len(self.inputs) == len(self._inputs.batches())
        self.batch_size = self._inputs.batch_size
        self.exact = self.run(module)

    def run(
        self,
        function: Callable[..., Any],
        batches: list[Tensor] | None = None,
        name: str = "the module",
    ) -> list[Tensor]:
        """Return a function's outputs that are decoded, of the batch or of rows ``[R, ...]``."""
        inputs = self._inputs
        found = list[Tensor]()
        if batches is None:
            batches = inputs.batches()
        given = iter(batches)
        pairs = zip(inputs.leaves, inputs.dims, strict=True)
        leaves = [x if dim is None else next(given).clone().movedim(0, dim) for x, dim in pairs]
        args, kwargs = tree_unflatten(leaves, inputs.spec)
        with torch.no_grad(), as_called():
            tree = function(*args, **kwargs)
        outputs, spec = tree_flatten(tree)
        dims = broadcast_dims("out_dims", self._out_dims, spec)
        for i, (output, dim) in enumerate(zip(outputs, dims, strict=True)):
            if dim is None or not isinstance(output, Tensor):
                continue
            check_batch(tree, i, output, dim, len(batches[0]))
            requirement = f"{self._owner}: {name} must return"
            where = leaf_name("output", tree, i)
            if not output.dtype.is_floating_point:
                raise TypeError(
                    f"{requirement} floating-point tensors, got {output.dtype} in {where}"
                )
            if not bool(output.isfinite().all()):
                raise RuntimeError(f"{requirement} finite outputs, got NaN or infinity in {where}")
            found.append(output.movedim(dim, 0))
        return found

    def decode(
        self,
        code: Code,
        received: Sequence[int],
        num_stragglers: int = 0,
        surrogate: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Return every output's answers, ``[B, ...]``, NaN without enough results.

        With outputs of a surrogate, ``[B, ...]``, a code that repeats inputs decodes residuals.
        """
        received = _within(received, code)
        if len(received) < code.min_received:
            return [torch.full_like(exact, math.nan) for exact in self.exact]
        plan, results = self._planned(code, num_stragglers)
        rows = [self._workers.index(worker) for worker in received]
        every = [to_scale(self._attacked(result[rows], received), code.link) for result in results]
        if code.adversaries:
            places = plan.trusted(every, received).places
            every = [arrived[places] for arrived in every]
            received = tuple(received[place] for place in places)
        answers = []
        for i, arrived in enumerate(every):
            if surrogate:
                known = to_scale(surrogate[i], code.link)
                decoded = plan.decode(arrived - plan.encode(known)[received], received) + known
            else:
                decoded = plan.decode(arrived, received)
            if code.link is not None:
                decoded = decoded.softmax(-1)
            answers.append(decoded)
        return answers

    def answers(
        self, decoder: Callable[..., Any], received: Sequence[int], name: str
    ) -> list[Tensor]:
        """Return the answers of a function of inputs, outputs and received workers, checked."""
        with torch.no_grad(), as_called():
            found: list[Any] = tree_leaves(
                decoder(
                    [x.clone() for x in self._inputs.batches()],
                    [x.clone() for x in self.exact],
                    [*received],
                )
            )
        wanted = [[*x.shape] for x in self.exact]
        got = [[*getattr(x, "shape", [])] for x in found]
        if got != wanted:
            raise ValueError(
                f"compare: {name!r} must return answers of shape {wanted}, got {shown(got)}"
            )
        for x in found:
            instance("compare", f"an answer of {name!r}", x, Tensor)
        return found

    def _attacked(self, results: Tensor, received: Sequence[int]) -> Tensor:
        """Return results ``[F, rows, ...]`` with wrong ones in the places of faulty workers."""
        if self.attack is None:
            return results
        attack, adversaries, seed = self.attack
        generator = torch.Generator().manual_seed(hash((seed, *received)))
        wrong = results.clone()
        for place in torch.randperm(len(results), generator=generator)[:adversaries].tolist():
            rows = attack(results[place], generator)
            if not isinstance(rows, Tensor) or rows.shape != wrong[place].shape:
                raise ValueError(
                    "compare: attack must return a tensor of the shape it got, "
                    f"{[*wrong[place].shape]}, got {shown(rows)}"
                )
            wrong[place] = rows
        return wrong

    def missing(self, code: Code, received: Sequence[int], num_stragglers: int = 0) -> Tensor:
        """Return the rows that no worker in a received set has computed: bool, ``[B]``."""
        return self._planned(code, num_stragglers)[0].source(_within(received, code)) < 0

    def _planned(self, code: Code, num_stragglers: int) -> tuple[BatchPlan, list[Tensor]]:
        """Return the code's plan of the batch, and its results, ``[|workers|, G, ...]`` each."""
        key = code, min(num_stragglers, code.num_workers - 1)
        if key not in self._plans:
            others = []
            if not self.inputs:
                others = self._inputs.batches()
            plan = code.plan(self.inputs, key[1], batch_size=self.batch_size, others=others)
            workers = _within(self._workers, code)
            # A code that does not mix carries inputs of the batch, whose results are known.
            values = self.exact
            if code.mixes:
                values = self._inputs.batches()
            coded = [plan.encode(leaf)[workers] for leaf in values]
            self._plans[key] = plan, self._computed(coded) if code.mixes else coded
        return self._plans[key]

    def _computed(self, coded: list[Tensor]) -> list[Tensor]:
        """Return the module's outputs of coded inputs; equal inputs are computed once."""
        plain = (x.detach().contiguous().view(torch.uint8).cpu().numpy() for x in coded)
        content = hash(tuple(x.tobytes() for x in plain))  # the same for all decoders of an encoder
        if content not in self._results:
            results = self.run(self._module, [x.flatten(0, 1) for x in coded])
            self._results[content] = [x.unflatten(0, coded[0].shape[:2]) for x in results]
        return self._results[content]


def _within(received: Sequence[int], code: Code) -> list[int]:
    """Return the workers of a received set that a code has."""
    return [worker for worker in received if worker < code.num_workers]
