"""The facts about an adapter's folder that the catalogue needs: whether it has changed, and its size."""

from __future__ import annotations

from pathlib import Path

from mlx_router_server.catalogue.stamps import digest_of

__all__ = ["adapter_bytes", "adapter_digest"]


def adapter_digest(folder: Path | None) -> str:
    """Of the adapter's configuration, and of the size, time and inode of its weights; empty where there is none."""
    if folder is None:
        return ""
    facts = []
    for name in ("adapter_config.json", "adapters.safetensors"):
        try:
            stat = (folder / name).stat()
        except OSError:
            continue
        facts.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return digest_of(facts)


def adapter_bytes(folder: Path | None) -> int:
    """Of its weights; 0 where there are none, which the load will tell."""
    try:
        return (folder / "adapters.safetensors").stat().st_size if folder is not None else 0
    except OSError:
        return 0
