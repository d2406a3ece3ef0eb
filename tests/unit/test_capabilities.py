"""What a model can do, by the one function that catalogue and worker ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_router_server.catalogue.entry import Capability
from mlx_router_server.catalogue.inspect import inspect_folder
from mlx_router_shared.capabilities import _TEMPLATE_TYPES, _TOOL_PARSERS, chat_capabilities
from mlx_router_shared.generation import Counted, CountRequest, GenerationRequest, Message, Role, Tool, ToolCallDone
from mlx_router_shared.protocol import Load
from mlx_router_worker.engines.load_tokenizer import load_model_tokenizer
from mlx_router_worker.engines.text import TextEngine
from mlx_router_worker.engines.tokenizer import TokenizerEngine
from tests.support.engine import play, submit
from tests.tiny_models.parrot import make_parrot

_CHAT = "{% for m in messages %}{{ m.content }}{% endfor %}"
_TEMPLATES: dict[str, tuple[Any, dict[str, Any], bool, bool]] = {
    "hermes": (_CHAT + "{{ tools }}<tool_call>{{ tool_call.name }}", {}, True, False),
    "json without tool_call.name": (_CHAT + "{% if tools %}{% set x = '<tool_call>' %}{% endif %}", {}, True, False),
    "xml": (_CHAT + "{{ tools }}<tool_call>\n<function=", {}, True, False),
    "mistral": (_CHAT + "{{ tools }}[TOOL_CALLS]", {}, True, False),
    "marks without tools": (_CHAT + "<tool_call>", {}, False, False),
    "no parser": (_CHAT + "{{ tools }}<tool_calls>", {}, False, False),
    "llama": (_CHAT + "{{ tools }}<|python_tag|>", {}, False, False),
    "named by the tokenizer": (_CHAT, {"tool_parser_type": "mistral"}, True, False),
    "named, but unknown": (_CHAT + "{{ tools }}<tool_call>", {
        "tool_parser_type": "nonesuch", "chat_template_type": "nonesuch"}, True, False),
    "several, one for tools": ([{"name": "default", "template": _CHAT}, {
        "name": "tool_use", "template": _CHAT + "{% if tools %}{% set x = '<tool_call>' %}{% endif %}"}],
        {}, True, False),
    "thinking": (_CHAT + "{% if enable_thinking %}x{% endif %}", {}, False, True),
    "think in the text": (_CHAT + "<think>", {}, False, True),
}  # fmt: skip


@pytest.mark.parametrize("name", _TEMPLATES)
def test_catalogue_and_worker_say_the_same(tmp_path: Path, name: str) -> None:
    template, more, tools, thinking = _TEMPLATES[name]
    folder = make_parrot(
        tmp_path / "p", ["x"], chat_template=None, tokenizer_config={"chat_template": template, **more}
    )
    listed = inspect_folder(folder).capabilities
    engine = TextEngine(lambda data: None)
    facts = engine.load(Load(model="p", path=str(folder), context_tokens=0, parallel=1), lambda stage, fraction: None)
    engine.close()
    assert (Capability.TOOLS in listed, Capability.THINKING in listed) == (tools, thinking)
    assert (facts.has_tools, facts.has_thinking) == (tools, thinking)


def _load(folder: Path) -> TextEngine:
    engine = TextEngine(lambda data: None)
    engine.load(Load(model="p", path=str(folder), context_tokens=0, parallel=1), lambda stage, fraction: None)
    return engine


@pytest.mark.parametrize("where", ["chat_template.json", "additional_chat_templates"])
def test_a_template_is_found_wherever_it_stands(tmp_path: Path, where: str) -> None:
    """A file that transformers reads for processors alone, and a second template for requests with tools."""
    template = _CHAT + "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{% set x = '<tool_call>' %}"
    pieces = ["<tool_call>", '{"name": "f", "arguments": {"a": 1}}', "</tool_call>"]
    folder = make_parrot(tmp_path / "p", pieces, chat_template=None)
    if where == "chat_template.json":
        (folder / where).write_text(json.dumps({"chat_template": template}))
    else:
        (folder / "chat_template.jinja").write_text(_CHAT)
        (folder / where).mkdir()
        (folder / where / "tool_use.jinja").write_text(template)
    assert Capability.TOOLS in inspect_folder(folder).capabilities
    engine = _load(folder)
    ask = GenerationRequest(messages=[Message(role=Role.USER, content="go")], tools=[Tool(name="f")])
    events = play(engine, {"r": ask})["r"]
    engine.close()
    assert [event.name for event in events if isinstance(event, ToolCallDone)] == ["f"]
    counted = submit(TokenizerEngine(lambda data: None), "c", CountRequest(path=str(folder), request=ask))[0]
    assert isinstance(counted, Counted)
    assert counted.text == "go<f>"


def test_what_no_file_names_is_left_to_mlx_lm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some architectures have a parser and a template of their own, which a value of None would take away."""
    options: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "mlx_router_worker.engines.load_tokenizer.load_tokenizer", lambda path, said, **more: options.append(said)
    )
    load_model_tokenizer(make_parrot(tmp_path / "p", ["x"], chat_template=_CHAT))
    named = {"tool_parser_type": "nonesuch", "chat_template_type": "nonesuch"}
    load_model_tokenizer(make_parrot(tmp_path / "q", ["x"], chat_template=_CHAT, tokenizer_config=named))
    assert options == [{"trust_remote_code": False}, {"trust_remote_code": False, **dict.fromkeys(named)}]


