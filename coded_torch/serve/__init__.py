"""A model behind HTTP on unreliable workers: the Open Inference Protocol, in an ASGI application.

``application.py`` receives a request, ``protocol.py`` parses it, ``batcher.py`` queues it and
computes it with others, and ``metrics.py`` counts the outcome. ``model.py`` finds what a model
takes and returns, and loads its next version. Needs the extra ``serve``.
"""

from ..open_inference import DATATYPES, TensorSpec
from .application import App, deployment
from .model import specs
from .protocol import Connection

__all__ = ["DATATYPES", "App", "Connection", "TensorSpec", "deployment", "specs"]
