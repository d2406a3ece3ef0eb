"""Imported by every Python that has this folder on its path: notes what the process opens, starts and connects to.

One line for each event, to the file that MLXR_AUDIT names; it is opened once, so that noting does not note itself.
"""

import os
import sys

_FILE = os.environ.get("MLXR_AUDIT")
_EVENTS = frozenset(
    ["open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.rmdir", "os.link", "os.symlink",
     "subprocess.Popen", "os.posix_spawn", "os.exec", "os.system", "socket.connect", "socket.getaddrinfo"]
)  # fmt: skip

if _FILE:
    _DESCRIPTOR = os.open(_FILE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def _note(event: str, arguments: tuple[object, ...]) -> None:
        if event in _EVENTS:
            what = repr(arguments[:2]).replace("\n", " ")[:500]
            os.write(_DESCRIPTOR, f"{os.getpid()}\t{event}\t{what}\n".encode("utf-8", "replace"))

    sys.addaudithook(_note)
