"""Short names as Ollama has them, and the MLX repositories that they stand for.

A name of this table resolves when its repository is on this machine, and is what ``pull`` fetches; it is looked up
nowhere else. ``[model_aliases]`` in the configuration adds to it and overrides it.
"""

from __future__ import annotations

from typing import Final

from mlx_router_server.catalogue.names import DEFAULT_HOST, HUB_HOSTS, ModelName, parse_name

__all__ = ["SHIPPED", "keyed", "repository_of"]

_MLX: Final = "mlx-community/"
_TABLE: Final = """
qwen3            Qwen3-8B-4bit
qwen3:0.6b       Qwen3-0.6B-4bit
qwen3:1.7b       Qwen3-1.7B-4bit
qwen3:4b         Qwen3-4B-4bit
qwen3:8b         Qwen3-8B-4bit
qwen3:14b        Qwen3-14B-4bit
qwen3:30b        Qwen3-30B-A3B-4bit
qwen3:32b        Qwen3-32B-4bit
qwen3:235b       Qwen3-235B-A22B-4bit
qwen3-coder      Qwen3-Coder-30B-A3B-Instruct-4bit
qwen3-coder:30b  Qwen3-Coder-30B-A3B-Instruct-4bit
qwen3-embedding       Qwen3-Embedding-8B-4bit-DWQ
qwen3-embedding:0.6b  Qwen3-Embedding-0.6B-4bit-DWQ
qwen3-embedding:4b    Qwen3-Embedding-4B-4bit-DWQ
qwen3-embedding:8b    Qwen3-Embedding-8B-4bit-DWQ
qwen2.5          Qwen2.5-7B-Instruct-4bit
qwen2.5:0.5b     Qwen2.5-0.5B-Instruct-4bit
qwen2.5:1.5b     Qwen2.5-1.5B-Instruct-4bit
qwen2.5:3b       Qwen2.5-3B-Instruct-4bit
qwen2.5:7b       Qwen2.5-7B-Instruct-4bit
qwen2.5:14b      Qwen2.5-14B-Instruct-4bit
qwen2.5:32b      Qwen2.5-32B-Instruct-4bit
qwen2.5:72b      Qwen2.5-72B-Instruct-4bit
qwen2.5-coder       Qwen2.5-Coder-7B-Instruct-4bit
qwen2.5-coder:0.5b  Qwen2.5-Coder-0.5B-Instruct-4bit
qwen2.5-coder:1.5b  Qwen2.5-Coder-1.5B-Instruct-4bit
qwen2.5-coder:3b    Qwen2.5-Coder-3B-Instruct-4bit
qwen2.5-coder:7b    Qwen2.5-Coder-7B-Instruct-4bit
qwen2.5-coder:14b   Qwen2.5-Coder-14B-Instruct-4bit
qwen2.5-coder:32b   Qwen2.5-Coder-32B-Instruct-4bit
qwq              QwQ-32B-4bit
qwq:32b          QwQ-32B-4bit
llama3.1         Meta-Llama-3.1-8B-Instruct-4bit
llama3.1:8b      Meta-Llama-3.1-8B-Instruct-4bit
llama3.1:70b     Meta-Llama-3.1-70B-Instruct-4bit
llama3.2         Llama-3.2-3B-Instruct-4bit
llama3.2:1b      Llama-3.2-1B-Instruct-4bit
llama3.2:3b      Llama-3.2-3B-Instruct-4bit
llama3.3         Llama-3.3-70B-Instruct-4bit
llama3.3:70b     Llama-3.3-70B-Instruct-4bit
gemma2           gemma-2-9b-it-4bit
gemma2:2b        gemma-2-2b-it-4bit
gemma2:9b        gemma-2-9b-it-4bit
gemma2:27b       gemma-2-27b-it-4bit
gemma3           gemma-3-4b-it-4bit
gemma3:270m      gemma-3-270m-it-4bit
gemma3:1b        gemma-3-1b-it-4bit
gemma3:4b        gemma-3-4b-it-4bit
gemma3:12b       gemma-3-12b-it-4bit
gemma3:27b       gemma-3-27b-it-4bit
gpt-oss          gpt-oss-20b-MXFP4-Q8
gpt-oss:20b      gpt-oss-20b-MXFP4-Q8
gpt-oss:120b     gpt-oss-120b-MXFP4-Q8
mistral          Mistral-7B-Instruct-v0.3-4bit
mistral:7b       Mistral-7B-Instruct-v0.3-4bit
mistral-nemo     Mistral-Nemo-Instruct-2407-4bit
mistral-nemo:12b  Mistral-Nemo-Instruct-2407-4bit
mistral-small        Mistral-Small-24B-Instruct-2501-4bit
mistral-small:24b    Mistral-Small-24B-Instruct-2501-4bit
mixtral          Mixtral-8x7B-Instruct-v0.1-4bit
mixtral:8x7b     Mixtral-8x7B-Instruct-v0.1-4bit
phi3             Phi-3-mini-4k-instruct-4bit
phi3:mini        Phi-3-mini-4k-instruct-4bit
phi3.5           Phi-3.5-mini-instruct-4bit
phi4             phi-4-4bit
phi4:14b         phi-4-4bit
phi4-mini        Phi-4-mini-instruct-4bit
phi4-mini:3.8b   Phi-4-mini-instruct-4bit
deepseek-r1       DeepSeek-R1-Distill-Qwen-7B-4bit
deepseek-r1:1.5b  DeepSeek-R1-Distill-Qwen-1.5B-4bit
deepseek-r1:7b    DeepSeek-R1-Distill-Qwen-7B-4bit
deepseek-r1:8b    DeepSeek-R1-Distill-Llama-8B-4bit
deepseek-r1:14b   DeepSeek-R1-Distill-Qwen-14B-4bit
deepseek-r1:32b   DeepSeek-R1-Distill-Qwen-32B-4bit
deepseek-r1:70b   DeepSeek-R1-Distill-Llama-70B-4bit
smollm2          SmolLM2-1.7B-Instruct-4bit
smollm2:135m     SmolLM2-135M-Instruct-4bit
smollm2:360m     SmolLM2-360M-Instruct-4bit
smollm2:1.7b     SmolLM2-1.7B-Instruct-4bit
granite3.3       granite-3.3-8b-instruct-4bit
granite3.3:2b    granite-3.3-2b-instruct-4bit
granite3.3:8b    granite-3.3-8b-instruct-4bit
devstral         Devstral-Small-2505-4bit
devstral:24b     Devstral-Small-2505-4bit
codestral        Codestral-22B-v0.1-4bit
codestral:22b    Codestral-22B-v0.1-4bit
command-r        c4ai-command-r-08-2024-4bit
olmo2            OLMo-2-1124-7B-Instruct-4bit
olmo2:7b         OLMo-2-1124-7B-Instruct-4bit
olmo2:13b        OLMo-2-1124-13B-Instruct-4bit
falcon3          Falcon3-7B-Instruct-4bit
falcon3:1b       Falcon3-1B-Instruct-4bit
falcon3:3b       Falcon3-3B-Instruct-4bit
falcon3:7b       Falcon3-7B-Instruct-4bit
falcon3:10b      Falcon3-10B-Instruct-4bit
"""

SHIPPED: Final[dict[str, str]] = {
    short: _MLX + repository for short, repository in (line.split() for line in _TABLE.strip().splitlines())
}


def repository_of(name: ModelName, configured: dict[str, str]) -> str | None:
    """The repository on the hub that a name stands for, as ``ORG/NAME``; None for a name that stands for none.

    ``configured`` maps keys of names to repositories, like ``keyed(SHIPPED)``.
    """
    if (found := configured.get(name.key) or _KEYED.get(name.key)) is not None:
        return found
    of_hub = name.host.lower() in HUB_HOSTS or (name.host.lower() == DEFAULT_HOST and name.namespace != "library")
    return f"{name.namespace}/{name.model}" if of_hub and name.tag == "latest" else None


def keyed(aliases: dict[str, str]) -> dict[str, str]:
    """The same table by the keys of its names. Raises ``InvalidRequest`` for what is no name."""
    return {parse_name(short).key: repository for short, repository in aliases.items()}


_KEYED: Final = keyed(SHIPPED)
