"""Anthropic's Messages: the request as a chat, the answer as content blocks and events."""

import json
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from plait.gateway.dialects import Head
from plait.gateway.failure import ApiError, invalid, refused
from plait.gateway.frames import Result, Usage, named
from plait.gateway.requests import (
    STOP_CHARACTERS_MAX,
    TOOLS_MAX,
    Called,
    CalledFunction,
    ChatRequest,
    FunctionSpec,
    Message,
    PlaitFields,
    Positive,
    Probability,
    Provider,
    ToolSpec,
)
from plait.gateway.running import Piece
from plait.gateway.tools import ToolCall

ID_PREFIX = "msg_"
CHAT_NAMES = {"messages": "messages", "stop": "stop_sequences"}
"""What a chat's fields are called here; its messages are numbered otherwise."""


class Content(Struct):
    """A piece of content: text, a call, or what a call returned."""

    type: str
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Any = None


class Turn(Struct):
    """A message."""

    role: Literal["user", "assistant"]
    content: str | list[Content]


class InputTool(Struct):
    """A tool, as Messages has it."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class ToolChoice(Struct):
    """Whether a tool must be used, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None


class Thinking(Struct):
    """Whether the model is to think first."""

    type: str


class OutputOptions(Struct):
    """What the answer must look like."""

    format: Any = None


class CountRequest(Struct, kw_only=True):
    """``POST /v1/messages/count_tokens``."""

    model: str
    messages: Annotated[list[Turn], Meta(min_length=1)]
    system: str | list[Content] | None = None
    tools: Annotated[list[InputTool], Meta(max_length=TOOLS_MAX)] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountRequest, kw_only=True):
    """``POST /v1/messages``."""

    max_tokens: Positive
    stop_sequences: (
        Annotated[
            list[Annotated[str, Meta(min_length=1, max_length=STOP_CHARACTERS_MAX)]],
            Meta(max_length=16),
        ]
        | None
    ) = None
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=1)] | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=0)] | None = None
    mcp_servers: list[Any] | None = None
    output_format: Any = None
    output_config: OutputOptions | None = None
    provider: Provider | None = None
    plait: PlaitFields | None = None


def as_chat(request: CountRequest) -> ChatRequest:
    """The chat that a request stands for; raises ``ApiError`` for what cannot be honoured."""
    _check(request)
    messages = []
    if request.system:
        messages.append(Message("system", _text(request.system, "system")))
    for number, turn in enumerate(request.messages):
        messages += _turn(turn, f"messages[{number}]")
    mode: Any = {"any": "required", "none": "none"}.get(
        request.tool_choice.type if request.tool_choice else "auto", "auto"
    )
    if request.tool_choice is not None and request.tool_choice.type == "tool":
        mode = ToolSpec(FunctionSpec(request.tool_choice.name or ""))
    chat = ChatRequest(
        model=request.model,
        messages=messages,
        tools=[_tool(tool, f"tools[{number}]") for number, tool in enumerate(request.tools or ())],
        tool_choice=mode,
    )
    if isinstance(request, MessagesRequest):
        chat.max_tokens, chat.stream = request.max_tokens, request.stream
        chat.temperature, chat.top_p = request.temperature, request.top_p
        chat.top_k, chat.stop = request.top_k, request.stop_sequences
        chat.provider, chat.plait = request.provider, request.plait
    return chat


def _check(request: CountRequest) -> None:
    if request.thinking is not None and request.thinking.type != "disabled":
        raise refused("thinking", "thinking is not supported")
    if not isinstance(request, MessagesRequest):
        return
    if request.mcp_servers:
        raise refused("mcp_servers", "no servers are asked: call tools yourself")
    if request.output_format is not None:
        raise refused("output_format", "formats are for /v1/chat/completions and /v1/responses")
    if request.output_config is not None and request.output_config.format is not None:
        why = "formats are for /v1/chat/completions and /v1/responses"
        raise refused("output_config.format", why)


def _tool(tool: InputTool, where: str) -> ToolSpec:
    if tool.input_schema is None:
        raise refused(f"{where}.type", "only tools with an input_schema are supported")
    spec = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
    }
    try:
        return ToolSpec(msgspec.convert(spec, FunctionSpec))
    except msgspec.ValidationError as error:
        raise invalid(where, str(error)) from error


def _turn(turn: Turn, where: str) -> list[Message]:
    """A message, after one for each result of a call that it carries."""
    if isinstance(turn.content, str):
        return [Message(turn.role, turn.content)]
    results, texts, calls = list[Message](), list[str](), list[Called]()
    for number, part in enumerate(turn.content):
        at = f"{where}.content[{number}]"
        match part.type:
            case "text":
                texts.append(part.text or "")
            case "tool_use":
                arguments = json.dumps(part.input or {}, ensure_ascii=False)
                calls.append(Called(CalledFunction(part.name or "", arguments), part.id or ""))
            case "tool_result":
                if not part.tool_use_id:
                    raise invalid(f"{at}.tool_use_id", "a result says which call it is of")
                text = _result(part.content, at)
                results.append(Message("tool", text, tool_call_id=part.tool_use_id))
            case "thinking" | "redacted_thinking":
                pass
            case other:
                raise refused(f"{at}.type", f"content of type {other!r} is not supported")
    if texts or calls or not results:
        results.append(Message(turn.role, "\n".join(texts), tool_calls=calls or None))
    return results


