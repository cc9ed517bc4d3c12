"""The ASGI application: routes, each a thin step between HTTP and the parts."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from plait.client import Options
from plait.errors import PlaitError
from plait.gateway import failure, openapi, page
from plait.gateway.answering import Answering, Desk
from plait.gateway.bundles import BundleStore
from plait.gateway.config import GatewayConfig
from plait.gateway.dialects import ChatDialect, Dialect, TextDialect
from plait.gateway.doorman import Doorman
from plait.gateway.failure import ApiError, invalid, json_response
from plait.gateway.metrics import CONTENT_TYPE, Metrics
from plait.gateway.orders import Job, chat_jobs, completion_jobs, prompt_tokens, routing
from plait.gateway.port import Upstream
from plait.gateway.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generating,
    QuoteRequest,
    TokenizeRequest,
    decoder,
    plain_messages,
)
from plait.gateway.running import InProgress
from plait.gateway.shelf import Shelf, Shelved, facts_of
from plait.router.explain import explain

BodyT = TypeVar("BodyT")


class Gateway:
    """The handlers of one gateway over one client of the network."""

    def __init__(self, upstream: Upstream, network_id: str, config: GatewayConfig) -> None:
        self.in_progress = InProgress(config.sessions_max)
        self._upstream, self._network_id, self._config = upstream, network_id, config
        self._metrics = Metrics()
        self._shelf = Shelf(upstream)
        self._bundles = BundleStore(config.bundles_max, config.bundle_bytes_max)
        self._desk = Desk(upstream, config, self._metrics, self._bundles, self.in_progress)
        self._created = int(time.time())
        self._chat_body = decoder(ChatRequest)
        self._completion_body = decoder(CompletionRequest)
        self._quote_body = decoder(QuoteRequest)
        self._tokenize_body = decoder(TokenizeRequest)
        self._detokenize_body = decoder(DetokenizeRequest)

    def app(self) -> ASGIApp:
        """The application to serve."""
        reads = {
            "/": self.page,
            "/page.css": self.style,
            "/v1/models": self.models,
            "/v1/models/{id:path}": self.model,
            "/v1/bundles/{id}": self.bundle,
            "/tokenizer_info": self.tokenizer_info,
            "/health": self.health,
            "/ready": self.ready,
            "/version": self.version,
            "/metrics": self.metrics,
            "/openapi.json": self.openapi,
        }
        writes = {
            "/v1/chat/completions": self.chat,
            "/v1/completions": self.completions,
            "/v1/quote": self.quote,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        routes = Starlette(
            routes=[Route(path, handler, methods=["GET"]) for path, handler in reads.items()]
            + [Route(path, handler, methods=["POST"]) for path, handler in writes.items()],
            exception_handlers={
                ApiError: _on_error,
                PlaitError: _on_error,
                HTTPException: _on_http_error,
                ClientDisconnect: _on_disconnect,
                Exception: _on_error,
            },
        )
        return Doorman(routes, self._config, self._metrics)

    # Answers ------------------------------------------------------------------------

    async def chat(self, request: Request) -> Any:
        """``POST /v1/chat/completions``."""
        body = await self._body(request, self._chat_body)
        model = await self._shelf.get(body.model)
        jobs = await chat_jobs(body, model, self._config)
        return self._answering(request, body, ChatDialect(bool(body.logprobs)), jobs)

    async def completions(self, request: Request) -> Any:
        """``POST /v1/completions``."""
        body = await self._body(request, self._completion_body)
        model = await self._shelf.get(body.model)
        jobs = await completion_jobs(body, model, self._config)
        return self._answering(request, body, TextDialect(body.logprobs is not None), jobs)

    def _answering(
        self, request: Request, body: Generating, dialect: Dialect, jobs: list[Job]
    ) -> Answering:
        options = body.stream_options
        return Answering(
            self._desk,
            dialect,
            jobs,
            request_id=request.state.request_id,
            owner=request.state.owner,
            stream=bool(body.stream),
            include_usage=bool(options and options.include_usage),
        )

    async def bundle(self, request: Request) -> Response:
        """``GET /v1/bundles/{id}``."""
        found = self._bundles.get(request.path_params["id"], request.state.owner)
        if found is None:
            raise ApiError(404, "there is no such bundle, or no longer", code="bundle_not_found")
        return Response(found, media_type="application/json")

    async def quote(self, request: Request) -> Response:
        """``POST /v1/quote``."""
        body = await self._body(request, self._quote_body)
        model = await self._shelf.get(body.model)
        count = body.prompt_tokens or await self._measure(model, body)
        options = Options(max_tokens=body.max_tokens or self._config.default_max_tokens)
        options = routing(options, body.provider, body.plait)
        decision = explain(self._upstream.plan(model.name, count, options))
        predicted = decision.pop("predicted")
        tokens = {"prompt_tokens": count, "max_tokens": options.max_tokens}
        return json_response({"object": "quote"} | decision | tokens | predicted)

    # Models and tokens --------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        return json_response({"object": "list", "data": await self._models()})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``."""
        wanted = request.path_params["id"]
        for model in await self._models():
            if model["id"] == wanted:
                return json_response(model)
        message = f"there is no model {wanted!r} with a complete pipeline now"
        raise ApiError(404, message, code="model_not_found", param="model")

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``."""
        body = await self._body(request, self._tokenize_body)
        model = await self._shelf.get_or_default(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "give either a prompt or messages")
        if body.messages is not None:
            ids = await asyncio.to_thread(model.tokenizer.chat, plain_messages(body.messages))
        else:
            ids = await asyncio.to_thread(model.tokenizer.encode, body.prompt or "")
        length = {"count": len(ids), "max_model_len": model.context_length}
        return json_response(length | {"tokens": ids, "model": model.name})

    async def detokenize(self, request: Request) -> Response:
        """``POST /detokenize``."""
        body = await self._body(request, self._detokenize_body)
        model = await self._shelf.get_or_default(body.model)
        if any(token >= model.tokenizer.vocabulary_size for token in body.tokens):
            raise invalid("tokens", f"{model.name} has no such token id")
        text = await asyncio.to_thread(model.tokenizer.decode, body.tokens)
        return json_response({"prompt": text, "model": model.name})

    async def tokenizer_info(self, request: Request) -> Response:
        """``GET /tokenizer_info``."""
        model = await self._shelf.get_or_default(request.query_params.get("model"))
        return json_response(await asyncio.to_thread(facts_of, model))

    # The gateway itself -------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        """``GET /health``."""
        return json_response({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """``GET /ready``."""
        models = [name for name, _ in self._shelf.ready()]
        if not models or self.in_progress.closing:
            return json_response({"status": "not ready", "models": []}, 503)
        return json_response({"status": "ready", "models": models})

    async def version(self, request: Request) -> Response:
        """``GET /version``."""
        return json_response({"version": self._config.version})

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``."""
        return Response(self._metrics.exposition(), headers={"content-type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        """``GET /openapi.json``."""
        return json_response(openapi.describe(self._config.version))

    async def page(self, request: Request) -> Response:
        """``GET /``."""
        models = await self._models()
        routes = {
            name: " → ".join(f"{stage.offer.peer[-6:]} {stage.span}" for stage in plan.stages)
            for name, plan in self._shelf.ready()
        }
        listed = [model | {"route": routes.get(model["id"], "")} for model in models]
        view, spend = self._upstream.view(), self._metrics.by_model()
        return page.render(self._network_id, listed, view, spend)

    async def style(self, request: Request) -> Response:
        """``GET /page.css``."""
        return PlainTextResponse(page.STYLE, media_type="text/css")

    # Parts --------------------------------------------------------------------------

    async def _models(self) -> list[dict[str, Any]]:
        return [
            self._shelf.describe(await self._shelf.get(name), plan, self._created)
            for name, plan in self._shelf.ready()
        ]

    async def _measure(self, model: Shelved, body: QuoteRequest) -> int:
        if body.messages is not None:
            return await prompt_tokens(model, plain_messages(body.messages), raw=False)
        if body.prompt is not None:
            return await prompt_tokens(model, body.prompt, raw=True)
        raise invalid("prompt_tokens", "give prompt_tokens, messages or a prompt")

    async def _body(self, request: Request, decode: Callable[[bytes], BodyT]) -> BodyT:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            message = "send the body with content-type: application/json"
            raise ApiError(415, message, code="unsupported_media_type")
        parts, size = list[bytes](), 0
        async for part in request.stream():
            parts.append(part)
            size += len(part)
            if size > self._config.body_bytes_max:
                message = f"the body has more than {self._config.body_bytes_max} bytes"
                raise ApiError(413, message, code="request_too_large")
        return decode(b"".join(parts))


async def _on_error(request: Request, error: Exception) -> Response:
    return failure.of(error).response()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path}: {error.detail}"
    response = ApiError(error.status_code, message, code=code).response()
    response.headers.update(error.headers or {})
    return response


async def _on_disconnect(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # Nobody reads it.
