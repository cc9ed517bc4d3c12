"""The gateway as an ASGI application over a scripted client: no network, no server."""

import asyncio
import base64
import hashlib
import json
from collections.abc import Iterator, MutableMapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest

from plait.client import Answer, Options, Score
from plait.gateway.config import GatewayConfig
from plait.gateway.keys import KeyRing
from plait.gateway.port import Ask
from plait.model import catalog
from plait.model.tokenizer import Tokenizer
from plait.testing.accounting import key_of
from plait.testing.calling import MODEL, Caller
from plait.testing.upstream import FakeUpstream
from plait.types import MILLION, Span

KEY = "correct-horse-battery-staple"


@pytest.fixture(scope="module", autouse=True)
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(catalog.MODELS_DIR_VARIABLE, str(tmp_path_factory.mktemp("models")))
        yield


def tokenizer() -> Tokenizer:
    return Tokenizer.load(catalog.load(MODEL))


# Answers ------------------------------------------------------------------------------


async def test_a_chat_answers_with_its_bill() -> None:
    call = Caller()
    reply = await call.chat()
    body = reply.json()
    assert reply.status == 200
    assert body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello there", "refusal": None}
    assert (choice["finish_reason"], choice["logprobs"]) == ("stop", None)
    prompt = body["usage"]["prompt_tokens"]
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": 3,
        "total_tokens": prompt + 3,
        "prompt_tokens_details": {"cached_tokens": 0},
        "cost": 7,
    }
    [account] = body["plait"]["answers"]
    assert [step["start"] for step in account["route"]] == [0, 5]
    first = key_of("node 0:5").peer_id
    assert reply.headers["x-plait-route"].startswith(f"0:5={first},5:8=")
    assert reply.headers["x-plait-cost-microcredits"] == "7"
    assert body["id"] == "chatcmpl-" + reply.headers["x-request-id"]
    [ask] = call.upstream.asked
    assert (ask.sampling.temperature_micros, ask.sampling.top_p_micros) == (MILLION, MILLION)
    assert ask.options.max_tokens == 256
    assert len(ask.prompt_ids) == prompt


async def test_messages_become_what_the_template_takes() -> None:
    call = Caller()
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    reply = await call.chat(messages=messages, temperature=0, top_p=0, top_k=-1, user="x", store=1)
    assert reply.status == 200
    [ask] = call.upstream.asked
    plain = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one\ntwo"},
    ]
    assert list(ask.prompt_ids) == tokenizer().chat(plain)
    assert (ask.sampling.temperature_micros, ask.sampling.top_k) == (0, 0)
    assert ask.sampling.top_p_micros == 1


async def test_routing_follows_openrouters_words() -> None:
    call = Caller()
    provider = {"sort": "price", "only": ["a"], "ignore": ["b"], "max_price": {"request": 9}}
    await call.chat(provider=provider, plait={"ttft_s": 2.0, "bundle": True})
    options = call.upstream.asked[0].options
    assert (options.sort, options.max_price, options.ttft_s) == ("price", 9, 2.0)
    assert (options.only, options.ignore) == (frozenset("a"), frozenset("b"))
    assert options.bundle


