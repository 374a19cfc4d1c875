"""A real HTTP server around the app: in the foreground (`run`) or in a thread (`running`).

The socket is bound before anything else, so that a taken port is an error a person understands and port 0 gives a URL that works.
On a signal, or at the end of `running`, the server says at `/ready` that it stops and refuses new work with 503, lets running answers
end for up to `drain_seconds`, aborts the rest and ends the engine's thread.
"""

import asyncio
import errno
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from garage.core.errors import UserError
from garage.engine.engine import Engine
from garage.serve.app import serve_app
from garage.serve.service import Service
from garage.specs.serve import ServeSpec


def bind(spec: ServeSpec) -> socket.socket:
    """A listening socket on the host and port of the spec.

    Raises:
        UserError: the port is taken, or the address is not ours to listen on.
    """
    family = socket.AF_INET6 if ":" in spec.host else socket.AF_INET
    try:
        return socket.create_server((spec.host, spec.port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {spec.port} on {spec.host} is in use", remedy="choose another --port, or 0 for any free one") from error
        text = f"cannot listen on {spec.host}:{spec.port}: {error.strerror or error}"
        raise UserError(text, remedy="choose another --host or --port") from error


def url_of(sock: socket.socket) -> str:
    """Where clients find a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(engine: Engine, spec: ServeSpec, *, sock: socket.socket | None = None, on_ready: Callable[[str], None] = print) -> None:
    """Serve until SIGINT or SIGTERM; once it answers, `on_ready` gets the URL. Give `sock` (from `bind`) to hold the port meanwhile."""
    sock = sock or bind(spec)
    with sock:
        _server(engine, spec, lambda: on_ready(url_of(sock))).run(sockets=[sock])


@contextmanager
def running(engine: Engine, spec: ServeSpec) -> Iterator[str]:
    """Serve from a thread of this process; gives the URL, and at the end stops cleanly."""
    with bind(spec) as sock:
        server = _server(engine, spec)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, name="garage-server", daemon=True)
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start; its log says why"
                time.sleep(0.01)
            yield url_of(sock)
        finally:
            server.should_exit = True
            thread.join()


class _Server(uvicorn.Server):
    """Drains before it closes its doors, so that whoever asks meanwhile is told, not cut off."""

    def __init__(self, service: Service, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._service, self._on_ready = service, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.is_draining = True
        end = time.monotonic() + self._service.spec.drain_seconds
        while self._service.metrics.in_flight and time.monotonic() < end and not self.force_exit:
            await asyncio.sleep(0.02)
        await super().shutdown(sockets)


def _server(engine: Engine, spec: ServeSpec, on_ready: Callable[[], None] = lambda: None) -> uvicorn.Server:
    app = serve_app(engine, spec)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="on", ws="none", timeout_graceful_shutdown=1
    )
    return _Server(app.state.service, config, on_ready)
