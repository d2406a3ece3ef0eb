"""The wire: what goes in comes out, and what is no message is refused with a dump."""

from __future__ import annotations

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_router_shared import codec
from mlx_router_shared.errors import ErrorCode, MlxRouterError, ProtocolError, error_from_code
from mlx_router_shared.generation import (
    Finish,
    FinishReason,
    GenerationRequest,
    Message,
    Role,
    Sampling,
    StreamEvents,
    TextDelta,
    Tool,
    ToolCall,
    ToolCallDone,
    Usage,
)
from mlx_router_shared.protocol import Bootstrap, Hello, Step, Submit

_REQUEST = GenerationRequest(
    messages=[
        Message(role=Role.SYSTEM, content="Sé breve 👋"),
        Message(role=Role.ASSISTANT, tool_calls=[ToolCall(name="f", arguments='{"a": 1}', id="c1")]),
        Message(role=Role.TOOL, content="", tool_call_id="c1"),
    ],
    tools=[Tool(name="f", description="d", parameters='{"type":"object"}')],
    sampling=Sampling(temperature=0.0, logit_bias={5: -1.5}),
    stop=["\n\n"],
)


def test_a_request_survives_the_wire() -> None:
    message = Submit(request_id="r1", request=_REQUEST)
    assert codec.decode_to_worker(codec.encode(message)) == message


def test_a_step_survives_the_wire() -> None:
    message = Step(
        number=7,
        streams=[
            StreamEvents(
                request_id="r1",
                events=[
                    TextDelta(text="é"),
                    ToolCallDone(index=0, id="c", name="f", arguments="{}"),
                    Usage(prompt_tokens=1, completion_tokens=2),
                    Finish(reason=FinishReason.STOP, stop_string="."),
                ],
            )
        ],
    )
    assert codec.decode_from_worker(codec.encode(message)) == message


def test_unknown_fields_are_ignored_so_that_a_newer_peer_is_understood() -> None:
    plain = msgpack.unpackb(codec.encode(Step(number=1, streams=[])))
    plain["new_field"] = 1
    assert codec.decode_from_worker(msgpack.packb(plain)) == Step(number=1, streams=[])


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_a_protocol_error(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        codec.decode_from_worker(data)


def test_a_message_for_the_other_direction_is_refused() -> None:
    hello = Hello(protocol_version=1, pid=1, token="t", engine="fake", import_seconds=0.0)
    with pytest.raises(ProtocolError, match="hello"):
        codec.decode_to_worker(codec.encode(hello))


def test_the_ceiling_holds_in_both_directions(monkeypatch: pytest.MonkeyPatch) -> None:
    data = codec.encode(Submit(request_id="r", request=_REQUEST))
    monkeypatch.setattr(codec, "MAX_MESSAGE_BYTES", len(data) - 1)
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        codec.encode(Submit(request_id="r", request=_REQUEST))
    with pytest.raises(ProtocolError, match="exceeds the limit"):
        codec.decode_to_worker(data)


def test_the_bootstrap_line_is_one_line() -> None:
    bootstrap = Bootstrap(endpoint="ipc:///tmp/x/s", worker_id="w", token="a\nb", engine="mlx")
    line = codec.encode_bootstrap(bootstrap)
    assert line.count(b"\n") == 1
    assert codec.decode_bootstrap(line) == bootstrap


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_names_one_class(code: ErrorCode) -> None:
    error = error_from_code(code, "text")
    assert error.code is code
    assert error.message == "text"


def test_a_code_from_the_future_becomes_the_base_class() -> None:
    assert type(error_from_code("not_invented_yet", "text")) is MlxRouterError
