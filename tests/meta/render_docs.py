"""Renders what the documents say of the code: `make docs` writes it, a test compares it.

In docs/*.md the parts between ``<!-- rendered: NAME -->`` and ``<!-- end -->`` come from here, and the example
configuration as a whole.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any, get_args

from mlx_router_server.dialects import (
    anthropic_requests,
    embedding_requests,
    ollama_embedding,
    ollama_management,
    ollama_requests,
    openai_completions,
    openai_requests,
    responses_requests,
)
from mlx_router_server.dialects.options import HONOURED_OPTIONS, IGNORED_OPTIONS
from mlx_router_server.lifecycle.states import TRANSITIONS, State
from mlx_router_server.service.launchd import LABEL, Launchd
from mlx_router_server.service.plan import ServicePlan
from mlx_router_server.service.systemd import Systemd
from mlx_router_server.settings import describe_settings
from mlx_router_server.settings_layers import CONFIG_VERSION
from mlx_router_shared import generation, protocol
from tests.meta.checks import ALL_CHECKS, NOT_HERE, covered_checks
from tests.meta.requirements import LATER, REQUIREMENTS, marked_tests

__all__ = ["EXAMPLE", "FIELD_RULES", "ROOT", "main", "render", "rendered_documents"]

ROOT = Path(__file__).parents[2]
FIELD_RULES = (
    ollama_requests.CHAT_FIELDS,
    ollama_requests.GENERATE_FIELDS,
    ollama_embedding.EMBED_FIELDS,
    ollama_embedding.EMBEDDINGS_FIELDS,
    ollama_management.SHOW_FIELDS,
    ollama_management.PULL_FIELDS,
    ollama_management.CREATE_FIELDS,
    ollama_management.COPY_FIELDS,
    ollama_management.DELETE_FIELDS,
    ollama_management.PUSH_FIELDS,
    openai_requests.CHAT_FIELDS,
    openai_completions.COMPLETION_FIELDS,
    responses_requests.RESPONSE_FIELDS,
    embedding_requests.EMBEDDING_FIELDS,
    embedding_requests.RERANK_FIELDS,
    anthropic_requests.MESSAGE_FIELDS,
    anthropic_requests.COUNT_FIELDS,
)
EXAMPLE = ROOT / "configs" / "mlx-router.example.toml"
_PART = re.compile(r"(<!-- rendered: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _attribute_docs(kind: type) -> dict[str, str]:
    """The strings that stand under the fields of a class."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(node, ast.ClassDef)
    found, last = {}, ""
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            last = statement.target.id
        elif isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            last = statement.targets[0].id
        elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant) and last:
            found[last] = inspect.cleandoc(str(statement.value.value)).replace("\n", " ")
            last = ""
    return found


def _struct(kind: Any) -> str:
    docs = _attribute_docs(kind)
    tag = kind.__struct_config__.tag
    lines = [f"### {kind.__name__}" + (f" (`{tag}`)" if tag else ""), "", inspect.cleandoc(kind.__doc__), ""]
    if kind.__struct_fields__:
        lines += ["| field | type | required | meaning |", "|---|---|---|---|"]
        required = len(kind.__struct_fields__) - len(kind.__struct_defaults__)
        names_with_default = set(kind.__struct_fields__[required:])
        defaults = dict(zip(kind.__struct_fields__[required:], kind.__struct_defaults__, strict=True))
        for name in kind.__struct_fields__:
            annotation = str(kind.__annotations__[name]).replace("|", "\\|")
            must = "no" if name in names_with_default and not _is_nodefault(defaults[name]) else "yes"
            lines.append(f"| `{name}` | `{annotation}` | {must} | {docs.get(name, '')} |")
        lines.append("")
    return "\n".join(lines)


def _is_nodefault(value: object) -> bool:
    return type(value).__name__ == "NoDefault" or repr(value) == "NODEFAULT"


