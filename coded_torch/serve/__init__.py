"""A model behind HTTP on unreliable workers: the Open Inference Protocol, in an ASGI application.

``_connections.py`` has the HTTP server, ``_application.py`` receives a request, ``_protocol.py``
parses it, ``_suspects.py`` refuses rows that hang workers, ``_batcher.py`` queues it and computes
it with others, and ``metrics.py`` counts the outcome. ``_model.py`` finds what a model takes and
returns, and loads its next version. Needs the extra ``serve``.
"""

from ..open_inference import DATATYPES, TensorSpec
from ._application import App, deployment
from ._connections import server
from ._model import specs

__all__ = ["DATATYPES", "App", "TensorSpec", "deployment", "server", "specs"]
