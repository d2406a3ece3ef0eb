"""What a model can do in a conversation, from its chat template and its vocabulary: the one function that the catalogue
asks before a model is loaded and the worker when it loads it.

The formats are those of mlx-lm's parsers (``mlx_lm.tokenizer_utils``).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = [
    "ChatCapabilities",
    "additional_templates",
    "chat_capabilities",
    "chat_template_type",
    "processor_template",
    "read_chat_template",
    "read_tokenizer_config",
    "template_for_tools",
]

_LARGEST_TEMPLATE: Final = 2 * 2**20
_MOST_TEMPLATES: Final = 20
_LARGEST_JSON: Final = 32 * 2**20
_TOOL_FORMATS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = (
    ("minimax_m2", ("<minimax:tool_call>",)),
    ("gemma4", ("<|tool_call>", "<tool_call|>")),
    ("function_gemma", ("<start_function_call>",)),
    ("longcat", ("<longcat_tool_call>",)),
    ("glm47", ("<arg_key>",)),
    ("pythonic", ("<|tool_list_start|>",)),
    ("pythonic", ("<|tool_call_start|>",)),
    ("qwen3_coder", ("<tool_call>\\n<function=",)),
    ("qwen3_coder", ("<tool_call>\n<function=",)),
    ("kimi_k2", ("<|tool_calls_section_begin|>",)),
    ("minicpm5", ('<function name="', '<param name="')),
    ("mistral", ("[TOOL_CALLS]",)),
    ("muse_spark", ("<atem:function_calls>",)),
    ("json_tools", ("<tool_call>",)),
)
"""Parsers, and what a template contains whose model writes calls for it; the first that fits counts."""
_TOOL_PARSERS: Final = frozenset({*(parser for parser, _ in _TOOL_FORMATS), "kimi_k3", "laguna"})
_TEMPLATE_TYPES: Final = frozenset({"deepseek_v32", "muse_spark"})
"""Templates that mlx-lm has as code of its own."""
_THINKING_TOKENS: Final = (
    ("<think>", "</think>"), ("<longcat_think>", "</longcat_think>"), ("<|think:start|>", "<|think:end|>"),
    ("<|channel>", "<channel|>"), ("<|open|>", "<|close|>"),
)  # fmt: skip
_THINKING_MARKS: Final = ("enable_thinking", "<think>", "</think>", "<|channel>thought", "<|think:start|>",
                          "<longcat_think>", "thinking")  # fmt: skip
_XTML: Final = ("<|open|>", "<|close|>", "<|sep|>", "<|end_of_msg|>")


class ChatCapabilities(NamedTuple):
    """What a model can do beyond answering."""

    tool_parser: str
    """The name of mlx-lm's parser for its calls; empty if it makes none that can be read."""
    thinking: bool

    @property
    def tools(self) -> bool:
        return bool(self.tool_parser)


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """The object in ``tokenizer_config.json``; empty if there is none that can be read."""
    return _read_object(folder / "tokenizer_config.json")


def read_chat_template(folder: Path) -> Any:
    """The chat template of a model folder as transformers finds it: a text, a list or mapping of named ones, or
    empty."""
    template: Any = _read_text(folder / "chat_template.jinja")
    if not template:
        template = read_tokenizer_config(folder).get("chat_template") or processor_template(folder)
    more = {path.stem: _read_text(path) for path in additional_templates(folder)}
    if isinstance(template, str) and more:
        return {"default": template, **more} if template else more
    return template if isinstance(template, str | list | dict) else ""


def processor_template(folder: Path) -> str:
    """Return the template of ``chat_template.json`` if the model has no other, else empty. Transformers reads that file
    for processors only."""
    if (folder / "chat_template.jinja").is_file() or read_tokenizer_config(folder).get("chat_template"):
        return ""
    template = _read_object(folder / "chat_template.json").get("chat_template")
    return template if isinstance(template, str) else ""


def chat_template_type(tokenizer_config: Mapping[str, Any]) -> str | None:
    """Return the built-in mlx-lm template that the config names; None if it names none or an unknown one."""
    named = tokenizer_config.get("chat_template_type")
    return named if isinstance(named, str) and named in _TEMPLATE_TYPES else None


def additional_templates(folder: Path) -> list[Path]:
    """The files of named templates beside the default one."""
    try:
        return sorted((folder / "additional_chat_templates").glob("*.jinja"))[:_MOST_TEMPLATES]
    except OSError:
        return []


def _read_text(path: Path) -> str:
    """The text of a template; empty if there is none that can be read."""
    try:
        if path.is_file() and path.stat().st_size <= _LARGEST_TEMPLATE:
            return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        pass
    return ""


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_JSON:
            return {}
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def template_for_tools(template: Any) -> str:
    """The text of a chat template, of several named ones the one for tools: ``tokenizer_config.json`` has a string, a
    list of ``{"name", "template"}`` or, once loaded, a dictionary."""
    if isinstance(template, list):
        template = {item.get("name"): item.get("template") for item in template if isinstance(item, Mapping)}
    if isinstance(template, Mapping):
        template = template.get("tool_use") or template.get("default")
    return template if isinstance(template, str) else ""


def chat_capabilities(
    template: Any, vocabulary: Collection[str] | None, tokenizer_config: Mapping[str, Any]
) -> ChatCapabilities:
    """``vocabulary`` holds the tokens as text; None if it cannot be read, and then the template alone decides."""
    text = template_for_tools(template)
    return ChatCapabilities(
        _tool_parser(text, vocabulary or (), tokenizer_config), _thinks(text, vocabulary) if text else False
    )


def _tool_parser(template: str, vocabulary: Collection[str], tokenizer_config: Mapping[str, Any]) -> str:
    named = tokenizer_config.get("tool_parser_type")
    if isinstance(named, str) and named in _TOOL_PARSERS:
        return named
    if "tools" in template:
        for parser, marks in _TOOL_FORMATS:
            if all(mark in template for mark in marks):
                return parser
    if template and all(token in vocabulary for token in _XTML):
        return "kimi_k3"
    if template and "<|tool_call_start|>" in vocabulary and "<|tool_call_end|>" in vocabulary:
        return "pythonic"
    return ""


def _thinks(template: str, vocabulary: Collection[str] | None) -> bool:
    if not any(mark in template for mark in _THINKING_MARKS):
        return False
    return vocabulary is None or any(start in vocabulary and end in vocabulary for start, end in _THINKING_TOKENS)
