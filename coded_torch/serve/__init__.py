"""A model behind HTTP on unreliable workers: the Open Inference Protocol, in an ASGI application.

A request passes these files: ``application.py`` receives it, ``protocol.py`` and ``tensors.py``
parse it, ``batcher.py`` queues it, ``model.py`` computes it together with others, and
``metrics.py`` counts the outcome. ``ray_serve.py`` puts the application into replicas of Ray Serve.
Needs the extra ``serve``.
"""

from .application import app
from .ray_serve import deployment
from .tensors import DATATYPES, TensorSpec, specs

__all__ = ["DATATYPES", "TensorSpec", "app", "deployment", "specs"]
