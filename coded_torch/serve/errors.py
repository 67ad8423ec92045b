"""The error of a request that gets no answer."""

from __future__ import annotations

__all__ = ["RequestError", "invalid"]


class RequestError(Exception):
    """A request is not answered.

    Args:
        status: the status of HTTP.
        reason: one of few words; the metrics count refusals by it.
        message: the text for the client.
    """

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason, self.message = status, reason, message


def invalid(message: str) -> RequestError:
    """Return the error of a request that is itself wrong."""
    return RequestError(400, "invalid", message)