def test_counting_is_not_disturbed_by_a_link_to_nowhere(tmp_path: Path) -> None:
    folder = make_parrot(tmp_path / "p", ["x"])
    (folder / "old.json").symlink_to("gone.json")
    ask = GenerationRequest(messages=[Message(role=Role.USER, content="go")])
    counted = submit(TokenizerEngine(lambda data: None), "c", CountRequest(path=str(folder), request=ask))[0]
    assert isinstance(counted, Counted)


def test_a_template_too_large_to_be_read_is_not_read_for_the_digest(tmp_path: Path) -> None:
    folder = make_parrot(tmp_path / "p", ["x"])
    with (folder / "chat_template.json").open("wb") as stream:
        stream.truncate(2**40)  # a sparse file
    assert inspect_folder(folder).digest


def test_every_parser_and_template_of_mlx_lm_is_known() -> None:
    import mlx_lm

    for package, known in (("tool_parsers", _TOOL_PARSERS), ("chat_templates", _TEMPLATE_TYPES)):
        files = (Path(mlx_lm.__path__[0]) / package).glob("[!_]*.py")
        assert {file.stem for file in files} == known


def test_thinking_needs_the_tokens_and_the_template() -> None:
    tokens = {"<think>", "</think>"}
    assert chat_capabilities(_CHAT + "<think>", tokens, {}).thinking
    assert not chat_capabilities(_CHAT, tokens, {}).thinking, "an instruct model of a thinking family"
    assert not chat_capabilities(_CHAT + "<think>", {"a"}, {}).thinking
    assert chat_capabilities(_CHAT + "<think>", None, {}).thinking


@pytest.mark.parametrize("name", ["json without tool_call.name", "several, one for tools"])
def test_a_call_is_read_where_tools_are_listed(tmp_path: Path, name: str) -> None:
    pieces = ["<tool_call>", '{"name": "f", "arguments": {"a": 1}}', "</tool_call>"]
    template = _TEMPLATES[name][0]
    folder = make_parrot(tmp_path / "p", pieces, chat_template=None, tokenizer_config={"chat_template": template})
    engine = _load(folder)
    ask = GenerationRequest(messages=[Message(role=Role.USER, content="go")], tools=[Tool(name="f")])
    events = play(engine, {"r": ask})["r"]
    engine.close()
    (call,) = [event for event in events if isinstance(event, ToolCallDone)]
    assert (call.name, json.loads(call.arguments)) == ("f", {"a": 1})
