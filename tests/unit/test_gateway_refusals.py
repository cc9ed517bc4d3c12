"""What the gateway refuses, and how errors are told."""

from collections.abc import Iterator
from typing import Any

import pytest

from plait.errors import (
    CapacityError,
    ConfigError,
    DeadlineExceeded,
    LedgerError,
    NoRoute,
    PeerUnreachable,
    PlaitError,
    RemoteProtocolError,
    SessionLost,
    VerificationError,
)
from plait.gateway.config import GatewayConfig
from plait.model import catalog
from plait.testing.calling import MODEL, Caller
from plait.testing.upstream import FakeUpstream, peer_at
from plait.types import Span


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        yield


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"function_call": {"name": "f"}}, "function_call"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"max_completion_tokens": 2040}, "max_completion_tokens"),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format",
        ),
        ({"plait": {"regex": "("}}, "plait.regex"),
        ({"plait": {"lark": "start: ("}}, "plait.lark"),
        ({"plait": {"regex": "a"}, "response_format": {"type": "json_object"}}, "plait.regex"),
        ({"plait": {"ttft": 1}}, "plait.ttft"),
        (
            {
                "tools": [{"function": {"name": "f", "parameters": {"type": 5}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"plait": {"regex": "a", "lark": "start: a"}}, "plait.lark"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"500": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias[...]"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"),
        ({"presence_penalty": -3}, "presence_penalty"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"modalities": ["audio"]}, "modalities"),
        ({"stream_options": {}}, "stream_options"),
        ({"stop": ""}, "stop"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"n": 9}, "n"),
        ({"temperature": 2.5}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
        ),
        ({"model": None}, "model"),
        ({"provider": {"max_price": {"prompt": 1}}}, "provider.max_price.prompt"),
        ({"provider": {"data_collection": "deny"}}, "provider.data_collection"),
        ({"provider": {"order": ["a"]}}, "provider.order"),
        ({"provider": {"onyl": ["a"]}}, "provider.onyl"),
        ({"provider": {"max_price": {"total": 1}}}, "provider.max_price.total"),
        ({"provider": {"allow_fallbacks": False}}, "provider.allow_fallbacks"),
        ({"provider": {"require_parameters": True}}, "provider.require_parameters"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(
    fields: dict[str, Any], param: str
) -> None:
    call = Caller()
    reply = await call.chat(**fields)
    error = reply.json()["error"]
    assert (reply.status, error["param"]) == (400, param)
    assert {"message", "type", "param", "code"} <= error.keys()
    assert reply.headers["x-should-retry"] == "false"
    assert not call.upstream.asked


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"suffix": "x"}, "suffix"),
        ({"best_of": 3}, "best_of"),
    ],
)
async def test_completions_refuse_too(fields: dict[str, Any], param: str) -> None:
    reply = await Caller().complete("x", **fields)
    assert (reply.status, reply.json()["error"]["param"]) == (400, param)


ERRORS: list[tuple[Exception, int, str, str]] = [
    (ConfigError("x"), 400, "invalid_request", "false"),
    (NoRoute("x", missing=[(0, 1)]), 503, "no_route", "true"),
    (NoRoute("x", cheapest=5), 400, "no_route", "false"),
    (NoRoute("x", missing=[(0, 1)], options=["only"]), 400, "no_route", "false"),
    (DeadlineExceeded("x"), 504, "deadline_exceeded", "true"),
    (PeerUnreachable("x"), 503, "network_unreachable", "true"),
    (CapacityError("x", retry_after_s=3), 503, "overloaded", "true"),
    (LedgerError("x"), 402, "insufficient_quota", "false"),
    (SessionLost("x"), 503, "session_lost", "true"),
    (RemoteProtocolError("x"), 502, "peer_broke_protocol", "true"),
    (VerificationError("x"), 502, "verification_failed", "true"),
    (PlaitError("x"), 500, "internal_error", "false"),
    (RuntimeError("a secret"), 500, "internal_error", "false"),
]


