"""Our own OpenAPI description: paths by hand, bodies from the structs that decode them."""

from typing import Any

import msgspec

from plait.gateway.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    QuoteRequest,
    TokenizeRequest,
)

_BODIES: dict[str, tuple[str, type[msgspec.Struct]]] = {
    "/v1/chat/completions": ("Answer a conversation.", ChatRequest),
    "/v1/completions": ("Continue texts.", CompletionRequest),
    "/v1/quote": ("The route that would be taken, its price and speed.", QuoteRequest),
    "/tokenize": ("Token ids of a text or a conversation.", TokenizeRequest),
    "/detokenize": ("The text of token ids.", DetokenizeRequest),
}
_READS = {
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
_TEXT = {"/metrics": "text/plain"}
_EVENTS = ("/v1/chat/completions", "/v1/completions")


def describe(version: str) -> dict[str, Any]:
    """The document."""
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
    content: dict[str, Any] = {_TEXT.get(path, "application/json"): {}}
    if path in _EVENTS:
        content["text/event-stream"] = {}
    error = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "security": [] if path in _OPEN else [{"key": []}, {}],
        "responses": {
            "200": {"description": "Done.", "content": content},
            "default": {"description": "An error.", "content": error},
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
