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
from mlx_router_worker.text.json_calls import JsonCallReader, ReadCall, calls_in, read_json
from mlx_router_worker.text.stop_strings import StopStrings
from mlx_router_worker.text.tagged_calls import end_of_call, is_in_value

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
        json_calls: bool = False,
        incremental: bool = False,
        forced: bool = False,
        max_calls: int | None = None,
    ) -> None:
        """``parse_tool`` is None when no tools were offered: what looks like a call is text then.

        ``json_calls``: the model writes its calls in JSON. ``incremental`` tells such calls while they are written.
        ``forced``: everything but thinking is one call in JSON, with or without markers. ``max_calls``: the answer is
        ``complete`` after so many.
        """
        self._stops = StopStrings(stops)
        self._parse_tool = parse_tool
        self._markers = tool_markers
        self._make_id = make_id
        self._json_calls = json_calls or incremental or forced
        self._incremental = incremental
        self._forced = forced
        self._max_calls = max_calls
        self._call = ""
        self._reader = JsonCallReader()
        self._call_id = ""
        self._calls = 0
        self._read = 0
        """Calls of the block that is being written."""
        self._no_calls = ""
        """Text between those calls that is not a call."""
        self._raw_kind = "normal"
        """The kind of the last piece, before an end marker inside an argument was undone."""
        self._searched = 0
        """So far the call has been searched for its end."""
        self._reopened = False
        """What looked like the end of a call was inside one of its strings."""
        self._skipping = self._skipped = ""
        """The end marker that is still to come, and the text that may be the beginning of it."""
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
            raw_kind, self._raw_kind = self._raw_kind, kind
            if self._skipping:
                kind = self._kind_while_skipping(raw_kind, kind, events)
            if self._forced and kind == "normal":
                if self._kind != "tool" and not text.strip():
                    continue
                kind = "tool"
            elif self._kind == "tool" and (self._reopened or kind == "normal") and self._is_inside_value():
                # The model wrote the end marker as part of an argument, and may write more markers in it.
                if kind != raw_kind:
                    text = self._markers[kind == "normal"] + text
                self._reopened = True
                kind = "tool"
            if self._skipping and kind == "normal":
                self._skip_marker(text, events)
                continue
            if kind != self._kind:
                self._change(kind, events)
            if kind == "tool":
                self._write_call(text, events)
            elif kind == "reasoning":
                self._reason(text, events)
            else:
                self._say(text, events)
        return events

    def _kind_while_skipping(self, before: str, kind: str, events: list[Event]) -> str:
        """How to take a piece behind a call that is whole, before its end marker has been seen."""
        if before == "tool" and kind == "normal":
            # What splits the text has taken the end marker out of it.
            skipped, self._skipping, self._skipped = self._skipped, "", ""
            self._say(skipped, events)
        return "normal" if before == kind == "tool" else kind

    def _is_inside_value(self) -> bool:
        """Whether an apparent end marker is inside an argument."""
        if self._parse_tool is None or not self._markers[1]:
            return False
        return self._reopened or (self._reader.in_string if self._json_calls else is_in_value(self._call))

    def finish(self, *, cut: bool) -> list[Event]:
        """The end of the answer; ``cut`` when a token limit ended it, so that an open call is not whole."""
        events: list[Event] = []
        if self.complete or self.failed:
            return events
        if self._kind == "tool" and self._reopened and not self._json_calls:
            self._end_reopened(events, at_any=True)  # an argument that is never closed
        if self._kind == "tool":
            # Some families never close their last call: the end of the turn closes it.
            self._end_call(events, closed=not cut, at_end=True)
        if self._skipped:
            self._say(self._skipped, events)
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
        if not self._json_calls or self._parse_tool is None:
            if self._reopened:
                self._end_reopened(events)
            return
        while text and not self.failed:
            calls, text = self._reader.feed(text)
            for call in calls:
                self._note_call(call, events)
            if self._reopened and self._reader.is_balanced:
                # The call whose argument held an end marker is whole now; its own end marker is still to come.
                self._end_call(events, closed=True, at_end=False)
                self._skipping = self._markers[1]
                self._kind = "normal"
                self._skip_marker(text, events)
                return
            if text:
                self._no_calls += self._reader.rest
                self._reader = JsonCallReader()

    def _end_reopened(self, events: list[Event], *, at_any: bool = False) -> None:
        """End a tagged call at the first end marker outside of its arguments; with ``at_any`` at the first of all."""
        marker = self._markers[1]
        start, self._searched = self._searched, max(len(self._call) - len(marker), 0)
        at = self._call.find(marker) if at_any else end_of_call(self._call, marker, start)
        if at < 0:
            return
        rest = self._call[at + len(marker) :]
        self._call = self._call[:at]
        self._end_call(events, closed=True, at_end=False)
        self._kind = self._raw_kind = "normal"
        # What follows may hold further calls, whose markers were put back.
        while rest and not self.complete:
            text, opened, rest = rest.partition(self._markers[0])
            body, _, rest = rest.partition(marker)
            events += self.feed([("normal", text), *([("tool", body), ("normal", "")] if opened else [])])

    def _note_call(self, call: ReadCall, events: list[Event]) -> None:
        if call.begins:
            self._call_id = self._make_id()
            if self._incremental:
                events.append(ToolCallStarted(index=self._calls, id=self._call_id, name=call.name))
        if self._incremental and call.more:
            events.append(ToolCallArguments(index=self._calls, text=call.more))
        if call.done:
            self._finish_call(call, events)

    def _finish_call(self, call: ReadCall, events: list[Event]) -> None:
        """A call whose last bracket has been written."""
        try:
            whole = isinstance(json.loads(call.arguments), dict)
        except (ValueError, RecursionError):
            whole = False
        if whole:
            done = ToolCallDone(index=self._calls, id=self._call_id, name=call.name, arguments=call.arguments)
            events.append(done)
            self._calls += 1
            self._read += 1
        elif self._incremental:
            self._fail(events)

    def _skip_marker(self, text: str, events: list[Event]) -> None:
        """Take text of which the end marker of a call is the beginning."""
        self._skipped += text
        bare = self._skipped.lstrip()
        if bare.startswith(self._skipping):
            rest = bare[len(self._skipping) :]
        elif self._skipping.startswith(bare):
            return  # it may still become the marker
        else:
            rest = self._skipped
        self._skipping = self._skipped = ""
        if rest:
            self._say(rest, events)

    def _end_call(self, events: list[Event], *, closed: bool, at_end: bool) -> None:
        text, self._call = self._call, ""
        reader, self._reader = self._reader, JsonCallReader()
        read, self._read = self._read, 0
        no_calls, self._no_calls = self._no_calls + reader.rest, ""
        self._searched = 0
        self._reopened = False
        if reader.begun and self._incremental:
            # A call of which parts have been sent cannot become text any more.
            self._space = ""
            self._at_edge = True
            if closed:  # else a limit has cut it, and the finish reason says so
                self._fail(events)
            return
        if read:
            self._space = ""
            self._at_edge = True
            if no_calls and closed:
                self._say(no_calls, events)
            return
        calls = self._read_calls(text) if closed else None
        if calls is None:
            start, end = self._markers
            raw = text if self._forced else start + text + ("" if at_end else end)
            self._at_edge = False
            events.append(TextDelta(text=self._space + raw))
            self._space = ""
            return
        for name, arguments, call_id in calls:
            events.append(
                ToolCallDone(index=self._calls, id=call_id or self._make_id(), name=name, arguments=arguments)
            )
            self._calls += 1
        self._space = ""
        self._at_edge = True

    def _fail(self, events: list[Event]) -> None:
        self.failed = True
        events.append(
            Failure(code=ErrorCode.ENGINE_FAILED, message="the model wrote a tool call whose arguments are not JSON")
        )

    def _read_calls(self, text: str) -> list[tuple[str, str, str]] | None:
        """Name, arguments and the model's own id of each call; None if this is no call."""
        if self._parse_tool is None:
            return None
        parsers = [] if self._forced else [self._parse_tool]
        for parse in [*parsers, read_json] if self._json_calls else parsers:
            try:
                return calls_in(parse(text))
            except Exception:  # noqa: S112  # the parsers are many and raise what they like: this is no call for it
                continue
        return None
