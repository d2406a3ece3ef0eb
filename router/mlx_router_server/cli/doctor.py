"""``mlx-router doctor``: what could keep the router from working, looked at one by one, each with how to fix it.

Nothing is changed. The last look is a trial: a router of its own loads the demo model and is asked something.
"""

from __future__ import annotations

import argparse
import http.client
import importlib.metadata
import json
import os
import platform
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import FrameType
from typing import Final, NoReturn
from urllib.parse import urlsplit

import psutil

from mlx_router_server.access.keys import keys_file
from mlx_router_server.catalogue.discovery import hub_cache
from mlx_router_server.catalogue.extras import install_command
from mlx_router_server.cli.client import ApiError, Client, NoRouter
from mlx_router_server.cli.tables import human_size, print_json
from mlx_router_server.settings import Settings
from mlx_router_server.settings_layers import config_file, home_folder
from mlx_router_server.workers.launcher import worker_environment
from mlx_router_server.workers.memory import default_budget, read_memory, wired_limit

__all__ = ["Finding", "doctor"]

_OK: Final = "ok"
_WARNING: Final = "warning"
_PROBLEM: Final = "problem"
_MARKS: Final = {_OK: "✓", _WARNING: "!", _PROBLEM: "✗"}
_SETTINGS: Final = ("MLX_ROUTER_", "OLLAMA_")
_OWN_FILES: Final = 512  # of the router and its workers, beside connections
_LEAST_FREE: Final = 5 * 10**9
_HUB_SECONDS: Final = 5.0
_TRIAL_SECONDS: Final = 120.0
_SOURCES: Final = {
    "fork": "workers are forked from a process that has done the imports",
    "standby": "idle workers wait for models",
    "spawn": "a worker is started for each load",
}
_DEVICE: Final = (
    "import json, mlx.core as mx; i = mx.device_info(); "
    "print(json.dumps({'device': str(mx.default_device()), 'name': i.get('device_name', ''), "
    "'working_set': i.get('max_recommended_working_set_size', 0)}))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one look found; ``fix`` says what to do about it."""

    level: str
    about: str
    text: str
    fix: str = ""


def doctor(options: argparse.Namespace, settings: Settings) -> int:
    """Exit status 0 when the router can work, with or without warnings."""
    findings: list[Finding] = []
    if error := getattr(options, "settings_error", ""):
        broken = Finding(level=_PROBLEM, about="configuration", text=error,
                         fix="Correct the file; `mlx-router config check` reads it again.")  # fmt: skip
        looks: tuple[Callable[[Settings], Iterator[Finding]], ...] = (lambda settings: iter([broken]), *_LOOKS)
    else:
        looks = _LOOKS
    for look in looks:
        for finding in look(settings):
            findings.append(finding)
            if not options.json:
                print(f" {_MARKS[finding.level]} {finding.about}: {finding.text}", flush=True)
                if finding.fix:
                    print(f"     {finding.fix}", flush=True)
    problems = [finding for finding in findings if finding.level == _PROBLEM]
    if options.json:
        print_json([asdict(finding) for finding in findings])
    else:
        warnings = sum(finding.level == _WARNING for finding in findings)
        print(f"\n{_count(len(problems), 'problem')}, {_count(warnings, 'warning')}")
    return 1 if problems else 0


def _count(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"


def _python(settings: Settings) -> Iterator[Finding]:
    version = platform.python_version()
    translated = sys.platform == "darwin" and platform.machine() != "arm64"
    if translated:
        yield Finding(level=_PROBLEM, about="Python", text=f"{version} for {platform.machine()}",
                      fix="MLX needs Apple silicon and a Python that is built for it (arm64).")  # fmt: skip
    else:
        yield Finding(level=_OK, about="Python", text=f"{version}, {sys.executable}")
    if sys.platform not in ("darwin", "linux"):
        yield Finding(level=_PROBLEM, about="platform", text=platform.platform(), fix="Use macOS or Linux.")
    else:
        yield Finding(level=_OK, about="platform", text=platform.platform())


def _packages(settings: Settings) -> Iterator[Finding]:
    for name in ("mlx", "mlx-lm", "huggingface_hub"):
        try:
            yield Finding(level=_OK, about=name, text=importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(level=_PROBLEM, about=name, text="not installed", fix="pip install mlx-router-server")


def _device(settings: Settings) -> Iterator[Finding]:
    """Asked in a process of its own: this one never imports MLX."""
    try:
        done = subprocess.run([sys.executable, "-P", "-c", _DEVICE], capture_output=True, text=True, timeout=60,
                              env=worker_environment(dict(os.environ)), check=False)  # fmt: skip
        told = json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        yield Finding(level=_PROBLEM, about="MLX", text=f"it cannot be imported: {type(error).__name__}",
                      fix="Reinstall it: pip install --force-reinstall mlx mlx-lm")  # fmt: skip
        return
    name = told["name"] or told["device"]
    yield Finding(level=_OK, about="MLX device", text=f"{told['device']}, {name}".strip(", "))
    if "gpu" not in told["device"].lower() and sys.platform == "linux":
        yield Finding(level=_WARNING, about="MLX device", text="the CPU: fine for trying, slow for large models",
                      fix=f"With an NVIDIA GPU: {install_command('cuda')}")  # fmt: skip
        yield from _compiler()


def _compiler() -> Iterator[Finding]:
    """MLX's CPU back end builds its fused kernels when it runs."""
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found is None:
        yield Finding(level=_WARNING, about="compiler", text="no C++ compiler on the PATH",
                      fix="Compiled functions of MLX's CPU back end need one: apt install g++")  # fmt: skip
    else:
        yield Finding(level=_OK, about="compiler", text=found)


def _memory(settings: Settings) -> Iterator[Finding]:
    reading = read_memory()
    budget = settings.memory_budget or default_budget(reading)
    text = f"{human_size(reading.total_bytes)} in all, {human_size(reading.available_bytes)} free, "
    text += f"{human_size(budget)} for models"
    if budget < 10**9:
        yield Finding(level=_WARNING, about="memory", text=text, fix="Close other programs, or set memory_budget.")
    else:
        yield Finding(level=_OK, about="memory", text=text)
    if sys.platform == "darwin" and (limit := wired_limit()):
        yield Finding(level=_OK, about="wired limit", text=human_size(limit))


def _open_files(settings: Settings) -> Iterator[Finding]:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = settings.max_connections + _OWN_FILES
    if limit == resource.RLIM_INFINITY or limit >= wanted:
        yield Finding(level=_OK, about="open files", text="enough are allowed")
        return
    text = f"{limit} are allowed, {wanted} are needed for max_connections"
    yield Finding(level=_WARNING, about="open files", text=text,
                  fix=f"Raise the hard limit (ulimit -Hn {wanted}; LimitNOFILE= in a unit of systemd).")  # fmt: skip


def _disk(settings: Settings) -> Iterator[Finding]:
    for about, folder in (("home folder", home_folder(dict(os.environ))), ("hub cache", hub_cache(dict(os.environ)))):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if not os.access(there, os.W_OK):
            yield Finding(level=_PROBLEM, about=about, text=f"{folder} cannot be written",
                          fix=f"Make it yours, or use another: {_variable(about)}")  # fmt: skip
        elif free < _LEAST_FREE:
            yield Finding(level=_WARNING, about=about, text=f"{folder}: only {human_size(free)} are free",
                          fix=f"Models take gigabytes: mlx-router rm MODEL, or set {_variable(about)}.")  # fmt: skip
        else:
            yield Finding(level=_OK, about=about, text=f"{folder}, {human_size(free)} free")


def _variable(about: str) -> str:
    return "MLX_ROUTER_HOME" if about == "home folder" else "HF_HOME"


def _config(settings: Settings) -> Iterator[Finding]:
    """One that cannot be read is the first finding."""
    file = config_file(dict(os.environ))
    yield Finding(level=_OK, about="configuration", text=str(file) if file.exists() else "none: the defaults")
    for name, said in settings.models.items():
        for what, path in (("path", said.path), ("adapter", said.adapter)):
            if path is not None and not path.is_dir():
                yield Finding(level=_WARNING, about="configuration", text=f"models.{name!r}: no folder {path}",
                              fix=f"Correct its {what}, or take the entry out.")  # fmt: skip
    for folder in settings.models_dirs:
        if not folder.is_dir():
            yield Finding(level=_WARNING, about="configuration", text=f"models_dirs: no folder {folder}",
                          fix="Make it, or take it out.")  # fmt: skip


def _permissions(settings: Settings) -> Iterator[Finding]:
    home = home_folder(dict(os.environ))
    for file in (keys_file(home), home / "local.key"):
        if file.exists() and stat.S_IMODE(file.stat().st_mode) & 0o077:
            yield Finding(level=_PROBLEM, about="permissions", text=f"others can read {file}",
                          fix=f"chmod 600 {file}")  # fmt: skip
            return
    yield Finding(level=_OK, about="permissions", text="keys are for nobody else's eyes")


def _port(settings: Settings) -> Iterator[Finding]:
    client = Client(settings.url)
    try:
        text, _ = client.text("/health")
        ours = '"version"' in text and '"ok"' in text
    except NoRouter:
        yield Finding(level=_OK, about="port", text=f"{settings.port} is free")
        return
    if ours:
        yield Finding(level=_OK, about="port", text=f"an mlx-router answers at {settings.url}")
    else:
        yield Finding(level=_PROBLEM, about="port", text=f"another program answers at {settings.url}",
                      fix=f"Stop it, or take another port: mlx-router start --port {settings.port + 1}")  # fmt: skip


def _hub(settings: Settings) -> Iterator[Finding]:
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    parts = urlsplit(endpoint)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=_HUB_SECONDS)
    try:
        connection.request("HEAD", "/api/models?limit=1")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException) as error:
        yield Finding(level=_WARNING, about="hub", text=f"{endpoint} cannot be reached ({type(error).__name__})",
                      fix="Only `pull` needs it. Through a proxy: HTTPS_PROXY; a mirror: HF_ENDPOINT.")  # fmt: skip
    else:
        yield Finding(level=_OK, about="hub", text=f"{endpoint} answers")
    finally:
        connection.close()


def _leftovers(settings: Settings) -> Iterator[Finding]:
    """Workers whose router is gone; the next start ends them."""
    lost = []
    for process in psutil.process_iter(["pid", "ppid", "cmdline", "uids"]):
        line = process.info["cmdline"] or []
        if "mlx_router_worker" in line and process.info["ppid"] == 1 and process.info["uids"].real == os.getuid():
            lost.append(process.info["pid"])
    if lost:
        pids = " ".join(map(str, lost))
        yield Finding(level=_WARNING, about="leftovers", text=f"workers without a router: pid {pids}",
                      fix=f"The next start ends them; or: kill {pids}")  # fmt: skip
    else:
        yield Finding(level=_OK, about="leftovers", text="none")


def _trial(settings: Settings) -> Iterator[Finding]:
    """A router on a free port with a home of its own loads the demo model, is asked, and loads it once more."""
    began = time.monotonic()
    with _unwound_by_signals(), tempfile.TemporaryDirectory(prefix="mlxr-doctor-") as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_SETTINGS)}
        environment |= {"MLX_ROUTER_HOME": folder, "HF_HOME": folder}
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "mlx_router_server", "start", "--port", "0",
             "--worker-source", settings.worker_source, "--standby-workers", str(settings.standby_workers)],
            stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment, text=True,
        )  # fmt: skip
        watchdog = _kill_later(process)
        try:
            assert process.stderr is not None
            url = last = ""
            while not url and (line := process.stderr.readline()):
                last = line.strip() or last
                url = line.partition(" listens on ")[2].strip()
            if not url:
                raise NoRouter(last or "it ended without a word")
            answer = Client(url).post("/api/generate", {"model": "demo", "prompt": "Hello!", "stream": False})
            took = time.monotonic() - began
            if not answer.get("response"):
                raise NoRouter("the demo model answered nothing")
            text = f"the demo model was loaded and answered in {took:.1f} s"
            findings = [Finding(level=_OK, about="trial", text=text), _worker_source(Client(url))]
        except (NoRouter, ApiError) as error:
            findings = [Finding(level=_PROBLEM, about="trial", text=f"the demo model did not answer: {error}",
                                fix="Its log says more: mlx-router start --port 0 --log-level debug")]  # fmt: skip
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            watchdog.cancel()
            assert process.stderr is not None
            process.stderr.close()
    yield from findings