def _structs(*kinds: Any) -> str:
    return "\n".join(_struct(kind) for kind in kinds)


def _states() -> str:
    docs = _attribute_docs(State)
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> unloaded"]
    lines += [f"    {old} --> {new}: {why}" for old, news in TRANSITIONS.items() for new, why in news.items()]
    lines += ["```", "", "| state | meaning |", "|---|---|"]
    lines += [f"| `{state}` | {docs[state.name]} |" for state in State]
    return "\n".join(lines) + "\n"


def _requirements() -> str:
    tests = marked_tests(ROOT)
    lines = ["| promise | | tests |", "|---|---|---|"]
    for number, text in REQUIREMENTS.items():
        later = " (a later release)" if number in LATER else ""
        names = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in tests.get(number, []))
        lines.append(f"| {number} | {text}{later} | {names} |")
    return "\n".join(lines) + "\n"


def _fields() -> str:
    lines = []
    for rules in FIELD_RULES:
        lines += [f"## {rules.route}", "", "| field | rule | |", "|---|---|---|"]
        lines += [f"| `{name}` | honoured | {rules.notes.get(name, '')} |" for name in rules.honoured]
        lines += [f"| `{name}` | ignored | {why} |" for name, why in rules.ignored.items()]
        lines += [f"| `{name}` | refused | {why} |" for name, why in rules.refused.items()]
        lines.append("")
    return "\n".join(lines)


def _options() -> str:
    lines = ["| option | rule |", "|---|---|"]
    lines += [f"| `{name}` | honoured |" for name in sorted(HONOURED_OPTIONS)]
    lines += [f"| `{name}` | ignored: it has no meaning with MLX |" for name in sorted(IGNORED_OPTIONS)]
    return "\n".join(lines) + "\n"


def _conformance() -> str:
    tests = covered_checks(ROOT)
    lines = ["| check | tests, or why it does not apply |", "|---|---|"]
    for check in ALL_CHECKS:
        names = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in tests.get(check, []))
        lines.append(f"| {check} | {names or NOT_HERE.get(check, '')} |")
    return "\n".join(lines) + "\n"


def _value(default: Any) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, tuple):
        return str([str(part) for part in default]).replace("'", '"')
    return (
        f'"{default}"' if isinstance(default, str) else f"{default:g}" if isinstance(default, float) else str(default)
    )


def _settings() -> str:
    lines = ["| setting | default | unit | Ollama's variable | meaning |", "|---|---|---|---|---|"]
    for field in describe_settings():
        meta = field.metadata
        ollama = f"`{meta['ollama']}`" if meta["ollama"] else ""
        lines.append(f"| `{field.name}` | `{_value(field.default)}` | {meta['unit']} | {ollama} | {meta['help']} |")
    return "\n".join(lines) + "\n"


