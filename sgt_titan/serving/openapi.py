"""What the proxy takes, as an OpenAPI document: behind ``--openapi``, for clients that are made from one, and tests."""

from __future__ import annotations

from typing import Any

from sgt_titan.serving.responses import FIELDS as RESPONSES_FIELDS
from sgt_titan.serving.schema import ChatRequest, CompletionRequest

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_OBJECT = {"type": "object"}
# Of /v1/responses, beside what a chat has under the same name.
_RESPONSES = {
    "input": {"anyOf": [{"type": "string"}, {"type": "array", "items": _OBJECT}]},
    "instructions": {"type": "string"},
    "max_output_tokens": {"type": "integer"},
    "tools": {"type": "array", "items": _OBJECT},
    "text": {"type": "object", "properties": {"format": _OBJECT}},
    "reasoning": {"type": "object", "properties": {"effort": {"type": "string"}}},
    "store": {"const": False},
    "truncation": {"const": "disabled"},
    "background": {"const": False},
    "include": {"const": []},
    "service_tier": {"enum": ["auto", "default"]},
    **{name: {"type": "string"} for name in ("user", "safety_identifier", "prompt_cache_key")},
    "metadata": _OBJECT,
}
_INSPECT = {
    "type": "object",
    "properties": {
        "model": {"type": "string"},
        "prompt": {"type": "string"},
        "messages": {"type": "array", "items": _OBJECT},
        "tools": {"type": "array", "items": _OBJECT},
        "private": {"anyOf": [{"type": "boolean"}, _OBJECT]},
    },
}


def document(inspect: bool) -> dict[str, Any]:
    """The document. Every route answers an error in OpenAI's form."""
    chat = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    properties = {name: _RESPONSES.get(name) or chat["properties"][name] for name in RESPONSES_FIELDS}
    responses = {"type": "object", "required": ["model", "input"], "properties": properties}
    posts = {
        "/v1/chat/completions": ("Chat", chat),
        "/v1/completions": (
            "Completion",
            CompletionRequest.model_json_schema(ref_template="#/components/schemas/{model}"),
        ),
        "/v1/responses": ("Responses", responses),
        "/v1/embeddings": ("Embeddings", _OBJECT),
        **({"/v1/inspect": ("Inspect", _INSPECT)} if inspect else {}),
    }
    schemas: dict[str, Any] = {"Error": _ERROR}
    paths: dict[str, Any] = {}
    for path, (name, schema) in posts.items():
        schemas |= schema.pop("$defs", {})
        schemas[name] = schema
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        paths[path] = {"post": {"requestBody": {"required": True, "content": body}, "responses": _answers()}}
    for path in ("/v1/models", "/healthz", "/readyz", "/metrics"):
        paths[path] = {"get": {"responses": _answers()}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "sgt-titan", "version": "1", "description": "OpenAI's API; prompts leave as embeddings."},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _answers() -> dict[str, Any]:
    error = {
        "description": "an error",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    return {"200": {"description": "the answer"}, "default": error}
