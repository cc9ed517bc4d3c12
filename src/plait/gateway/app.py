"""The ASGI application: routes, each a thin step between HTTP and the parts."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp

from plait.gateway import messages_api, openapi, page, responses_api
from plait.gateway.answering import Answering, Desk
from plait.gateway.budgets import Key
from plait.gateway.bundles import BundleStore
from plait.gateway.config import GatewayConfig
from plait.gateway.dialects import ChatDialect, Head, TextDialect
from plait.gateway.doorman import Doorman
from plait.gateway.embedding import embeddings
from plait.gateway.failure import ApiError, in_words_of, invalid, json_response
from plait.gateway.frames import Dialect
from plait.gateway.key_store import Cashier
from plait.gateway.messages_api import CountRequest, MessagesDialect, MessagesRequest
from plait.gateway.metrics import CONTENT_TYPE, Metrics
from plait.gateway.orders import (
    Job,
    chat_ids,
    chat_jobs,
    completion_jobs,
    max_tokens,
    options_of,
    text_ids,
)
from plait.gateway.port import Upstream
from plait.gateway.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    Generating,
    QuoteRequest,
    TokenizeRequest,
    decoder,
    plain_messages,
)
from plait.gateway.responses_api import ResponsesDialect, ResponsesRequest
from plait.gateway.routing import Routes
from plait.gateway.running import InProgress
from plait.gateway.shares import Shares
from plait.gateway.shelf import Shelf, Shelved, facts_of
from plait.gateway.till import check_model, check_peers, permitted, within
from plait.router.explain import explain

BodyT = TypeVar("BodyT")

_HOLD_SLACK_MS = 60_000
"""A hold outlives the longest request by this much."""


class Gateway:
    """The handlers of one gateway over one client of the network."""

    def __init__(self, upstream: Upstream, network_id: str, config: GatewayConfig) -> None:
        self.in_progress = InProgress(config.sessions_max, config.waiting_max)
        self.cashier: Cashier | None = None
        if config.key_store is not None:
            ttl_ms = round(1000 * config.request_timeout_s) + _HOLD_SLACK_MS
            self.cashier = Cashier(config.key_store, _clock_ms, ttl_ms)
        self._upstream, self._network_id, self._config = upstream, network_id, config
        self._metrics = Metrics()
        self._shelf = Shelf(upstream)
        self._bundles = BundleStore(config.bundles_max, config.bundle_bytes_max)
        self._desk = Desk(
            upstream,
            config,
            self._metrics,
            self._bundles,
            self.in_progress,
            self.cashier,
            Shares(upstream),
        )
        self._created = int(time.time())
        self._chat_body = decoder(ChatRequest)
        self._completion_body = decoder(CompletionRequest)
        self._responses_body = decoder(ResponsesRequest)
        self._messages_body = decoder(MessagesRequest)
        self._count_body = decoder(CountRequest)
        self._embedding_body = decoder(EmbeddingRequest)
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
            "/v1/responses": self.responses,
            "/v1/messages": self.messages,
            "/v1/messages/count_tokens": self.count_tokens,
            "/v1/embeddings": self.embeddings,
            "/v1/quote": self.quote,
            "/tokenize": self.tokenize,
            "/detokenize": self.detokenize,
        }
        # Tried one after the other: what is asked most stands first.
        routes = Routes(writes.items(), reads.items())
        return Doorman(routes, self._config, self._metrics, self.cashier)

    def close(self) -> None:
        """Write what is left of usage."""
        if self.cashier is not None:
            self.cashier.close()

    # Answers ------------------------------------------------------------------------

    async def chat(self, request: Request) -> Any:
        """``POST /v1/chat/completions``."""
        body = await self._body(request, self._chat_body)
        model = await self._shelf.get(body.model)
        jobs = await chat_jobs(body, model, self._config)
        head = self._head(request, "chatcmpl-", model)
        usage, logprobs = _include_usage(body), bool(body.logprobs)
        dialect = ChatDialect(head, include_usage=usage, logprobs=logprobs)
        return self._answering(request, dialect, jobs, stream=body.stream)

    async def completions(self, request: Request) -> Any:
        """``POST /v1/completions``."""
        body = await self._body(request, self._completion_body)
        model = await self._shelf.get(body.model)
        jobs = await completion_jobs(body, model, self._config)
        head = self._head(request, "cmpl-", model)
        dialect = TextDialect(head, include_usage=_include_usage(body), logprobs=body.logprobs)
        return self._answering(request, dialect, jobs, stream=body.stream)

    async def responses(self, request: Request) -> Any:
        """``POST /v1/responses``."""
        body = await self._body(request, self._responses_body)
        model = await self._shelf.get(body.model)
        chat = responses_api.as_chat(body)
        with in_words_of(responses_api.CHAT_NAMES):
            jobs = await chat_jobs(chat, model, self._config)
        dialect = ResponsesDialect(self._head(request, "resp_", model), body)
        return self._answering(request, dialect, jobs, stream=body.stream)

    async def messages(self, request: Request) -> Any:
        """``POST /v1/messages``."""
        body = await self._body(request, self._messages_body)
        model = await self._shelf.get(body.model)
        jobs = await self._message_jobs(body, model)
        dialect = MessagesDialect(self._head(request, messages_api.ID_PREFIX, model))
        return self._answering(request, dialect, jobs, stream=body.stream)

    async def count_tokens(self, request: Request) -> Response:
        """``POST /v1/messages/count_tokens``."""
        body = await self._body(request, self._count_body)
        model = await self._shelf.get(body.model)
        check_model(model.name, request.state.key)
        jobs = await self._message_jobs(body, model)
        return json_response({"input_tokens": jobs[0].prompt_tokens})

    async def _message_jobs(self, body: CountRequest, model: Shelved) -> list[Job]:
        chat = messages_api.as_chat(body)
        with in_words_of(messages_api.CHAT_NAMES):
            return await chat_jobs(chat, model, self._config)

    async def embeddings(self, request: Request) -> Response:
        """``POST /v1/embeddings``."""
        body = await self._body(request, self._embedding_body)
        model = await self._shelf.get(body.model)
        return await embeddings(body, model, self._desk, request.state.key)

    def _head(self, request: Request, prefix: str, model: Shelved) -> Head:
        return Head(prefix + request.state.request_id, int(time.time()), model)

    def _answering(
        self, request: Request, dialect: Dialect, jobs: list[Job], *, stream: bool | None
    ) -> Answering:
        most = self._config.sessions_max
        if len(jobs) > most:
            name = "n" if jobs[-1].choice == len(jobs) - 1 else "prompt"
            raise invalid(name, f"{len(jobs)} answers are asked for, {most} are given at once")
        return Answering(
            self._desk,
            dialect,
            permitted(jobs, request.state.key),
            request_id=request.state.request_id,
            owner=request.state.owner,
            key=request.state.key,
            stream=bool(stream),
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
        check_model(model.name, request.state.key)
        count = body.prompt_tokens or await self._measure(model, body)
        limit = max_tokens(count, body.max_tokens, model, self._config, "prompt_tokens")
        options = within(options_of(limit, body.provider, body.plait), request.state.key)
        check_peers(self._upstream, model.name, count, options, request.state.key)
        decision = explain(self._upstream.plan(model.name, count, options))
        predicted = decision.pop("predicted")
        tokens = {"prompt_tokens": count, "max_tokens": options.max_tokens}
        return json_response({"object": "quote"} | decision | tokens | predicted)

    # Models and tokens --------------------------------------------------------------

    async def models(self, request: Request) -> Response:
        """``GET /v1/models``."""
        key: Key | None = request.state.key
        listed = [one for one in await self._models() if key is None or key.allows(one["id"])]
        return json_response({"object": "list", "data": listed})

    async def model(self, request: Request) -> Response:
        """``GET /v1/models/{id}``."""
        model = await self._shelf.get(request.path_params["id"])
        check_model(model.name, request.state.key)
        for name, plan in self._shelf.ready():
            if name == model.name:
                return json_response(self._shelf.describe(model, plan, self._created))
        message = f"{model.name} has no complete pipeline now"
        raise ApiError(404, message, code="model_not_found", param="model")

    async def tokenize(self, request: Request) -> Response:
        """``POST /tokenize``."""
        body = await self._body(request, self._tokenize_body)
        model = await self._shelf.get_or_default(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise invalid("prompt", "give either a prompt or messages")
        if body.messages is not None:
            ids = list(await chat_ids(model, plain_messages(body.messages)))
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
        models = [name for name, _ in self._shelf.ready()]
        return json_response(openapi.describe(self._config.version, models))

    async def page(self, request: Request) -> Response:
        """``GET /``."""
        models = await self._models()
        routes = {
            name: " → ".join(f"{stage.offer.peer[-6:]} {stage.span}" for stage in plan.stages)
            for name, plan in self._shelf.ready()
        }
        listed = [model | {"route": routes.get(model["id"], "")} for model in models]
        view, spend = self._upstream.view(), self._metrics.by_model()
        follow = "follow" in request.query_params
        return page.render(self._network_id, listed, view, spend, follow=follow)

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
            return len(await chat_ids(model, plain_messages(body.messages)))
        if body.prompt is not None:
            return len(await text_ids(model, body.prompt, "prompt"))
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


def _include_usage(body: Generating) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


def _clock_ms() -> int:
    return time.time_ns() // 1_000_000
