"""The ASGI application: routes, and what is done for every request.

`make_app` gives one that any ASGI server runs; `distcls serve` runs it on uvicorn (`connection`).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import time
import urllib.parse
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from multipart import MultipartError, PushMultipartParser, parse_options_header

from distcls.errors import UsageError, did_you_mean, shown
from distcls.prediction import (
    SET,
    UNSURE,
    least_probabilities,
    prediction_sets,
    ranking,
    shortest,
)
from distcls.serving.body import Body, ClientGone, Message, Receive
from distcls.serving.openapi import docs_page, document
from distcls.serving.options import MB, ServeOptions
from distcls.serving.pages import HTML_HEADERS, load_pages, png
from distcls.serving.protocol import (
    Refused,
    check_outputs,
    format_infer,
    parse_infer,
    parse_object,
    server_metadata,
)
from distcls.serving.repository import Version
from distcls.serving.service import Call, Service
from distcls.serving.work import Output, Work
from distcls.task import Task

Send = Callable[[Message], Awaitable[None]]
Scope = dict[str, Any]

JSON = "application/json"
EXACT = ("/predict", "/v2/health/live", "/v2/health/ready", "/metrics")
FORM = re.compile(rb"[\w.\[\]-]{1,50}=")
"""How a form without files begins."""
WATCH_AFTER = 0.05
"""Seconds after which a client that waits is watched for leaving; most are answered before."""
COMPRESSED_FROM = 1000
"""Bytes of an answer from which compressing it pays."""
OPEN_ROUTES = ("/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json")
"""Answered without a token: probes and links carry none."""


class Reply:
    """What is sent back."""

    def __init__(
        self,
        body: bytes,
        status: int = 200,
        kind: str = JSON,
        headers: dict[str, str] | None = None,
    ) -> None:
        self.body, self.status, self.kind = body, status, kind
        self.headers = headers or {}


class Request(Call):
    """One request: its path, headers and query, and its body to be read."""

    def __init__(self, scope: Scope, receive: Receive, options: ServeOptions) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            self.headers[name.lower()] = value
        self.query: dict[str, str] = {}
        self._query: bytes = scope["query_string"]
        self.body = Body(receive, self.headers, options)
        super().__init__(self.method, self.path, self.header("x-request-id"))
        self.client = (scope.get("client") or ("",))[0]

    def header(self, name: str) -> str:
        """The value of a header; empty if it is not there."""
        return self.headers.get(name.encode(), b"").decode("latin-1")

    def require_query(self, *known: str) -> None:
        """Read the query. Raises Refused for a parameter that is unknown, or empty."""
        text = self._query.decode("latin-1")
        try:
            pairs = urllib.parse.parse_qsl(text, keep_blank_values=True, max_num_fields=50)
        except ValueError as error:
            raise Refused(400, f"the query cannot be read: {str(error)[:100]}") from error
        self.query = dict(pairs)
        for name, value in self.query.items():
            if name not in known:
                raise Refused(400, f"unknown parameter {shown(name)}{did_you_mean(name, known)}")
            if not value:
                raise Refused(400, f"{name}: is empty")

    def flag(self, name: str) -> bool:
        """A yes or no of the query."""
        value = self.query.get(name, "false").lower()
        if value not in ("true", "false", "1", "0"):
            raise Refused(400, f"{name}: {value[:50]!r}, expected true or false")
        return value in ("true", "1")


Handler = Callable[..., Coroutine[Any, Any, Reply]]


class App(Service):
    """The application; `await start()` before the first request, or serve its lifespan."""

    def __init__(self, options: ServeOptions, token: str = "") -> None:
        """`token` is the bearer token that requests have to carry, if any."""
        super().__init__(options, token)
        self._pages = load_pages()
        routes = _routes(self)
        self._routes = [
            (re.compile(pattern + r"/?"), _readable(pattern), handlers)
            for pattern, handlers in routes.items()
        ]
        self._exact = {pattern: (pattern, routes[pattern]) for pattern in EXACT}
        """What is asked most, without trying all patterns."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI 3."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            self.in_flight += 1
            try:
                await self._serve(scope, receive, send)
            finally:
                self.in_flight -= 1

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                try:
                    await self.start()
                except Exception as error:
                    await send({"type": "lifespan.startup.failed", "message": str(error)})
                    return
                await send({"type": "lifespan.startup.complete"})
            elif message["type"] == "lifespan.shutdown":
                await self.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, self.options)
        request.body.budget = self.body_budget
        try:
            reply = await self._answer(request)
        except ClientGone:
            self._record(request, 499)
            with contextlib.suppress(Exception):  # nobody may be there to read it
                await _send(send, _error(400, "the body ended before it was complete"))
            return
        finally:
            request.body.release()
        closes = not await request.body.drain() or self.draining
        reply.headers["x-request-id"] = request.id
        if self.options.cors:
            _allow_origin(request, reply, self.options.cors)
        self._record(request, reply.status)
        if closes:
            reply.headers["connection"] = "close"
        await _send(send, reply, head=scope["method"] == "HEAD")

    async def _answer(self, request: Request) -> Reply:
        """The reply to a request, whatever happens."""
        try:
            return await self._dispatch(request)
        except ClientGone:
            raise
        except Exception as error:
            refused = self.refuse(request, error)
            return _error(refused.status, refused.message, refused.headers)

    def _matching(self, path: str) -> Iterator[tuple[str, dict[str, Handler], dict[str, str]]]:
        """Routes that fit a path: the name, the handlers by method, and the parts of the path."""
        if path in self._exact:
            route, handlers = self._exact[path]
            yield route, handlers, {}
            return
        for pattern, route, handlers in self._routes:
            if (match := pattern.fullmatch(path)) is not None:
                yield (
                    route,
                    handlers,
                    {name: text or "" for name, text in match.groupdict().items()},
                )

    async def _dispatch(self, request: Request) -> Reply:
        path = request.path
        if self.options.base_path:
            if not path.startswith(self.options.base_path):
                raise Refused(404, f"{path[:100]!r} is not below {self.options.base_path}")
            path = path[len(self.options.base_path) :] or "/"
        allowed: list[str] = []
        for route, handlers, values in self._matching(path):
            request.route = route
            if request.method == "OPTIONS" and self.options.cors:
                return Reply(b"", 204)
            if path.rstrip("/") not in OPEN_ROUTES:
                if path not in self._pages:
                    self.authorize(request.headers.get(b"authorization", b""))
                self.require_taking()
            handler = handlers.get("GET" if request.method == "HEAD" else request.method)
            if handler is not None:
                return await handler(request, **values)
            allowed += [*handlers]
        if allowed:
            methods = ", ".join(sorted(set(allowed)))
            message = f"{request.method[:20]} is not allowed here, but {methods}"
            raise Refused(405, message, {"allow": methods})
        raise Refused(404, f"there is nothing at {path[:100]!r}; /docs lists what is")

    # what the routes do

    async def live(self, request: Request) -> Reply:
        """GET /v2/health/live"""
        if self.repository.stuck:
            return _error(503, "a batch hangs", more={"live": False})
        return _json({"live": True})

    async def ready(self, request: Request) -> Reply:
        """GET /v2/health/ready"""
        if reason := self.not_ready:
            return _error(503, reason, more={"ready": False})
        return _json({"ready": True, "live": True})

    async def server(self, request: Request) -> Reply:
        """GET /v2"""
        return _json(server_metadata())

    async def models(self, request: Request) -> Reply:
        """GET /v2/models"""
        return _json({"models": self.repository.names})

    async def metadata(self, request: Request, model: str, version: str = "") -> Reply:
        """GET /v2/models/{model}"""
        found = self.repository.find(model, version)
        return _json(found.interface.metadata([found.version]))

    async def model_ready(self, request: Request, model: str, version: str = "") -> Reply:
        """GET /v2/models/{model}/ready"""
        found = self.repository.find(model, version)
        if not self.usable(found):
            return _error(503, "not ready", more={"ready": False})
        return _json({"name": found.name, "ready": True})

    async def config(self, request: Request, model: str, version: str = "") -> Reply:
        """GET /v2/models/{model}/config"""
        return _json(self.repository.find(model, version).interface.config())

    async def stats(self, request: Request, model: str = "", version: str = "") -> Reply:
        """GET /v2/models/stats, or of one model"""
        return _json(self.repository.statistics(model, version))

    async def index(self, request: Request) -> Reply:
        """POST /v2/repository/index"""
        values = await _json_object(request)
        only = values.get("ready", False)
        if not isinstance(only, bool):
            raise Refused(400, "ready: expected true or false")
        return _json(self.repository.index(only))

    async def load_or_unload(self, request: Request, model: str, action: str) -> Reply:
        """POST /v2/repository/models/{model}/load, unload"""
        values = await _json_object(request)
        await self.control(model, action, values.get("parameters", {}))
        return _json({})

    async def setting(self, request: Request, model: str = "") -> Reply:
        """GET trace and logging settings: there are none"""
        if model:
            self.repository.find(model, "")
        return _json({})

    async def no_setting(self, request: Request, model: str = "", region: str = "") -> Reply:
        """POST of settings, registering shared memory"""
        await request.body.read()
        raise Refused(501, "not supported by this server")

    async def regions(self, request: Request, region: str = "") -> Reply:
        """GET status of shared memory: no region"""
        return _json([])

    async def infer(self, request: Request, model: str, version: str = "") -> Reply:
        """POST /v2/models/{model}/infer"""
        found = self.admit(request, model, version)
        length = request.headers.get(b"inference-header-content-length")
        found.engine.require_room()
        body = await request.body.read()
        found = self.still(request, found, model, version)
        text = None if length is None else length.decode("latin-1")
        asked = parse_infer(body, text, found.interface)
        outputs = await self._compute(request, found, asked.works, asked.timeout)
        body, json_bytes = format_infer(asked, outputs, found.interface)
        self.count(request, found, outputs)
        headers, kind = {}, JSON
        if json_bytes is not None:
            headers["inference-header-content-length"] = str(json_bytes)
            kind = "application/octet-stream"
        return _compressed(request, Reply(body, kind=kind, headers=headers))

    async def predict(self, request: Request) -> Reply:
        """POST /predict"""
        flags = ("probabilities", "input", "explain")
        request.require_query("model", "version", "top_k", "coverage", *flags)
        model, version = request.query.get("model", ""), request.query.get("version", "")
        found = self.admit(request, model, version)
        task = found.interface.task
        top_k = _count_of(request.query.get("top_k", "5"), len(task.classes))
        wants_input, everything = request.flag("input"), request.flag("probabilities")
        least = _limits_of(request.query.get("coverage"), found)
        explains = request.flag("explain")
        if explains and not self.options.explain:
            raise Refused(403, "explanations are not allowed; --explain allows them")
        found.engine.require_room()
        body = await request.body.read()
        found = self.still(request, found, model, version)
        files = _files(body, request.header("content-type"), self.options.max_images)
        if explains and len(files) > 1:
            raise Refused(400, "explain: is for a single image")
        works = [Work(data, keep_input=wants_input or explains) for _, data in files]
        outputs = await self._compute(request, found, works, None)
        check_outputs(outputs, skip_errors=len(outputs) > 1)
        predictions = [
            {
                "name": name,
                **_prediction(found, output, top_k, everything, request.seconds["queue"]),
            }
            for (name, _), output in zip(files, outputs, strict=True)
        ]
        if least is not None:
            for prediction, output in zip(predictions, outputs, strict=True):
                if output.error is None:
                    _add_sets(prediction, task, output, least)
        if explains:
            if not wants_input:
                del predictions[0]["input"]
            began = time.monotonic()
            predictions[0]["explanation"] = await self._explanation(request, found, outputs[0])
            self.count(request, found, outputs)
            request.seconds["explain"] = time.monotonic() - began
        else:
            self.count(request, found, outputs)
        return _json({"model": found.name, "version": found.version, "predictions": predictions})

    async def _explanation(self, request: Request, found: Version, output: Output) -> str:
        """What the prediction of an image rests on, as a PNG in a data URL.

        Its covered images are a request like any other: they take turns, may miss a deadline, and
        are dropped if the client leaves.
        """
        from distcls.explanation.explain import overlay, target
        from distcls.explanation.occlusion import all_patches, covered, heat_of, log_odds

        task, size, seconds = found.interface.task, found.interface.size, request.seconds
        assert output.input is not None
        pixels = np.frombuffer(output.input, np.uint8).reshape(*size, 3)
        boxes = [box for group in all_patches(*size) for box in group]
        images = await asyncio.to_thread(covered, pixels, boxes)
        works = [Work(image.reshape(-1).data, pixels=True) for image in images]
        outputs = await self._compute(request, found, works, None)
        request.images, request.seconds = 1, seconds
        check_outputs(outputs, skip_errors=False)
        chosen, _, _ = target(task, output.logits[None], None)
        before = log_odds(output.logits[None], task, chosen)
        after = log_odds(np.stack([each.logits for each in outputs]), task, chosen)
        drawn = overlay(pixels, heat_of(size, before, after))
        return _data_url(png(drawn.tobytes(), *drawn.shape[:2]))

    async def card(self, request: Request) -> Reply:
        """GET /card"""
        request.require_query("model", "version")
        found = self.repository.find(
            request.query.get("model", ""), request.query.get("version", "")
        )
        card, task, facts = found.card, found.interface.task, found.engine.facts
        heads = [{"name": head.name, "classes": list(head.classes)} for head in task.heads]
        values = {
            "models": self.repository.names,
            "model": found.name,
            "version": found.version,
            "task": task.kind,
            "classes": list(task.classes),
            "heads": heads,
            "preprocess": card["preprocess"],
            "training": card["training"],
            "certificate": card["certificate"],
            "calibration": card.get("calibration"),
            "sha256": facts["sha256"],
            "provider": facts["provider"],
            "limits": {
                "images": self.options.max_images,
                "body_bytes": self.options.max_body * MB,
                "explain": self.options.explain,
            },
        }
        return _json(values)

    async def openapi(self, request: Request) -> Reply:
        """GET /openapi.json"""
        return _json(self._document())

    def _document(self) -> dict[str, Any]:
        served = list(self.repository.versions())
        names = [each.name for each in served]
        versions = sorted({each.version for each in served})
        if self.wants_token:  # whoever reads it may not know them
            names, versions = [], []
        return document(self.options, self.wants_token, names, versions)

    async def page(self, request: Request) -> Reply:
        """GET / and its files"""
        path = request.path[len(self.options.base_path) :]
        if not path:  # the page's own addresses start from here
            return Reply(b"", 308, headers={"location": f"{self.options.base_path}/"})
        body, kind, headers = self._pages[path if path in self._pages else path.rstrip("/")]
        return Reply(body, kind=kind, headers=dict(headers))

    async def docs(self, request: Request) -> Reply:
        """GET /docs"""
        page = docs_page(self._document())
        return Reply(page, kind="text/html; charset=utf-8", headers=dict(HTML_HEADERS))

    async def prometheus(self, request: Request) -> Reply:
        """GET /metrics"""
        return Reply(self.metrics.page(), kind="text/plain; version=0.0.4; charset=utf-8")

    async def _compute(
        self, request: Request, found: Version, works: Sequence[Work], timeout: float | None
    ) -> list[Output]:
        """The outputs of images; their computing is dropped if the client leaves."""
        here = asyncio.current_task()
        assert here is not None
        leaving: asyncio.Future[None] | None = None
        left = False

        def leave(_: object) -> None:
            nonlocal left
            left = True
            here.cancel()

        def watch() -> None:
            nonlocal leaving
            leaving = asyncio.ensure_future(request.body.gone())
            leaving.add_done_callback(leave)

        watching = asyncio.get_running_loop().call_later(WATCH_AFTER, watch)
        try:
            return await self.compute(request, found, works, timeout)
        except asyncio.CancelledError:
            if not left:
                raise
            here.uncancel()
            raise ClientGone from None
        finally:
            watching.cancel()
            if leaving is not None:
                leaving.remove_done_callback(leave)
                leaving.cancel()

    def _record(self, request: Request, status: int) -> None:
        request.size = request.body.size
        self.record(request, status)


