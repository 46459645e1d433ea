"""The server process: uvicorn around the application, and signal handling.

SIGHUP reads the folder of steerings again. After SIGTERM or SIGINT the server accepts nothing more, gives accepted
requests time to end, and answers those that haven't ended by then with an error. A second signal ends the process at
once.
"""

from __future__ import annotations

import ipaddress
import logging
import queue
import signal
import socket
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from trimtab.errors import TrimtabError
from trimtab.serve.connections import KEEP_SECONDS, protocol
from trimtab.serve.memory import limit_malloc_arenas
from trimtab.serve.scheduler import Scheduler

log: logging.Logger = logging.getLogger("trimtab")
FINAL_SEND_SECONDS = 5
"""Seconds to send what is left after the grace period."""


def is_loopback(host: str) -> bool:
    """Whether a server bound to this address can only be reached from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may resolve to anything


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises `TrimtabError` if it can't listen there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        # Unix: a port whose previous server has just ended is free. Windows has this without an option; there
        # SO_REUSEADDR would let a second server take the port of a running one.
        option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise TrimtabError(
            f"can't listen on {host} port {port}: {error.strerror or error}; choose another with --port (0: any)"
        ) from None
    return bound


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, scheduler: Scheduler, seconds: float) -> None:
        super().__init__(config)
        self._scheduler = scheduler
        self._seconds = seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True
        self._scheduler.drain(self._seconds)
        self.should_exit = True


def make_server(app: ASGIApp, scheduler: Scheduler, *, grace: float, connections: int) -> uvicorn.Server:
    """uvicorn around the application, with this server's limits on connections."""
    config = uvicorn.Config(
        app,
        http=protocol(connections),
        timeout_keep_alive=KEEP_SECONDS,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(grace) + FINAL_SEND_SECONDS,
    )
    return _Server(config, scheduler, grace)


def coalescing_trigger(work: Callable[[], None]) -> Callable[[], None]:
    """A function that requests a run of `work` in a thread; calls during a run cause one more run after it.

    So a run always follows the last call. May be called from a signal handler.
    """
    wanted: queue.SimpleQueue[None] = queue.SimpleQueue()

    def forever() -> None:
        while True:
            wanted.get()
            while not wanted.empty():
                wanted.get()
            try:
                work()
            except Exception:  # the next one runs all the same
                log.exception("a task requested by a signal failed")

    threading.Thread(target=forever, daemon=True).start()
    return lambda: wanted.put(None)


def serve(
    app: ASGIApp,
    scheduler: Scheduler,
    bound: socket.socket,
    *,
    grace: float,
    connections: int,
    hangup: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal arrives; accepted requests then have `grace` seconds to end.

    `hangup` is called in its own thread on SIGHUP, on systems that have it: once for all signals that arrive while it
    runs.
    """
    if hangup is not None and hasattr(signal, "SIGHUP"):
        again = coalescing_trigger(hangup)
        signal.signal(signal.SIGHUP, lambda *_: again())
    limit_malloc_arenas()
    make_server(app, scheduler, grace=grace, connections=connections).run(sockets=[bound])
