"""OpenAI's bodies: /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from typing import Any, Final

from msgspec import Struct, field

from mlx_router_server.dialects.body import convert, read_object, without_nulls
from mlx_router_server.dialects.call import Call, Needs
from mlx_router_server.dialects.ollama_requests import read_tools
from mlx_router_server.dialects.options import Options, parse_options
from mlx_router_server.durations import parse_duration
from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import GenerationRequest, Message, Role, Sampling, Tool, ToolCall

__all__ = ["OPENAI_DEFAULTS", "parse_chat_completion", "parse_completion"]

OPENAI_DEFAULTS: Final = Sampling(temperature=1.0, top_p=1.0)
_ROLES: Final = {
    "system": Role.SYSTEM,
    "developer": Role.SYSTEM,
    "user": Role.USER,
    "assistant": Role.ASSISTANT,
    "tool": Role.TOOL,
}
_EFFORTS: Final = ("none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra")
_COMPLETION_TOKENS: Final = 16  # OpenAI's own default for /v1/completions
_NOT_YET: Final = "this release does not support {}"


class _StreamOptions(Struct, kw_only=True):
    include_usage: bool = False


class _Common(Struct, kw_only=True):
    model: str = ""
    stream: bool = False
    stream_options: _StreamOptions = field(default_factory=_StreamOptions)
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int = 1
    stop: str | list[str] = field(default_factory=list)
    seed: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] = field(default_factory=dict)
    # Extensions that are seen in the field.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    num_ctx: int | None = None
    keep_alive: Any = None
    options: dict[str, Any] = field(default_factory=dict)


class _ChatBody(_Common, kw_only=True):
    messages: list[dict[str, Any]] = field(default_factory=list)
    max_completion_tokens: int | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    tool_choice: Any = None
    parallel_tool_calls: bool = True
    response_format: dict[str, Any] = field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    reasoning: dict[str, Any] = field(default_factory=dict)
    enable_thinking: bool | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    functions: list[Any] = field(default_factory=list)
    function_call: Any = None
    audio: Any = None
    modalities: list[str] = field(default_factory=list)
    web_search_options: Any = None


class _CompletionBody(_Common, kw_only=True):
    prompt: str | list[Any] = ""
    suffix: str = ""
    echo: bool = False
    best_of: int = 1
    logprobs: int | None = None


class _Function(Struct, kw_only=True):
    name: str
    arguments: str = ""


class _ToolCall(Struct, kw_only=True):
    function: _Function
    id: str = ""


class _Message(Struct, kw_only=True):
    role: str
    content: str | list[dict[str, Any]] | None = None
    name: str = ""
    tool_calls: list[_ToolCall] = field(default_factory=list)
    tool_call_id: str = ""
    reasoning_content: str = ""
    reasoning: str = ""


def parse_chat_completion(body: bytes) -> Call:
    """Raises ``InvalidRequest`` with ``param``; nothing was looked up yet."""
    chat = convert(read_object(body, empty="EOF"), _ChatBody)
    if not chat.messages:
        raise InvalidRequest("[] is too short - 'messages'", param="messages")
    _check_ranges(chat)
    _refuse_unsupported(chat)
    tools = _tools(chat)
    options = parse_options(chat.options)
    thinking, effort = _thinking(chat)
    needs = {Needs.COMPLETION: '"{name}" does not support chat'}
    if tools:
        needs[Needs.TOOLS] = "{full} does not support tools"
    request = _request(
        chat,
        options,
        messages=[_message(number, item) for number, item in enumerate(chat.messages)],
        tools=tools,
        thinking=thinking,
        thinking_effort=effort,
        max_tokens=chat.max_completion_tokens or chat.max_tokens or options.max_tokens,
        top_logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
    )
    return _call(chat, request, needs, options, most_tool_calls=None if chat.parallel_tool_calls else 1)


def parse_completion(body: bytes) -> Call:
    """Raises ``InvalidRequest`` with ``param``; nothing was looked up yet."""
    completion = convert(read_object(body, empty="EOF"), _CompletionBody)
    _check_ranges(completion)
    if completion.suffix:
        raise UnsupportedCapability(f"{completion.model} does not support insert", param="suffix")
    if completion.best_of != 1:
        raise UnsupportedCapability(_NOT_YET.format("best_of"), param="best_of")
    if completion.echo:
        raise UnsupportedCapability(_NOT_YET.format("echo"), param="echo")
    if completion.logprobs is not None:
        raise UnsupportedCapability(_NOT_YET.format("logprobs on /v1/completions"), param="logprobs")
    text, tokens = _prompt(completion.prompt)
    options = parse_options(completion.options)
    request = _request(
        completion,
        options,
        prompt=text,
        prompt_tokens=tokens,
        max_tokens=completion.max_tokens or options.max_tokens or _COMPLETION_TOKENS,
    )
    return _call(completion, request, {Needs.COMPLETION: '"{name}" does not support completions'}, options)


def _call(
    body: _Common,
    request: GenerationRequest,
    needs: dict[Needs, str],
    options: Options,
    most_tool_calls: int | None = None,
) -> Call:
    return Call(
        model=body.model,
        request=request,
        stream=body.stream,
        keep_alive_seconds=None if body.keep_alive is None else parse_duration(body.keep_alive),
        needs=needs,
        most_tool_calls=most_tool_calls,
        include_usage=body.stream_options.include_usage,
        ignored=options.ignored,
    )


def _request(body: _Common, options: Options, **more: Any) -> GenerationRequest:
    said = options.sampling
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    return GenerationRequest(
        sampling=Sampling(
            temperature=_first(body.temperature, said.temperature),
            top_p=_first(body.top_p, said.top_p),
            top_k=_first(body.top_k, said.top_k),
            min_p=_first(body.min_p, said.min_p),
            repeat_penalty=_first(body.repetition_penalty, said.repeat_penalty),
            repeat_last_n=said.repeat_last_n,
            presence_penalty=_first(body.presence_penalty, said.presence_penalty),
            frequency_penalty=_first(body.frequency_penalty, said.frequency_penalty),
            seed=_first(body.seed, said.seed),
            logit_bias=_logit_bias(body.logit_bias),
        ),
        sampling_defaults=OPENAI_DEFAULTS,
        context_tokens=_first(body.num_ctx, options.context_tokens),
        stop=[text for text in stop if text] or options.stop,
        **more,
    )


def _first(said: Any, otherwise: Any) -> Any:
    return otherwise if said is None else said


def _check_ranges(body: _Common) -> None:
    ranges: tuple[tuple[str, float | None, float, float], ...] = (
        ("temperature", body.temperature, 0, 2),
        ("top_p", body.top_p, 0, 1),
        ("min_p", body.min_p, 0, 1),
        ("presence_penalty", body.presence_penalty, -2, 2),
        ("frequency_penalty", body.frequency_penalty, -2, 2),
    )
    for name, value, low, high in ranges:
        if value is not None and not low <= value <= high:
            raise InvalidRequest(f"{name} must be between {low} and {high}, not {value:g}", param=name)
    for name, number in (
        ("max_tokens", body.max_tokens),
        ("max_completion_tokens", getattr(body, "max_completion_tokens", None)),
        ("num_ctx", body.num_ctx),
    ):
        if number is not None and number < 1:
            raise InvalidRequest(f"{name} must be at least 1, not {number}", param=name)
    if body.top_k is not None and body.top_k < 0:
        raise InvalidRequest("top_k must not be negative", param="top_k")
    if body.repetition_penalty is not None and body.repetition_penalty <= 0:
        raise InvalidRequest("repetition_penalty must be greater than 0", param="repetition_penalty")
    if body.n != 1:
        raise UnsupportedCapability("this release answers one choice per request: n must be 1", param="n")


def _refuse_unsupported(chat: _ChatBody) -> None:
    """Fields that would change the answer and cannot be honoured are refused, never ignored."""
    if chat.top_logprobs is not None:
        if not 0 <= chat.top_logprobs <= 20:
            raise InvalidRequest("top_logprobs must be between 0 and 20", param="top_logprobs")
        if not chat.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if chat.response_format.get("type", "text") != "text":
        raise UnsupportedCapability(_NOT_YET.format("response_format"), param="response_format")
    if chat.functions or chat.function_call is not None:
        raise UnsupportedCapability("functions are long deprecated: use tools", param="functions")
    if chat.audio is not None or any(kind != "text" for kind in chat.modalities):
        raise UnsupportedCapability("this server answers in text only", param="modalities")
    if chat.web_search_options is not None:
        raise UnsupportedCapability("this server does not search the web", param="web_search_options")


def _tools(chat: _ChatBody) -> list[Tool]:
    choice = chat.tool_choice
    if choice is None or choice == "auto":
        return read_tools(chat.tools)
    if choice == "none":
        return []  # a call cannot be made where no tool is known
    if not chat.tools:
        raise InvalidRequest("tool_choice needs tools", param="tool_choice")
    if choice != "required" and not isinstance(choice, dict):
        raise InvalidRequest("tool_choice must be none, auto, required or an object", param="tool_choice")
    if isinstance(choice, dict):
        name = (choice.get("function") or {}).get("name") if isinstance(choice.get("function"), dict) else None
        if name not in [tool.name for tool in read_tools(chat.tools)]:
            raise InvalidRequest(f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")
    raise UnsupportedCapability(_NOT_YET.format("a forced tool_choice"), param="tool_choice")


def _thinking(chat: _ChatBody) -> tuple[bool | None, str | None]:
    effort = chat.reasoning_effort or chat.reasoning.get("effort")
    if effort is not None:
        if effort not in _EFFORTS:
            raise InvalidRequest(
                f'invalid reasoning value: "{effort}" (must be one of {", ".join(_EFFORTS)})', param="reasoning_effort"
            )
        if effort == "none":
            return False, None
        return True, {"minimal": "low", "xhigh": "max", "ultra": "max"}.get(effort, effort)
    said = chat.enable_thinking
    if said is None and isinstance(chat.chat_template_kwargs.get("enable_thinking"), bool):
        said = chat.chat_template_kwargs["enable_thinking"]
    return said, None


def _message(number: int, item: dict[str, Any]) -> Message:
    at = f"messages[{number}]"
    message = convert(without_nulls(item), _Message, f"{at}.")
    if message.role not in _ROLES:
        raise InvalidRequest(f"unknown role {message.role!r}", param=f"{at}.role")
    if message.content is None and not message.tool_calls and message.role != "assistant":
        raise InvalidRequest("invalid message content type: <nil>", param=f"{at}.content")
    return Message(
        role=_ROLES[message.role],
        content=_content(message.content, f"{at}.content"),
        reasoning=message.reasoning_content or message.reasoning or None,
        tool_calls=[
            ToolCall(id=call.id, name=call.function.name, arguments=call.function.arguments or "{}")
            for call in message.tool_calls
        ],
        tool_call_id=message.tool_call_id or None,
        tool_name=message.name or None if message.role == "tool" else None,
    )


def _content(content: str | list[dict[str, Any]] | None, at: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type")
        if kind in ("text", "refusal") and isinstance(part.get(kind), str):
            texts.append(part[kind])
        elif kind == "image_url":
            raise UnsupportedCapability("this model does not support images", param=f"{at}[{number}]")
        elif kind in ("input_audio", "file"):
            raise UnsupportedCapability(f"this model does not support {kind} parts", param=f"{at}[{number}]")
        else:
            raise InvalidRequest("invalid message format", param=f"{at}[{number}]")
    return "".join(texts)


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    found = {}
    for token, value in bias.items():
        if not token.isdigit() or not -100 <= value <= 100:
            raise InvalidRequest("logit_bias maps token ids to numbers from -100 to 100", param="logit_bias")
        found[int(token)] = value
    return found


def _prompt(prompt: str | list[Any]) -> tuple[str | None, list[int]]:
    """Text, or token ids; a list of one prompt is that prompt."""
    if isinstance(prompt, str):
        if not prompt:
            raise InvalidRequest("prompt must not be empty", param="prompt")
        return prompt, []
    if len(prompt) == 1 and isinstance(prompt[0], str | list):
        return _prompt(prompt[0])
    if prompt and all(isinstance(token, int) and not isinstance(token, bool) for token in prompt):
        return None, prompt
    if prompt and all(isinstance(part, str | list) for part in prompt):
        raise UnsupportedCapability(_NOT_YET.format("several prompts in one request"), param="prompt")
    raise InvalidRequest("prompt must be text or a list of token ids", param="prompt")
