"""How the commands talk to the router: plain HTTP from the standard library, so that a command starts quickly."""

from __future__ import annotations

import hmac
import http.client
import json
import os
import secrets
import socket
import ssl
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

from mlx_router_server.access.keys import key_digest, local_key, local_proof
from mlx_router_server.settings import Settings
from mlx_router_server.settings_layers import SettingsError, home_folder
from mlx_router_server.telemetry.logs import one_line

__all__ = ["ApiError", "Client", "NoRouter", "OtherProgram", "connect", "in_path"]

_CONNECT_SECONDS = 5.0
_LOOK_SECONDS = 30.0
"""The longest time that an answer which needs no model may take."""
_LARGEST_ANSWER = 256 * 2**20


class _Deadline:
    """Cuts the connection that it is given when the block has taken too long; never with None."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._timer: threading.Timer | None = None

    def watch(self, connection: socket.socket) -> None:
        if self._seconds is not None:
            self._timer = threading.Timer(self._seconds, self._cut, [connection])
            self._timer.daemon = True
            self._timer.start()

    @staticmethod
    def _cut(connection: socket.socket) -> None:
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def __enter__(self) -> _Deadline:
        return self

    def __exit__(self, *_: object) -> None:
        if self._timer is not None:
            self._timer.cancel()


def connect(
    settings: Settings, environment: Mapping[str, str] = os.environ, *, answer_seconds: float | None = None
) -> Client:
    """A client for the router that the settings name. Its key is ``MLX_ROUTER_API_KEY``, or else the local key of this
    user, which is sent to nobody but a router on this machine that has proved to know it."""
    url = settings.url
    if settings.origins.get("host") == "OLLAMA_HOST" and environment.get("OLLAMA_HOST", "").strip().lower().startswith(
        "https://"
    ):
        url = "https" + url.removeprefix("http")
    if key := environment.get("MLX_ROUTER_API_KEY", ""):
        if not (key.isascii() and key.isprintable()):
            raise SettingsError("MLX_ROUTER_API_KEY: it holds characters that no header may have")
        return Client(url, key, answer_seconds)
    return Client(url, "", answer_seconds, local_key=_local_key(url, environment))


def in_path(text: str) -> str:
    """Return a model's name as a part of a path or of a query."""
    return quote(text, safe="/:", errors="surrogateescape")


def _local_key(url: str, environment: Mapping[str, str]) -> str:
    is_here = urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
    return local_key(home_folder(dict(environment))) if is_here else ""


class NoRouter(Exception):
    """No router answers at the address."""


class OtherProgram(NoRouter):
    """Another program answers at the address."""


