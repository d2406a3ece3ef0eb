"""Model names: ``[host/][namespace/]model[:tag]``, as Ollama has them.

A requested name is only ever a key. It is never a path, never part of one, and never sent anywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final

from mlx_router_shared.errors import InvalidRequest

__all__ = ["DEFAULT_HOST", "HUB_HOSTS", "ModelName", "parse_name"]

DEFAULT_HOST: Final = "registry.ollama.ai"
HUB_HOSTS: Final = frozenset({"hf.co", "huggingface.co"})
_DEFAULT_NAMESPACE: Final = "library"
_DEFAULT_TAG: Final = "latest"
_LONGEST: Final = 600
_HOST: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]{0,349}", re.ASCII)
_NAMESPACE: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,79}", re.ASCII)
_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", re.ASCII)


@dataclass(frozen=True, slots=True)
class ModelName:
    """A parsed name; the spelling is kept, comparing is done on ``key``."""

    host: str
    namespace: str
    model: str
    tag: str

    @property
    def key(self) -> str:
        """Equal for all spellings of one model."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}".lower()

    @property
    def display(self) -> str:
        """The shortest form, always with its tag: ``demo:latest``, ``org/model:latest``."""
        prefix = ""
        if self.host.lower() != DEFAULT_HOST:
            prefix = f"{self.host}/{self.namespace}/"
        elif self.namespace.lower() != _DEFAULT_NAMESPACE:
            prefix = f"{self.namespace}/"
        return f"{prefix}{self.model}:{self.tag}"

    @property
    def plain(self) -> ModelName:
        """``hf.co/org/name`` is what some people call ``org/name``."""
        return replace(self, host=DEFAULT_HOST) if self.host.lower() in HUB_HOSTS else self

    @property
    def spellings(self) -> tuple[str, ...]:
        """As people write it: with its tag, and without where that is the usual one; with the hub and without."""
        names = (self.display, self.plain.display)
        return tuple(dict.fromkeys(text for name in names for text in (name, name.removesuffix(":latest"))))

    @property
    def full(self) -> str:
        """With host, namespace and tag."""
        return f"{self.host}/{self.namespace}/{self.model}:{self.tag}"


def parse_name(text: str) -> ModelName:
    """Raises ``InvalidRequest`` for everything that is not a name."""
    text = text.strip()
    if len(text) > _LONGEST:
        raise _invalid()
    if text.lower().endswith((":cloud:local", ":local:cloud")):
        raise InvalidRequest(f'use either :local or :cloud, not both: "{text}"', param="model")
    path, tag = text, _DEFAULT_TAG
    # A colon after the last slash begins the tag; any other belongs to the host's port.
    colon = text.rfind(":")
    if colon > text.rfind("/"):
        path, tag = text[:colon], text[colon + 1 :]
    parts = path.split("/")
    if len(parts) > 3:
        raise _invalid()
    model = parts[-1]
    namespace = parts[-2] if len(parts) > 1 else _DEFAULT_NAMESPACE
    host = parts[0] if len(parts) > 2 else DEFAULT_HOST
    if (
        _HOST.fullmatch(host) is None
        or _NAMESPACE.fullmatch(namespace) is None
        or _PART.fullmatch(model) is None
        or _PART.fullmatch(tag) is None
        or ".." in model
    ):
        raise _invalid()
    return ModelName(host, namespace, model, tag)


def _invalid() -> InvalidRequest:
    return InvalidRequest("invalid model name", param="model")
