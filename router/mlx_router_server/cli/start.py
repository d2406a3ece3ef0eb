"""``mlx-router start``: bind, tell where, serve, and end as the signal says."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import errno
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvicorn
from starlette.applications import Starlette

from mlx_router_server.access.keys import KeyFileError, keys_file, read_keys
from mlx_router_server.api.edge import is_loopback
from mlx_router_server.api.server import Server
from mlx_router_server.api.wire import WireLimits, guarded_protocol
from mlx_router_server.app import create_app, reload
from mlx_router_server.cli.client import Client, NoRouter
from mlx_router_server.lifecycle.states import State
from mlx_router_server.service.launchd import LABEL
from mlx_router_server.service.notify import Notifier, activated_sockets
from mlx_router_server.settings import Settings, flags_of
from mlx_router_server.settings_layers import SettingsError, config_file, home_folder, load_settings
from mlx_router_server.telemetry.logs import configure_logs, quiet_uvicorn
from mlx_router_server.version import __version__

__all__ = ["start"]

log = logging.getLogger(__name__)

_BACKLOG = 2048
_KEEP_ALIVE_SECONDS = 120  # idle connections: clients reuse them after a while, and some fail when they are closed
_STATUS_SECONDS = 10.0
_ASKING_SECONDS = 3.0


def start(options: argparse.Namespace, settings: Settings) -> int:
    """Serve in the foreground until a signal comes; the second signal hastens."""
    try:
        configure_logs(settings.log_level, settings.log_format, settings.log_file)
    except OSError as error:
        raise SettingsError(f"log_file {settings.log_file!r}: {error.strerror}") from None
    quiet_uvicorn()
    home = home_folder(dict(os.environ))
    listeners = activated_sockets(os.environ)
    settings = _where(settings, listeners)
    _refuse_open_door(settings, home)
    listeners = listeners or _listen(settings)
    if not listeners:
        return 1
    addresses = [_address(listener) for listener in listeners]
    app = create_app(settings, home)

    file = config_file(dict(os.environ), options.config)
    was_read = options.config is not None or file.exists()

    async def reload_settings() -> None:
        """Read the settings again; a file that is invalid, or gone since it was last read, changes nothing."""
        nonlocal was_read
        named = file if was_read else None
        try:
            new = await asyncio.to_thread(load_settings, flags_of(options), dict(os.environ), named)
            was_read = was_read or file.exists()
        except SettingsError as error:
            log.error("event=reload_refused error=%r", str(error))
            return
        await reload(app, new, home)

    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        http=guarded_protocol(settings.max_connections, lambda: _limits(app)),
        ws="none",
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(settings.drain_timeout_seconds),
    )
    received: list[int] = []
    server = _Server(config, app, received, reload_settings, Notifier(os.environ))
    # From the first word on: a signal that comes before the loop runs must not be lost, or worse, be deadly.
    with server.capture_signals(), contextlib.suppress(KeyboardInterrupt):
        for address in addresses:
            # In one piece: the log is written by a thread of its own.
            sys.stderr.write(f"mlx-router {__version__} listens on {address}\n")
            sys.stderr.flush()
        server.run(sockets=listeners)
    for listener in listeners:
        listener.close()
    if not server.started and not received:
        return 1
    inside: Server | None = getattr(app.state, "server", None)  # none when a signal came before there was anything
    if inside is not None and (left := inside.supervisor.left_behind):
        print(f"mlx-router: worker processes that could not be ended: {', '.join(map(str, left))}", file=sys.stderr)
        return 1
    if inside is not None and inside.supervisor.gave_up:
        return 1
    if received and os.environ.get("XPC_SERVICE_NAME") != LABEL:  # launchd would take it for a crash
        # The service manager sees the truth: ended by this signal, after an orderly shutdown.
        logging.shutdown()  # nothing of Python runs after this signal
        signal.signal(received[0], signal.SIG_DFL)
        os.kill(os.getpid(), received[0])
    return 0


def _refuse_open_door(settings: Settings, home: Path) -> None:
    """Others can reach every address but loopback; they need keys, or the operator's word that they do not. A file of
    keys that cannot be read must not mean that nobody is asked for one."""
    try:
        keys = read_keys(keys_file(home))
    except KeyFileError as error:
        raise SettingsError(str(error)) from None
    if not keys and not (is_loopback(settings.host) or settings.insecure_bind or settings.api_keys):
        raise SettingsError(
            f"host {settings.host or '0.0.0.0'!r} can be reached from other machines, and there are no keys: "  # noqa: S104  # said, not bound
            "make one with `mlx-router keys add NAME`, or allow everybody with --insecure-bind true"
        )


def _limits(app: Starlette) -> WireLimits:
    """Those in force; before there is a server, nothing comes in."""
    server: Server | None = getattr(app.state, "server", None)
    settings = server.settings if server is not None else Settings()
    return WireLimits(
        header_bytes=settings.max_header_bytes,
        seconds=settings.request_timeout_seconds,
        reading_seconds=settings.reading_timeout_seconds,
    )


class _Server(uvicorn.Server):
    """Remembers the first signal; uvicorn would raise it before the workers are seen gone.

    The first signal refuses whoever waits and lets run what runs; the second ends that, too; the third ends everything.
    SIGHUP has the settings read again, unless it says that the terminal is gone.
    """

    def __init__(
        self, config: uvicorn.Config, app: Starlette, received: list[int], on_hangup: Callable[[], Awaitable[None]],
        notifier: Notifier,
    ) -> None:  # fmt: skip
        super().__init__(config)
        self._notifier = notifier
        self._telling: asyncio.Task[None] | None = None
        self._app = app
        self._received = received
        self._on_hangup = on_hangup
        self._reloading: asyncio.Future[None] | None = None
        self._ending: asyncio.Future[None] | None = None
        self._hung_up = False
        self._reload_wanted = False
        self._had_terminal = _has_terminal()
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started and self._notifier.wanted:
            self._notifier.ready(self._words())
            self._telling = asyncio.create_task(self._tell_alive(), name="service")
        if self._hung_up:
            self._hang_up()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self._telling is not None:
            self._telling.cancel()

    async def _tell_alive(self) -> None:
        """While the owner of all models takes turns, and not just while this loop does."""
        supervisor = self._app.state.server.supervisor
        interval = self._notifier.watchdog_seconds / 4 or _STATUS_SECONDS
        turns = -1
        while True:
            if supervisor.turns != turns:
                turns = supervisor.turns
                self._notifier.alive()
                if not self.should_exit:
                    self._notifier.status(self._words())
            supervisor.nudge()
            await asyncio.sleep(interval)

    def _words(self) -> str:
        server: Server = self._app.state.server
        loaded = sum(view.state in (State.READY, State.DRAINING) for view in server.supervisor.views())
        waiting = server.supervisor.waiting
        return f"{len(server.catalogue.entries())} models, {loaded} loaded, {waiting} requests waiting"

    async def _reload(self) -> None:
        """Read the settings until no SIGHUP has come since the last reading began."""
        self._notifier.reloading()
        while self._reload_wanted:
            self._reload_wanted = False
            try:
                await self._on_hangup()
            except Exception:
                log.exception("event=reload_failed")  # what was in force stays
        self._notifier.ready(self._words())

    def _hang_up(self) -> None:
        """SIGHUP: read the settings again, one reading at a time, once the application has started."""
        self._reload_wanted = True
        if self.started and (self._reloading is None or self._reloading.done()):
            self._reloading = asyncio.ensure_future(self._reload())

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]  # uvicorn's own signature has no useful type
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGHUP and not (self._had_terminal and not _has_terminal()):
            self._hung_up = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._hang_up)
            return
        self._received.append(number)
        self.should_exit = True
        if len(self._received) > 2:
            self.force_exit = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._lead_out, len(self._received))

    def _lead_out(self, signals: int) -> None:
        server: Server | None = getattr(self._app.state, "server", None)
        if server is None:
            return  # the signal came before there was anything to lead out
        if signals == 1:
            self._notifier.stopping("finishing what runs")
            server.supervisor.begin_leaving()
        else:
            server.supervisor.hasten()
            if server.models is not None:
                self._ending = asyncio.ensure_future(server.models.stop())


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def _where(settings: Settings, activated: list[socket.socket]) -> Settings:
    """Sockets that a manager handed over count for what the settings say of the address."""
    for listener in activated:
        if listener.family != socket.AF_UNIX:
            host, port = listener.getsockname()[:2]
            origins = {**settings.origins, "host": "the service manager", "port": "the service manager"}
            return dataclasses.replace(settings, host=host, port=port, origins=origins)
    return settings


def _address(listener: socket.socket) -> str:
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _listen(settings: Settings) -> list[socket.socket]:
    """The one that the settings name; none when somebody else has it, which is said."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            print(f"mlx-router: {_who_is_there(settings)}", file=sys.stderr)
            return []
        raise SettingsError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
    listener.listen(_BACKLOG)
    listener.set_inheritable(False)
    return [listener]


def _who_is_there(settings: Settings) -> str:
    client = Client(settings.url, answer_seconds=_ASKING_SECONDS)  # it may accept, and never say anything
    who = "another program"
    try:
        text, _ = client.text("/")
        if text.strip() == "Ollama is running":
            who = "Ollama"
            health, _ = client.text("/health")
            if '"version"' in health:
                who = "another mlx-router"
    except NoRouter:
        pass
    return (
        f"port {settings.port} is taken: {who} answers at {settings.url}. "
        f"Stop it, or choose another port: mlx-router start --port {settings.port + 1}"
    )
