"""The OpenAPI document of the server, and a page that shows it."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

from distcls import __version__
from distcls.serving.options import ServeOptions
from distcls.serving.protocol import INPUT

_TEXT = {"type": "string"}
_NUMBER = {"type": "number"}
_TEXTS = {"type": "array", "items": _TEXT}
_OBJECT = {"type": "object"}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = {**required, **(optional or {})}
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_LABELLED = _object({"label": _TEXT, "probability": _NUMBER})
_SET = {**_TEXTS, "description": "the classes of the prediction set"}
_OF_HEAD = _object({"label": _TEXT, "probability": _NUMBER}, {"set": _SET})
_PREDICTION = _object(
    {
        "name": _or_null(_TEXT),
        "error": _or_null(_TEXT),
        "label": _or_null(_TEXT),
        "probability": _or_null(_NUMBER),
        "top_k": _list(_LABELLED),
        "heads": {"type": "object", "additionalProperties": _OF_HEAD},
        "labels": _TEXTS,
        "seconds": _object({"queue": _NUMBER, "decode": _NUMBER, "infer": _NUMBER}),
    },
    {
        "input": {"type": "string", "description": "the preprocessed input, a PNG as data URL"},
        "probabilities": {"type": "object", "additionalProperties": _NUMBER},
        "set": _SET,
        "unsure": {**_TEXTS, "description": "labels that an image may have or not"},
        "explanation": {
            "type": "string",
            "description": "what the prediction rests on, a PNG as data URL",
        },
    },
)
_TENSOR = _object(
    {"name": _TEXT, "datatype": _TEXT, "shape": _list({"type": "integer"})},
    {"parameters": _OBJECT, "data": {"type": "array", "items": {}}},
)
_DESCRIBED = _object({"name": _TEXT, "datatype": _TEXT, "shape": _list({"type": "integer"})})
_INFER = _object(
    {
        "inputs": {
            **_list(
                _object(
                    {
                        "name": {"type": "string", "enum": [INPUT]},
                        "datatype": {"type": "string", "enum": ["BYTES", "UINT8"]},
                        "shape": _list({"type": "integer", "minimum": 0}),
                    },
                    {"data": {"type": "array", "items": {}}, "parameters": _OBJECT},
                )
            ),
            "minItems": 1,
            "maxItems": 1,
        }
    },
    {
        "id": {"type": "string", "maxLength": 1000},
        "outputs": _list(_object({"name": _TEXT}, {"parameters": _OBJECT})),
        "parameters": _OBJECT,
    },
)
_OPTIONAL: dict[Any, dict[str, Any]] = {
    "options": {"ready": {"type": "boolean"}},
    "parameters": {"parameters": _OBJECT},
}
"""Properties of bodies that may be left out."""
_PAIR = _object({"count": {"type": "integer"}, "ns": {"type": "integer"}})
_STATS = _object(
    {
        "model_stats": _list(
            _object(
                {"name": _TEXT, "version": _TEXT, "inference_stats": _object({"success": _PAIR})}
            )
        )
    }
)
_METADATA = _object(
    {
        **{"name": _TEXT, "versions": _TEXTS, "platform": _TEXT},
        **{"inputs": _list(_DESCRIBED), "outputs": _list(_DESCRIBED)},
    }
)
_INFERRED = _object(
    {"model_name": _TEXT, "model_version": _TEXT, "outputs": _list(_TENSOR)}, {"id": _TEXT}
)
_ERRORS = {
    "400": "what was sent is wrong",
    "401": "a bearer token is wanted",
    "403": "not allowed",
    "404": "unknown path, model or version",
    "408": "the body came too slowly",
    "413": "too large",
    "415": "an encoding or a form that is not known",
    "501": "not supported",
    "503": "busy, not ready or shutting down; Retry-After says when to try again",
    "504": "the deadline passed before computing could begin",
}


def document(
    options: ServeOptions, token: bool, names: Sequence[str], versions: Sequence[str]
) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the server: its options, and the models with their versions."""
    paths = {row[0]: {row[1]: _operation(*row)} for row in _table()}
    known = {
        key: {**_TEXT, "enum": [*values]}
        for key, values in (("model", names), ("version", versions))
        if values
    }
    for methods in paths.values():
        for operation in methods.values():
            for parameter in operation["parameters"]:
                parameter["schema"] = known.get(parameter["name"], parameter["schema"])
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "distcls serve",
            "version": __version__,
            "description": "An image classifier: POST /predict takes image files; the rest is the "
            "Open Inference Protocol v2.",
        },
        "servers": [{"url": options.base_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": {"Error": _object({"error": _TEXT})},
            "responses": {
                status: {
                    "description": text,
                    "content": {
                        "application/json": {"schema": {"$ref": "#/components/schemas/Error"}}
                    },
                }
                for status, text in _ERRORS.items()
            },
        },
    }
    if token:
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
    return found


