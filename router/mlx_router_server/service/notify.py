"""What a service tells systemd, by the socket that it names: ready, reloading, stopping, a sentence, signs of life.

Nothing happens where no manager asked for it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

__all__ = ["Notifier", "activated_sockets"]

_FIRST: Final = 3  # systemd hands sockets over from this file number on


class Notifier:
    """Reads ``NOTIFY_SOCKET`` and ``WATCHDOG_USEC``, and takes them out, so that no child speaks in our name."""

    def __init__(self, environment: MutableMapping[str, str]) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        seconds = environment.pop("WATCHDOG_USEC", "")
        pid = environment.pop("WATCHDOG_PID", "")
        wanted = seconds.isdigit() and pid in ("", str(os.getpid()))
        self.watchdog_seconds = int(seconds) / 1e6 if wanted else 0.0
        """How often a sign of life has to come at least; 0: none is waited for."""

    @property
    def wanted(self) -> bool:
        return bool(self._address)

    def ready(self, status: str) -> None:
        self._send("READY=1", f"STATUS={status}")

    def reloading(self) -> None:
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reading the settings again")

    def stopping(self, status: str) -> None:
        self._send("STOPPING=1", f"STATUS={status}")

    def status(self, text: str) -> None:
        self._send(f"STATUS={text}")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        """A manager that is gone is no reason to fail."""
        if not self._address:
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | getattr(socket, "SOCK_CLOEXEC", 0)) as sender:
            sender.setblocking(False)
            try:
                sender.sendto("\n".join(lines).encode(), self._address)
            except OSError:
                pass


def activated_sockets(environment: MutableMapping[str, str]) -> list[socket.socket]:
    """Sockets that systemd listens on for us, in its order; an empty list where it offers none."""
    pid, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    environment.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdigit():
        return []
    found = [socket.socket(fileno=number) for number in range(_FIRST, _FIRST + int(count))]
    for listener in found:
        listener.set_inheritable(False)
    return found
