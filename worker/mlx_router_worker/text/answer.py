"""From the text of a model to events: reasoning, content, tool calls, stop strings.

The pieces come already cut by kind ("normal", "reasoning", "tool") from mlx-lm's text state machine; this decides
what a client sees of them. A tool call that cannot be read is text: it is shown as the model wrote it, never half.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from mlx_router_shared.generation import Event, FinishReason, ReasoningDelta, TextDelta, ToolCallDelta
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
    ) -> None:
        """``parse_tool`` is None when no tools were offered: what looks like a call is text then."""
        self._stops = StopStrings(stops)
        self._parse_tool = parse_tool
        self._markers = tool_markers
        self._make_id = make_id
        self._call = ""
        self._calls = 0
        self._space = ""
        """White space not shown yet: it is dropped at the edges of reasoning and of calls."""
        self._kind = "normal"
        self._at_edge = False
        self.stop_string: str | None = None

    @property
    def finish_reason(self) -> FinishReason:
        """Why an answer that ended by itself ended."""
        return FinishReason.TOOL_CALLS if self._calls else FinishReason.STOP

    def feed(self, pieces: list[tuple[str, str]]) -> list[Event]:
        """Take pieces of (kind, text). After a stop string was met nothing more is shown."""
        events: list[Event] = []
        for kind, text in pieces:
            if self.stop_string is not None:
                break
            if kind != self._kind:
                self._change(kind, events)
            if kind == "tool":
                self._call += text
            elif kind == "reasoning":
                self._reason(text, events)
            else:
                self._say(text, events)
        return events

    def finish(self, *, cut: bool) -> list[Event]:
        """The end of the answer; ``cut`` when a token limit ended it, so that an open call is not whole."""
        events: list[Event] = []
        if self.stop_string is not None:
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

    def _end_call(self, events: list[Event], *, closed: bool, at_end: bool) -> None:
        text, self._call = self._call, ""
        calls = self._read_calls(text) if closed else None
        if calls is None:
            start, end = self._markers
            raw = start + text + ("" if at_end else end)
            self._at_edge = False
            events.append(TextDelta(text=self._space + raw))
            self._space = ""
            return
        for name, arguments in calls:
            events.append(ToolCallDelta(index=self._calls, id=self._make_id(), name=name, arguments=arguments))
            self._calls += 1
        self._space = ""
        self._at_edge = True

    def _read_calls(self, text: str) -> list[tuple[str, str]] | None:
        if self._parse_tool is None:
            return None
        try:
            parsed = self._parse_tool(text)
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
