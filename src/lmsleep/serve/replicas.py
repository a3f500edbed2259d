"""Several servers of one model under Ray Serve: a key goes to the one that holds it.

If that one died it goes to another one, which takes over from what all of them share.
"""

import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

from lmsleep.serve.app import create_app
from lmsleep.serve.log import to_stderr
from lmsleep.serve.run import Settings, assemble, listen
from lmsleep.session import Session

# Read by Ray's proxies when they start: requests with the same header go to the same replica.
os.environ["RAY_SERVE_SESSION_ID_HEADER_KEY"] = "authorization"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig

NAME = "lmsleep"
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Replica:
    """One server, in a process of its own; its store is a copy that is lost with it.

    Args:
        opened: makes the session whose model is served.
        how: it is served; `store` is the folder in which the copies of this machine are made.
    """

    def __init__(self, opened: Callable[[], Session], how: Settings) -> None:
        to_stderr()
        how.store.mkdir(parents=True, exist_ok=True)
        self._copy = tempfile.TemporaryDirectory(prefix="replica-", dir=how.store)
        self.here = assemble(opened(), replace(how, store=Path(self._copy.name)))

    def __serve_build_asgi_app__(self) -> Any:
        """Return what answers requests."""
        return create_app(self.here)


def run(
    opened: Callable[[], Session],
    how: Settings,
    replicas: int,
    host: str,
    port: int,
    tell: Callable[[str], None],
    gpus: int,
) -> None:
    """Serve until SIGINT or SIGTERM, on the Ray cluster that RAY_ADDRESS names, or on this machine.

    Args:
        opened: makes the session whose model is served; called in each replica.
        how: each is served; with an address that they share.
        replicas: how many.
        host: to listen at.
        port: to listen at.
        tell: called with the address once it can be reached.
        gpus: of each replica.

    Raises:
        OSError: if the address is taken.
    """
    with listen(host, port) as free:  # Ray opens it itself
        port = free.getsockname()[1]
    ray.init(include_dashboard=False, log_to_driver=True, logging_level="error", num_cpus=_cpus(replicas))
    try:
        serve.start(http_options=HTTPOptions(host=host, port=port))
        deployment = serve.deployment(serve.ingress()(Replica)).options(
            name=NAME,
            num_replicas=replicas,
            max_ongoing_requests=how.most_waiting,
            health_check_period_s=2,
            ray_actor_options={"num_cpus": 0 if gpus else 1, "num_gpus": gpus},
            # No fallback: a replica that is busy is waited for, since another one would have to take over.
            request_router_config=RequestRouterConfig(
                request_router_class=ROUTER, request_router_kwargs={"num_fallback_replicas": 0}
            ),
        )
        serve.run(deployment.bind(opened, how), name=NAME, route_prefix="/")
        tell(f"http://{host}:{port}")
        ended = Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: ended.set())
        ended.wait()
    finally:
        serve.shutdown()
        ray.shutdown()


def _cpus(replicas: int) -> int | None:
    """Return how many CPUs a cluster of this machine alone pretends to have: each replica asks for one."""
    return None if os.environ.get("RAY_ADDRESS") else max(replicas, os.cpu_count() or 1)
