"""Request bodies: decoded strictly where it matters.

A field that we understand and cannot honour is refused by name rather than ignored. Unknown
fields of the APIs' own are accepted, as their clients send ever more of them; unknown members
of ``provider`` and ``plait`` are refused, as a misspelt limit would limit nothing.
"""

import json
import re
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from plait.gateway.failure import INVALID, ApiError, invalid, refused
from plait.types import BIASES_MAX, TOP_LOGPROBS_MAX

BodyT = TypeVar("BodyT")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Temperature = Annotated[float, Meta(ge=0, le=2)]
Probability = Annotated[float, Meta(ge=0, le=1)]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Count = Annotated[int, Meta(ge=0, le=2**53)]
Seed = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Choices = Annotated[int, Meta(ge=1, le=8)]
TokenIds = list[Count]

STOPS_MAX = 16
TOOLS_MAX = 128
STOP_CHARACTERS_MAX = 256


class StreamOptions(Struct):
    """How to stream."""

    include_usage: bool | None = None


class MaxPrice(Struct, forbid_unknown_fields=True):
    """OpenRouter's object; only a price for the whole request can be kept."""

    request: Count | None = None
    prompt: float | None = None
    completion: float | None = None
    image: float | None = None


class Provider(Struct, forbid_unknown_fields=True):
    """Routing, in OpenRouter's vocabulary; providers are peer ids, prices microcredits."""

    sort: Literal["latency", "price", "throughput", "weighted"] | None = None
    only: list[str] | None = None
    ignore: list[str] | None = None
    max_price: Count | MaxPrice | None = None
    order: list[str] | None = None
    data_collection: Literal["allow", "deny"] | None = None
    zdr: bool | None = None
    quantizations: list[str] | None = None
    allow_fallbacks: bool | None = None
    require_parameters: bool | None = None


class PlaitFields(Struct, forbid_unknown_fields=True):
    """What only Plait has: evidence, bounds on predicted times, grammars of its own, and
    what is kept for the next request."""

    bundle: bool = False
    regex: str | None = None
    lark: str | None = None
    ttft_s: Annotated[float, Meta(gt=0)] | None = None
    tpot_s: Annotated[float, Meta(gt=0)] | None = None
    keep_alive_s: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    """For how long the stages are asked to keep prompt and answer for the next turn."""


class Part(Struct):
    """A part of a message's content."""

    type: str
    text: str | None = None


class CalledFunction(Struct):
    """A call's function; ``arguments`` is JSON."""

    name: str
    arguments: str = "{}"


class Called(Struct):
    """A call that the model made earlier."""

    function: CalledFunction
    id: str = ""
    type: Literal["function"] = "function"


class Message(Struct):
    """A chat message."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None
    tool_calls: list[Called] | None = None
    tool_call_id: str | None = None


class FunctionSpec(Struct):
    """A function that the model may call."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.:-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Struct):
    """A tool: functions only."""

    function: FunctionSpec
    type: Literal["function"] = "function"


class SchemaSpec(Struct):
    """A named JSON schema."""

    name: str = ""
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(Struct):
    """What an answer must look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaSpec | None = None


Bias = Annotated[float, Meta(ge=-100, le=100)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]


class Generating(Struct, kw_only=True):
    """What both kinds of completion take."""

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    max_tokens: Positive | None = None
    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: Annotated[int, Meta(ge=-1)] | None = None
    seed: Seed | None = None
    n: Choices | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=10)] | None = None
    min_p: Probability | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=BIASES_MAX)] | None = None
    provider: Provider | None = None
    plait: PlaitFields | None = None


class ChatRequest(Generating, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    tools: Annotated[list[ToolSpec], Meta(max_length=TOOLS_MAX)] | None = None
    functions: list[Any] | None = None
    function_call: Any = None
    web_search_options: dict[str, Any] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolSpec | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    modalities: list[str] | None = None


class CompletionRequest(Generating, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[str | int | list[int]]
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Meta(ge=0, le=TOP_LOGPROBS_MAX)] | None = None
    best_of: int | None = None
    suffix: str | None = None


class QuoteRequest(Struct, kw_only=True):
    """``POST /v1/quote``: a prompt's length, or messages or a prompt to measure."""

    model: str
    prompt_tokens: Positive | None = None
    messages: list[Message] | None = None
    prompt: str | None = None
    max_tokens: Positive | None = None
    provider: Provider | None = None
    plait: PlaitFields | None = None


class EmbeddingRequest(Struct, kw_only=True):
    """``POST /v1/embeddings``."""

    model: str
    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Positive | None = None
    provider: Provider | None = None


