r"""Codes and trivial baselines side by side on one's own model."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._arguments import count, instance, shown
from .._torch import as_called, on_host
from ..codes import (
    BerrutCode,
    Code,
    FloaterHormannCode,
    LagrangeCode,
    RegressionCode,
    ReplicationCode,
    SplineCode,
)
from ..stragglers import Stragglers, Uniform
from ._faults import Attack
from ._tune import SETS, Trial, calls_of, chosen
from .scores import Comparison, Record, Score, Setting, check_labels, score

# The baselines of a surrogate, whose names no other scheme may have.
_WITH_SURROGATES = {"surrogate alone", "replication, surrogate", "regression, residuals"}
_WITH_SURROGATES |= {"no redundancy, surrogate", "no redundancy, residuals"}

#: Answers to a batch, from its inputs, the module's outputs, and the workers that were received.
Decoder = Callable[[list[Tensor], list[Tensor], Sequence[int]], Any]


def peers(num_data: int, num_workers: int) -> dict[str, Code]:
    """Return the codes of the paper and its peers, as published and with ordered rows."""
    k = num_data
    n = num_workers
    return {
        "the paper's scheme": SplineCode(k, n, ordering="arrival"),
        "Berrut": BerrutCode(k, n, ordering="arrival"),
        "the paper's, ordered": SplineCode(k, n),
        "Berrut, ordered": BerrutCode(k, n),
        "Floater-Hormann, ordered": FloaterHormannCode(k, n),
        "Lagrange, ordered": LagrangeCode(k, n, decoder_degree=k - 1),
        "replication": ReplicationCode(k, n, ordering="arrival"),
        "regression": RegressionCode(k, n),
    }


@on_host()
def compare(
    module: nn.Module,
    batches: Iterable[Any],
    settings: Sequence[Setting | tuple[int, int, int]] = (Setting(24, 20, 4),),
    *,
    labels: Sequence[Tensor] | None = None,
    extra: Callable[[int, int], Mapping[str, Code | Decoder]] | None = None,
    surrogate: Callable[..., Any] | None = None,
    schemes: Sequence[str] | None = None,
    delays: Callable[..., Stragglers] = Uniform,
    received_sets: int = 1,
    seeds: int | Sequence[int] = 0,
    tuning_batches: int | None = None,
    attack: Attack | None = None,
    adversaries: int = 1,
    in_dims: Any = 0,
    out_dims: Any = 0,
    progress: Callable[[list[Any]], Iterable[Any]] = iter,
) -> Comparison:
    """Compare the codes, and the trivial baselines, on a model of one's own.

    All schemes answer the same batches from the same workers. On the first batches every code's
    numbers are chosen as :func:`~coded_torch.tune` does, without labels; the others are answered.
    The reference describes the baselines and the other arguments.

    Args:
        module: the module, in evaluation mode.
        batches: at least two, each an argument of the module or a tuple of several.
        settings: a :class:`~coded_torch.experiments.scores.Setting` each, or a tuple (N, K, S):
            workers, inputs per group, workers lost.
    """
    instance("compare", "module", module, nn.Module)
    calls = calls_of("compare", module, batches)
    if len(calls) < 2:
        raise ValueError(
            "compare: batches must hold at least two, one to tune on and one to answer, got "
            f"{len(calls)}"
        )
    truth: Any = [None] * len(calls) if labels is None else labels
    if not isinstance(truth, Sequence) or len(truth) != len(calls):
        raise ValueError(
            f"compare: labels must be a sequence of integer tensors, one for each of {len(calls)} "
            f"batches, got {shown(labels)}"
        )
    for name, value in {"extra": extra, "surrogate": surrogate, "attack": attack}.items():
        instance("compare", name, value, Callable, optional=True)
    adversaries = count("compare", "adversaries", adversaries)
    instance("compare", "delays", delays, Callable)
    instance("compare", "settings", settings, Sequence)
    known = [_setting(setting) for setting in settings]
    several: Any = seeds if isinstance(seeds, list | tuple | range) else [seeds]
    seeds = [count("compare", "seeds", seed, least=0, most=2**64 - 2) for seed in several]
    for name, values in {"settings": known, "seeds": seeds}.items():
        if not values:
            raise ValueError(f"compare: {name} must not be empty, got {shown(values)}")
    instance("compare", "schemes", schemes, Sequence, optional=True)
    received_sets = count("compare", "received_sets", received_sets)
    cut = tuning_batches
    if tuning_batches is None:
        cut = max(1, len(calls) // 4)
    cut = count("compare", "tuning_batches", cut, most=len(calls) - 1)

    def trials(setting: Setting, seed: int, number: int, part: slice) -> Iterator[Any]:
        """Yield the trial of each batch of a part of the batches, and its labels."""
        n, _, lost = setting
        drawn = delays(lost, seed=seed)
        instance("compare", "the result of delays", drawn, Stragglers)
        for i, (args, classes) in [*enumerate(zip(calls, truth, strict=True))][part]:
            sets = [received_by(drawn, n, lost) for _ in range(number)]
            owner = f"compare: batches[{i}]"
            trial = Trial(module, args, sets, in_dims=in_dims, out_dims=out_dims, owner=owner)
            if classes is not None:
                shapes = [[*leaf.shape] for leaf in trial.exact]
                if [*map(len, shapes)] != [2]:
                    raise ValueError(
                        "compare: labels must go with a module that returns [B, classes], got "
                        f"{shown(shapes)}"
                    )
                check_labels("compare", classes, trial.exact[0])
            if attack is not None:
                few = min(map(len, sets))
                count("compare", "adversaries, of the workers received,", adversaries, 1, few)
                trial.attack = attack, adversaries, seed
            yield trial, classes

    records: list[Record] = []
    codes: dict[tuple[Setting, str], Code] = {}
    for setting in known:
        n, k, s = setting
        # Not the workers that are lost later.
        first = [trial for trial, _ in trials(setting, max(seeds) + 1, SETS, slice(cut))]
        untuned = _schemes(k, n, first[0], extra, schemes)
        if attack is not None:
            untuned |= _defended(untuned, adversaries)
        tuned: dict[str, Code | Decoder] = {}
        for name, code in progress([*untuned.items()]):
            if isinstance(code, Code):
                mixes = code.mixes or surrogate is None
                code = chosen("compare", code, first, s, mixes=mixes)
                codes[setting, name] = code
            if attack is not None and not isinstance(code, Code):
                raise ValueError(
                    "compare: extra must return codes beside an attack, as functions get honest "
                    f"outputs, got {shown(name)}"
                )
            tuned[name] = code
        for seed in seeds:
            answered = trials(setting, seed, received_sets, slice(cut, None))
            for batch, (trial, classes) in enumerate(answered):
                exact = _flat(trial.exact)
                size = trial.batch_size
                found: dict[str, tuple[Code | Decoder | None, list[Score]]] = {}
                cheap = []
                if surrogate is not None:
                    cheap = trial.run(surrogate, name="surrogate")
                    wanted, got = ([[*x.shape] for x in each] for each in (trial.exact, cheap))
                    if got != wanted:
                        requirement = f"surrogate must return {wanted}"
                        raise ValueError(f"compare: {requirement}, got {shown(got)}")
                for received in trial.sets:
                    for name, answers, of in _answers(trial, tuned, received, s, cheap):
                        scores = score(_flat(answers), exact, classes)
                        found.setdefault(name, (of, []))[1].append(scores)
                for name, (of, each) in found.items():
                    text = ""
                    workers = n
                    inputs = k
                    if isinstance(of, Code):
                        text = repr(of)
                        workers = of.num_workers
                        inputs = of.num_data
                    work = 0.0
                    if of is not None:
                        work = workers * -(-size // inputs) / size
                    rows = size * received_sets
                    means = Score(*map(float, np.mean(each, axis=0)))
                    records.append(Record(n, k, s, name, text, seed, batch, rows, work, means))
    return Comparison(records, codes)


def _schemes(k: int, n: int, trial: Trial, extra: Any, names: Any) -> dict[str, Code | Decoder]:
    """Return schemes that fit the trial, by name: the extra ones, and all or those in ``names``."""
    parts = min(n, trial.batch_size)
    codes = peers(k, n) | {"no redundancy, regression": RegressionCode(parts, parts)}
    with as_called():
        added = {}
        if extra is not None:
            added = extra(k, n)
    instance("compare", "what extra returns", added, Mapping)
    for name, code in added.items():
        instance("compare", f"what extra returns as {name!r}", code, Code | Callable)
        of = (code.num_data, code.num_workers) if isinstance(code, Code) else (k, n)
        if of != (k, n) or name in codes.keys() | _WITH_SURROGATES:
            raise ValueError(
                f"compare: extra must return codes of K = {k} and N = {n} under names that are not "
                f"taken, got {shown({name: code})}"
            )
    schemes: dict[str, Code | Decoder] = {**codes, **added}
    fit = {x: y for x, y in schemes.items() if trial.mixable or not getattr(y, "mixes", False)}
    wanted = [*fit] if names is None else [*names]
    asked = {x: y for x, y in fit.items() if x in wanted or x in added}
    are_known = names is None or all(name in [*schemes] for name in wanted)  # may have no hash
    if not (asked and are_known):
        raise ValueError(
            f"compare: schemes must be names of {str([*fit])[1:-1]}, got {shown(names)}"
        )
    return asked


def _defended(schemes: Mapping[str, Code | Decoder], adversaries: int) -> dict[str, Code | Decoder]:
    """Return the codes that can drop wrong results, with this defence switched on."""
    return {
        f"{name}, defended": code.replace(adversaries=adversaries)
        for name, code in schemes.items()
        if isinstance(code, Code) and code.defends and not code.adversaries
    }


def _answers(
    trial: Trial,
    schemes: Mapping[str, Code | Decoder],
    received: Sequence[int],
    lost: int,
    cheap: list[Tensor],
) -> Iterator[tuple[str, Sequence[Tensor], Code | Decoder | None]]:
    """Yield the name of each scheme, its answers, and its code or function."""
    codes = {name: code for name, code in schemes.items() if isinstance(code, Code)}
    for name, of in schemes.items():
        if isinstance(of, Code):
            yield name, trial.decode(of, received, lost), of
        else:
            yield name, trial.answers(of, received, name), of
    if not cheap:
        return
    yield "surrogate alone", cheap, None
    for name, code in codes.items():
        if name in ("no redundancy, regression", "replication"):
            rows = trial.missing(code, received, lost)
            computed = trial.exact if trial.attack is None else trial.decode(code, received, lost)
            pairs = zip(computed, cheap, strict=True)
            answers = [known.index_put((rows,), stands[rows]) for known, stands in pairs]
            yield f"{name.partition(',')[0]}, surrogate", answers, code
        if name in ("no redundancy, regression", "regression"):
            answers = trial.decode(code, received, lost, cheap)
            yield f"{name.removesuffix(', regression')}, residuals", answers, code


def received_by(delays: Stragglers, num_workers: int, lost: int) -> list[int]:
    """Return the workers that answer in one draw of delays: all but the ``lost`` slowest.

    Raises a ValueError if the delays do not tell which workers these are, or lose more of them.
    """
    latencies = delays.sample(num_workers)
    seconds, order = latencies.sort()
    first = num_workers - lost
    if not seconds[first - 1] < [*seconds, math.inf][first]:
        raise ValueError(
            f"compare: delays must make S = {lost} of N = {num_workers} workers slower than all "
            f"others, got {shown(latencies.tolist())}"
        )
    return sorted(order[:first].tolist())


def _setting(setting: Any) -> Setting:
    """Return a setting, or raise a ValueError if the value is not a setting."""
    with contextlib.suppress(TypeError, ValueError):
        n, k, s = (count("compare", "settings", value, least=0) for value in setting)
        if 1 <= k <= n and s < n:
            return Setting(n, k, s)
    raise ValueError(
        "compare: settings must be Setting(num_workers, num_data, num_stragglers), or N, K and S "
        f"in this order, integers with 1 <= K <= N and 0 <= S < N, got {shown(setting)}"
    )


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    """Put all outputs of an input side by side, ``[B, C]``."""
    return torch.cat([leaf[..., None].flatten(1) for leaf in leaves], 1)
