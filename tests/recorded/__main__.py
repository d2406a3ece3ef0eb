"""Writes down what Open WebUI asks of a server: ``make record-open-webui``. Its pages' buttons are pressed over its
HTTP API, between it and a real router stands a proxy that keeps each call. The tests replay open_webui.json."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import tempfile
import threading
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from mlx_router_server.catalogue.catalogue import DEMO_FOLDER
from tests.support.hub import running_hub
from tests.support.router import running_router, wait_until

_PROGRAM = Path(__file__).parents[2] / ".venv-agents" / "open-webui" / "bin" / "open-webui"
_TARGET = Path(__file__).parent / "open_webui.json"
_KEPT = ("authorization", "content-type", "accept", "user-agent")
_BASE = "http://127.0.0.1:18091"


def _proxy(upstream: str, calls: list[dict[str, Any]]) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the standard library's name
            pass

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            connection = http.client.HTTPConnection(urlsplit(upstream).netloc, timeout=60)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
            connection.request(self.command, self.path, body or None, headers)
            response = connection.getresponse()
            data = response.read()
            connection.close()
            calls.append({
                "method": self.command, "path": self.path, "status": response.status,
                "headers": {name.lower(): value for name, value in headers.items() if name.lower() in _KEPT},
                "body": json.loads(body) if body else None,
            })  # fmt: skip
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("transfer-encoding", "content-length", "connection"):
                    self.send_header(name, value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = do_HEAD = _pass_on  # noqa: N815  # the standard library's names

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def _ask(token: str, method: str, path: str, body: Any = None) -> Any:
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {token}"} if token else {})}
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(_BASE + path, data=data, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.read().decode()
    except urllib.error.HTTPError as error:
        raise OSError(f"{method} {path}: {error.code}: {error.read().decode()[:500]}") from None


def _press_buttons(token: str) -> None:
    hello = [{"role": "user", "content": "Hello!"}]
    _ask(token, "GET", "/api/models")
    _ask(token, "GET", "/ollama/api/version")
    _ask(token, "GET", "/ollama/api/tags")
    _ask(token, "GET", "/ollama/api/ps")
    _ask(token, "POST", "/ollama/api/show", {"model": "demo:latest"})
    for stream in (True, False):
        _ask(token, "POST", "/api/chat/completions", {"model": "demo:latest", "messages": hello, "stream": stream})
    _ask(token, "POST", "/ollama/api/generate", {"model": "demo:latest", "prompt": "Hello!", "stream": False})
    _ask(token, "POST", "/openai/chat/completions", {"model": "demo:latest", "messages": hello, "stream": True})
    _ask(token, "POST", "/ollama/api/unload", {"model": "demo:latest"})
    _ask(token, "POST", "/ollama/api/copy", {"source": "demo:latest", "destination": "copied"})
    _ask(token, "POST", "/ollama/api/create", {"model": "made", "from": "demo:latest", "system": "Be brief."})
    _ask(token, "POST", "/ollama/api/pull/0", {"model": "mlx-community/House-0.4M"})
    _ask(token, "GET", "/api/models?refresh=true")
    for name in ("copied:latest", "made:latest"):
        _ask(token, "DELETE", "/ollama/api/delete", {"model": name})


def main() -> None:
    calls: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mlxr-") as folder, running_hub() as hub:
        home = Path(folder)
        hub.add_folder("mlx-community/House-0.4M", DEMO_FOLDER)
        (home / "router").mkdir()
        with running_router(home / "router", variables={"HF_ENDPOINT": hub.url}) as router:
            proxy = _proxy(router.url, calls)
            address = f"http://127.0.0.1:{proxy.server_address[1]}"
            environment = {
                "PATH": f"{_PROGRAM.parent}:/usr/bin:/bin", "HOME": folder, "LANG": "C.UTF-8",
                "DATA_DIR": str(home / "data"), "WEBUI_AUTH": "False", "WEBUI_SECRET_KEY": "x", "OFFLINE_MODE": "True",
                "HF_HUB_OFFLINE": "1", "ENABLE_VERSION_UPDATE_CHECK": "False", "RAG_EMBEDDING_ENGINE": "ollama",
                "OLLAMA_BASE_URL": address, "ENABLE_OPENAI_API": "True", "OPENAI_API_BASE_URL": f"{address}/v1",
                "OPENAI_API_KEY": "x", "ANONYMIZED_TELEMETRY": "False",
            }  # fmt: skip
            with (home / "log").open("w") as log:
                process = subprocess.Popen(
                    [str(_PROGRAM), "serve", "--host", "127.0.0.1", "--port", _BASE.rpartition(":")[2]], cwd=home,
                    env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                )  # fmt: skip
            try:
                wait_until(_healthy, "Open WebUI is up", 180)
                user = {"email": "admin@localhost", "password": "admin"}
                _press_buttons(json.loads(_ask("", "POST", "/api/v1/auths/signin", user))["token"])
                version = json.loads(_ask("", "GET", "/api/version"))["version"]
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait(10)
                proxy.shutdown()
                proxy.server_close()
    _TARGET.write_text(json.dumps({"open_webui": version, "calls": calls}, indent=1) + "\n")
    print(_TARGET, len(calls))


def _healthy() -> bool:
    try:
        return bool(json.loads(_ask("", "GET", "/health"))["status"])
    except (OSError, ValueError):
        return False


if __name__ == "__main__":
    main()
