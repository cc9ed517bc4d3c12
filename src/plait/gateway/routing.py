"""From a path to its handler, and from what a handler raises to a response.

Starlette's own application does the same with five more functions around each request and three
around each message: on a stream, around each token.
"""

from collections.abc import Awaitable, Callable, Iterable

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from plait.errors import PlaitError
from plait.gateway import failure
from plait.gateway.failure import ApiError

Handler = Callable[[Request], Awaitable[ASGIApp]]
"""Takes a request; what it returns is called to respond."""


class Routes:
    """An ASGI application: handlers by path, tried in their order.

    It needs a ``state`` in the scope, in which ``begun`` says whether a response has.
    """

    def __init__(
        self, posts: Iterable[tuple[str, Handler]], gets: Iterable[tuple[str, Handler]]
    ) -> None:
        self._router = Router(
            [Route(path, _Endpoint(handler), methods=["POST"]) for path, handler in posts]
            + [Route(path, _Endpoint(handler), methods=["GET"]) for path, handler in gets]
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; what is no error of ours to explain is raised after its response."""
        scope["app"] = self  # Without, the router would answer unknown paths by itself.
        try:
            await self._router(scope, receive, send)
        except Exception as error:
            if scope["state"].get("begun"):
                raise
            await _explained(error, scope)(scope, receive, send)
            if not isinstance(error, ApiError | PlaitError | HTTPException | ClientDisconnect):
                raise


class _Endpoint:
    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        respond = await self._handler(Request(scope, receive))
        await respond(scope, receive, send)


def _explained(error: Exception, scope: Scope) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # Nobody reads it; counted like who leaves later.
    if not isinstance(error, HTTPException):
        return failure.of(error).response(scope)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{scope['method']} {scope['path']}: {error.detail}"
    response = ApiError(error.status_code, message, code=code).response(scope)
    response.headers.update(error.headers or {})
    return response