async def test_a_stream_is_role_text_reason_usage_done() -> None:
    reply = await Caller().chat(stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = reply.events()
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert (usage["usage"]["completion_tokens"], usage["usage"]["cost"]) == (3, 7)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert [delta["content"] for delta in deltas[1:-1]] == ["Hel", "lo", " there"]
    assert deltas[-1] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[-1]["plait"]["answers"][0]["cost_microcredits"] == 7
    steps = chunks[-1]["plait"]["answers"][0]["route"]
    route = ",".join(f"{step['start']}:{step['end']}={step['peer']}" for step in steps)
    assert reply.headers["x-plait-route"] == route
    assert reply.headers["x-plait-predicted-cost-microcredits"] == "50"
    assert (await Caller().chat()).headers["x-plait-receipts-verified"] == "4"
    assert "usage" not in (await Caller().chat(stream=True)).events()[0]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("graceful", [False, True])
async def test_a_stop_sequence_cuts_and_ends_the_session(stream: bool, graceful: bool) -> None:
    pieces = ("ab", "cE", "ND", "never", "sent")
    call = Caller(FakeUpstream(pieces=pieces, graceful=graceful, vouched=8, cut=1))
    reply = await call.chat(stop=["END", "zzz"], stream=stream)
    if stream:
        assert reply.deltas() == "abc"
        last = reply.events()[-2]
        account, choice = last["plait"]["answers"][0], last["choices"][0]
    else:
        body = reply.json()
        account, choice = body["plait"]["answers"][0], body["choices"][0]
        assert choice["message"]["content"] == "abc"
        assert body["usage"]["completion_tokens"] == 3
    assert choice["finish_reason"] == "stop"
    assert account["cost_is_estimate"] is not graceful
    assert account["cost_microcredits"] == (7 if graceful else 9)
    assert call.upstream.cancelled == (not graceful)


async def test_what_only_looked_like_a_stop_is_delivered() -> None:
    call = Caller(FakeUpstream(pieces=("ab", "EN")))
    assert (await call.chat(stop="END")).json()["choices"][0]["message"]["content"] == "abEN"
    assert (await call.chat(stop="END", stream=True)).deltas() == "abEN"


async def test_choices_draw_with_seeds_of_their_own() -> None:
    call = Caller()
    body = (await call.chat(n=3, seed=-1)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [ask.sampling.seed for ask in call.upstream.asked] == [2**63 - 1, 0, 1]
    single = (await Caller().chat()).json()["usage"]["prompt_tokens"]
    assert body["usage"]["prompt_tokens"] == single
    assert (body["usage"]["completion_tokens"], body["usage"]["cost"]) == (9, 21)
    chunks = (await call.chat(n=2, stream=True)).events()[:-1]
    assert sorted({chunk["choices"][0]["index"] for chunk in chunks}) == [0, 1]


async def test_logprobs_of_the_drawn_tokens() -> None:
    call = Caller()
    content = (await call.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in content] == [0.0, -0.5, -1.0]
    assert [bytes(entry["bytes"]).decode() for entry in content] == [e["token"] for e in content]
    chunks = (await call.chat(logprobs=True, stream=True)).events()[1:-2]
    streamed = [chunk["choices"][0]["logprobs"]["content"] for chunk in chunks]
    assert [entry for part in streamed for entry in part] == content
    top = (await call.chat(logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]
    assert [len(entry["top_logprobs"]) for entry in top["content"]] == [2, 2, 2]
    assert call.upstream.asked[-1].sampling.top_logprobs == 2
    cut = (await call.chat(logprobs=True, stop="lo")).json()["choices"][0]
    assert [entry["logprob"] for entry in cut["logprobs"]["content"]] == [0.0]
    old = (await call.complete("x", logprobs=0)).json()["choices"][0]["logprobs"]
    assert old["tokens"] == [entry["token"] for entry in content]
    assert old["token_logprobs"] == [0.0, -0.5, -1.0]
    assert (old["text_offset"][0], old["top_logprobs"]) == (0, None)
    more = (await call.complete("x", logprobs=1)).json()["choices"][0]["logprobs"]
    # The likeliest, and the drawn token itself.
    assert [len(top) for top in more["top_logprobs"]] == [1, 2, 2]


async def test_echo_with_logprobs_scores_the_prompt() -> None:
    call, prompt = Caller(FakeUpstream(pieces=("a",))), "the caf\u00e9 is"
    ids = tokenizer().encode(prompt)
    reply = await call.complete(prompt, echo=True, logprobs=1, max_tokens=1)
    [choice] = reply.json()["choices"]
    assert call.upstream.asked[-1].options.score_prompt
    assert choice["text"] == prompt + "a"
    known = choice["logprobs"]
    assert known["token_logprobs"] == [None, *(-0.25 * n for n in range(1, len(ids))), 0.0]
    assert known["top_logprobs"][0] is None
    assert len(known["tokens"]) == len(ids) + 1
    # Offsets are characters of the text, also where a character has several tokens.
    assert known["text_offset"][-1] == len(prompt)
    assert known["text_offset"] == sorted(known["text_offset"])
    mine = known["tokens"][1]
    assert known["top_logprobs"][1][mine] == -0.25
    assert max(known["top_logprobs"][1].values()) == 0.0
    chunks = (await call.complete(ids, echo=True, logprobs=1, max_tokens=1, stream=True)).events()
    first, second = (chunk["choices"][0] for chunk in chunks[:2])
    assert (first["text"], second["text"]) == (prompt, "a")
    assert len(first["logprobs"]["tokens"]) == len(ids)
    assert second["logprobs"]["text_offset"] == [len(prompt)]


async def test_echo_alone_shows_no_drawn_token() -> None:
    call = Caller(FakeUpstream(pieces=("a",)))
    body = (await call.complete("the sea", echo=True, max_tokens=0, logprobs=0)).json()
    [choice] = body["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("the sea", "length")
    assert choice["logprobs"]["top_logprobs"] is None
    assert len(choice["logprobs"]["tokens"]) == len(tokenizer().encode("the sea"))
    [choice] = (await call.complete("the sea", echo=True, max_tokens=0)).json()["choices"]
    assert (choice["text"], choice["logprobs"]) == ("the sea", None)
    assert call.upstream.asked[-1].options.max_tokens == 1


async def test_an_end_token_has_its_place_among_the_scores() -> None:
    class Ending(FakeUpstream):
        def answer(self, ask: Ask, pieces: tuple[str, ...], *, finished: bool = False) -> Answer:
            return replace(super().answer(ask, pieces, finished=finished), end=Score(0, -0.75))

    fields = {"echo": True, "logprobs": 1, "max_tokens": 1}
    [choice] = (await Caller(Ending(pieces=())).complete("the sea", **fields)).json()["choices"]
    assert choice["text"] == "the sea"
    assert choice["logprobs"]["token_logprobs"][-1] == -0.75
    assert len(choice["logprobs"]["tokens"]) == len(tokenizer().encode("the sea")) + 1


async def test_a_plain_delta_is_what_encoding_the_whole_chunk_gives() -> None:
    pieces = ('say "hi"\\n', "\u00e9\u4e2d\U0001f600", "\n\t\x01", "\u2028</script>")
    call = Caller(FakeUpstream(pieces=pieces))
    for more in ({}, {"stream_options": {"include_usage": True}}):
        plain = (await call.chat(stream=True, n=2, **more)).events()
        told = (await call.chat(stream=True, n=2, logprobs=True, **more)).events()
        assert len(plain) == len(told)
        for one, other in zip(plain, told, strict=True):
            if one == "[DONE]" or not one["choices"] or "plait" in one:
                continue
            other["choices"][0]["logprobs"] = None
            assert list(one) == list(other)
            assert one["choices"] == other["choices"]
            assert one.get("usage", "none") == other.get("usage", "none")


async def test_completions_take_texts_and_token_ids() -> None:
    call = Caller()
    body = (await call.complete(["one", "two"], n=2, echo=True)).json()
    assert body["object"] == "text_completion"
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == ["oneHello there"] * 2 + ["twoHello there"] * 2
    ids = tokenizer().encode("some words")
    assert (await call.complete(ids)).status == 200
    assert (await call.complete([ids, ids[:1]])).status == 200
    assert [list(ask.prompt_ids) for ask in call.upstream.asked[-2:]] == [ids, ids[:1]]
    assert (await call.complete([ids], echo=True)).json()["choices"][0]["text"].startswith("some w")
    chunks = (await call.complete("x", stream=True)).events()
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == "Hello there"


@pytest.mark.parametrize("prompt", [[], ["a", 1], [[1], "a"], "", [10**9], [[]], 7])
async def test_a_prompt_that_is_none_is_refused(prompt: object) -> None:
    reply = await Caller().complete(prompt)
    assert (reply.status, reply.json()["error"]["param"]) == (400, "prompt")


async def test_the_answer_must_fit_the_context() -> None:
    call = Caller()
    reply = await call.chat(max_completion_tokens=2040)
    error = reply.json()["error"]
    assert (reply.status, error["code"]) == (400, "context_length_exceeded")
    assert error["param"] == "max_completion_tokens"
    assert (await call.chat(max_tokens=2040)).json()["error"]["param"] == "max_tokens"
    long = "word " * 5000
    assert (await call.complete(long)).json()["error"]["code"] == "context_length_exceeded"
    ids = tokenizer().encode("a " * 1000)
    assert (await call.complete("a " * 1000)).status == 200
    assert call.upstream.asked[-1].options.max_tokens == min(256, 2048 - len(ids))


# Sessions -----------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_leaving_cancels_the_session(stream: bool) -> None:
    left = asyncio.Event()
    upstream = FakeUpstream(gate=asyncio.Event())
    call = Caller(upstream)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": stream}
    async with asyncio.TaskGroup() as group:
        group.create_task(call("POST", "/v1/chat/completions", body, left=left))
        await upstream.started.wait()
        assert call.gateway.in_progress.sessions == 1
        left.set()
    assert upstream.cancelled == 1
    assert call.gateway.in_progress.sessions == 0


async def test_closing_ends_every_answer_and_takes_no_more() -> None:
    call = Caller(FakeUpstream(gate=asyncio.Event()))

    def close(data: bytes) -> None:
        if b"Hel" in data:
            call.gateway.in_progress.close()

    body = {"model": MODEL, "prompt": "x", "stream": True}
    reply = await call("POST", "/v1/completions", body, on_body=close)
    assert reply.events()[-1]["error"]["code"] == "overloaded"
    assert call.upstream.cancelled == 1
    assert (await call.chat()).status == 503
    assert (await call("GET", "/ready")).status == 503


async def test_comments_keep_a_slow_stream_alive() -> None:
    gate = asyncio.Event()
    call = Caller(FakeUpstream(gate=gate), GatewayConfig(keep_alive_s=0.001))

    def note(data: bytes) -> None:
        if data.startswith(b": "):
            gate.set()

    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "stream": True}
    reply = await call("POST", "/v1/chat/completions", body, on_body=note)
    assert b"\n\n: keep-alive\n\n" in reply.body
    assert reply.deltas() == "Hello there"
    assert reply.events()[-1] == "[DONE]"


@pytest.mark.parametrize("after", [0, 1])
async def test_a_reader_that_stalls_loses_its_place(after: int) -> None:
    """The write after the first text, or the one before it, never returns."""
    call = Caller(
        FakeUpstream(endless=True, interval_s=0.001),
        GatewayConfig(write_timeout_s=0.02, keep_alive_s=10),
    )
    body = json.dumps({"model": MODEL, "prompt": "x", "stream": True, "max_tokens": 2000})
    writes = 0

    async def receive() -> MutableMapping[str, Any]:
        nonlocal body
        if body:
            data, body = body.encode(), ""
            return {"type": "http.request", "body": data, "more_body": False}
        return await asyncio.Future[MutableMapping[str, Any]]()

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal writes
        if message["type"] == "http.response.body":
            writes += 1
            if writes > after:
                await asyncio.Future[None]()

    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions"}
    async with asyncio.timeout(10):
        await call.app(scope | {"query_string": b"", "headers": headers}, receive, send)
    assert writes == after + 1
    assert call.upstream.cancelled == 1
    assert call.gateway.in_progress.sessions == 0


async def test_an_answer_that_takes_too_long_is_a_504() -> None:
    call = Caller(FakeUpstream(gate=asyncio.Event()), GatewayConfig(request_timeout_s=0.01))
    reply = await call.chat()
    assert (reply.status, reply.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert call.upstream.cancelled == 1


async def test_answers_at_once_are_bounded() -> None:
    call = Caller(config=GatewayConfig(sessions_max=2))
    call.upstream.gate, left = asyncio.Event(), asyncio.Event()
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
    async with asyncio.TaskGroup() as group:
        group.create_task(call("POST", "/v1/chat/completions", body, left=left))
        await call.upstream.started.wait()
        reply = await call.chat(n=2)
        assert (reply.status, reply.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert reply.headers["retry-after"] == "1"
        left.set()
    call.upstream.gate.set()
    assert (await call.chat(n=2)).status == 200
    # What can never fit is not worth trying again.
    for reply, param in ((await call.chat(n=3), "n"), (await call.complete(["x"] * 3), "prompt")):
        assert (reply.status, reply.json()["error"]["param"]) == (400, param)
        assert reply.headers["x-should-retry"] == "false"
    body = {"model": MODEL, "input": ["x"] * 5}
    assert (await call("POST", "/v1/embeddings", body)).status == 200
    assert (await call.complete(["x"] * 33)).status == 400


# Models, tokens, evidence -------------------------------------------------------------


async def test_the_next_turn_may_be_prepared() -> None:
    call = Caller()
    for plait, kept_s in (({"keep_alive_s": 600}, 600), ({}, 0)):
        await call.chat(plait=plait)
        assert call.upstream.asked[-1].options.keep_alive_s == kept_s
    reply = await call.chat(plait={"keep_alive_s": -1})
    assert reply.status == 400
    assert "keep_alive_s" in reply.json()["error"]["message"]


async def test_models_are_those_with_a_complete_pipeline() -> None:
    call = Caller()
    [model] = (await call("GET", "/v1/models")).json()["data"]
    assert (model["id"], model["object"], model["context_length"]) == (MODEL, "model", 2048)
    assert model["coverage"] == {"layers": 8, "hosts": 2, "hosts_per_layer_min": 1}
    assert model["price"]["completion_microcredits_per_million"] > 0
    assert (await call("GET", f"/v1/models/{MODEL}")).json() == model
    reply = await call("GET", "/v1/models/some/body/else")
    assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")
    assert (await call("GET", "/ready")).json()["models"] == [MODEL]
    broken = Caller(FakeUpstream(spans=(Span(0, 5),)))
    assert (await broken("GET", "/v1/models")).json()["data"] == []
    assert (await broken("GET", "/ready")).status == 503
    assert (await broken("POST", "/tokenize", {"prompt": "x"})).status == 404


async def test_tokens_and_back() -> None:
    call = Caller()
    reply = (await call("POST", "/tokenize", {"prompt": "some words", "model": MODEL})).json()
    assert reply["count"] == len(reply["tokens"])
    back = await call("POST", "/detokenize", {"tokens": reply["tokens"]})
    assert back.json()["prompt"] == "some words"
    messages = [{"role": "user", "content": "hi"}]
    chat = (await call("POST", "/tokenize", {"messages": messages})).json()
    assert chat["count"] == (await call.chat()).json()["usage"]["prompt_tokens"]
    assert (await call("POST", "/tokenize", {})).status == 400
    assert (await call("POST", "/detokenize", {"tokens": [10**6]})).status == 400
    assert (await call("POST", "/detokenize", {"tokens": [-1]})).status == 400
    info = (await call("GET", f"/tokenizer_info?model={MODEL}")).json()
    assert (info["eos_token"], info["max_model_len"]) == ("<|im_end|>", 2048)


async def test_a_quote_is_the_plan() -> None:
    call = Caller()
    body = {"model": MODEL, "prompt_tokens": 10, "max_tokens": 20}
    quote = (await call("POST", "/v1/quote", body)).json()
    planned = call.upstream.plan(MODEL, 10, Options(max_tokens=20)).predicted
    assert quote["price_microcredits"] == planned.price_microcredits
    assert [step["start"] for step in quote["route"]] == [0, 5]
    assert (await call("POST", "/v1/quote", {"model": MODEL})).status == 400
    measured = await call("POST", "/v1/quote", {"model": MODEL, "prompt": "some words"})
    assert measured.json()["prompt_tokens"] > 0
    refused = await call("POST", "/v1/quote", body | {"provider": {"max_price": 1}})
    assert (refused.status, refused.json()["error"]["param"]) == (400, "provider.max_price")


async def test_bundles_are_kept_when_asked_for() -> None:
    call = Caller(FakeUpstream(bundle=b'{"a":1}'))
    assert (await call.chat()).json()["plait"]["answers"][0]["bundle"] is None
    reply = await call.chat(plait={"bundle": True})
    found = await call("GET", reply.headers["x-plait-bundle"])
    assert (found.status, found.body) == (200, b'{"a":1}')
    assert (await call("GET", "/v1/bundles/none")).status == 404
    two = (await call.chat(n=2, plait={"bundle": True}, stream=True)).events()
    accounts = [e["plait"]["answers"][0] for e in two if e != "[DONE]" and "plait" in e]
    paths = {account["bundle"] for account in accounts}
    assert len(paths) == 2
    assert [(await call("GET", path)).status for path in sorted(paths)] == [200, 200]
    every = Caller(FakeUpstream(bundle=b"{}"), GatewayConfig(always_bundle=True))
    assert "x-plait-bundle" in (await every.chat()).headers


# The door and the gateway itself ------------------------------------------------------


def with_keys(*keys: str) -> GatewayConfig:
    digests = tuple(hashlib.sha256(key.encode()).digest() for key in keys)
    return GatewayConfig(host="0.0.0.0", keys=KeyRing(digests))


async def test_keys_open_the_door() -> None:
    call = Caller(FakeUpstream(bundle=b"{}"), with_keys(KEY, KEY + "2"))
    reply = await call.chat()
    error = reply.json()["error"]
    assert (reply.status, error["code"]) == (401, "invalid_api_key")
    assert reply.headers["x-should-retry"] == "false"
    assert not call.upstream.asked
    for path in ("/health", "/ready", "/version"):
        assert (await call("GET", path)).status == 200
    for wrong in ("Bearer nope", f"Basic {KEY}", KEY, "Bearer", "Bearer \xff"):
        assert (await call("GET", "/v1/models", authorization=wrong)).status == 401
    call.headers = {"authorization": f"Bearer {KEY}", "host": "plait.example.org"}
    reply = await call.chat(plait={"bundle": True})
    path = reply.headers["x-plait-bundle"]
    assert (await call("GET", path)).status == 200
    assert (await call("GET", path, authorization=f"Bearer {KEY}2")).status == 404


async def test_a_browser_may_use_its_own_prompt_for_the_page_only() -> None:
    call = Caller(config=with_keys(KEY))
    reply = await call("GET", "/")
    assert (reply.status, reply.headers["www-authenticate"]) == (401, 'Basic realm="plait"')
    basic = "Basic " + base64.b64encode(f"me:{KEY}".encode()).decode()
    assert (await call("GET", "/", authorization=basic)).status == 200
    assert (await call("GET", "/", authorization="Basic %%")).status == 401
    assert (await call("GET", "/v1/models", authorization=basic)).status == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:4700", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:4700", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example:4700", 403),
    ],
)
async def test_without_keys_the_host_must_be_this_machine(host: str, status: int) -> None:
    assert (await Caller()("GET", "/health", host=host)).status == status


async def test_without_keys_any_bearer_passes() -> None:
    call = Caller(headers={"authorization": "Bearer whatever"})
    assert (await call.chat()).status == 200


async def test_metrics_and_page_show_the_same_spend() -> None:
    call = Caller()
    await call.chat()
    await call.chat(model="none")
    text = (await call("GET", "/metrics")).body.decode()
    assert 'plait_gateway_cost_microcredits_total{model="tiny-random"} 7.0' in text
    assert 'endpoint="/v1/chat/completions",status="404"' in text
    assert "plait_gateway_sessions_active 0.0" in text
    page = await call("GET", "/")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    html = page.body.decode()
    assert "<td>3</td><td>7</td>" in html
    assert key_of("node 0:5").peer_id in html
    assert "<script" not in html
    assert "http" not in html.replace("http-equiv", "")
    assert "http-equiv" not in html
    followed = (await call("GET", "/?follow=1")).body.decode()
    assert '<meta http-equiv="refresh" content="10">' in followed
    assert (await call("GET", "/page.css")).headers["content-type"].startswith("text/css")


async def test_the_description_covers_every_route() -> None:
    call = Caller()
    document = (await call("GET", "/openapi.json")).json()
    assert (await call("GET", "/version")).json() == {"version": "1.2"}
    assert document["info"]["version"] == "1.2"
    for path, operations in document["paths"].items():
        for method in operations:
            reply = await call(method.upper(), path.replace("{id}", "x"), {})
            assert reply.status < 500, path
            assert b'"not_found"' not in reply.body, path
            assert reply.status != 405, path
    references = json.dumps(document).split('"$ref": "#/components/schemas/')[1:]
    names = {reference.partition('"')[0] for reference in references}
    assert document["components"]["schemas"]["ChatRequest"]["properties"]["model"]["enum"] == [
        MODEL
    ]
    routes = {"/v1/responses", "/v1/messages", "/v1/embeddings", "/tokenizer_info", "/metrics"}
    assert routes <= document["paths"].keys()
    assert names <= document["components"]["schemas"].keys()


async def test_the_fake_is_closed_like_the_client() -> None:
    """The fake's stream counts as cancelled when it is closed early, and only then."""
    call = Caller()
    await call.chat()
    upstream, [ask] = call.upstream, call.upstream.asked
    async with aclosing(upstream.stream(ask)) as stream:
        await anext(aiter(stream))
    assert upstream.cancelled == 1
    async with aclosing(upstream.stream(ask)) as stream:
        assert isinstance([item async for item in stream][-1], Answer)
    assert upstream.cancelled == 1
