"""Load a model's tokenizer, the same way for generation and for counting."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_lm.utils import load_tokenizer

from mlx_router_shared.capabilities import (
    chat_capabilities,
    chat_template_type,
    processor_template,
    read_chat_template,
    read_tokenizer_config,
)

__all__ = ["load_model_tokenizer"]


def load_model_tokenizer(path: Path, eos_token_ids: Any = None) -> Any:
    """Load mlx-lm's tokenizer of a model folder, with the parser for tool calls that ``chat_capabilities`` names."""
    config = read_tokenizer_config(path)
    options: dict[str, Any] = {
        # Spelt out: a tokenizer that wants to run code of its own is refused, and nobody is asked on standard input.
        "trust_remote_code": False,
    }
    # Without a name mlx-lm takes the architecture's, or looks at the vocabulary by the same rules as we do.
    named = {
        "tool_parser_type": chat_capabilities(read_chat_template(path), None, config).tool_parser or None,
        "chat_template_type": chat_template_type(config),
    }
    # A name that mlx-lm does not know would raise, and None takes it away.
    options |= {option: name for option, name in named.items() if name is not None or option in config}
    if template := processor_template(path):
        options["chat_template"] = template
    return load_tokenizer(path, options, eos_token_ids=eos_token_ids)
