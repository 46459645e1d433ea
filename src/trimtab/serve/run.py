"""The server process: uvicorn around the application, and what a signal does.

On SIGHUP the folder of steerings is read again. On SIGTERM or SIGINT nothing more is accepted, what was accepted has
its time to end, and what hasn't ended by then gets an error. A second signal ends the process at once.
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
from trimtab.serve.memory import keep_little
from trimtab.serve.scheduler import Scheduler

log: logging.Logger = logging.getLogger("trimtab")
LAST_WORDS = 5
"""Seconds to send what is left when the time to end is over."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to this address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False  # a name may stand for anything


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 takes any free one. Raises `TrimtabError` where it can't."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
        bound.listen(2048)
    except OSError as error:
        bound.close()
        raise TrimtabError(
            f"can't listen on {host} port {port}: {error.strerror or error}; --port chooses another (0: any)"
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
    """uvicorn around the application, with our bounds on connections."""
    config = uvicorn.Config(
        app,
        http=protocol(connections),
        timeout_keep_alive=KEEP_SECONDS,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(grace) + LAST_WORDS,
    )
    return _Server(config, scheduler, grace)


def one_at_a_time(work: Callable[[], None]) -> Callable[[], None]:
    """A function that has the work done, in a thread; a call while it is being done has it done once more.

    So the last call has the last turn, however often that is. May be called from a signal's handler.
    """
    wanted: queue.SimpleQueue[None] = queue.SimpleQueue()

    def forever() -> None:
        while True:
            wanted.get()
            while not wanted.empty():
                wanted.get()
            try:
                work()
            except Exception:  # the next one is done all the same
                log.exception("the work that a signal requested failed")

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
    """Serve until a signal comes; `grace` is how many seconds accepted requests have then.

    `hangup` is called in a thread of its own at SIGHUP, where the system has it: once for all that come while it runs.
    """
    if hangup is not None and hasattr(signal, "SIGHUP"):
        again = one_at_a_time(hangup)
        signal.signal(signal.SIGHUP, lambda *_: again())
    keep_little()
    make_server(app, scheduler, grace=grace, connections=connections).run(sockets=[bound])
