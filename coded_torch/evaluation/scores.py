r"""How good decoded answers are, compared to the model's own.

Answers are ``[..., C]``: the last dimension is one answer, all others count inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import dense

__all__ = ["relative_accuracy", "rmse", "rmse_mean", "top1_agreement"]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def rmse(decoded: Tensor, exact: Tensor) -> float:
    r"""The root of the mean squared error of an answer.

    .. math:: \sqrt{\mathrm{E}\,\tfrac1K \sum_k \lVert \hat f(x_k) - f(x_k) \rVert_2^2}

    Args:
        decoded: the decoded answers, ``[..., C]``, floating-point, finite.
        exact: the model's own answers, the same shape.

    Returns:
        The error, computed in float64, in the units of the answers: a norm over all C entries, not
        a mean over them.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes differ or hold no answer, or an entry is not finite.

    Note:
        At least :func:`rmse_mean`, and equal to it if all errors are of one length. Papers report
        either of them as "RMSE".

    Example:
        >>> import torch
        >>> from coded_torch.evaluation import scores
        >>> scores.rmse(torch.tensor([[7.0], [1.0]]), torch.zeros(2, 1))
        5.0
    """
    return float(_errors("rmse", decoded, exact).square().mean().sqrt())


def rmse_mean(decoded: Tensor, exact: Tensor) -> float:
    r"""The mean over inputs of the norm of an answer's error.

    .. math:: \mathrm{E}\,\tfrac1K \sum_k \lVert \hat f(x_k) - f(x_k) \rVert_2

    Args:
        decoded: the decoded answers, ``[..., C]``, floating-point, finite.
        exact: the model's own answers, the same shape.

    Returns:
        The error, computed in float64, in the units of the answers.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes differ or hold no answer, or an entry is not finite.

    Note:
        At most :func:`rmse`, the other meaning of "RMSE" in papers.

    Example:
        >>> import torch
        >>> from coded_torch.evaluation import scores
        >>> scores.rmse_mean(torch.tensor([[7.0], [1.0]]), torch.zeros(2, 1))
        4.0
    """
    return float(_errors("rmse_mean", decoded, exact).mean())


def relative_accuracy(decoded: Tensor, exact: Tensor, labels: Tensor) -> float:
    r"""RelAcc: the accuracy of the decoded answers over the accuracy of the model itself.

    Args:
        decoded: the decoded scores of C classes, ``[..., C]``, floating-point, finite.
        exact: the model's own scores, the same shape.
        labels: the true classes, integers, ``[...]``.

    Returns:
        The ratio, at least 0; above 1 if decoding repairs more answers than it spoils.

    Raises:
        TypeError: the scores are not floating-point tensors, or the labels not an integer tensor.
        ValueError: the shapes do not fit or hold no answer, a score is not finite, or the model is
            never right, which leaves nothing to divide by.

    Example:
        >>> import torch
        >>> from coded_torch.evaluation import scores
        >>> exact = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> scores.relative_accuracy(exact.flip(0)[:1].expand(2, 2), exact, torch.tensor([0, 1]))
        0.5
    """
    _check("relative_accuracy", decoded, exact)
    if not isinstance(labels, Tensor) or labels.dtype not in _INTEGERS:
        raise TypeError(
            "relative_accuracy: labels must be an integer tensor, "
            f"got {getattr(labels, 'dtype', type(labels).__name__)}"
        )
    if labels.shape != exact.shape[:-1]:
        raise ValueError(
            f"relative_accuracy: labels must have shape {tuple(exact.shape[:-1])}, "
            f"got {tuple(labels.shape)}"
        )
    right = int((exact.argmax(-1) == labels).sum())
    if not right:
        raise ValueError("relative_accuracy: the model must be right at least once, got never")
    return int((decoded.argmax(-1) == labels).sum()) / right


def top1_agreement(decoded: Tensor, exact: Tensor) -> float:
    r"""The share of inputs whose decoded answer names the same class as the model's own.

    Args:
        decoded: the decoded scores of C classes, ``[..., C]``, floating-point, finite.
        exact: the model's own scores, the same shape.

    Returns:
        The share, in [0, 1].

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes differ or hold no answer, or a score is not finite.

    Example:
        >>> import torch
        >>> from coded_torch.evaluation import scores
        >>> exact = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> scores.top1_agreement(torch.tensor([[0.6, 0.4], [0.6, 0.4]]), exact)
        0.5
    """
    _check("top1_agreement", decoded, exact)
    return float((decoded.argmax(-1) == exact.argmax(-1)).double().mean())


def _errors(metric: str, decoded: Tensor, exact: Tensor) -> Tensor:
    """The norm of every answer's error: ``[..., C] -> [...]``, float64."""
    _check(metric, decoded, exact)
    return (decoded.detach().double() - exact.detach().double()).square().sum(-1).sqrt()


def _check(metric: str, decoded: Tensor, exact: Tensor) -> None:
    for argument, value in (("decoded", decoded), ("exact", exact)):
        dense(metric, argument, value)
        if not value.dim() or not value.numel():
            raise ValueError(
                f"{metric}: {argument} must have shape [..., C] and hold at least one answer, "
                f"got {tuple(value.shape)}"
            )
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{metric}: {argument} must be finite, got NaN or infinity")
    if decoded.shape != exact.shape:
        raise ValueError(
            f"{metric}: decoded must have the shape of exact, {tuple(exact.shape)}, "
            f"got {tuple(decoded.shape)}"
        )
