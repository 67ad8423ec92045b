"""The model of a fleet of servers, for a server in front of them. Needs the extra ``endpoints``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..open_inference.client import BusyError, RemoteModule
from ..open_inference.tensors import TensorSpec
from .protocol import ADDED

__all__ = ["FleetModule", "find"]

_PREDICTED = ADDED[0]
_SECONDS = 0.1  # the pause of a server that predicted rows, as it was late; not tuned


class FleetModule(RemoteModule):
    """The model of a fleet. A server of this package that predicts rows counts as busy.

    Of a server's outputs it has all but :data:`ADDED`, which the server in front adds anew.
    """

    def __init__(self, url: str, model: str) -> None:
        super().__init__(url, model)
        found = self.metadata.outputs
        self.specs = tuple(spec for spec in found if spec not in ADDED)
        asked = (*self.specs, *(spec for spec in found if spec == _PREDICTED))
        self.metadata = self.metadata._replace(outputs=asked)

    def outputs(self, tensors: Sequence[Tensor]) -> Any:
        """Return the outputs of the model; a BusyError if a server predicted some."""
        own = len(self.specs)
        if any(bool(flags.any()) for flags in tensors[own:]):
            raise BusyError(_SECONDS)
        return tuple(tensors[:own])


def find(urls: Sequence[str], model: str) -> tuple[FleetModule, list[TensorSpec], list[TensorSpec]]:
    """Return the model of a fleet, by the first server that answers, and its specs.

    Raises:
        ValueError: a URL is wrong, or the model has no outputs.
        RuntimeError: no server knows the model.
    """
    trouble = ""
    for url in urls:
        try:
            module = FleetModule(url, model)
        except RuntimeError as error:
            trouble = trouble or str(error)
        else:
            return module, [*module.metadata.inputs], [*module.specs]
    raise RuntimeError(f"no endpoint describes the model {model!r}; {trouble}")
