"""Responses, Messages, tools, formats, embeddings, places: over the obedient engine."""

import asyncio
import base64
import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from plait.errors import CapacityError, SessionLost
from plait.gateway.app import Gateway
from plait.gateway.config import GatewayConfig
from plait.model import catalog
from plait.testing.obedient import Engine
from plait.testing.upstream import FakeUpstream
from plait.types import MILLION

MODEL = "tiny-random"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "degrees": {"type": "integer"}},
    "required": ["city", "degrees"],
}
TOOL = {"name": "weather", "description": "Tell the weather.", "parameters": SCHEMA}
TOOLS = [{"type": "function", "function": TOOL}]
QUESTION = [{"role": "user", "content": "Is it 21 degrees?"}]


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        yield


class Caller:
    """Posts to the application."""

    def __init__(self, upstream: FakeUpstream | None = None, **config: Any) -> None:
        self.upstream = upstream or FakeUpstream(script=Engine(MODEL))
        self.gateway = Gateway(self.upstream, "net", GatewayConfig(**config))
        self.app = self.gateway.app()
        self.status = 0
        self.headers: dict[str, str] = {}
        self.data = b""
        self.queued = asyncio.Event()

    async def __call__(self, path: str, **body: Any) -> Any:
        """The JSON of the response, or the events of a stream."""
        self.status, self.data = 0, b""
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }
        messages = [{"type": "http.request", "body": json.dumps({"model": MODEL} | body).encode()}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            return await asyncio.Future()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
                self.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            self.data += message.get("body", b"")
            if b": queue position" in self.data:
                self.queued.set()

        async with asyncio.timeout(10):
            await self.app(scope, receive, send)
        if self.data.startswith(b"{"):
            return json.loads(self.data)
        lines = [line for line in self.data.decode().splitlines() if line.startswith("data: {")]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    async def chat(self, **body: Any) -> Any:
        return await self("/v1/chat/completions", **({"messages": QUESTION} | body))


# Tools and formats --------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": TOOL}])
async def test_a_chat_calls_a_tool(choice: Any) -> None:
    call = Caller()
    body = await call.chat(tools=TOOLS, tool_choice=choice)
    [answer] = body["choices"]
    assert answer["finish_reason"] == "tool_calls"
    assert answer["message"]["content"] is None
    [made] = answer["message"]["tool_calls"]
    assert made["function"]["name"] == "weather"
    assert json.loads(made["function"]["arguments"])["degrees"] == 21
    grammar = call.upstream.asked[0].sampling.grammar
    assert (grammar is None) == (choice == "auto")
    chunks = await call.chat(tools=TOOLS, tool_choice=choice, stream=True)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    [[streamed]] = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert (streamed["index"], streamed["function"]) == (0, made["function"])
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    assert not any(delta.get("content") for delta in deltas)
    made = {"id": "1", "type": "function", "function": made["function"]}
    told = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    body = await call.chat(tools=TOOLS, messages=told)
    assert body["choices"][0]["message"]["content"] == "It says: rain"
    assert (await call.chat(tools=TOOLS, tool_choice="none"))["choices"][0]["message"]["content"]


async def test_formats_become_grammars() -> None:
    call = Caller()
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    body = await call.chat(response_format=format_)
    content = json.loads(body["choices"][0]["message"]["content"])
    assert content == {"city": "a word", "degrees": 21}
    await call.chat(response_format={"type": "json_object"})
    await call.chat(plait={"regex": "[ab]+"})
    await call.chat(response_format={"type": "text"})
    grammars = [ask.sampling.grammar for ask in call.upstream.asked]
    kinds = [None if grammar is None else (grammar.kind, grammar.text) for grammar in grammars]
    assert kinds == [
        ("json_schema", json.dumps(SCHEMA)),
        ("json_schema", '{"type":"object"}'),
        ("regex", "[ab]+"),
        None,
    ]


async def test_penalties_and_biases_reach_the_sampler() -> None:
    call = Caller()
    fields = {"logit_bias": {"7": -100, "3": 1.5}, "min_p": 0.1, "repetition_penalty": 1.1}
    await call.chat(presence_penalty=0.5, frequency_penalty=-2, **fields)
    sampling = call.upstream.asked[0].sampling
    assert sampling.logit_bias == ((3, 1_500_000), (7, -100 * MILLION))
    assert (sampling.presence_penalty_micros, sampling.frequency_penalty_micros) == (
        500_000,
        -2_000_000,
    )
    assert (sampling.min_p_micros, sampling.repetition_penalty_micros) == (100_000, 1_100_000)
    assert sampling.end_ids


# Responses ----------------------------------------------------------------------------


async def test_a_response_is_a_message_or_calls() -> None:
    call = Caller()
    body = await call("/v1/responses", input="hi", instructions="Be brief.", metadata={"a": "b"})
    [item] = body["output"]
    assert item["content"][0]["text"].startswith("The sky")
    assert (body["status"], body["object"], body["metadata"]) == (
        "completed",
        "response",
        {"a": "b"},
    )
    assert body["usage"]["total_tokens"] == body["usage"]["input_tokens"] + 9
    flat = [{"type": "function"} | TOOL]
    asked = [{"role": "user", "content": [{"type": "input_text", "text": "Is it 21?"}]}]
    body = await call("/v1/responses", input=asked, tools=flat)
    [made] = body["output"]
    assert (made["type"], json.loads(made["arguments"])["degrees"]) == ("function_call", 21)
    back = {"type": "function_call_output", "call_id": made["call_id"], "output": "rain"}
    body = await call("/v1/responses", input=[*asked, made, back], tools=flat)
    assert body["output"][0]["content"][0]["text"] == "It says: rain"
    text = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}}
    body = await call("/v1/responses", input="21", text=text)
    assert json.loads(body["output"][0]["content"][0]["text"])["degrees"] == 21
    body = await call("/v1/responses", input="x", include=["message.output_text.logprobs"])
    assert len(body["output"][0]["content"][0]["logprobs"]) == 9