def _routes(app: App) -> dict[str, dict[str, Handler]]:
    """Handlers by method, by the pattern of a path."""
    model = r"/v2/models/(?P<model>[^/]+)"
    version = r"(?:/versions/(?P<version>[^/]+))?"
    region = r"(?:/region/(?P<region>[^/]+))?"
    return {
        r"/v2/health/live": {"GET": app.live},
        r"/v2/health/ready": {"GET": app.ready},
        r"/v2": {"GET": app.server},
        r"/v2/models": {"GET": app.models},
        r"/v2/models/stats": {"GET": app.stats},
        model + version + r"/infer": {"POST": app.infer},
        model + version: {"GET": app.metadata},
        model + version + r"/ready": {"GET": app.model_ready},
        model + version + r"/config": {"GET": app.config},
        model + version + r"/stats": {"GET": app.stats},
        model + r"/trace/setting": {"GET": app.setting, "POST": app.no_setting},
        r"/v2/trace/setting": {"GET": app.setting, "POST": app.no_setting},
        r"/v2/logging": {"GET": app.setting, "POST": app.no_setting},
        r"/v2/repository/index": {"POST": app.index},
        r"/v2/repository/models/(?P<model>[^/]+)/(?P<action>load|unload)": {
            "POST": app.load_or_unload
        },
        rf"/v2/(?:system|cuda)sharedmemory{region}/status": {"GET": app.regions},
        rf"/v2/(?:system|cuda)sharedmemory{region}/(?:un)?register": {"POST": app.no_setting},
        r"/predict": {"POST": app.predict},
        r"/card": {"GET": app.card},
        r"/metrics": {"GET": app.prometheus},
        r"/openapi\.json": {"GET": app.openapi},
        r"/docs": {"GET": app.docs},
        r"/|/page\.css|/page\.js": {"GET": app.page},
    }