@pytest.mark.parametrize(("error", "status", "code", "retry"), ERRORS)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_is_a_status(
    error: Exception, status: int, code: str, retry: str, stream: bool
) -> None:
    reply = await Caller(FakeUpstream(error=error)).chat(stream=stream)
    assert (reply.status, reply.json()["error"]["code"]) == (status, code)
    assert reply.headers["x-should-retry"] == retry
    assert ("retry-after" in reply.headers) == (status == 503 and retry == "true")
    assert b"secret" not in reply.body
    if isinstance(error, CapacityError):
        assert reply.headers["retry-after"] == "3"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("provider.only", [str(peer_at(Span(0, 5)))]),
        ("provider.ignore", [str(peer_at(Span(0, 5)))]),
        ("provider.max_price", 1),
        ("plait.ttft_s", 1e-6),
        ("plait.tpot_s", 1e-6),
    ],
)
async def test_what_no_route_keeps_is_named_as_the_request_has_it(field: str, value: Any) -> None:
    part, _, name = field.partition(".")
    body = {"model": MODEL, "prompt_tokens": 10, part: {name: value}}
    reply = await Caller()("POST", "/v1/quote", body)
    error = reply.json()["error"]
    assert (reply.status, error["param"], reply.headers["x-should-retry"]) == (400, field, "false")
    assert error["remedy"].endswith(f": {field}")


async def test_an_error_in_a_stream_ends_it_without_done() -> None:
    call = Caller(FakeUpstream(error=SessionLost("a stage died"), after=2))
    reply = await call.chat(stream=True)
    assert reply.status == 200
    assert reply.deltas() == "Hello"
    assert reply.events()[-1]["error"]["code"] == "session_lost"
    assert (await call.chat()).status == 503


async def test_an_unknown_model_and_one_without_a_pipeline() -> None:
    call = Caller()
    for name, shown in (("none", "'none'"), ("x" * 10_000, f"'{'x' * 64}…'")):
        reply = await call.chat(model=name)
        error = reply.json()["error"]
        assert (reply.status, error["code"]) == (404, "model_not_found")
        assert error["message"] == f"there is no model {shown}; served now: {MODEL}"
    reply = await call.chat(model="smollm2-135m")
    assert (reply.status, reply.json()["error"]["param"]) == (404, "model")
    assert "plait models pull" in reply.json()["error"]["remedy"]


@pytest.mark.parametrize(
    "raw", [b"{", b"", b"\xff", b"[" * 100_000, b"[]", b'{"model": "\\ud800"}']
)
async def test_a_body_that_is_not_a_request(raw: bytes) -> None:
    reply = await Caller()("POST", "/v1/chat/completions", raw=raw)
    assert reply.status == 400


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b'{"model": "a", "stop": "\xff"}', "byte 0xff at position 24 is not UTF-8"),
        (b'{"model": "\\ud800"}', "surrogate"),
        (b'{"model": "\\ud83d\\ude00"', "truncated"),
    ],
)
async def test_what_is_wrong_with_a_body_is_told(raw: bytes, why: str) -> None:
    reply = await Caller()("POST", "/v1/chat/completions", raw=raw)
    error = reply.json()["error"]
    assert (reply.status, error["code"]) == (400, "invalid_json")
    assert why in error["message"]


async def test_a_drawn_seed_is_a_number_that_json_readers_keep() -> None:
    seeds = [(await (call := Caller()).chat()).json()["plait"]["answers"][0]["seed"] for _ in "abc"]
    assert all(seed < 2**53 for seed in seeds)
    assert call.upstream.asked[0].sampling.seed == seeds[-1]
    given = (await call.chat(seed=2**63 - 1)).json()["plait"]["answers"][0]["seed"]
    assert given == 2**63 - 1


async def test_bodies_are_json_and_bounded() -> None:
    call = Caller(config=GatewayConfig(body_bytes_max=100))
    assert (await call("POST", "/tokenize", raw=b"x" * 101)).status == 413
    assert (await call("POST", "/tokenize", {}, content_type="text/plain")).status == 415
    assert (await call("POST", "/tokenize", {}, content_type="")).status == 415
    assert (await call("PUT", "/tokenize")).status == 405
    reply = await call("GET", "/nowhere")
    assert (reply.status, reply.json()["error"]["code"]) == (404, "not_found")