@pytest.mark.parametrize("tools", [[], [{"type": "function"} | TOOL]])
async def test_the_events_of_a_response_add_up(tools: list[Any]) -> None:
    call = Caller()
    events = await call("/v1/responses", input="Is it 21?", tools=tools, stream=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:3] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
    ]
    assert kinds[-2:] == ["response.output_item.done", "response.completed"]
    deltas = "".join(event["delta"] for event in events if event["type"].endswith(".delta"))
    [item] = events[-1]["response"]["output"]
    assert item == events[-2]["item"]
    assert deltas == (item["arguments"] if tools else item["content"][0]["text"])
    assert item["id"] == events[2]["item"]["id"] == events[-3].get("item_id")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"conversation": "x"}, "conversation"),
        ({"prompt": {"id": "x"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": ""}, "input"),
        ({"input": [{"role": "user", "content": ""}], "instructions": ""}, "input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"max_output_tokens": 2040}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": 5}}}},
            "text.format",
        ),
        ({"plait": {"regex": "("}}, "plait.regex"),
    ],
)
async def test_responses_name_what_they_refuse(fields: dict[str, Any], param: str) -> None:
    call = Caller()
    body = await call("/v1/responses", **({"input": "hi"} | fields))
    assert (call.status, body["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        ({"mcp_servers": [{}]}, "mcp_servers"),
        ({"output_format": {"type": "json_schema"}}, "output_format"),
        ({"output_config": {"format": {}}}, "output_config.format"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        ({"stop_sequences": ["x"] * 17}, "stop_sequences"),
        ({"max_tokens": 2040}, "max_tokens"),
    ],
)
async def test_messages_name_what_they_refuse(fields: dict[str, Any], param: str) -> None:
    call = Caller()
    body = await call("/v1/messages", **({"max_tokens": 9, "messages": QUESTION} | fields))
    assert (call.status, body["error"]["param"]) == (400, param)


async def test_what_changes_nothing_is_accepted() -> None:
    call = Caller()
    await call("/v1/messages", max_tokens=9, messages=QUESTION, thinking={"type": "disabled"})
    assert call.status == 200
    await call("/v1/responses", input="hi", truncation="disabled", conversation=None, verbosity=1)
    assert call.status == 200


async def test_a_response_that_is_cut_or_fails_says_so() -> None:
    call = Caller(FakeUpstream(endless=True))
    body = await call("/v1/responses", input="x", max_output_tokens=4)
    assert (body["status"], body["incomplete_details"]["reason"]) == (
        "incomplete",
        "max_output_tokens",
    )
    failing = Caller(FakeUpstream(error=RuntimeError("x"), after=1))
    events = await failing("/v1/responses", input="x", stream=True)
    assert [event["type"] for event in events[-2:]] == ["response.failed", "error"]
    refused: tuple[Any, ...] = ({"previous_response_id": "r"}, {"background": True}, {"input": []})
    for bad in refused:
        await call("/v1/responses", **({"input": "x"} | bad))
        assert call.status == 400


# Messages -----------------------------------------------------------------------------


async def test_a_message_has_text_or_tool_use() -> None:
    call = Caller()
    body = await call("/v1/messages", max_tokens=90, messages=QUESTION, system="Be brief.")
    assert body["content"] == [
        {"type": "text", "text": "The sky is blue because of Rayleigh scattering."}
    ]
    assert (body["stop_reason"], body["usage"]["output_tokens"]) == ("end_turn", 9)
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    for choice in ({"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "weather"}):
        body = await call(
            "/v1/messages", max_tokens=90, messages=QUESTION, tools=tools, tool_choice=choice
        )
        [use] = body["content"]
        assert (body["stop_reason"], use["input"]["degrees"]) == ("tool_use", 21)
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "rain"}
    turns = [
        *QUESTION,
        {"role": "assistant", "content": [use]},
        {"role": "user", "content": [result]},
    ]
    body = await call("/v1/messages", max_tokens=90, messages=turns, tools=tools)
    assert body["content"][0]["text"] == "It says: rain"
    body = await call("/v1/messages", max_tokens=90, messages=QUESTION, stop_sequences=["blue"])
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "blue")
    count = await call("/v1/messages/count_tokens", messages=QUESTION)
    assert count["input_tokens"] > 5


async def test_the_events_of_a_message_add_up() -> None:
    call = Caller()
    tools = [{"name": "weather", "input_schema": SCHEMA}]
    for offered, kind in (([], "text_delta"), (tools, "input_json_delta")):
        events = await call(
            "/v1/messages", max_tokens=90, messages=QUESTION, tools=offered, stream=True
        )
        kinds = [event["type"] for event in events]
        assert kinds[:2] == ["message_start", "content_block_start"]
        assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        deltas = [event["delta"] for event in events if event["type"] == "content_block_delta"]
        assert {delta["type"] for delta in deltas} == {kind}


async def test_errors_are_in_anthropics_words() -> None:
    call = Caller()
    body = await call("/v1/messages", max_tokens=0, messages=QUESTION)
    assert (call.status, body["type"], body["error"]["type"]) == (
        400,
        "error",
        "invalid_request_error",
    )
    failing = Caller(FakeUpstream(error=RuntimeError("x"), after=1))
    events = await failing("/v1/messages", max_tokens=5, messages=QUESTION, stream=True)
    assert events[-1]["type"] == "error"
    assert events[-1]["request_id"] == failing.headers["request-id"]
    poor = Caller(FakeUpstream(error=SessionLost("x", remedy="try again")))
    body = await poor("/v1/messages", max_tokens=5, messages=QUESTION)
    assert body["error"]["remedy"] == "try again"
    assert body["request_id"] == poor.headers["request-id"] == poor.headers["x-request-id"]
    await poor("/v1/responses", input="hi")
    assert "request-id" not in poor.headers


async def test_cached_tokens_are_told_as_anthropic_does() -> None:
    call = Caller(FakeUpstream(cached_tokens=4))
    usage = (await call("/v1/messages", max_tokens=9, messages=QUESTION))["usage"]
    count = await call("/v1/messages/count_tokens", messages=QUESTION)
    assert usage["cache_read_input_tokens"] == 4
    assert usage["input_tokens"] + 4 == count["input_tokens"]


# Embeddings ---------------------------------------------------------------------------


async def test_embeddings_as_numbers_and_base64() -> None:
    call = Caller(FakeUpstream(vector=(0.5, -1.0)))
    body = await call("/v1/embeddings", input=["a", "b"])
    assert [item["embedding"] for item in body["data"]] == [[0.5, -1.0]] * 2
    body = await call("/v1/embeddings", input=[1, 2, 3], encoding_format="base64")
    raw = base64.b64decode(body["data"][0]["embedding"])
    assert struct.unpack("<2f", raw) == (0.5, -1.0)
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3, "cost": 7}
    refused: tuple[Any, ...] = ({"input": []}, {"input": "x", "dimensions": 3})
    for bad in (*refused, {"input": ["x"] * 33}):
        await call("/v1/embeddings", **bad)
        assert call.status == 400


