"""Our own OpenAPI description: paths by hand, bodies from the structs that decode them."""

from collections.abc import Sequence
from typing import Any

import msgspec

from plait.gateway.messages_api import CountRequest, MessagesRequest
from plait.gateway.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    QuoteRequest,
    TokenizeRequest,
)
from plait.gateway.responses_api import ResponsesRequest

_BODIES: dict[str, tuple[str, type[msgspec.Struct]]] = {
    "/v1/chat/completions": ("Answer a conversation.", ChatRequest),
    "/v1/completions": ("Continue texts.", CompletionRequest),
    "/v1/responses": ("Answer an input, as items.", ResponsesRequest),
    "/v1/messages": ("Answer a conversation, in Anthropic's words.", MessagesRequest),
    "/v1/messages/count_tokens": ("How many tokens a conversation has.", CountRequest),
    "/v1/embeddings": ("A vector for each text.", EmbeddingRequest),
    "/v1/quote": ("The route that would be taken, its price and speed.", QuoteRequest),
    "/tokenize": ("Token ids of a text or a conversation.", TokenizeRequest),
    "/detokenize": ("The text of token ids.", DetokenizeRequest),
}
_READS = {
    "/": "A page with models, nodes and spend.",
    "/page.css": "Its style.",
    "/v1/models": "Models with a complete pipeline now.",
    "/v1/models/{id}": "One of them.",
    "/v1/bundles/{id}": "The evidence of an answer, for plait verify.",
    "/tokenizer_info": "What a remote tokenizer needs to know.",
    "/health": "200 while the gateway runs.",
    "/ready": "200 when a complete pipeline for some model exists.",
    "/version": "The version of Plait.",
    "/metrics": "Prometheus metrics.",
    "/openapi.json": "This description.",
}
_OPEN = ("/health", "/ready", "/version")
_TEXT = {"/metrics": "text/plain", "/": "text/html", "/page.css": "text/css"}
_EVENTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")

_STRING: dict[str, Any] = {"type": "string"}
_INTEGER: dict[str, Any] = {"type": "integer"}
_OBJECT: dict[str, Any] = {"type": "object"}


def _object(**members: dict[str, Any]) -> dict[str, Any]:
    """An object that has these members, among others."""
    return {"type": "object", "properties": members, "required": list(members)}


def _array(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


_USAGE = _object(prompt_tokens=_INTEGER, completion_tokens=_INTEGER, total_tokens=_INTEGER)
_COMPLETION = _object(
    id=_STRING,
    object=_STRING,
    created=_INTEGER,
    model=_STRING,
    choices=_array(_object(index=_INTEGER, finish_reason=_STRING)),
    usage=_USAGE,
    plait=_OBJECT,
)
_MODEL = _object(
    id=_STRING, object={"const": "model"}, created=_INTEGER, owned_by=_STRING, price=_OBJECT
)
_RESULTS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": _COMPLETION,
    "/v1/completions": _COMPLETION,
    "/v1/responses": _object(
        id=_STRING, object={"const": "response"}, status=_STRING, output=_array(_OBJECT)
    ),
    "/v1/messages": _object(
        id=_STRING, type={"const": "message"}, content=_array(_OBJECT), usage=_OBJECT
    ),
    "/v1/messages/count_tokens": _object(input_tokens=_INTEGER),
    "/v1/embeddings": _object(object={"const": "list"}, data=_array(_OBJECT), model=_STRING),
    "/v1/quote": _object(object={"const": "quote"}, prompt_tokens=_INTEGER, max_tokens=_INTEGER),
    "/tokenize": _object(count=_INTEGER, max_model_len=_INTEGER, tokens=_array(_INTEGER)),
    "/detokenize": _object(prompt=_STRING),
    "/v1/models": _object(object={"const": "list"}, data=_array(_MODEL)),
    "/v1/models/{id}": _MODEL,
    "/v1/bundles/{id}": _OBJECT,
    "/tokenizer_info": _object(model=_STRING, vocab_size=_INTEGER),
    "/health": _object(status=_STRING),
    "/ready": _object(status=_STRING, models=_array(_STRING)),
    "/version": _object(version=_STRING),
    "/openapi.json": _object(openapi=_STRING, paths=_OBJECT),
}


def describe(version: str, models: Sequence[str]) -> dict[str, Any]:
    """The document; ``models`` are those that are served now."""
    kinds = [kind for _, kind in _BODIES.values()]
    references, components = msgspec.json.schema_components(
        kinds, ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, Any] = {}
    for (path, (summary, _)), reference in zip(_BODIES.items(), references, strict=True):
        body = {"required": True, "content": {"application/json": {"schema": reference}}}
        paths[path] = {"post": _operation(path, summary) | {"requestBody": body}}
    for path, summary in _READS.items():
        paths[path] = {"get": _operation(path, summary)}
    for component in components.values():
        if models and "model" in component.get("properties", {}):
            component["properties"]["model"] |= {"examples": list(models)}
            if "model" in component.get("required", ()):
                component["properties"]["model"]["enum"] = list(models)
    components["Error"] = _error_schema()
    return {
        "openapi": "3.1.0",
        "info": {"title": "Plait gateway", "version": version or "0"},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(path: str, summary: str) -> dict[str, Any]:
    result = {"schema": _RESULTS[path]} if path in _RESULTS else {}
    content: dict[str, Any] = {_TEXT.get(path, "application/json"): result}
    if path in _EVENTS:
        content["text/event-stream"] = {}
    failure = {"$ref": "#/components/schemas/Error"} if path != "/ready" else {"type": "object"}
    operation: dict[str, Any] = {
        "summary": summary,
        "security": [] if path in _OPEN else [{"key": []}, {}],
        "responses": {
            "200": {"description": "Done.", "content": content},
            "default": {
                "description": "An error.",
                "content": {"application/json": {"schema": failure}},
            },
        },
    }
    if "{id}" in path:
        schema = {"type": "string"}
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": schema}]
    if path == "/tokenizer_info":
        schema = {"type": "string"}
        operation["parameters"] = [{"name": "model", "in": "query", "schema": schema}]
    return operation


def _error_schema() -> dict[str, Any]:
    nullable: dict[str, Any] = {"type": ["string", "null"]}
    members: dict[str, Any] = {"message": {"type": "string"}, "type": {"type": "string"}}
    members |= {"param": nullable, "code": nullable, "remedy": {"type": "string"}}
    error = {
        "type": "object",
        "properties": members,
        "required": ["message", "type", "param", "code"],
    }
    return {"type": "object", "properties": {"error": error}, "required": ["error"]}
