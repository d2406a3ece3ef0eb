"""Which answers are guided token by token: those under a schema, forced or strict calls, and limited thinking."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from msgspec.structs import replace

from mlx_router_shared.errors import InvalidRequest, UnsupportedCapability
from mlx_router_shared.generation import GenerationRequest, Tool
from mlx_router_worker.generation.sampling import GuideProcessor
from mlx_router_worker.text.grammar import Grammars
from mlx_router_worker.text.guide import Guide, Markers
from mlx_router_worker.text.renderer import is_chat
from mlx_router_worker.text.schemas import answer_grammar, call_grammar

__all__ = ["Guides"]

_LONGEST_PROBLEM: Final = 200
_JSON_CALLS: Final = "mlx_lm.tool_parsers.json_tools"
_JSON_ARGUMENTS: Final = "mlx_lm.tool_parsers.mistral"


class Guides:
    """Makes the guides of one model. Its grammars are built when the first one is needed."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self._tokenizer = tokenizer
        self._folder = folder
        self._grammars: Grammars | None = None

    @property
    def calls_are_json(self) -> bool:
        """Whether this model's family writes tool calls as JSON between two markers."""
        return getattr(self._tokenizer.tool_parser, "__module__", "") == _JSON_CALLS

    @property
    def calls_hold_json(self) -> bool:
        """Whether the arguments of its calls are JSON, behind a name that is not."""
        return getattr(self._tokenizer.tool_parser, "__module__", "") == _JSON_ARGUMENTS

    def guide(self, request: GenerationRequest, pieces: Any, budget: int) -> GuideProcessor | None:
        """Return what watches an answer token by token; None if nothing has to.

        ``pieces`` is the state in which the answer begins, ``budget`` the most tokens that it may have. Raises
        ``InvalidRequest`` for a grammar that cannot be enforced, ``UnsupportedCapability`` without a tokenizer.json.
        """
        strict = any(tool.strict for tool in request.tools) and self.calls_are_json and not request.forced_tools
        may_call = bool(request.tools) and self._tokenizer.has_tool_calling and not request.forced_tools
        thinks = is_chat(request) and self._tokenizer.has_thinking
        limited = thinks and request.max_thinking_tokens is not None
        if request.schema is None and not request.forced_tools and not strict and not limited:
            return None
        text = None
        strict_call = self._follow_calls(request.tools) if strict and may_call else None
        if request.forced_tools:
            text = self._follow_calls([tool for tool in request.tools if tool.name in request.forced_tools])
        elif request.schema is not None:
            text = self.follow(answer_grammar(request.schema))
        lead: list[int] = []
        if request.forced_tools and self.calls_are_json:
            lead = self._encode(self._tokenizer.tool_call_start + "\n")
        return GuideProcessor(
            Guide(
                markers=self._markers(),
                end_tokens=sorted(self._tokenizer.eos_token_ids),
                budget=budget,
                text=text,
                call=(lambda: strict_call.copy() if strict_call is not None else None) if may_call else None,
                lead=lead,
                may_think=thinks and request.thinking is not False,
                is_thinking=pieces is not None and pieces[0] == "reasoning",
                max_thinking_tokens=request.max_thinking_tokens,
            )
        )

    def _markers(self) -> Markers:
        tokenizer = self._tokenizer
        return Markers(
            think_start=tokenizer.think_start_tokens or (),
            think_end=tokenizer.think_end_tokens or (),
            call_start=tokenizer.tool_call_start_tokens or (),
            call_end=tokenizer.tool_call_end_tokens or (),
            space=[tokens[0] for text in ("\n", "\n\n") if len(tokens := self._encode(text)) == 1],
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _tokenizer_json(self) -> str:
        file = self._folder / "tokenizer.json"
        if file.exists():
            return file.read_text(encoding="utf-8")
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedCapability(
                "this model's tokenizer has no tokenizer.json, which formats, schemas and required tool calls need"
            )
        return str(backend.to_str())

    def _follow_calls(self, tools: list[Tool]) -> Any:
        """Follow the call of one of these tools; parameters that cannot be enforced are refused of strict ones only."""
        try:
            return self.follow(call_grammar(tools))
        except InvalidRequest:
            if all(tool.strict for tool in tools):
                raise
            return self.follow(
                call_grammar([tool if tool.strict else replace(tool, parameters="{}") for tool in tools])
            )

    def follow(self, grammar: str) -> Any:
        """Return a follower of a grammar from its beginning. Raises as ``guide`` does."""
        if self._grammars is None:
            self._grammars = Grammars(self._tokenizer_json(), sorted(self._tokenizer.eos_token_ids))
        follower = self._grammars.follow(grammar)
        if problem := follower.broken or follower.fails_early():
            raise InvalidRequest(f"the schema cannot be enforced: {problem.splitlines()[0][:_LONGEST_PROBLEM]}")
        return follower