def _worker_source(client: Client) -> Finding:
    """Have a router that has had the time to prepare for it load a model."""
    client.post("/admin/models/demo/unload")
    began = time.monotonic()
    client.post("/admin/models/demo/load")
    seconds = time.monotonic() - began
    source = client.get("/admin/status")["router"]["worker_source"]
    how = f"{_SOURCES[source['kind']]}; the demo model was loaded again in {seconds * 1000:.0f} ms"
    if not source["reason"]:
        return Finding(level=_OK, about="worker source", text=how)
    text = f"{how}. The fork server cannot be used: {source['reason']}"
    return Finding(level=_WARNING, about="worker source", text=text,
                   fix='Set worker_source = "standby" to start without it.')  # fmt: skip


@contextmanager
def _unwound_by_signals() -> Iterator[None]:
    """Have a termination or a closed terminal end the block as ctrl-C does, so that what it has started is ended."""

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _kill_later(process: subprocess.Popen[str]) -> threading.Timer:
    timer = threading.Timer(_TRIAL_SECONDS, process.kill)
    timer.daemon = True
    timer.start()
    return timer


_LOOKS: Final[tuple[Callable[[Settings], Iterator[Finding]], ...]] = (
    _python, _packages, _device, _memory, _open_files, _disk, _config, _permissions, _port, _hub, _leftovers, _trial,
)  # fmt: skip
