"""OpenAI's Responses: the request as a chat, the answer as items and events.

Nothing is stored: ``previous_response_id`` is refused, ``store`` answered with false.
"""

import time
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from plait.gateway.dialects import Head, chat_logprobs
from plait.gateway.failure import ApiError, invalid, refused
from plait.gateway.frames import Result, Usage, named
from plait.gateway.requests import (
    TOOLS_MAX,
    Called,
    CalledFunction,
    ChatRequest,
    FunctionSpec,
    Message,
    Part,
    PlaitFields,
    Positive,
    Probability,
    Provider,
    ResponseFormat,
    SchemaSpec,
    Temperature,
    ToolSpec,
)
from plait.gateway.running import Piece
from plait.gateway.tools import ToolCall
from plait.types import TOP_LOGPROBS_MAX

CHAT_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""What a chat's fields are called here."""
_LOGPROBS = "message.output_text.logprobs"


class InputItem(Struct):
    """One item of the input: a message, a call, or what a call returned."""

    type: str = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class FlatTool(Struct):
    """A function, as Responses has it."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextFormat(Struct):
    """What the text must look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(Struct):
    """The request's ``text``."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponsesRequest(Struct, kw_only=True):
    """``POST /v1/responses``."""

    model: str
    input: str | Annotated[list[InputItem], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    include: list[str] | None = None
    stream: bool | None = None
    tools: Annotated[list[FlatTool], Meta(max_length=TOOLS_MAX)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FlatTool | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    previous_response_id: str | None = None
    background: bool | None = None
    conversation: Any = None
    prompt: Any = None
    truncation: Literal["auto", "disabled"] | None = None
    metadata: dict[str, str] | None = None
    provider: Provider | None = None
    plait: PlaitFields | None = None


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """The chat that a request stands for; raises ``ApiError`` for what cannot be honoured."""
    if request.previous_response_id:
        raise refused("previous_response_id", "responses are not stored: send the whole input")
    if request.background:
        raise refused("background", "background responses are not supported")
    for name in ("conversation", "prompt"):
        if getattr(request, name) is not None:
            raise refused(name, f"nothing is stored, no {name} either: send the whole input")
    if request.truncation == "auto":
        raise refused("truncation", "input that does not fit the context is refused, not cut")
    wants = bool(request.top_logprobs) or _LOGPROBS in (request.include or ())
    return ChatRequest(
        model=request.model,
        messages=_messages(request),
        stream=request.stream,
        max_tokens=request.max_output_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        logprobs=wants,
        top_logprobs=request.top_logprobs,
        tools=[_tool(tool, f"tools[{number}]") for number, tool in enumerate(request.tools or ())],
        tool_choice=_choice(request.tool_choice),
        response_format=_format(request.text),
        provider=request.provider,
        plait=request.plait,
    )


def _messages(request: ResponsesRequest) -> list[Message]:
    messages = [Message("system", request.instructions)] if request.instructions else []
    if isinstance(request.input, str):
        return [*messages, Message("user", request.input)]
    for number, item in enumerate(request.input):
        messages.append(_message(item, f"input[{number}]"))
    return messages


def _message(item: InputItem, where: str) -> Message:
    match item.type:
        case "message":
            if item.role is None or item.content is None:
                raise invalid(where, "a message has a role and content")
            return Message(item.role, _parts(item.content))
        case "function_call":
            if item.name is None:
                raise invalid(f"{where}.name", "a call has a name")
            function = CalledFunction(item.name, item.arguments or "{}")
            return Message("assistant", tool_calls=[Called(function, item.call_id or "")])
        case "function_call_output":
            if not item.call_id:
                raise invalid(f"{where}.call_id", "an output says which call it is of")
            return Message("tool", _parts(item.output or ""), tool_call_id=item.call_id)
        case "reasoning":
            return Message("assistant", "")
    raise refused(f"{where}.type", f"input of type {item.type!r} is not supported")


def _parts(content: str | list[Part]) -> str | list[Part]:
    if isinstance(content, str):
        return content
    names = {"input_text": "text", "output_text": "text"}
    return [Part(names.get(part.type, part.type), part.text) for part in content]


def _tool(tool: FlatTool, where: str) -> ToolSpec:
    if tool.type != "function" or not tool.name:
        raise refused(f"{where}.type", f"tools of type {tool.type!r} are not supported")
    try:
        spec = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
        return ToolSpec(msgspec.convert(spec, FunctionSpec))
    except msgspec.ValidationError as error:
        raise invalid(where, str(error)) from error


def _choice(choice: Any) -> Any:
    return _tool(choice, "tool_choice") if isinstance(choice, FlatTool) else choice


def _format(text: TextOptions | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    given = text.format
    schema = SchemaSpec(given.name or "", given.schema) if given.schema is not None else None
    return ResponseFormat(given.type, schema)


class ResponsesDialect:
    """The answer as items; one message item at most, and one item per call."""

    def __init__(self, head: Head, request: ResponsesRequest) -> None:
        self._head, self._request = head, request
        self._logprobs = bool(request.top_logprobs) or _LOGPROBS in (request.include or ())
        self._sequence = 0
        self._items: list[dict[str, Any]] = []
        self._texts: list[str] = []
        self._open = False

    def begin(self, results: list[Result]) -> list[bytes]:
        """The response, without output."""
        response = self._response("in_progress", [])
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def piece(self, piece: Piece) -> list[bytes]:
        """Deltas of the message, and whole calls."""
        frames = []
        if piece.text:
            frames += [] if self._open else self._open_message()
            self._texts.append(piece.text)
            tokens = chat_logprobs(self._head.model, piece.tokens)["content"]
            frames.append(
                self._part_event(
                    "output_text.delta",
                    delta=piece.text,
                    logprobs=tokens if self._logprobs else [],
                )
            )
        for call in piece.calls:
            frames += self._close_message(None) + self._call_frames(call)
        return frames

    def finish(self, result: Result, plait: dict[str, Any]) -> list[bytes]:
        """The message is whole."""
        if not self._items and not self._open:
            return self._open_message() + self._close_message(result)
        return self._close_message(result)

    def end(self, results: list[Result], usage: Usage) -> list[bytes]:
        """The whole response."""
        status = _status(results[0])
        body = self._response(status, self._items, results[0], usage)
        return [self._event(f"response.{status}", response=body)]

    def failed(self, problem: ApiError) -> list[bytes]:
        """The response with its error."""
        body = self._response("failed", self._items)
        body["error"] = {"code": "server_error", "message": str(problem)}
        error = problem.body()["error"]
        return [
            self._event("response.failed", response=body),
            self._event(
                "error", code=error["code"], message=error["message"], param=error["param"]
            ),
        ]

    def whole(self, results: list[Result], usage: Usage, plait: dict[str, Any]) -> dict[str, Any]:
        """The response."""
        result = results[0]
        items = [] if result.calls and not result.text else [self._message(result.text, result)]
        items += [_call_item(call) for call in result.calls]
        body = self._response(_status(result), items, result, usage)
        return body | {"plait": plait}

    def _open_message(self) -> list[bytes]:
        self._open = True
        item = self._message("", None) | {"status": "in_progress", "content": []}
        return [
            self._event("response.output_item.added", output_index=len(self._items), item=item),
            self._part_event("content_part.added", part=_part("", [])),
        ]

    def _close_message(self, result: Result | None) -> list[bytes]:
        if not self._open:
            return []
        self._open = False
        item = self._message("".join(self._texts), result)
        part = item["content"][0]
        self._texts.clear()
        frames = [
            self._part_event("output_text.done", text=part["text"], logprobs=part["logprobs"]),
            self._part_event("content_part.done", part=part),
            self._event("response.output_item.done", output_index=len(self._items), item=item),
        ]
        self._items.append(item)
        return frames

    def _call_frames(self, call: ToolCall) -> list[bytes]:
        item, index = _call_item(call), len(self._items)
        where = {"item_id": item["id"], "output_index": index}
        added = item | {"status": "in_progress", "arguments": ""}
        arguments = "response.function_call_arguments"
        self._items.append(item)
        return [
            self._event("response.output_item.added", output_index=index, item=added),
            self._event(f"{arguments}.delta", **where, delta=call.arguments),
            self._event(f"{arguments}.done", **where, name=call.name, arguments=call.arguments),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _message(self, text: str, result: Result | None) -> dict[str, Any]:
        tokens: list[Any] = []
        if self._logprobs and result is not None:
            tokens = chat_logprobs(self._head.model, result.tokens)["content"]
        incomplete = result is not None and _status(result) == "incomplete"
        return {
            "id": f"msg_{self._head.id[5:]}_{len(self._items)}",
            "type": "message",
            "status": "incomplete" if incomplete else "completed",
            "role": "assistant",
            "content": [_part(text, tokens)],
        }

    def _part_event(self, name: str, **members: Any) -> bytes:
        item = f"msg_{self._head.id[5:]}_{len(self._items)}"
        where = {"item_id": item, "output_index": len(self._items), "content_index": 0}
        return self._event(f"response.{name}", **where, **members)

    def _event(self, kind: str, **members: Any) -> bytes:
        self._sequence += 1
        return named(kind, {"type": kind, "sequence_number": self._sequence - 1} | members)

    def _response(
        self,
        status: str,
        items: list[dict[str, Any]],
        result: Result | None = None,
        usage: Usage | None = None,
    ) -> dict[str, Any]:
        request = self._request
        incomplete = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._head.id,
            "object": "response",
            "created_at": self._head.created,
            "completed_at": int(time.time()) if usage is not None else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": incomplete,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "model": self._head.model.name,
            "output": items,
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if request.temperature is None else request.temperature,
            "text": {"format": _told_format(request.text)},
            "tool_choice": request.tool_choice or "auto",
            "tools": [msgspec.to_builtins(tool) for tool in request.tools or ()],
            "top_logprobs": request.top_logprobs or 0,
            "top_p": 1.0 if request.top_p is None else request.top_p,
            "truncation": "disabled",
            "usage": None if usage is None else _usage(usage),
            "user": None,
            "metadata": request.metadata or {},
        }


def _told_format(text: TextOptions | None) -> dict[str, Any]:
    given = text.format if text is not None and text.format is not None else TextFormat()
    told = {"type": given.type}
    if given.type == "json_schema":
        return told | {"name": given.name or "", "schema": given.schema, "strict": given.strict}
    return told


def _status(result: Result) -> str:
    return "incomplete" if result.finished.finish_reason == "length" else "completed"


def _part(text: str, logprobs: list[Any]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _call_item(call: ToolCall) -> dict[str, Any]:
    return {
        "id": "fc_" + call.id.removeprefix("call_"),
        "type": "function_call",
        "status": "completed",
        "call_id": call.id,
        "name": call.name,
        "arguments": call.arguments,
    }


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "cost": usage.cost,
    }