def _result(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    try:
        return _text(msgspec.convert(content, list[Content]), where)
    except msgspec.ValidationError as error:
        raise invalid(f"{where}.content", str(error)) from error


def _text(content: str | list[Content], where: str) -> str:
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        if part.type != "text":
            why = f"content of type {part.type!r} is not supported, only text"
            raise refused(f"{where}[{number}].type", why)
    return "\n".join(part.text or "" for part in content)


class MessagesDialect:
    """The answer as content blocks."""

    def __init__(self, head: Head) -> None:
        self._head = head
        self._index = -1
        self._in_text = False
        self._plait: dict[str, Any] = {}

    def begin(self, results: list[Result]) -> list[bytes]:
        """The message, empty."""
        # How much of the prompt was cached is known at the end, and told there.
        usage = Usage(results[0].job.prompt_tokens, 0, 0)
        message = self._message([], None, None, _usage(usage))
        return [named("message_start", {"type": "message_start", "message": message})]

    def piece(self, piece: Piece) -> list[bytes]:
        """Deltas of a text block, and blocks of calls."""
        frames = []
        if piece.text:
            frames += [] if self._in_text else self._start({"type": "text", "text": ""})
            self._in_text = True
            frames.append(self._delta({"type": "text_delta", "text": piece.text}))
        for call in piece.calls:
            frames += self._stop() + self._start(_use(call) | {"input": {}})
            frames.append(self._delta({"type": "input_json_delta", "partial_json": call.arguments}))
            self._in_text = True  # a block is open
            frames += self._stop()
        return frames

    def finish(self, result: Result, plait: dict[str, Any]) -> list[bytes]:
        """The end of the last block."""
        self._plait = plait
        if self._index < 0:
            self._in_text = True
            return self._start({"type": "text", "text": ""}) + self._stop()
        return self._stop()

    def end(self, results: list[Result], usage: Usage) -> list[bytes]:
        """The reason and the usage."""
        reason, stop = _reason(results[0])
        delta = {"stop_reason": reason, "stop_sequence": stop}
        told = {"type": "message_delta", "delta": delta, "usage": _usage(usage)}
        return [
            named("message_delta", told | {"plait": self._plait}),
            named("message_stop", {"type": "message_stop"}),
        ]

    def failed(self, problem: ApiError) -> list[bytes]:
        """An error event."""
        return [named("error", problem.anthropic_body(self._head.id.removeprefix(ID_PREFIX)))]

    def whole(self, results: list[Result], usage: Usage, plait: dict[str, Any]) -> dict[str, Any]:
        """The message."""
        result = results[0]
        content: list[dict[str, Any]] = []
        if result.text or not result.calls:
            content.append({"type": "text", "text": result.text})
        content += [_use(call) for call in result.calls]
        reason, stop = _reason(result)
        return self._message(content, reason, stop, _usage(usage)) | {"plait": plait}

    def _start(self, block: dict[str, Any]) -> list[bytes]:
        self._index += 1
        kind = "content_block_start"
        return [named(kind, {"type": kind, "index": self._index, "content_block": block})]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        kind = "content_block_delta"
        return named(kind, {"type": kind, "index": self._index, "delta": delta})

    def _stop(self) -> list[bytes]:
        if not self._in_text:
            return []
        self._in_text = False
        kind = "content_block_stop"
        return [named(kind, {"type": kind, "index": self._index})]

    def _message(
        self,
        content: list[dict[str, Any]],
        reason: str | None,
        stop: str | None,
        usage: dict[str, Any],
    ) -> dict[str, Any]:
        return {
            "id": self._head.id,
            "type": "message",
            "role": "assistant",
            "model": self._head.model.name,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": usage,
        }


def _use(call: ToolCall) -> dict[str, Any]:
    try:
        given = json.loads(call.arguments)
    except ValueError:
        given = {}
    return {
        "type": "tool_use",
        "id": "toolu_" + call.id.removeprefix("call_"),
        "name": call.name,
        "input": given if isinstance(given, dict) else {},
    }


def _reason(result: Result) -> tuple[str, str | None]:
    outcome = result.finished
    if outcome.stop is not None:
        return "stop_sequence", outcome.stop
    names = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
    return names[outcome.finish_reason], None


def _usage(usage: Usage) -> dict[str, Any]:
    """As theirs: ``input_tokens`` leaves out what was cached."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        "cost": usage.cost,
    }
