"""Bodies of requests, packed or not, never larger than they may be."""

from __future__ import annotations

import zlib

from starlette.requests import Request

from .errors import RequestError, invalid

__all__ = ["read_body"]

_WINDOWS = {"gzip": 31, "deflate": 15}  # zlib's names of the formats


async def read_body(request: Request, most: int) -> bytes:
    """The body, unpacked.

    Args:
        request: whose body has not been read.
        most: bytes that it may have, packed and unpacked.

    Raises:
        RequestError: it has more (413), is packed otherwise (415), or cannot be unpacked (400).
        ClientDisconnect: the client has gone.
    """
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding not in ("identity", *_WINDOWS):
        raise RequestError(
            415, "invalid", f"Content-Encoding must be gzip or deflate, got {encoding!r}"
        )
    length = request.headers.get("content-length", "0")
    if not length.isdigit() or int(length) > most:
        raise _too_large(most)
    unpacker = zlib.decompressobj(_WINDOWS[encoding]) if encoding in _WINDOWS else None
    parts, packed, size = [], 0, 0
    async for chunk in request.stream():
        packed += len(chunk)
        if packed > most:
            raise _too_large(most)
        if unpacker is not None:
            try:
                chunk = unpacker.decompress(chunk, most - size + 1)  # the rest is not unpacked
            except zlib.error as error:
                raise invalid(f"the body must be {encoding}, got {error}") from None
        size += len(chunk)
        if size > most:
            raise _too_large(most)
        parts.append(chunk)
    if unpacker is not None and (not unpacker.eof or unpacker.unused_data):
        what = "more than that" if unpacker.eof else "only the beginning"
        raise invalid(f"the body must be {encoding}, got {what}")
    return b"".join(parts)


def _too_large(most: int) -> RequestError:
    return RequestError(413, "too_large", f"the body must be at most {most} bytes, unpacked")