class TokenizeRequest(Struct, kw_only=True):
    """``POST /tokenize``, as vLLM has it; ``model`` may be left out."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Struct, kw_only=True):
    """``POST /detokenize``."""

    tokens: TokenIds
    model: str | None = None


def decoder(kind: type[BodyT]) -> Callable[[bytes], BodyT]:
    """A function from a body to ``kind`` that raises ``ApiError`` naming the wrong field."""
    decoder_ = msgspec.json.Decoder(kind)

    def decode(body: bytes) -> BodyT:
        try:
            return decoder_.decode(body)
        except msgspec.ValidationError as error:
            raise invalid(_field(str(error)), str(error)) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            message = f"the body is not JSON: {_why_not_json(body, error)}"
            raise ApiError(400, message, kind=INVALID, code="invalid_json") from error

    return decode


def _field(message: str) -> str | None:
    """The path of the field that a ``ValidationError`` is about."""
    found = re.search(r"at `\$\.?(.*)`$", message)
    path = found[1] if found else ""
    if member := re.search(r"(?:missing required|unknown) field `([^`]+)`", message):
        return f"{path}.{member[1]}" if path else member[1]
    return path or None


def _why_not_json(body: bytes, error: Exception) -> str:
    """What is wrong with a body, where the decoder's own words mislead."""
    try:
        text = body.decode()
    except UnicodeDecodeError as where:
        # The decoder counts from the beginning of a string.
        return f"byte 0x{body[where.start]:02x} at position {where.start} is not UTF-8"
    if _SURROGATE.search(text):
        with suppress(ValueError, RecursionError):
            json.loads(text)
            return "a string has half of a surrogate pair, which is no character"
    return str(error)


def check_common(request: Generating) -> None:
    """Raise ``ApiError`` for what no answer can honour."""
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options goes with stream: true only")


def check_chat(request: ChatRequest) -> None:
    """Raise ``ApiError`` for what a chat asks and we cannot do."""
    check_common(request)
    if request.functions:
        raise refused("functions", "functions are not supported: use tools")
    if request.function_call not in (None, "none", "auto"):
        raise refused("function_call", "function_call is not supported: use tool_choice")
    if request.web_search_options is not None:
        raise refused("web_search_options", "nothing is searched in the web")
    if set(request.modalities or ()) - {"text"}:
        raise refused("modalities", "only text is supported")
    if request.top_logprobs and not request.logprobs:
        raise invalid("top_logprobs", "top_logprobs goes with logprobs: true only")
    for number, message in enumerate(request.messages):
        if message.role == "tool" and not message.tool_call_id:
            why = "a tool's message says which call it answers"
            raise invalid(f"messages[{number}].tool_call_id", why)


def check_completion(request: CompletionRequest) -> None:
    """Raise ``ApiError`` for what a completion asks and we cannot do."""
    check_common(request)
    if request.suffix:
        raise refused("suffix", "suffix is not supported")
    if request.best_of not in (None, 1, request.n):
        raise refused("best_of", "best_of is not supported")
    if request.max_tokens == 0 and not request.echo:
        raise invalid("max_tokens", "max_tokens is 0, and there is no echo: nothing is asked")


def stops_of(request: Generating) -> tuple[str, ...]:
    """The stop sequences; raises ``ApiError`` for an empty one, or too much of them."""
    stops = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
    if not all(stops):
        raise invalid("stop", "a stop sequence must not be empty")
    if len(stops) > STOPS_MAX or any(len(stop) > STOP_CHARACTERS_MAX for stop in stops):
        raise invalid(
            "stop",
            f"at most {STOPS_MAX} stop sequences of at most {STOP_CHARACTERS_MAX} characters",
        )
    return stops


def plain_messages(messages: list[Message]) -> list[dict[str, Any]]:
    """Messages as chat templates take them; raises ``ApiError`` for anything but text."""
    return [_plain(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain(message: Message, where: str) -> dict[str, Any]:
    if message.role == "function":
        raise refused(f"{where}.role", "messages of role 'function' are not supported: use 'tool'")
    plain: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _text(message, where),
    }
    if message.tool_calls:
        plain["tool_calls"] = [
            {"type": "function", "function": _arguments(call, f"{where}.tool_calls[{number}]")}
            for number, call in enumerate(message.tool_calls)
        ]
    return plain


def _arguments(call: Called, where: str) -> dict[str, Any]:
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}")
    except msgspec.DecodeError as error:
        raise invalid(
            f"{where}.function.arguments", f"the arguments are not JSON: {error}"
        ) from error
    return {"name": call.function.name, "arguments": arguments}


def _text(message: Message, where: str) -> str:
    if message.content is None:
        if message.tool_calls:
            return ""
        raise invalid(f"{where}.content", "the message has no content")
    if isinstance(message.content, str):
        return message.content
    for number, part in enumerate(message.content):
        if part.type not in ("text", "refusal"):
            why = f"content of type {part.type!r} is not supported, only text"
            raise refused(f"{where}.content[{number}].type", why)
    return "\n".join(part.text or "" for part in message.content)


def texts_of(prompt: str | list[str | int | list[int]], param: str) -> list[str | list[int]]:
    """Prompts or inputs, each text or token ids; raises ``ApiError`` for a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    if ids and len(ids) == len(prompt):
        return [ids]
    texts = [item for item in prompt if not isinstance(item, int)]
    if not texts or len(texts) != len(prompt) or len({type(item) for item in texts}) > 1:
        raise invalid(param, f"{param} is a text, texts, token ids, or lists of token ids")
    return texts
