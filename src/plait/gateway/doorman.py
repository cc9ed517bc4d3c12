"""Who comes in: request ids, the Host check, API keys and response counts, for every request.

Without keys the gateway listens on loopback only; a page in the user's browser could reach
it there under a name of its own (DNS rebinding) or with a form. So the Host must be this
machine's, and bodies must be declared as JSON, which a browser asks permission for.
"""

import base64
import binascii
import secrets
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from plait.gateway.budgets import Key
from plait.gateway.config import GatewayConfig, is_loopback
from plait.gateway.failure import ANTHROPIC_PATH, ApiError
from plait.gateway.key_store import Cashier
from plait.gateway.metrics import Metrics
from plait.gateway.rates import Rates

OPEN_PATHS = frozenset({"/health", "/ready", "/version"})
BROWSER_PATHS = frozenset({"/", "/page.css", "/metrics"})
"""Where a browser's own password prompt is good enough: they change nothing."""

_CLIENT_LEFT = 499
"""As proxies count it; nobody reads it."""


class Doorman:
    """ASGI middleware; puts ``request_id``, ``owner`` and ``key`` into the request's state, and
    ``begun`` once its response has."""

    def __init__(
        self, app: ASGIApp, config: GatewayConfig, metrics: Metrics, cashier: Cashier | None
    ) -> None:
        self._app, self._config, self._metrics = app, config, metrics
        self._cashier = cashier
        self._rates = Rates()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it here."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(16)
        state = scope.setdefault("state", {})
        state["request_id"], state["key"] = request_id, None
        limits: dict[str, str] = {}

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                state["begun"] = True
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if scope["path"].startswith(ANTHROPIC_PATH):
                    headers["request-id"] = request_id
                headers["x-content-type-options"] = "nosniff"
                headers.update(limits)
                self._count(scope, message["status"])
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._check_host(headers)
            state["owner"] = self._owner(scope["path"], headers, state)
            if state["key"] is not None and scope["method"] == "POST":
                limits |= self._rates.take(state["key"])
            else:
                limits |= self._rates.told(state["key"])
        except ApiError as error:
            limits |= self._rates.told(state["key"])
            response = error.response(scope)
            if error.status == 401 and scope["path"] in BROWSER_PATHS:
                response.headers["www-authenticate"] = 'Basic realm="plait"'
            await response(scope, receive, marked)
            return
        await self._app(scope, receive, marked)
        if not state.get("begun"):
            # Its client left before there was a status to send.
            self._count(scope, _CLIENT_LEFT)

    def _count(self, scope: Scope, status: int) -> None:
        route = getattr(scope.get("route"), "path", "none")
        self._metrics.requests.labels(route, str(status)).inc()

    def _check_host(self, headers: Headers) -> None:
        if self._config.locked:
            return  # Whoever has a key is meant to come in, perhaps through a proxy.
        host = headers.get("host", "").strip()
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if host and not is_loopback(name.lower()):
            message = f"this gateway serves this machine only, not {name!r}"
            raise ApiError(403, message, code="host_not_allowed")

    def _owner(self, path: str, headers: Headers, state: dict[str, Any]) -> str:
        if not self._config.locked or path in OPEN_PATHS:
            return ""
        secret = _key(headers.get("authorization", ""), basic=path in BROWSER_PATHS)
        secret = secret or headers.get("x-api-key", "").strip()  # as Anthropic's clients send it
        owner = self._config.keys.owner_of(secret) if secret and self._config.keys else None
        if owner is not None:
            return owner
        found: Key | None = self._cashier.find(secret) if secret and self._cashier else None
        if found is None:
            message = "the API key is missing or wrong: send Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")
        state["key"] = found
        return found.id


def _key(authorization: str, *, basic: bool) -> str:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if basic and scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""
