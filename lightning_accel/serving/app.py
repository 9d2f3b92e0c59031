"""The server's application: Open Inference Protocol v2, health, metrics and reloading."""

import asyncio
import hmac
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from lightning_accel import __version__
from lightning_accel.engines.manifest import read_manifest
from lightning_accel.errors import LightningAccelError
from lightning_accel.serving.drift import rows_outside
from lightning_accel.serving.metrics import Metrics
from lightning_accel.serving.pool import (
    PoolSettings,
    QueueFullError,
    RequestFailedError,
    RequestTimeoutError,
    WorkerPool,
)
from lightning_accel.serving.protocol import BINARY_HEADER, describe, read_request, write_response
from lightning_accel.serving.shadow import Expected, Shadow

_OPEN = ("/v2/health/", "/metrics")  # paths that need no token: a probe has none


@dataclass
class ServedModel:
    """A bundle behind a name.

    Args:
        name: in the paths of the server.
        settings: how it is served.
        pool: its workers.
        shadow: compares a share of the answers with the float32 reference.
        ranges: smallest and largest number of each input that the bundle was verified on.
        version: counts the reloads, from 1.
        lock: held while it is reloaded.
    """

    name: str
    settings: PoolSettings
    pool: WorkerPool
    shadow: Shadow | None = None
    ranges: Mapping[str, Sequence[float]] = field(default_factory=dict)
    version: int = 1
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(frozen=True)
class ServerSettings:
    """Limits of a server.

    Args:
        max_body: largest body of a request in bytes.
        timeout_s: time within which a request is answered.
        token: that each request must bring, ``Authorization: Bearer ...``; empty: none.
        finite: whether inputs with NaN or infinity are refused.
        sagemaker: whether the only model answers at ``/ping`` and ``/invocations``, too, as Amazon SageMaker asks.
    """

    max_body: int = 64 * 2**20
    timeout_s: float = 30.0
    token: str = ""
    finite: bool = True
    sagemaker: bool = False


class _BodyTooLargeError(LightningAccelError):
    """A body is longer than the server takes."""