def _readable(pattern: str) -> str:
    """The pattern of a path, for metrics: /v2/models/{model}/infer."""
    without = re.sub(r"\(\?:/[^()]*\(\?P<\w+>[^)]*\)\)\?", "", pattern)
    return re.sub(r"\(\?P<(\w+)>[^)]*\)", r"{\1}", without).replace("\\", "")


def _prediction(
    version: Version, output: Output, top_k: int, everything: bool, queue: float
) -> dict[str, Any]:
    """The prediction for one image, as /predict says it."""
    task = version.interface.task
    seconds = {"queue": queue, "decode": output.decode_s, "infer": output.infer_s}
    found: dict[str, Any] = {
        "error": output.error,
        "label": None,
        "probability": None,
        "top_k": [],
        "heads": {},
        "labels": [],
        "seconds": {name: round(value, 6) for name, value in seconds.items()},
    }
    if output.input is not None:
        found["input"] = _data_url(png(output.input, *version.interface.size))
    if output.error is not None:
        return found
    logits = output.logits[None]
    probabilities = task.probabilities(logits)
    decided = task.decide(logits)
    found["label"] = task.text(decided[0])
    found["probability"] = shortest(task.confidence(probabilities, decided))[0]
    if task.single:
        ranked = ranking(logits, top_k)[0]
        values = shortest(probabilities[0, ranked])
        found["top_k"] = [
            {"label": task.classes[index], "probability": value}
            for index, value in zip(ranked.tolist(), values, strict=True)
        ]
        found["labels"] = [found["label"]]
    elif task.heads:
        own = shortest(task.of_answers(probabilities, decided)[0])
        for head, index, value in zip(task.heads, decided[0].tolist(), own, strict=True):
            found["heads"][head.name] = {"label": head.classes[index], "probability": value}
            found["labels"].append(head.classes[index])
    else:
        found["labels"] = [task.classes[at] for at in decided[0].nonzero()[0].tolist()]
    if everything:
        found["probabilities"] = dict(zip(task.classes, shortest(probabilities[0]), strict=True))
    return found


