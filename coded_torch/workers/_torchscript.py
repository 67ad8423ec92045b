"""Pickles of TorchScript, which torch does not pickle: a script travels in its own format."""

import copyreg
import io
from collections import ChainMap
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.jit._script import RecursiveScriptModule
from torch.jit._trace import TopLevelTracedModule, TracedModule


def with_scripts(pickler: Any) -> Any:
    """Return a subclass of a class of picklers, which can also pickle TorchScript."""
    table = getattr(pickler, "dispatch_table", None)
    usual: Any = table if isinstance(table, Mapping) else copyreg.dispatch_table
    return type("Pickler", (pickler,), {"dispatch_table": ChainMap(_SCRIPTS, usual)})


def _reduce_script(script: torch.jit.ScriptModule) -> tuple[Any, ...]:
    file = io.BytesIO()
    torch.jit.save(script, file)
    return _load_script, (torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8),)


def _load_script(content: Tensor) -> Any:
    return torch.jit.load(io.BytesIO(content.numpy().tobytes()))


# What torch.jit.script, trace and load return, and the parts of a trace.
_SCRIPTS: dict[type, Callable[[Any], Any]] = {
    RecursiveScriptModule: _reduce_script,
    TopLevelTracedModule: _reduce_script,
    TracedModule: _reduce_script,
}
