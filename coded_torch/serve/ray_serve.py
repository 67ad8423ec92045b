"""The application in replicas of Ray Serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette

from .application import Service
from .metrics import Metrics

__all__ = ["deployment"]

# The number of requests that Ray lets into a replica. Ray's default of 5 would refuse before the
# application's own bound of 256 does.
_MOST_REQUESTS = 1024


def deployment(factory: Callable[[], Starlette], **options: Any) -> Any:
    r"""Make a deployment for Ray Serve, each of whose replicas serves its own application.

    ``serve.run(deployment(make).bind())`` deploys it. Ray does autoscaling, rolling updates and the
    dashboard. The numbers of :mod:`coded_torch.serve.metrics` go to Ray, which puts ``ray_`` in
    front of their names.

    With :class:`~coded_torch.workers.ProcessWorkers` the workers of a replica are processes of its
    machine, with :class:`~coded_torch.workers.RayWorkers` actors of the cluster. Then
    ``placement_group_bundles=[{"CPU": 1}] * 7, placement_group_strategy="SPREAD"`` reserves places
    for the replica and for six workers on other machines, if they have ``num_cpus=1``.

    Needs the extra ``serve-ray``: ``pip install 'coded_torch[serve-ray]'``.

    Args:
        factory: makes the application by :func:`~coded_torch.serve.app`. The replica calls it.
        options: options of ``ray.serve.deployment``. By default Ray lets 1,024 requests into a
            replica, and as many wait, so that the application refuses and not Ray. Keep
            ``max_ongoing_requests`` above the application's ``max_queued_requests``.

    Raises:
        ImportError: Ray Serve is not installed.

    Warning:
        Ray binds one port of each replica to every interface and reads pickles from it: use it in
        a trusted network only. Nothing of the HTTP side is ever unpickled.

    Note:
        Ray's proxy costs 12 to 17 ms of a processor a request. Where that counts, set
        ``RAY_SERVE_THROUGHPUT_OPTIMIZED=1`` before Ray starts: the replicas serve HTTP themselves.
    """
    from ray import serve

    bounds = {"max_ongoing_requests": _MOST_REQUESTS, "max_queued_requests": _MOST_REQUESTS}
    options = bounds | options

    def build() -> Starlette:
        application = factory()
        service_of(application).metrics = Metrics(ray=True)
        return application

    return serve.deployment(**options)(serve.ingress(build)())


def service_of(application: Any) -> Service:
    """Return the service of an application, or raise a TypeError in the replica."""
    service = getattr(getattr(application, "state", None), "service", None)
    if not isinstance(service, Service):
        raise TypeError(
            "deployment: factory must return what coded_torch.serve.app does, got "
            f"{type(application).__name__}"
        )
    return service