class InferenceServer:
    """Bundles served over HTTP.

    Args:
        models: how each is served, by name.
        settings: limits.
    """

    def __init__(self, models: Mapping[str, PoolSettings], settings: ServerSettings | None = None) -> None:
        self.settings, self.metrics = settings or ServerSettings(), Metrics()
        self._wanted = dict(models)
        self.models: dict[str, ServedModel] = {}

    async def start(self) -> None:
        """Start every model's workers.

        Raises:
            EngineError: a bundle isn't reproduced on this machine, or can't be loaded.
        """
        try:
            for name, settings in self._wanted.items():
                self.models[name] = ServedModel(name, settings, *await self._started(name, settings))
                self._note(self.models[name])
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Answer the requests that wait, and end all workers."""
        closing = [part.close() for model in self.models.values() for part in (model.pool, model.shadow) if part]
        await asyncio.gather(*closing)

    async def reload(self, name: str, bundle: Path | None = None) -> ServedModel:
        """Start workers on the bundle as it is now; the old ones serve until those have reproduced it, and stay if they don't.

        Raises:
            EngineError: the new bundle isn't reproduced; the old one is still served.
        """
        model = self.models[name]
        async with model.lock:
            settings = model.settings
            if bundle is not None:
                settings = replace(settings, worker=replace(settings.worker, bundle=bundle))
            try:
                pool, shadow, ranges = await self._started(name, settings)
            except LightningAccelError:
                self.metrics.reloads.labels(name, "refused").inc()
                raise
            old, model.pool, model.settings, model.version = model.pool, pool, settings, model.version + 1
            old_shadow, model.shadow, model.ranges = model.shadow, shadow, ranges
            self.metrics.reloads.labels(name, "served").inc()
            self._note(model)
            await old.close()
            if old_shadow is not None:
                await old_shadow.close()
            return model

    def app(self) -> Starlette:
        """The ASGI application. :meth:`start` must have been called, and :meth:`close` must follow."""
        model = "/v2/models/{name}"
        versioned = model + "/versions/{version}"
        only = [
            Route("/ping", self._ready),
            Route("/invocations", self._guarded(self._invoke), methods=["POST"]),
        ]
        return Starlette(
            routes=[
                *(only if self.settings.sagemaker else []),
                Route("/v2", self._guarded(self._server)),
                Route("/v2/health/live", self._live),
                Route("/v2/health/ready", self._ready),
                Route("/metrics", self._metrics),
                *(Route(path, self._guarded(self._model)) for path in (model, versioned)),
                *(Route(path + "/ready", self._guarded(self._model_ready)) for path in (model, versioned)),
                *(Route(path + "/infer", self._guarded(self._infer), methods=["POST"]) for path in (model, versioned)),
                Route("/v2/repository/models/{name}/load", self._guarded(self._load), methods=["POST"]),
            ]
        )

    async def _started(
        self, name: str, settings: PoolSettings
    ) -> tuple[WorkerPool, Shadow | None, Mapping[str, Sequence[float]]]:
        def event(kind: str, rows: int = 0) -> None:
            if kind == "batch":
                self.metrics.batches.labels(name).observe(rows)
            elif kind == "restart":
                self.metrics.restarts.labels(name).inc()
            elif kind == "canary_failed":
                self.metrics.canaries.labels(name).inc()

        manifest = read_manifest(settings.worker.bundle)
        expected = Expected.of_bundle(manifest) if settings.shadow else None
        pool = WorkerPool(settings, event)
        await pool.start()
        shadow = None
        if expected is not None:
            worker = replace(settings.worker, canary=False, file="reference.onnx")
            reference = WorkerPool(replace(settings, worker=worker, workers=1, canary_s=0.0, pad_to=0, shadow=0.0))
            shadow = Shadow(settings.shadow, reference, expected, partial(self._shadowed, name))
            try:
                await reference.start()
            except BaseException:
                await pool.close()
                raise
        self.metrics.shadow_alarm.labels(name).set(0)
        known = {one.name for one in pool.served.inputs} if pool.served.batched else set()
        return pool, shadow, {n: r for n, r in manifest.get("input_ranges", {}).items() if n in known}

    def _shadowed(self, name: str, kind: str, count: int) -> None:
        if kind != "alarm":
            self.metrics.shadow.labels(name, kind).inc(count)
            return
        self.metrics.shadow_alarm.labels(name).set(count)
        shadow = self.models[name].shadow
        if shadow is not None:
            what = (
                "leaves its float32 reference more than on held-out data"
                if count
                else "is as near to its reference as before"
            )
            print(f"Model `{name}` {what}: {shadow.says}.", file=sys.stderr, flush=True)

    def _note(self, model: ServedModel) -> None:
        for size, rows in model.pool.served.variant.items():
            self.metrics.variant.labels(model.name, str(size)).set(rows)

    def _guarded(self, handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """A handler that asks for the token, and answers this library's errors with a status and one line."""

        async def answer(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            wanted = f"Bearer {self.settings.token}"
            if self.settings.token and not hmac.compare_digest(given.encode(), wanted.encode()):
                return _refusal(401, "Header `Authorization` must be `Bearer <token>` with this server's token.")
            name = request.path_params.get("name")
            if name is not None and name not in self.models:
                return _refusal(404, f"The model must be one of {sorted(self.models)}, but got {name!r}.")
            version = request.path_params.get("version")
            if version is not None and version != str(self.models[name or ""].version):
                return _refusal(404, f"The version must be {self.models[name or ''].version}, but got {version!r}.")
            return await handler(request)

        return answer

    async def _live(self, request: Request) -> Response:
        return JSONResponse({"live": True})

    async def _ready(self, request: Request) -> Response:
        ready = bool(self.models) and all(model.pool.ready for model in self.models.values())
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def _server(self, request: Request) -> Response:
        extensions = ["binary_tensor_data", "model_repository"]
        return JSONResponse({"name": "lightning-accel", "version": __version__, "extensions": extensions})

    async def _metrics(self, request: Request) -> Response:
        for model in self.models.values():
            self.metrics.queue.labels(model.name).set(model.pool.queue.rows)
            self.metrics.workers.labels(model.name).set(model.pool.ready)
        return Response(self.metrics.text(), media_type=self.metrics.content_type)

    async def _model(self, request: Request) -> Response:
        model = self.models[request.path_params["name"]]
        served = model.pool.served
        about: dict[str, Any] = {
            "name": model.name,
            "versions": [str(model.version)],
            "platform": f"lightning-accel_{served.engine}",
            "inputs": describe(served.inputs),
            "outputs": describe(served.outputs),
            "parameters": {
                "manifest_sha256": served.digest,
                "max_batch": model.settings.worker.max_batch if served.batched else 0,
                "kept_samples": served.samples,
                "batch_variant_rows": {str(size): rows for size, rows in served.variant.items()},
            },
        }
        return JSONResponse(about, headers=_headers(model))

    async def _model_ready(self, request: Request) -> Response:
        ready = bool(self.models[request.path_params["name"]].pool.ready)
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def _load(self, request: Request) -> Response:
        name = request.path_params["name"]
        try:
            model = await self.reload(name)
        except LightningAccelError as error:
            return _refusal(409, f"{error} The bundle that was served before still is.", _headers(self.models[name]))
        return JSONResponse({"name": name, "version": str(model.version)}, headers=_headers(model))

    async def _invoke(self, request: Request) -> Response:
        request.path_params["name"] = next(iter(self.models))
        return await self._infer(request)

    async def _infer(self, request: Request) -> Response:
        model, since = self.models[request.path_params["name"]], time.perf_counter()
        response = await self._answered(request, model)
        self.metrics.requests.labels(model.name, str(response.status_code)).inc()
        self.metrics.seconds.labels(model.name).observe(time.perf_counter() - since)
        return response

    async def _answered(self, request: Request, model: ServedModel) -> Response:
        pool = model.pool  # a reload replaces it
        served, largest = pool.served, model.settings.worker.max_batch
        try:
            body = await self._body(request)
            asked = read_request(
                body, request.headers.get(BINARY_HEADER), served.inputs, served.outputs, finite=self.settings.finite
            )
            if served.batched and asked.rows > largest:
                return _refusal(400, f"A request must hold at most {largest} rows, but got {asked.rows}. Split it.")
            for input_name, outside in rows_outside(asked.feeds, model.ranges).items():
                self.metrics.rows.labels(model.name, input_name).inc(asked.rows)
                self.metrics.outside.labels(model.name, input_name).inc(outside)
            answer = await pool.infer(asked.feeds, asked.rows, self.settings.timeout_s)
            if model.shadow is not None:
                model.shadow.offer(asked.feeds, asked.rows, answer.outputs)
        except _BodyTooLargeError as error:
            return _refusal(413, str(error))
        except QueueFullError as error:
            return _refusal(503, str(error), {"Retry-After": "1"})
        except RequestTimeoutError as error:
            return _refusal(504, str(error))
        except RequestFailedError as error:
            return _refusal(500, str(error))
        except LightningAccelError as error:
            return _refusal(400, str(error))
        except ClientDisconnect:
            return _refusal(400, "The client closed the connection before its request was complete.")
        content, header_length = write_response(asked, answer.outputs, model.name, str(model.version))
        headers = {**_headers(model, pool), "lightning-accel-batch-size": str(answer.batch)}
        if header_length is not None:
            headers[BINARY_HEADER] = header_length
        kind = "application/octet-stream" if header_length is not None else "application/json"
        return Response(content, headers=headers, media_type=kind)

    async def _body(self, request: Request) -> bytes:
        limit = self.settings.max_body
        length = request.headers.get("content-length", "0")
        parts, total = [], int(length) if length.isdigit() else 0
        if total <= limit:
            total = 0
            async for part in request.stream():
                total += len(part)
                if total > limit:
                    break
                parts.append(part)
        if total > limit:
            raise _BodyTooLargeError(f"The body must have at most {limit} bytes, but got {total} or more.")
        return b"".join(parts)


def _headers(model: ServedModel, pool: WorkerPool | None = None) -> dict[str, str]:
    served = (pool or model.pool).served
    return {"lightning-accel-manifest": served.digest, "lightning-accel-engine": served.engine}


def _refusal(status: int, text: str, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse({"error": text}, status, headers=dict(headers or {}))
