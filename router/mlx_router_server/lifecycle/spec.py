"""What has to be known of a model to decide about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from mlx_router_server.lifecycle.keepalive import KeepAlive

__all__ = ["ModelSpec", "Share"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Handed in with every request, so that a changed configuration holds from the next request on."""

    name: str
    estimate_bytes: int
    """What its worker may come to need: what it holds once loaded, and what may grow after that."""
    growth_bytes: int = 0
    """The part of the estimate that is not there yet when the model is loaded: caches and work space of requests."""
    fixed: bool = False
    """The operator said how much; a measurement does not change it."""
    load_seconds: float | None = None
    """What a load took the last time, remembered from an earlier run; None when it was never seen."""
    pinned: bool = False
    keep_alive: KeepAlive = field(default_factory=KeepAlive)
    content: str = ""
    """Something that changes with the files of the model; a worker that has loaded others is replaced."""
    parallel: int = 32
    """Requests that its worker takes at once; the others wait here."""

    @property
    def loaded_bytes(self) -> int:
        """What its worker holds once it is loaded, as far as that is known beforehand."""
        return self.estimate_bytes - self.growth_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What one worker may use of the machine, in bytes; the shares of all workers stay within the budget."""

    memory_bytes: int
    cache_bytes: int
    """Of these, what may be kept of freed buffers."""
    requests_bytes: int
    """Of these, what is left for requests beside the loaded model; at least 1."""
    wired_bytes: int
    """What may be wired on macOS; 0 leaves the system's own limit."""
