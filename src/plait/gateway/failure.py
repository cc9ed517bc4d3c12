"""Errors as HTTP: one table from the error tree to status, type and code."""

import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from plait.errors import (
    CapacityError,
    ConfigError,
    DeadlineExceeded,
    LedgerError,
    ModelError,
    NetworkError,
    NoRoute,
    PlaitError,
    RemoteProtocolError,
    SessionLost,
    VerificationError,
    reworded,
)

INVALID = "invalid_request_error"

# The first class that fits decides; a subclass stands before its base.
_TABLE: tuple[tuple[type[PlaitError], int, str, str], ...] = (
    (ConfigError, 400, INVALID, "invalid_request"),
    (ModelError, 404, INVALID, "model_not_found"),
    (NoRoute, 503, "route_error", "no_route"),
    (DeadlineExceeded, 504, "timeout_error", "deadline_exceeded"),
    (NetworkError, 503, "network_error", "network_unreachable"),
    (CapacityError, 503, "overloaded_error", "overloaded"),
    (LedgerError, 402, "insufficient_quota", "insufficient_quota"),
    (SessionLost, 503, "session_error", "session_lost"),
    (RemoteProtocolError, 502, "peer_error", "peer_broke_protocol"),
    (VerificationError, 502, "peer_error", "verification_failed"),
)
_AGAIN_S = 1.0
_FIELDS = {
    "only": "provider.only",
    "ignore": "provider.ignore",
    "max_price": "provider.max_price",
    "ttft_s": "plait.ttft_s",
    "tpot_s": "plait.tpot_s",
    "explain": "plait route MODEL --explain",
}
"""How a request spells what a remedy names, where it spells that in its own way."""
ANTHROPIC_PATH = "/v1/messages"
_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_PASSING = frozenset({429, 502, 503, 504})


class ApiError(Exception):
    """An answer that is an error. ``retry`` None follows from the status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        kind: str = INVALID,
        param: str | None = None,
        retry: bool | None = None,
        retry_after_s: float | None = None,
        remedy: str = "",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.kind = kind
        self.param = param
        self.retry = status in _PASSING if retry is None else retry
        self.retry_after_s = retry_after_s
        self.remedy = remedy

    def body(self) -> dict[str, Any]:
        """OpenAI's error object, with ``remedy`` where there is one."""
        error = {
            "message": str(self),
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }
        if self.remedy:
            error["remedy"] = self.remedy
        return {"error": error}

    def anthropic_body(self, request_id: str) -> dict[str, Any]:
        """Anthropic's error object, with ``remedy`` where there is one."""
        kind = _ANTHROPIC.get(self.status, "api_error")
        error = {"type": kind, "message": str(self), "code": self.code, "param": self.param}
        if self.remedy:
            error["remedy"] = self.remedy
        return {"type": "error", "error": error, "request_id": request_id}

    def headers(self) -> dict[str, str]:
        """Whether and when to try again, for SDKs that would guess from the status."""
        headers = {"x-should-retry": "true" if self.retry else "false"}
        if self.retry and self.status in (429, 503):
            after_s = _AGAIN_S if self.retry_after_s is None else self.retry_after_s
            # Retry-After knows whole seconds only: 0 would invite a storm.
            headers["retry-after"] = str(max(1, round(after_s)))
        return headers

    def response(self, scope: Scope) -> Response:
        """The error as a whole response, in the words of the API that was asked."""
        in_theirs = scope["path"].startswith(ANTHROPIC_PATH)
        body = self.anthropic_body(scope["state"]["request_id"]) if in_theirs else self.body()
        return json_response(body, self.status, self.headers())


def refused(param: str, why: str) -> ApiError:
    """A field that we understand and cannot honour."""
    return ApiError(400, why, code="unsupported_parameter", param=param)


def invalid(param: str | None, why: str) -> ApiError:
    """A field with a value that makes no sense."""
    return ApiError(400, why, code="invalid_value", param=param)


@contextmanager
def in_words_of(names: Mapping[str, str]) -> Generator[None]:
    """Name the fields of a request that was turned into another as its sender did: ``names``
    has for the first part of a path what to say instead of the whole."""
    try:
        yield
    except ApiError as error:
        head = re.split(r"[.\[]", error.param or "")[0]
        error.param = names.get(head, error.param)
        raise


def of(error: Exception) -> ApiError:
    """The HTTP side of any error; what is not ours to tell stays in the log."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(
            504, "the answer took too long", kind="timeout_error", code="deadline_exceeded"
        )
    for kind, status, type_, code in _TABLE:
        if isinstance(error, kind):
            # What the request itself rules out will not be possible in a second either.
            bounded = isinstance(error, NoRoute) and (bool(error.options) or not error.missing)
            return ApiError(
                400 if bounded else status,
                str(error),
                kind=type_,
                code=code,
                param=_param(error),
                retry_after_s=error.retry_after_s if isinstance(error, CapacityError) else None,
                remedy=_remedy(error),
            )
    return ApiError(500, "the gateway failed; see its log", kind="api_error", code="internal_error")


def _remedy(error: PlaitError) -> str:
    """What to try, in the words of a request."""
    return reworded(error.remedy, lambda option: _FIELDS.get(option, option))


def _param(error: Exception) -> str | None:
    if isinstance(error, ModelError):
        return "model"
    if isinstance(error, NoRoute) and error.options:
        return _FIELDS.get(error.options[0])
    return None


def json_response(
    value: object, status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A JSON response."""
    return Response(
        msgspec.json.encode(value), status, headers=headers, media_type="application/json"
    )
