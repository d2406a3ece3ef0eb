"""From the text of a model to events: reasoning, content, tool calls, stop strings.

The pieces come already cut by kind ("normal", "reasoning", "tool") from mlx-lm's text state machine; this decides
what a client sees of them. A tool call that cannot be read is text: it is shown as the model wrote it, never half.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mlx_router_shared.errors import ErrorCode
from mlx_router_shared.generation import (
    Event,
    Failure,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallDone,
    ToolCallStarted,
)
from mlx_router_worker.text.partial_call import PartialCall
from mlx_router_worker.text.stop_strings import StopStrings

__all__ = ["AnswerBuilder", "ToolParser"]

ToolParser = Callable[[str], Any]
"""The body of a call to ``{"name", "arguments"}``, or a list of those; raises on text that is no call."""


class AnswerBuilder:
    """Turns the pieces of one answer into events, one at a time."""

    def __init__(
        self,
        *,
        stops: list[str],
        parse_tool: ToolParser | None = None,
        tool_markers: tuple[str, str] = ("", ""),
        make_id: Callable[[], str] = lambda: "",
        incremental: bool = False,
        forced: bool = False,
        max_calls: int | None = None,
    ) -> None:
        """``parse_tool`` is None when no tools were offered: what looks like a call is text then.

        ``incremental`` tells calls written in JSON while they are written. ``forced``: everything but thinking is one
        call in JSON, with or without markers. ``max_calls``: the answer is ``complete`` after so many.
        """
        self._stops = StopStrings(stops)
        self._parse_tool = parse_tool
        self._markers = tool_markers
        self._make_id = make_id
        self._incremental = incremental
        self._forced = forced
        self._max_calls = max_calls
        self._call = ""
        self._partial = PartialCall()
        self._partial_id = ""
        self._calls = 0
        self._space = ""
        """White space not shown yet: it is dropped at the edges of reasoning and of calls."""
        self._kind = "normal"
        self._at_edge = False
        self.stop_string: str | None = None
        self.cut_characters = 0
        """Of the text that was fed last, so many are behind the stop string or part of it."""
        self.failed = False

    @property
    def complete(self) -> bool:
        """Nothing that may still come belongs to the answer."""
        return self.stop_string is not None or (self._max_calls is not None and self._calls >= self._max_calls)

    @property
    def held_characters(self) -> int:
        """Characters of the text that are not shown yet, because they may begin a stop string."""
        return self._stops.held

    @property
    def finish_reason(self) -> FinishReason:
        """Why an answer that ended by itself ended."""
        return FinishReason.TOOL_CALLS if self._calls else FinishReason.STOP

    def feed(self, pieces: list[tuple[str, str]]) -> list[Event]:
        """Take pieces of (kind, text). After a stop string was met nothing more is shown."""
        events: list[Event] = []
        for kind, text in pieces:
            if self.complete or self.failed:
                break
            if self._forced and kind == "normal":
                if self._kind != "tool" and not text.strip():
                    continue
                kind = "tool"
            if kind != self._kind:
                self._change(kind, events)
            if kind == "tool":
                self._write_call(text, events)
            elif kind == "reasoning":
                self._reason(text, events)
            else:
                self._say(text, events)
        return events

    def finish(self, *, cut: bool) -> list[Event]:
        """The end of the answer; ``cut`` when a token limit ended it, so that an open call is not whole."""
        events: list[Event] = []
        if self.complete or self.failed:
            return events
        if self._kind == "tool":
            # Some families never close their last call: the end of the turn closes it.
            self._end_call(events, closed=not cut, at_end=True)
        if rest := self._stops.flush():
            self._emit_text(rest, events)
        if self._space and not self._calls and self._kind == "normal":
            events.append(TextDelta(text=self._space))
        return events

    def _change(self, kind: str, events: list[Event]) -> None:
        if self._kind == "tool":
            self._end_call(events, closed=True, at_end=False)
        elif self._kind == "normal" and (rest := self._stops.flush()):
            self._emit_text(rest, events)
        if self._kind == "reasoning" or self._calls:
            self._space = ""
            self._at_edge = True
        self._kind = kind
        if kind == "reasoning":
            self._at_edge = True

    def _reason(self, text: str, events: list[Event]) -> None:
        if self._at_edge:
            text = text.lstrip()
        if text:
            self._at_edge = False
            body = text.rstrip()
            shown = self._space + body if body else ""
            self._space = text[len(body) :] if body else self._space + text
            if shown:
                events.append(ReasoningDelta(text=shown))

    def _say(self, text: str, events: list[Event]) -> None:
        shown, stop = self._stops.feed(text)
        if shown:
            self._emit_text(shown, events)
        if stop is not None:
            self.stop_string = stop
            self.cut_characters = self._stops.cut

    def _emit_text(self, text: str, events: list[Event]) -> None:
        if self._at_edge:
            text = text.lstrip()
            if not text:
                return
            self._at_edge = False
        if self._parse_tool is None:
            events.append(TextDelta(text=text))
            return
        # White space before a call belongs to the call: hold it until something else follows.
        body = text.rstrip()
        if body:
            events.append(TextDelta(text=self._space + body))
            self._space = text[len(body) :]
        else:
            self._space += text

    def _write_call(self, text: str, events: list[Event]) -> None:
        self._call += text
        if not self._incremental or self._parse_tool is None:
            return
        before = self._partial.name
        more = self._partial.feed(text)
        if self._partial.name is not None and before is None:
            self._partial_id = self._make_id()
            events.append(ToolCallStarted(index=self._calls, id=self._partial_id, name=self._partial.name))
        if more:
            events.append(ToolCallArguments(index=self._calls, text=more))

    def _end_call(self, events: list[Event], *, closed: bool, at_end: bool) -> None:
        text, self._call = self._call, ""
        partial, self._partial = self._partial, PartialCall()
        if partial.name is not None:
            self._end_partial(partial, events, closed=closed)
            return
        calls = self._read_calls(text) if closed else None
        if calls is None:
            start, end = self._markers
            raw = text if self._forced else start + text + ("" if at_end else end)
            self._at_edge = False
            events.append(TextDelta(text=self._space + raw))
            self._space = ""
            return
        for name, arguments in calls:
            events.append(ToolCallDone(index=self._calls, id=self._make_id(), name=name, arguments=arguments))
            self._calls += 1
        self._space = ""
        self._at_edge = True

    def _end_partial(self, partial: PartialCall, events: list[Event], *, closed: bool) -> None:
        """A call that was told while it was written cannot become text any more."""
        self._space = ""
        self._at_edge = True
        assert partial.name is not None
        if not closed:
            return  # cut by a limit, which is told as the reason of the end
        try:
            whole = partial.complete and isinstance(json.loads(partial.arguments), dict)
        except ValueError:
            whole = False
        if not whole:
            self.failed = True
            events.append(
                Failure(
                    code=ErrorCode.ENGINE_FAILED, message="the model wrote a tool call whose arguments are not JSON"
                )
            )
            return
        arguments = partial.arguments
        events.append(ToolCallDone(index=self._calls, id=self._partial_id, name=partial.name, arguments=arguments))
        self._calls += 1

    def _read_calls(self, text: str) -> list[tuple[str, str]] | None:
        if self._parse_tool is None:
            return None
        try:
            parsed = json.loads(text) if self._forced else self._parse_tool(text)
        except Exception:  # the parsers are many and raise what they like; all of it means: not a call
            return None
        calls = []
        for call in parsed if isinstance(parsed, list) else [parsed]:
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return None
            arguments = call.get("arguments") or {}
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except ValueError:
                    return None
            if not isinstance(arguments, dict):
                return None
            calls.append((call["name"], json.dumps(arguments, ensure_ascii=False)))
        return calls or None