def _limits_of(coverage: str | None, version: Version) -> list[float] | None:
    """The least probabilities of the model's prediction sets of this coverage."""
    try:
        wanted = None if coverage is None else float(coverage)
    except ValueError:
        raise Refused(400, f"coverage: {str(coverage)[:50]!r}, expected a number as 0.9") from None
    try:
        return least_probabilities(version.card.get("calibration"), wanted)
    except UsageError as error:
        raise Refused(400, str(error)) from error


def _add_sets(prediction: dict[str, Any], task: Task, output: Output, least: list[float]) -> None:
    """Add the prediction set, to each head its own; of labels also those that are unsure."""
    sets = prediction_sets(task, task.probabilities(output.logits[None]), least)
    if task.heads:
        for head, names in zip(task.heads, sets, strict=True):
            prediction["heads"][head.name][SET] = names[0]
        return
    for name, found in zip((SET, UNSURE), sets, strict=False):
        prediction[name] = found[0]


def _data_url(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def _count_of(text: str, classes: int) -> int:
    """A number of classes; more than there are mean all."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= 10**6):
        raise Refused(400, f"top_k: {text[:50]!r}, expected a whole number of at least 1")
    return min(int(text[:9]), classes)


def _files(body: bytes, kind: str, most: int) -> list[tuple[str | None, bytes]]:
    """Names and contents of the files in a body: its parts if it is a form, else the body."""
    name, options = parse_options_header(kind)
    if name == "application/x-www-form-urlencoded" and FORM.match(body):
        # curl calls everything a form that is not told otherwise; an image never begins like one
        raise Refused(
            415,
            "the body is a form without files; curl sends a file with --data-binary @photo.jpg or "
            "with -F file=@photo.jpg",
        )
    if name != "multipart/form-data":
        if not body:
            raise Refused(400, "the body is empty, expected an image file")
        return [(None, body)]
    found: list[tuple[str | None, bytes]] = []
    current: bytearray | None = None
    title: str | None = None
    boundary = options.get("boundary", "")
    try:
        with PushMultipartParser(
            boundary, max_segment_count=most + 16, max_segment_size=len(body) + 1
        ) as parser:
            for event in parser.parse(body):
                if event is None:
                    # without a name and content it is a file input that was left empty
                    if current is not None and (title or (title is not None and current)):
                        found.append((title, bytes(current)))
                    current = title = None
                elif isinstance(event, bytes | bytearray | memoryview):
                    assert current is not None
                    current += event
                else:
                    current, title = bytearray(), event.filename
    except (MultipartError, ValueError) as error:
        raise Refused(400, f"the form cannot be read: {str(error)[:200]}") from error
    if not found:
        raise Refused(400, "the form has no file; curl sends one with -F file=@photo.jpg")
    if len(found) > most:
        raise Refused(400, f"{len(found)} files, expected at most {most}")
    return found


async def _json_object(request: Request) -> dict[str, Any]:
    """The JSON object in a body; empty if there is no body."""
    body = await request.body.read()
    return parse_object(body) if body.strip() else {}


def _json(values: Any) -> Reply:
    return Reply(orjson.dumps(values))


def _error(
    status: int,
    message: str,
    headers: dict[str, str] | None = None,
    more: dict[str, Any] | None = None,
) -> Reply:
    text = message.encode("utf-8", "replace").decode()
    return Reply(orjson.dumps({"error": text, **(more or {})}), status, headers=headers)


def _compressed(request: Request, reply: Reply) -> Reply:
    """The answer of infer, compressed if the client takes that."""
    accepted = request.header("accept-encoding").lower()
    offered = {
        name.strip()
        for name, _, quality in (part.partition(";") for part in accepted.split(","))
        if not re.fullmatch(r"\s*q=0(\.0*)?\s*", quality)
    }
    reply.headers["vary"] = "Accept-Encoding"
    name = next((each for each in ("gzip", "deflate") if each in offered), None)
    if name is None or len(reply.body) < COMPRESSED_FROM:
        return reply
    packer = zlib.compressobj(1, wbits=31 if name == "gzip" else 15)
    reply.body = packer.compress(reply.body) + packer.flush()
    reply.headers["content-encoding"] = name
    return reply


def _allow_origin(request: Request, reply: Reply, origin: str) -> None:
    """Let web pages of an origin read the reply."""
    if request.header("origin") != origin:
        return
    reply.headers |= {
        "access-control-allow-origin": origin,
        "access-control-expose-headers": "retry-after, x-request-id, "
        "inference-header-content-length",
        "vary": "Origin",
    }
    if request.method == "OPTIONS":
        reply.headers["access-control-allow-methods"] = "GET, POST"
        allowed = "authorization, content-type, inference-header-content-length, x-request-id"
        reply.headers["access-control-allow-headers"] = allowed
        reply.headers["access-control-max-age"] = "600"


async def _send(send: Send, reply: Reply, head: bool = False) -> None:
    headers = {
        "content-type": reply.kind,
        "content-length": str(len(reply.body)),
        "x-content-type-options": "nosniff",
        **reply.headers,
    }
    encoded = [(name.encode("latin-1"), text.encode("latin-1")) for name, text in headers.items()]
    await send({"type": "http.response.start", "status": reply.status, "headers": encoded})
    await send({"type": "http.response.body", "body": b"" if head else reply.body})


def make_app(model: str | Path, *, token: str = "", **options: Any) -> App:
    """An ASGI application that serves a model file, to be run by any ASGI server.

    Args:
        model: an exported best.onnx, or a run directory with one.
        token: bearer token that requests have to carry; default: none is wanted.
        options: keys of `ServeOptions`, as `distcls serve --help` lists them. `engine="threads"`
            computes in threads of the process.

    The application loads the model in its lifespan, or when its `start()` is awaited.
    """
    return App(ServeOptions(model=Path(model), **options), token)