def _table() -> list[tuple[Any, ...]]:
    """Path, method, summary, status codes of errors, schema of the answer, of the body, query."""
    model, one = "/v2/models/{model}", ("401", "404", "503")
    version = model + "/versions/{version}"
    failing = ("400", "401", "404", "408", "413", "415", "503", "504")
    rows: list[tuple[Any, ...]] = [
        (
            *("/predict", "post", "Predict one or several image files", ("403", *failing)),
            _object({"model": _TEXT, "version": _TEXT, "predictions": _list(_PREDICTION)}),
            "files",
            ("model", "version", "top_k", "probabilities", "input", "explain", "coverage"),
        ),
        ("/card", "get", "What the model is", ("400", *one), _OBJECT, None, ("model", "version")),
        ("/v2", "get", "Name and version of the server", ("401",), _object({"name": _TEXT})),
        ("/v2/health/live", "get", "Whether the server lives", ("503",), _object({"live": {}})),
        (
            "/v2/health/ready",
            "get",
            "Whether all models are ready",
            ("503",),
            _object({"ready": {}}),
        ),
        ("/v2/models", "get", "Names of the models", ("401",), _object({"models": _TEXTS})),
        ("/v2/models/stats", "get", "Statistics of all models", ("401",), _STATS),
        ("/metrics", "get", "Metrics for Prometheus", ("401",), None),
        (
            *("/v2/repository/index", "post", "Models, versions and their states"),
            *(("400", "401", "408", "413", "415"), _list(_object({"name": _TEXT})), "options"),
        ),
    ]
    control = ("400", "401", "403", "404", "408", "413", "415", "503")
    for action in ("load", "unload"):
        path = f"/v2/repository/models/{{model}}/{action}"
        rows.append((path, "post", f"{action.title()} a model", control, _OBJECT, "parameters"))
    for base in (model, version):
        rows += [
            (base, "get", "Inputs and outputs of a model", one, _METADATA),
            (base + "/ready", "get", "Whether a model is ready", one, _object({"ready": {}})),
            (base + "/config", "get", "The model as a Triton configuration", one, _OBJECT),
            (base + "/stats", "get", "Statistics of a model", one, _STATS),
            (base + "/infer", "post", "Inference by the protocol", failing, _INFERRED, _INFER),
        ]
    return rows


def _operation(  # noqa: PLR0917 - a row of the table
    path: str,
    method: str,
    summary: str,
    errors: tuple[str, ...],
    answer: dict[str, Any] | None,
    body: Any = None,
    query: tuple[str, ...] = (),
) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": _TEXT}
        for name in ("model", "version")
        if f"{{{name}}}" in path
    ]
    schemas: dict[str, Any] = {
        "top_k": {"type": "integer", "minimum": 1, "maximum": 1_000_000, "default": 5},
        "probabilities": {"type": "boolean", "default": False},
        "input": {"type": "boolean", "default": False},
        "explain": {"type": "boolean", "default": False},
        "coverage": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
    }
    parameters += [
        {"name": name, "in": "query", "required": False, "schema": schemas.get(name, _TEXT)}
        for name in query
    ]
    found: dict[str, Any] = {
        "summary": summary,
        "operationId": f"{method}{path}".replace("/", "_").replace("{", "").replace("}", ""),
        "parameters": parameters,
        "responses": {
            "200": {
                "description": "done",
                "content": {"text/plain": {"schema": _TEXT}}
                if answer is None
                else {"application/json": {"schema": answer}},
            },
            **{status: {"$ref": f"#/components/responses/{status}"} for status in errors},
        },
    }
    if body is not None:
        found["requestBody"] = {
            "required": not isinstance(body, str) or body == "files",
            "content": _content(body),
        }
    return found


def _content(body: Any) -> dict[str, Any]:
    """The content of a request's body."""
    if body == "files":
        file = {"type": "string", "format": "binary"}
        files = _object({}, {"file": {"type": "array", "items": file}})
        return {"multipart/form-data": {"schema": files}, "image/*": {"schema": file}}
    if isinstance(body, str):  # of `_OPTIONAL`
        return {"application/json": {"schema": _object({}, _OPTIONAL[body])}}
    return {"application/json": {"schema": body}}


def docs_page(found: dict[str, Any]) -> bytes:
    """The document as an HTML page that needs nothing else."""
    sections = []
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            parameters = "".join(
                f"<li><code>{html.escape(each['name'])}</code> ({each['in']})</li>"
                for each in operation["parameters"]
            )
            (content,) = operation["responses"]["200"]["content"].values()
            answer = content["schema"]
            statuses = ", ".join(sorted(operation["responses"]))
            sections.append(
                f"<section><h2><code>{method.upper()} {html.escape(path)}</code></h2>"
                f"<p>{html.escape(operation['summary'])}. Statuses: {statuses}.</p>"
                f"<ul>{parameters}</ul><details><summary>answer</summary>"
                f"<pre>{html.escape(json.dumps(answer, indent=2))}</pre></details></section>"
            )
    base = found["servers"][0]["url"].rstrip("/")
    header = '-H "Authorization: Bearer $TOKEN" ' if "security" in found else ""
    example = html.escape(f"curl {header}--data-binary @photo.jpg http://HOST:PORT{base}/predict")
    errors = "".join(f"<li><code>{s}</code> {html.escape(t)}</li>" for s, t in _ERRORS.items())
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>distcls serve: reference</title>"
        '<meta name=viewport content="width=device-width"><link rel=stylesheet href=page.css>'
        "<main class=docs><h1>Reference</h1><p>The same as an OpenAPI document: "
        '<a href="openapi.json">openapi.json</a>. Every error is <code>{"error": "..."}</code>: '
        f"</p><ul>{errors}</ul><p>An image file, with curl:</p><pre>{example}</pre>"
        f"{''.join(sections)}</main></html>"
    ).encode()
