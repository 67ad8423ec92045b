r"""A module that stands for the model of a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .._arguments import instance
from .client import Client, Model, run

__all__ = ["RemoteModule"]


class RemoteModule(nn.Module):
    r"""A module without parameters that stands for the model of a server.

    Calling it asks one server. :class:`EndpointWorkers` runs it on many.

    Args:
        url: the server, such as ``"http://a:8000"``.
        model: the name of the model. Its inputs and outputs come from the server's metadata.
        outputs: the names of the outputs to ask for. Defaults to None, all of them.
        headers, token, context, connect_timeout, timeout: as in :class:`EndpointWorkers`.

    Raises:
        TypeError, ValueError: an argument has the wrong type or value.
        RuntimeError: the server cannot be reached, or does not keep the protocol.

    Calling raises:
        TypeError: the arguments are not tensors, one for each input, by position or by name.
        ValueError: the server refuses the inputs.
        RuntimeError: the model failed, or the server.

    Calling returns:
        The output ``[B, ...]``; if there are several, a dict by name. On the CPU.
    """

    def __init__(
        self, url: str, model: str, *, outputs: Sequence[str] | None = None, **options: Any
    ) -> None:
        super().__init__()
        client = Client(self, **options)
        self.url, self._options = client.checked(url), options
        instance(self, "model", model, str)
        self.metadata: Model = run(client.model(self.url, model, outputs))
        self._client: Client | None = client

    @property
    def model(self) -> str:
        """The name of the model."""
        return self.metadata.name

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Ask the server."""
        inputs = self.inputs(args, kwargs)
        if self._client is None:
            self._client = Client(self, **self._options)
        rows = len(inputs[0])
        outputs = run(self._client.infer(self.url, self.metadata, inputs, rows))
        return self.outputs(outputs)

    def inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """Return the arguments of a call in the order of the model's inputs."""
        specs = self.metadata.inputs
        names = [spec.name for spec in specs[len(args) :]]
        given = [*args, *(kwargs.get(name) for name in names)]
        if len(given) != len(specs) or kwargs.keys() - set(names):
            raise TypeError(
                f"RemoteModule: inputs must be {', '.join(spec.name for spec in specs)}, got "
                f"{len(args)} by position and {sorted(kwargs)}"
            )
        for spec, tensor in zip(specs, given, strict=True):
            if not isinstance(tensor, Tensor) or tensor.dtype != spec.dtype:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"RemoteModule: {spec.name} must be of {spec.dtype}, got {got}")
            if not spec.fits(tensor.shape[1:]) or tensor.dim() == 0:
                raise ValueError(
                    f"RemoteModule: {spec.name} must be of shape [B, {list(spec.shape)}], got "
                    f"{list(tensor.shape)}"
                )
        return given

    def outputs(self, tensors: Sequence[Tensor]) -> Any:
        """Return the outputs of the model as a call does."""
        names = [spec.name for spec in self.metadata.outputs]
        return tensors[0] if len(names) == 1 else dict(zip(names, tensors, strict=True))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None}

    def extra_repr(self) -> str:
        return f"{self.url!r}, {self.model!r}"