async def test_embeddings_are_routed_counted_and_fail_as_a_whole() -> None:
    call = Caller(FakeUpstream(cost=7))
    body = await call("/v1/embeddings", input=["a", "b", "c"], provider={"sort": "price"})
    assert body["usage"] == {"prompt_tokens": 3, "total_tokens": 3, "cost": 21}
    assert {ask.options.sort for ask in call.upstream.asked} == {"price"}
    assert {ask.options.max_tokens for ask in call.upstream.asked} == {1}
    assert call.gateway.in_progress.sessions == 0
    failing = Caller(FakeUpstream(error=CapacityError("full"), after=1))
    await failing("/v1/embeddings", input=["a", "b"])
    assert failing.status == 503
    closing = Caller()
    closing.gateway.in_progress.close()
    await closing("/v1/embeddings", input="a")
    assert closing.status == 503


# Places -------------------------------------------------------------------------------


async def test_who_waits_is_told_the_position_and_comes_in_order() -> None:
    upstream = FakeUpstream(gate=asyncio.Event())
    call = Caller(upstream, sessions_max=1, waiting_max=2, keep_alive_s=0.01)
    await call("/tokenize", prompt="x")  # The model is loaded: requests come in order.
    in_progress = call.gateway.in_progress
    callers = [_same(call) for _ in range(4)]
    async with asyncio.TaskGroup() as group:
        for caller in callers:
            group.create_task(caller.chat(stream=True, seed=callers.index(caller)))
        await callers[1].queued.wait()
        await callers[2].queued.wait()
        assert b": queue position 2\n\n" in callers[2].data
        assert (in_progress.sessions, in_progress.waiting) == (1, 2)
        assert upstream.gate is not None
        upstream.gate.set()
    assert callers[3].status == 429
    assert b": queue position 1\n\n" in callers[1].data
    assert [ask.sampling.seed for ask in upstream.asked] == [0, 1, 2]
    assert (in_progress.sessions, in_progress.waiting) == (0, 0)


async def test_closing_ends_those_who_wait() -> None:
    upstream = FakeUpstream(gate=asyncio.Event())
    call = Caller(upstream, sessions_max=1, waiting_max=1, keep_alive_s=0.01)
    first, second = _same(call), _same(call)
    async with asyncio.TaskGroup() as group:
        group.create_task(first.chat())
        await upstream.started.wait()
        group.create_task(second.chat(stream=True))
        await second.queued.wait()
        call.gateway.in_progress.close()
    assert first.status == 503
    assert b'"code":"overloaded"' in second.data


def _same(call: Caller) -> Caller:
    other = Caller.__new__(Caller)
    other.upstream, other.gateway, other.app = call.upstream, call.gateway, call.app
    other.status, other.data, other.queued = 0, b"", asyncio.Event()
    return other
