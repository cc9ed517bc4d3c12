"""The least OpenAI-style server over an engine: what proxies are measured in front of.

It parses a request's body and writes a frame per token, and nothing else: no checks, no
routes, no keys, no usage. Chat completions only, streamed.
"""

import msgspec
from starlette.types import ASGIApp, Receive, Scope, Send

from plait.client import Options, TextDelta
from plait.gateway.frames import DONE, data
from plait.gateway.port import Ask
from plait.testing.upstream import FakeUpstream
from plait.types import Sampling


def bare_app(upstream: FakeUpstream) -> ASGIApp:
    """The application over a fake that is endless."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message.get("more_body"):
                break
        asked = msgspec.json.decode(body or b"{}")
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        stream = upstream.stream(
            Ask(
                model=upstream.model,
                prompt_ids=(1,),
                sampling=Sampling(),
                options=Options(max_tokens=int(asked.get("max_tokens", 16))),
            )
        )
        async for item in stream:
            if isinstance(item, TextDelta):
                frame = _frame(upstream.model, {"content": item.text}, None)
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        last = _frame(upstream.model, {}, "length") + DONE
        await send({"type": "http.response.body", "body": last})

    return app


def _frame(model: str, delta: dict[str, str], reason: str | None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    kind = "chat.completion.chunk"
    return data({"id": "1", "object": kind, "created": 1, "model": model, "choices": [choice]})
