"""A model behind HTTP on unreliable workers: the Open Inference Protocol, in an ASGI application.

``application.py`` receives a request, ``protocol.py`` parses it, ``batcher.py`` queues it and
computes it with others, and ``metrics.py`` counts the outcome. Needs the extra ``serve``.
"""

from ..open_inference import DATATYPES, TensorSpec
from ..open_inference.description import specs
from .application import app, deployment
from .protocol import Connection

__all__ = ["DATATYPES", "Connection", "TensorSpec", "app", "deployment", "specs"]
