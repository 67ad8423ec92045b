"""Which settings of a wrapper fit each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._arguments import count, instance, real
from ..codes.base import Code
from ..input_space.regression import Regression
from ..scheduling.waiting import Waiting
from ..workers.base import Workers

if TYPE_CHECKING:
    from .coded_wrapper import CodedWrapper

__all__ = ["check_settings", "check_waiting"]


def check_settings(wrapper: CodedWrapper) -> None:
    """Raise a TypeError or a ValueError unless the settings of a wrapper fit each other."""
    code, pool, parts = wrapper.code, wrapper.workers, wrapper.parts
    instance(wrapper, "code", code, Code, optional=True)
    instance(wrapper, "workers", pool, Workers)
    instance(wrapper, "predictor", wrapper.predictor, Regression, optional=True)
    if parts is not None:
        count(wrapper, "parts", parts)
    if code is None:
        if parts is None and pool.num_workers is None:
            raise ValueError(
                f"CodedWrapper: parts must be given with {type(pool).__name__}, which has no "
                "number of workers, got None"
            )
    else:
        for name, reason in (
            ("parts", "which says how many columns there are"),
            ("predictor", "which says how missing answers are predicted"),
        ):
            if (value := getattr(wrapper, name)) is not None:
                raise ValueError(
                    f"CodedWrapper: {name} must be None with a code, {reason}, got {value}"
                )
        if wrapper.surrogate and code.mixes:
            # With a student, the paper's scheme has more error than the student alone in seven of
            # ten settings measured on two networks (benchmarks/surrogates.py).
            raise ValueError(
                "CodedWrapper: surrogate must be left out with a code that mixes inputs, as the "
                f"surrogate alone has less error, got one with {code}"
            )
    if wrapper.verify is not None:
        _check_verify(wrapper, wrapper.verify)
    check_waiting(code, wrapper.waiting)


def _check_verify(wrapper: CodedWrapper, share: float) -> None:
    real(wrapper, "verify", share, "between 0 and 1", lambda x: 0 <= x <= 1)
    if share and wrapper.code is not None:
        raise ValueError(
            "CodedWrapper: verify must be None with a code, as only rows can be verified, got "
            f"{share}"
        )
    if share and (wrapper.workers.num_workers or 0) < 2:
        raise ValueError(
            "CodedWrapper: verify must be None on a pool without two workers that can be told "
            f"apart, got {share} with {wrapper.workers}"
        )


def check_waiting(code: Code | None, waiting: Waiting | None) -> None:
    """Raise a TypeError or a ValueError unless a policy fits the code."""
    instance("CodedWrapper", "waiting", waiting, Waiting, optional=True)
    if waiting is None:
        return
    if code is None:
        if waiting.at_once:
            raise ValueError(
                "CodedWrapper: waiting must be Waiting(...) without a code, as rows do not stand "
                f"in for each other, got {waiting}"
            )
        return
    if not waiting.predict and code.mixes:
        raise ValueError(
            "CodedWrapper: waiting.predict must be True with a code that mixes inputs, as all that "
            f"it decodes is estimated, got False with {code}"
        )
    lost, most = waiting.num_stragglers or 0, code.num_workers - code.min_received
    if lost > most:
        raise ValueError(
            f"CodedWrapper: waiting.num_stragglers must be at most {most}, as {code} needs "
            f"{code.min_received} results, got {lost}"
        )