class ApiError(Exception):
    """The router refused; ``message`` is its sentence."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        self.message = one_line(message)  # it may repeat what somebody else has written
        super().__init__(self.message)


class _Shown:
    """A file that tells how much of it was read."""

    def __init__(self, stream: IO[bytes], show: Callable[[int], None]) -> None:
        self._stream = stream
        self._show = show

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._show(self._stream.tell())
        return data


class Client:
    """Talks to one router; each call is one connection."""

    def __init__(self, url: str, key: str = "", answer_seconds: float | None = None, *, local_key: str = "") -> None:
        """``answer_seconds``: the longest silence; None waits, because an answer may take as long as a load does.

        ``local_key`` is used once the router has proved that it knows it.
        """
        self.url = url
        self._answer_seconds = answer_seconds
        self._key = key
        self._unproved_key = local_key
        self._answers = False
        """Something at the address has answered within a limit of time."""
        parts = urlsplit(url)
        self._is_encrypted = parts.scheme == "https"
        self._host = parts.hostname or "127.0.0.1"
        self._port = parts.port or (443 if self._is_encrypted else 80)

    def get(self, path: str) -> Any:
        return self._whole("GET", path, None, _LOOK_SECONDS)

    def post(self, path: str, body: Any = None, *, answer_seconds: float | None = None) -> Any:
        """``answer_seconds``: the longest silence of an answer that needs no model."""
        return self._whole("POST", path, body, answer_seconds)

    def delete(self, path: str, body: Any) -> int:
        """The bytes that are free again."""
        connection, response = self._send("DELETE", path, body)
        data = self._read(connection, response)
        if response.status != 200:
            raise self._api_error(response, data)
        return int(response.headers.get("x-freed-bytes") or 0)

    def upload(self, path: str, file: Path, show: Callable[[int], None]) -> None:
        """A file to where its hash is its name; nothing is sent when it is there."""
        connection, response = self._send("HEAD", path, None)
        connection.close()
        if response.status == 200:
            show(file.stat().st_size)
            return
        with file.open("rb") as stream:
            connection, response = self._send("POST", path, _Shown(stream, show), file.stat().st_size)
            data = self._read(connection, response)
        if response.status not in (200, 201):
            raise self._api_error(response, data)

    def stream(self, path: str, body: Any) -> Generator[dict[str, Any], None, None]:
        """The objects of an answer, as they come, up to one that says ``done``."""
        yield from self.lines(path, body, lambda data: data.get("done") is True)

    def lines(
        self,
        path: str,
        body: Any,
        is_last: Callable[[dict[str, Any]], bool] = lambda data: data.get("status") == "success",
    ) -> Generator[dict[str, Any], None, None]:
        """The objects of an NDJSON answer, as they come; an error object raises ``ApiError``, and an answer that ends
        without its last object ``NoRouter``.

        Closing the iterator closes the connection, which stops the work.
        """
        connection, response = self._send("POST", path, body)
        try:
            if response.status != 200:
                raise self._api_error(response, response.read())
            self._check_sender(response)
            whole = False
            while line := response.readline():
                data = json.loads(line)
                if "error" in data:
                    raise ApiError(500, data["error"])
                whole = is_last(data)
                yield data
            if not whole:
                raise ConnectionResetError("it ended in the middle of an answer")
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise NoRouter(f"the connection to {self.url} broke off: {error}") from None
        finally:
            response.close()
            connection.close()

    def events(self, path: str) -> Generator[tuple[str, dict[str, Any]], None, None]:
        """Server-sent events with their kinds, until the router ends the stream; raises ``NoRouter`` when it breaks."""
        connection, response = self._send("GET", path, None)
        try:
            if response.status != 200:
                raise self._api_error(response, response.read())
            self._check_sender(response)
            kind = ""
            while line := response.readline():
                name, _, value = line.decode().rstrip("\n").partition(": ")
                if name == "event":
                    kind = value
                elif name == "data":
                    yield kind, json.loads(value)
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise NoRouter(f"the connection to {self.url} broke off: {error}") from None
        finally:
            response.close()
            connection.close()

    def text(self, path: str) -> tuple[str, str]:
        """The body of whoever answers there, and its Server header."""
        with _Deadline(self._answer_seconds or _LOOK_SECONDS) as deadline:
            connection, response = self._send("GET", path, None, deadline=deadline)
            try:
                return response.read(1000).decode("utf-8", "replace"), response.headers.get("server", "")
            except (OSError, http.client.HTTPException):
                return "", ""
            finally:
                connection.close()

    def _read(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> bytes:
        """Return the body. Raises ``NoRouter`` when it breaks off, ``OtherProgram`` when no router has sent it."""
        try:
            data = response.read(_LARGEST_ANSWER + 1)
            if response.length and len(data) <= _LARGEST_ANSWER:
                raise http.client.IncompleteRead(data, response.length)
        except (OSError, http.client.HTTPException) as error:
            raise NoRouter(f"the connection to {self.url} broke off: {error}") from None
        finally:
            connection.close()
        if len(data) > _LARGEST_ANSWER:
            raise OtherProgram(self._who_answers())
        self._check_sender(response)
        return data

    def _check_sender(self, response: http.client.HTTPResponse) -> None:
        """Every answer of a router has an identifier."""
        if response.status < 300 and "x-request-id" not in response.headers:
            raise OtherProgram(self._who_answers())

    def _whole(self, method: str, path: str, body: Any, answer_seconds: float | None = None) -> Any:
        with _Deadline(answer_seconds) as deadline:
            connection, response = self._send(method, path, body, answer_seconds=answer_seconds, deadline=deadline)
            data = self._read(connection, response)
        if response.status not in (200, 202):
            raise self._api_error(response, data)
        try:
            return json.loads(data) if data else None
        except ValueError:
            raise OtherProgram(self._who_answers()) from None

    def _send(
        self,
        method: str,
        path: str,
        body: Any,
        size: int | None = None,
        *,
        answer_seconds: float | None = None,
        deadline: _Deadline | None = None,
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """``size`` is that of a body which is a stream of bytes; any other is sent as JSON."""
        if self._unproved_key:
            key, self._unproved_key = self._unproved_key, ""
            self._key = key if self._knows(key) else ""
        seconds = self._answer_seconds or answer_seconds
        if seconds is None and not self._answers:
            self._check_answers()
        connection = self._connection()
        headers = {}
        data = body
        if size is not None:
            headers = {"content-length": str(size), "content-type": "application/octet-stream"}
        elif body is not None:
            headers, data = {"content-type": "application/json"}, json.dumps(body).encode()
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        try:
            connection.connect()
            connection.sock.settimeout(seconds)
            if deadline is not None:
                deadline.watch(connection.sock)
            connection.request(method, path, data, headers)
            return connection, connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise self._no_router(error) from None

    def _no_router(self, error: Exception) -> NoRouter:
        return NoRouter(f"no router answers at {self.url} ({error}); start one with: mlx-router start")

    def _check_answers(self) -> None:
        """Raise ``NoRouter`` if nothing answers ``/health`` in time: a request without a limit would hang."""
        connection = self._connection()
        try:
            connection.connect()
            connection.sock.settimeout(_LOOK_SECONDS)
            with _Deadline(_LOOK_SECONDS) as deadline:
                deadline.watch(connection.sock)
                connection.request("GET", "/health")
                connection.getresponse()  # its head will do: a body may have no end
        except (OSError, http.client.HTTPException) as error:
            raise self._no_router(error) from None
        finally:
            connection.close()
        self._answers = True

    def _connection(self) -> http.client.HTTPConnection:
        if not self._is_encrypted:
            return http.client.HTTPConnection(self._host, self._port, timeout=_CONNECT_SECONDS)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=_CONNECT_SECONDS, context=ssl.create_default_context()
        )

    def _knows(self, key: str) -> bool:
        """Whether the program at the address proves that it knows the local key."""
        challenge = secrets.token_hex(16)
        connection = self._connection()
        try:
            connection.connect()
            address = connection.sock.getpeername()[0]
            with _Deadline(_LOOK_SECONDS) as deadline:
                deadline.watch(connection.sock)
                connection.request("GET", "/health", headers={"x-mlx-router-challenge": challenge})
                proof = connection.getresponse().headers.get("x-mlx-router-proof") or ""
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        self._answers = True
        self._host = address  # a name may stand for several addresses, with another program at each
        return hmac.compare_digest(proof, local_proof(key_digest(key), challenge, address, self._port))

    def _api_error(self, response: http.client.HTTPResponse, data: bytes) -> ApiError | NoRouter:
        if response.status in (404, 405) and "x-request-id" not in response.headers:
            return OtherProgram(self._who_answers())
        try:
            message = json.loads(data)["error"]
        except (ValueError, KeyError, TypeError):
            message = data[:200].decode("utf-8", "replace") or f"status {response.status}"
        return ApiError(response.status, message if isinstance(message, str) else str(message.get("message", message)))

    def _who_answers(self) -> str:
        """A sentence about the program at the address, which is no mlx-router."""
        try:
            text, _ = Client(self.url, answer_seconds=_CONNECT_SECONDS).text("/")
        except NoRouter:
            text = ""
        who = "Ollama" if text.strip() == "Ollama is running" else "another program"
        end = "Quit Ollama" if who == "Ollama" else "End it"
        return (
            f"{self.url} is {who}, not mlx-router. {end}, or start mlx-router with "
            f"--port {self._port + 1} and set MLX_ROUTER_PORT={self._port + 1}"
        )
