"""The same application in the replicas of Ray Serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette

from .application import Service
from .metrics import Metrics

__all__ = ["deployment"]

_MOST_REQUESTS = 1024  # that Ray lets into a replica, where its default is 5


def deployment(factory: Callable[[], Starlette], **options: Any) -> Any:
    r"""A deployment for Ray Serve, each of whose replicas serves an application of its own.

    ``serve.run(deployment(make).bind())`` deploys it. What Ray does stays Ray's: autoscaling,
    rolling updates, the dashboard. The numbers of :mod:`coded_torch.serve.metrics` go to Ray, which
    puts ``ray_`` in front of their names.

    The workers of a replica are processes of its machine, if ``factory`` makes
    :class:`~coded_torch.workers.ProcessWorkers`; or actors of the cluster, if it makes
    :class:`~coded_torch.workers.RayWorkers`: then ``placement_group_bundles=[{"CPU": 1}] * 7,
    placement_group_strategy="SPREAD"`` reserves places for the replica and, with the workers' own
    option ``num_cpus=1``, for six of them on different machines.

    Needs the extra ``serve-ray``: ``pip install 'coded_torch[serve-ray]'``.

    Args:
        factory: makes the application, by :func:`~coded_torch.serve.app`; called in the replica.
        options: of ``ray.serve.deployment``. By default Ray lets 1,024 requests into a replica,
            and as many wait, so that it is the application that refuses.

    Raises:
        ImportError: Ray Serve is not installed.

    Raises in the replica:
        TypeError: ``factory`` makes something else.
        ValueError: ``max_ongoing_requests`` is not above the application's bound.

    Warning:
        Beside Ray's proxy, each replica binds a port to every interface, from which Ray reads
        pickles: for a trusted network only. Nothing of the HTTP side is ever unpickled.

    Note:
        Ray's proxy costs 12 to 17 ms of a processor a request. Where that counts, set
        ``RAY_SERVE_THROUGHPUT_OPTIMIZED=1`` before Ray starts: the replicas serve HTTP themselves.
    """
    from ray import serve

    options = {
        "max_ongoing_requests": _MOST_REQUESTS,
        "max_queued_requests": _MOST_REQUESTS,
        **options,
    }

    def build() -> Starlette:
        application = checked(factory, options["max_ongoing_requests"])
        application.state.service.metrics = Metrics(ray=True)
        return application

    return serve.deployment(**options)(serve.ingress(build)())


def checked(factory: Callable[[], Starlette], max_ongoing_requests: int) -> Starlette:
    """What a factory makes, if it is an application that refuses before Ray does."""
    application = factory()
    service = getattr(getattr(application, "state", None), "service", None)
    if not isinstance(service, Service):
        raise TypeError(
            "deployment: factory must return what coded_torch.serve.app does, got "
            f"{type(application).__name__}"
        )
    if service.max_queued_requests >= max_ongoing_requests:
        raise ValueError(
            "deployment: max_ongoing_requests must be above the application's own "
            f"max_queued_requests, {service.max_queued_requests}, got {max_ongoing_requests}"
        )
    return application
