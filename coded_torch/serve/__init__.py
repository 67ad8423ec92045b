"""A model behind HTTP on unreliable workers: the Open Inference Protocol, in an ASGI application.

``connections.py`` has the HTTP server, ``application.py`` receives a request, ``protocol.py``
parses it, ``suspects.py`` refuses rows that hang workers, ``batcher.py`` queues it and computes it
with others, and ``metrics.py`` counts the outcome. ``model.py`` finds what a model takes and
returns, and loads its next version. Needs the extra ``serve``.
"""

from ..open_inference import DATATYPES, TensorSpec
from .application import App, deployment
from .connections import server
from .model import specs

__all__ = ["DATATYPES", "App", "TensorSpec", "deployment", "server", "specs"]
