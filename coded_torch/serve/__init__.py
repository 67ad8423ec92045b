"""A model behind HTTP, on workers that fail: the Open Inference Protocol, in an ASGI application.

One request, file by file: ``application.py`` receives it, ``bodies.py`` reads and unpacks it,
``protocol.py`` and ``tensors.py`` understand it, ``batcher.py`` computes it together with others,
``metrics.py`` counts what became of it. ``ray_serve.py`` puts the same into replicas of Ray Serve,
``factories.py`` makes what the command serves. Needs the extra ``serve``.
"""

from .application import app
from .ray_serve import deployment
from .tensors import DATATYPES, TensorSpec

__all__ = ["DATATYPES", "TensorSpec", "app", "deployment"]
