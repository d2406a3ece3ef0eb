"""Anthropic's content blocks as turns of the canonical request."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from mlx_router_server.dialects.body import without_nulls
from mlx_router_server.dialects.images import image_from_base64
from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import Message, Role, ToolCall

__all__ = ["conversation"]

_BILLING: Final = "x-anthropic-billing-header:"
# What a hosted service ran itself and reported; a model here can do nothing with it.
_SERVER_BLOCKS: Final = (
    "server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
    "bash_code_execution_tool_result", "text_editor_code_execution_tool_result", "mcp_tool_use", "mcp_tool_result",
    "tool_search_tool_result", "container_upload", "redacted_thinking", "tool_reference", "compaction",
)  # fmt: skip


def conversation(system: str | list[dict[str, Any]], items: list[dict[str, Any]]) -> list[Message]:
    """The system text and all messages, turns of one role joined. Raises ``InvalidRequest`` and
    ``UnsupportedCapability``, which name the block."""
    messages = _system(system)
    for number, item in enumerate(items):
        messages += _message(item, f"messages.{number}")
    return _merged(messages)


def _system(system: str | list[dict[str, Any]]) -> list[Message]:
    if isinstance(system, str):
        texts = [system]
    else:
        texts = [_text(block, f"system.{number}") for number, block in enumerate(system)]
        if texts and texts[0].startswith(_BILLING):
            texts = texts[1:]
    text = "\n\n".join(part for part in texts if part)
    return [Message(role=Role.SYSTEM, content=text)] if text else []


def _text(block: dict[str, Any], at: str) -> str:
    text = block.get("text")
    if block.get("type") != "text" or not isinstance(text, str):
        raise InvalidRequest(f"{at}: only text blocks are possible here", param=at)
    return text


class _Turn(NamedTuple):
    """The blocks of one message, sorted."""

    texts: list[str]
    images: list[bytes]
    calls: list[ToolCall]
    results: list[Message]
    thoughts: list[str]


def _message(item: dict[str, Any], at: str) -> list[Message]:
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system"):
        raise InvalidRequest(f"{at}.role: unknown role {role!r}", param=f"{at}.role")
    if isinstance(content, str):
        return [Message(role=Role(role), content=content)]
    if not isinstance(content, list) or not all(isinstance(block, dict) for block in content):
        raise InvalidRequest(f"{at}.content: has to be a string or a list of blocks", param=f"{at}.content")
    turn = _Turn([], [], [], [], [])
    for number, block in enumerate(content):
        _sort(without_nulls(block), f"{at}.content.{number}", turn)
    out = list(turn.results)
    if turn.texts or turn.images or turn.calls or not out:
        out.append(
            Message(
                role=Role(role),
                content="\n\n".join(turn.texts) if role == "system" else "".join(turn.texts),
                images=turn.images,
                reasoning="".join(turn.thoughts) or None,
                tool_calls=turn.calls,
            )
        )
    return out


def _sort(block: dict[str, Any], at: str, turn: _Turn) -> None:
    kind = block.get("type")
    if kind == "text":
        turn.texts.append(_text(block, at))
    elif kind == "image":
        turn.images.append(_image(block, at))
    elif kind == "tool_use":
        turn.calls.append(_call(block, at))
    elif kind == "tool_result":
        turn.results.append(_result(block, at, turn))
    elif kind == "thinking":
        turn.thoughts.append(str(block.get("thinking", "")))
    elif kind in ("document", "search_result"):
        turn.texts.append(_document(block, at))
    elif kind not in _SERVER_BLOCKS:
        raise InvalidRequest(f"{at}: unknown block type {kind!r}", param=at)


def _image(block: dict[str, Any], at: str) -> bytes:
    source = block.get("source")
    kind = source.get("type") if isinstance(source, dict) else None
    if not isinstance(source, dict) or kind != "base64" or not isinstance(source.get("data"), str):
        raise InvalidRequest(
            f"invalid image source type: {kind}. Only base64 images are supported.", param=f"{at}.source"
        )
    return image_from_base64(source["data"], f"{at}.source.data")


def _call(block: dict[str, Any], at: str) -> ToolCall:
    name, call_id, arguments = block.get("name"), block.get("id"), block.get("input", {})
    if not isinstance(name, str) or not isinstance(call_id, str):
        raise InvalidRequest(f"{at}: tool_use needs an id and a name", param=at)
    return ToolCall(id=call_id, name=name, arguments=msgspec.json.encode(arguments).decode())


def _result(block: dict[str, Any], at: str, turn: _Turn) -> Message:
    content = block.get("content", "")
    inner = _Turn([], [], [], [], [])
    if isinstance(content, list):
        for number, part in enumerate(content):
            if not isinstance(part, dict):
                raise InvalidRequest(f"{at}.content.{number}: has to be a block", param=f"{at}.content.{number}")
            _sort(without_nulls(part), f"{at}.content.{number}", inner)
    elif isinstance(content, str):
        inner.texts.append(content)
    text = "\n".join(inner.texts)
    turn.images.extend(inner.images)  # templates take images in user turns only
    if block.get("is_error") is True:
        text = f"Error: {text}" if text else "Error"
    return Message(role=Role.TOOL, content=text, tool_call_id=str(block.get("tool_use_id", "")) or None)


def _document(block: dict[str, Any], at: str) -> str:
    """Plain text of a document or a search result, under its title."""
    source = block.get("source")
    title = block.get("title")
    parts = [title] if isinstance(title, str) else []
    content = block.get("content") if block.get("type") == "search_result" else source
    if isinstance(content, dict) and content.get("type") == "text" and isinstance(content.get("data"), str):
        parts.append(content["data"])
    elif isinstance(content, dict) and content.get("type") == "content":
        content = content.get("content")
        parts.append(content if isinstance(content, str) else _texts(content, at))
    elif isinstance(content, list):
        parts.append(_texts(content, at))
    else:
        kind = content.get("type") if isinstance(content, dict) else None
        raise UnsupportedCapability(f"{at}: documents of source type {kind!r} are not supported", param=at)
    return "\n".join(parts)


def _texts(blocks: Any, at: str) -> str:
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        raise InvalidRequest(f"{at}: has to be a list of blocks", param=at)
    return "\n".join(_text(block, f"{at}.content.{number}") for number, block in enumerate(blocks))


def _merged(messages: list[Message]) -> list[Message]:
    """Consecutive turns of user or assistant as one; calls, results and system turns stay as they are."""
    runs: list[list[Message]] = []
    for message in messages:
        last = runs[-1][-1] if runs else None
        if (
            last is not None
            and last.role is message.role
            and message.role in (Role.USER, Role.ASSISTANT)
            and not last.tool_calls
        ):
            runs[-1].append(message)
        else:
            runs.append([message])
    return [_joined(run) if len(run) > 1 else run[0] for run in runs]


def _joined(run: list[Message]) -> Message:
    """Turns of one role as one; only the last of them may have calls."""
    return msgspec.structs.replace(
        run[-1],
        content="\n\n".join(message.content for message in run if message.content),
        images=[image for message in run for image in message.images],
        reasoning="".join(message.reasoning for message in run if message.reasoning) or None,
    )
