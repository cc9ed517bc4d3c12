"""The gateway as an ASGI application, called as a server would: no network, no server."""

import asyncio
import json
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from plait.gateway.app import Gateway
from plait.gateway.config import GatewayConfig
from plait.testing.upstream import FakeUpstream

MODEL = "tiny-random"


@dataclass
class Reply:
    """A response, collected."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    def json(self) -> Any:
        """The body."""
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """What a stream's unnamed events carry."""
        lines = [line for line in self.body.decode().split("\n\n") if line.startswith("data: ")]
        data = [line.removeprefix("data: ") for line in lines]
        return [item if item == "[DONE]" else json.loads(item) for item in data]

    def deltas(self) -> str:
        """The text of a streamed chat."""
        chunks = [event for event in self.events() if event != "[DONE]" and "choices" in event]
        choices = [choice for chunk in chunks for choice in chunk["choices"]]
        return "".join(choice["delta"].get("content", "") for choice in choices)


@dataclass
class Caller:
    """Calls the application as a server would."""

    upstream: FakeUpstream = field(default_factory=FakeUpstream)
    config: GatewayConfig = field(default_factory=lambda: GatewayConfig(version="1.2"))
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.gateway = Gateway(self.upstream, "net-1", self.config)
        self.app = self.gateway.app()

    async def __call__(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        raw: bytes | None = None,
        left: asyncio.Event | None = None,
        on_body: Callable[[bytes], None] | None = None,
        **headers: str,
    ) -> Reply:
        """Ask; ``left`` is when the client goes away, ``on_body`` sees each part as it comes."""
        data = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        lines = {"host": "127.0.0.1", "content-type": "application/json"} | self.headers
        lines |= {name.replace("_", "-"): value for name, value in headers.items()}
        path, _, query = path.partition("?")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "headers": [(name.encode(), value.encode()) for name, value in lines.items() if value],
        }
        reply, requests = Reply(), [{"type": "http.request", "body": data, "more_body": False}]

        async def receive() -> MutableMapping[str, Any]:
            if requests:
                return requests.pop()
            await (left or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                reply.status = message["status"]
                reply.headers = {k.decode(): v.decode() for k, v in message["headers"]}
            else:
                reply.body += message.get("body", b"")
                if on_body is not None:
                    on_body(message.get("body", b""))

        async with asyncio.timeout(60):
            await self.app(scope, receive, send)
        return reply

    async def chat(self, **fields: Any) -> Reply:
        """Ask a chat, with these fields besides."""
        body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | fields
        return await self("POST", "/v1/chat/completions", body)

    async def complete(self, prompt: object, **fields: Any) -> Reply:
        """Ask for a completion, with these fields besides."""
        return await self("POST", "/v1/completions", {"model": MODEL, "prompt": prompt} | fields)