def _example() -> str:
    lines = [
        "# An example for mlx-router, with every setting at its default. Put it at ~/.config/mlx-router/config.toml",
        "# (macOS: ~/Library/Application Support/mlx-router/config.toml) or name it with --config.",
        "# Each setting is also a flag of `mlx-router start` and a variable of the environment: max_queue is",
        "# --max-queue and MLX_ROUTER_MAX_QUEUE.",
        "",
        f"version = {CONFIG_VERSION}",
        "",
    ]
    for field in describe_settings():
        unit = f" ({field.metadata['unit']})" if field.metadata["unit"] else ""
        lines += [f"# {field.metadata['help']}{unit}", f"{field.name} = {_value(field.default)}", ""]
    lines += [
        "# Models by name. Without `path` and `repo` the table is about a model that is found anyway.",
        '# [models."assistant"]',
        '# path = "/models/Qwen3-8B-4bit"   # a folder in MLX layout',
        '# repo = "mlx-community/Qwen3-8B-4bit"   # or a repository of the Hugging Face cache',
        '# aliases = ["qwen3:8b"]',
        "# preload = true   # loaded at the start, if nobody has to leave for it",
        "# pinned = true   # never evicted, never unloaded for being idle",
        '# keep_alive = "30m"',
        '# keep_alive_min = "1m"   # what requests may ask for',
        '# keep_alive_max = "2h"',
        "# keep_alive_lock = false   # true: requests may not change it",
        "# context_length = 16384",
        '# memory = "9GB"   # instead of the estimate',
        '# adapter = "/models/my-lora"   # a LoRA adapter that is put on its weights',
        '# draft_model = "Qwen3-0.6B-4bit"   # a smaller model with the same tokens, which guesses ahead',
        '# system = "You answer in one sentence."   # where a conversation brings no system prompt',
        "# options = { temperature = 0.2, num_ctx = 8192 }   # where a request says nothing",
        '# kind = "embedding"   # or "chat": where its files tell it wrong',
        "",
        "# Names that clients of other services send, to names of ours; the first that fits counts.",
        "# [name_map]",
        '# "claude-*opus*" = "assistant"',
        '# "gpt-*" = "assistant"',
        "",
        "# Short names beside those that ship (`mlx-router list --aliases`).",
        "# [model_aliases]",
        '# "house-model:8b" = "mlx-community/Qwen3-8B-4bit"',
    ]
    return "\n".join(lines) + "\n"


def _units() -> dict[Path, str]:
    """What `mlx-router service install` writes, for a user called ``me`` with the program in /opt/mlx-router."""
    found = {}
    for system in (False, True):
        home, kind = "/home/me", "-system" if system else ""
        found[ROOT / "configs" / f"mlx-router{kind}.service"] = Systemd(system=system, user_home=Path(home)).render(
            _service_plan(Path(home), Path(home) / ".config" / "mlx-router", system=system)
        )
        home, kind = "/Users/me", "daemon" if system else "agent"
        state = Path(home) / "Library" / "Application Support" / "mlx-router"
        found[ROOT / "configs" / f"{LABEL}.{kind}.plist"] = Launchd(system=system, user_home=Path(home)).render(
            _service_plan(Path(home), state, system=system)
        )
    return {path: unit.decode() for path, unit in found.items()}


def _service_plan(user_home: Path, state: Path, *, system: bool) -> ServicePlan:
    return ServicePlan(
        command=("/opt/mlx-router/bin/python", "-P", "-m", "mlx_router_server", "start"),
        environment={"MLX_ROUTER_HOME": str(state)},
        home=state,
        writable=(state, user_home / ".cache" / "huggingface"),
        leave_seconds=340,
        system=system,
        user="me",
        user_home=user_home,
        log_file="",
    )


def render(name: str) -> str:
    """The text of one rendered part."""
    to_worker, from_worker = get_args(protocol.ToWorker), get_args(protocol.FromWorker)
    parts = {
        "to-worker": lambda: _structs(*to_worker),
        "from-worker": lambda: _structs(*from_worker, protocol.ModelFacts),
        "bootstrap": lambda: _structs(protocol.Bootstrap),
        "events": lambda: _structs(generation.StreamEvents, *get_args(generation.Event), generation.TokenLogprob),
        "request": lambda: _structs(
            *get_args(generation.Request),
            generation.Message,
            generation.ToolCall,
            generation.Tool,
            generation.Sampling,
        ),
        "fields": _fields,
        "options": _options,
        "conformance": _conformance,
        "states": _states,
        "requirements": _requirements,
        "settings": _settings,
    }
    return parts[name]()


def rendered_documents() -> dict[Path, str]:
    """Every document with rendered parts, as it has to be."""
    found = {EXAMPLE: _example(), **_units()}
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        if _PART.search(text):
            found[path] = _PART.sub(lambda match: f"{match[1]}{render(match[2])}{match[3]}", text)
    return found


def main() -> None:
    for path, text in rendered_documents().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()
