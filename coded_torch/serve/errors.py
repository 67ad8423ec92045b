"""Why a request gets no answer."""

from __future__ import annotations

__all__ = ["RequestError"]


class RequestError(Exception):
    """A request that is not answered.

    Attributes:
        status: of HTTP.
        reason: one of few words, by which refusals are counted.
        message: what its client reads.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


def invalid(message: str) -> RequestError:
    """The client's own mistake."""
    return RequestError(400, "invalid", message)
