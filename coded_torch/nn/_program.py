"""Programs in files as modules: those of torch.export, and of ONNX."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .._loaded import LoadedModule

_SUFFIXES = (".pt2", ".onnx")


class Program(LoadedModule):
    """A program of :func:`torch.export.export`, or an ONNX model, as a module.

    It holds the file's content, which travels to workers, and loads it where it is called first.
    It has no parameters, and its mode and dtype are those that it was exported with.

    A program that was exported for one batch size needs :class:`FixedBatch`, too, as parts of a
    call have other sizes than the batch.

    Args:
        source: the program, or the path of its file, which ends in ``.pt2`` or ``.onnx``. ONNX
            needs the extra ``onnx``; several of its outputs are returned as a dict.

    Attributes:
        inputs: the names of the inputs, in order; None if an input is not a tensor.
        example: inputs by name, or as a tuple: those it was exported with, or None; of ONNX, two
            rows of numbers between 0 and 1, or of zeros of other dtypes.

    Raises:
        TypeError, ValueError: the source is neither.
        OSError, RuntimeError: the file cannot be read, or holds no such program.
        ImportError: onnxruntime is not installed.

    Example:
        >>> import torch
        >>> from coded_torch.nn import Program
        >>> rows = torch.export.Dim("rows")
        >>> linear = torch.nn.Linear(3, 1)
        >>> exported = torch.export.export(linear, (torch.zeros(2, 3),), dynamic_shapes=[{0: rows}])
        >>> Program(exported)(torch.zeros(5, 3)).shape
        torch.Size([5, 1])
    """

    def __init__(self, source: torch.export.ExportedProgram | str | os.PathLike[str]) -> None:
        super().__init__("program")
        self.suffix = ".pt2"
        if isinstance(source, torch.export.ExportedProgram):
            file = io.BytesIO()
            torch.export.save(source, file)
            content = file.getvalue()
        elif isinstance(source, str | os.PathLike):
            self.name = Path(source).name
            self.suffix = Path(source).suffix.lower()
            if self.suffix not in _SUFFIXES:
                raise ValueError(f"Program: source must end in .pt2 or .onnx, got {str(source)!r}")
            content = Path(source).read_bytes()
        else:
            got = type(source).__name__
            raise TypeError(f"Program: source must be an ExportedProgram or a path, got a {got}")
        if self.suffix == ".onnx" and importlib.util.find_spec("onnxruntime") is None:
            raise ImportError(
                "Program: onnxruntime must be installed: pip install 'coded_torch[onnx]'"
            )
        self.inputs: list[str] | None = None
        try:
            # Workers map the memory of tensors. As a buffer, it would move to devices.
            self._content = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            self.example = self._read_example()
        except Exception as error:  # those of onnxruntime have no common class
            why = str(error).partition("\n")[0]
            raise RuntimeError(f"Program: {self.name} cannot be loaded: {why}") from error

    def extra_repr(self) -> str:
        return f"{self.name}, {self._content.nbytes:,} bytes"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the program does, on the device that this module was moved to."""
        if self.inputs is not None:
            named = dict(zip(self.inputs, args, strict=False)) | kwargs
            if len(named) < len(args) + len(kwargs) or {*named} != {*self.inputs}:
                requirement = f"{self.name} must be called with {', '.join(self.inputs)}"
                got = f"{len(args)} by position and {[*kwargs]} by name"
                raise TypeError(f"Program: {requirement}, got {got}")
            args = tuple(named[name] for name in self.inputs)
            kwargs = {}
        return self.load()(*args, **kwargs)

    def _exported(self) -> torch.export.ExportedProgram:
        with warnings.catch_warnings():
            # Torch 2.10 and 2.11 warn of a buffer of their own, where warnings may be errors.
            warnings.filterwarnings("ignore", "The given buffer is not writable")
            return torch.export.load(io.BytesIO(self._content.numpy().tobytes()))

    def _session(self, device: torch.device) -> Any:
        """Return a session of onnxruntime for the model, on a device."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda":
            number = {"device_id": device.index or 0}
            providers.insert(0, ("CUDAExecutionProvider", number))
        content = self._content.numpy().tobytes()
        return onnxruntime.InferenceSession(content, options, providers=providers)

    def _load(self, device: torch.device) -> Callable[..., Any]:
        if self.suffix == ".onnx":
            return functools.partial(_run_onnx, self._session(device), device)
        program = self._exported()
        if device.type != "cpu":
            from torch.export.passes import move_to_device_pass

            program = move_to_device_pass(program, device)
        return program.module()

    def _read_example(self) -> tuple[Any, ...] | dict[str, Tensor] | None:
        """Return the example, and note the names of the inputs."""
        if self.suffix == ".onnx":
            declared = self._session(torch.device("cpu")).get_inputs()
            self.inputs = [x.name for x in declared]
            return {x.name: _example_of(x) for x in declared}
        program = self._exported()
        if program.example_inputs is None:
            return None
        args, kwargs = tree_map_only(Tensor, torch.clone, program.example_inputs)
        is_plain = all(isinstance(x, Tensor) for x in args) and not kwargs
        if is_plain:
            self.inputs = list(program.graph_signature.user_inputs)
            return dict(zip(self.inputs, args, strict=True))
        return args if not kwargs else kwargs if not args else None


_DTYPES_OF_ONNX = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int16)": torch.int16,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}


def _example_of(declared: Any) -> Tensor:
    """Return an example of an input of an ONNX model; sizes that it leaves open are 2."""
    dtype = _DTYPES_OF_ONNX.get(declared.type)
    if dtype is None:
        raise ValueError(f"its input {declared.name} must be a tensor, got {declared.type}")
    shape = [size if isinstance(size, int) else 2 for size in declared.shape]
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _run_onnx(session: Any, device: torch.device, *args: Tensor) -> Any:
    """Return the outputs of a session of onnxruntime as tensors on a device."""
    names = [x.name for x in session.get_inputs()]
    arrays = [x.detach().cpu().contiguous().numpy() for x in args]
    named = dict(zip(names, arrays, strict=True))
    results = [torch.from_numpy(x).to(device) for x in session.run(None, named)]
    if len(results) == 1:
        return results[0]
    return dict(zip([x.name for x in session.get_outputs()], results, strict=True))
