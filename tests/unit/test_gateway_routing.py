"""From a path to its handler, and what becomes of what a handler raises."""

import asyncio
import json
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from plait.errors import NoRoute
from plait.gateway.failure import ApiError
from plait.gateway.routing import Routes


def failing(error: Exception) -> Any:
    async def handler(request: Request) -> Response:
        raise error

    return handler


async def echo(request: Request) -> Response:
    return PlainTextResponse((await request.body()).decode() + request.path_params.get("id", ""))


async def breaking(request: Request) -> Any:
    async def respond(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("in the middle")

    return respond


ROUTES = Routes(
    [
        ("/echo", echo),
        ("/v1/messages", failing(ApiError(429, "slowly", code="rate_limit_exceeded"))),
        ("/refused", failing(ApiError(429, "slowly", code="rate_limit_exceeded"))),
        ("/lost", failing(NoRoute("nobody has layer 3", missing=((3, 4),)))),
        ("/bug", failing(RuntimeError("secret"))),
        ("/gone", failing(ClientDisconnect())),
        ("/breaks", breaking),
    ],
    [("/things/{id:path}", echo), ("/echo", echo)],
)


class Asked:
    """One request, and what was sent for it."""

    def __init__(self, method: str, path: str) -> None:
        self.sent: list[Message] = []
        self.state: dict[str, Any] = {"request_id": "r"}
        self.scope: Scope = {"type": "http", "method": method, "path": path, "headers": []}
        self.scope |= {"query_string": b"", "state": self.state, "server": ("127.0.0.1", 80)}

    def run(self) -> "Asked":
        asyncio.run(ROUTES(self.scope, self._receive, self._send))
        return self

    async def _receive(self) -> Message:
        return {"type": "http.request", "body": b"hello ", "more_body": False}

    async def _send(self, message: Message) -> None:
        self.state["begun"] = True  # as the doorman notes it
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> Any:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def error(self) -> Any:
        return json.loads(self.body)["error"]

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.sent[0]["headers"])


def test_a_handler_gets_the_request_and_the_route_is_known() -> None:
    assert Asked("POST", "/echo").run().body == b"hello "
    asked = Asked("GET", "/things/a/b").run()
    assert asked.body == b"hello a/b"
    assert asked.scope["route"].path == "/things/{id:path}"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not_found"),
        ("DELETE", "/echo", 405, "method_not_allowed"),
        ("POST", "/refused", 429, "rate_limit_exceeded"),
        ("POST", "/lost", 503, "no_route"),
    ],
)
def test_errors_are_answered_in_openais_words(
    method: str, path: str, status: int, code: str
) -> None:
    asked = Asked(method, path).run()
    assert (asked.status, asked.error["code"]) == (status, code)


def test_errors_of_messages_are_answered_in_anthropics_words() -> None:
    asked = Asked("POST", "/v1/messages").run()
    assert json.loads(asked.body)["type"] == "error"


def test_a_method_that_is_not_allowed_names_those_that_are() -> None:
    assert Asked("DELETE", "/refused").run().headers[b"allow"] == b"POST"


def test_a_slash_too_many_is_redirected() -> None:
    asked = Asked("POST", "/echo/").run()
    assert (asked.status, asked.headers[b"location"]) == (307, b"http://127.0.0.1/echo")


def test_a_bug_is_answered_without_its_words_and_raised_for_the_log() -> None:
    asked = Asked("POST", "/bug")
    with pytest.raises(RuntimeError, match="secret"):
        asked.run()
    assert (asked.status, asked.error["code"]) == (500, "internal_error")
    assert b"secret" not in asked.body


def test_who_is_gone_is_no_error() -> None:
    assert Asked("POST", "/gone").run().status == 499


def test_a_response_that_breaks_is_not_begun_again() -> None:
    asked = Asked("POST", "/breaks")
    with pytest.raises(RuntimeError, match="in the middle"):
        asked.run()
    assert [message["type"] for message in asked.sent] == ["http.response.start"]
