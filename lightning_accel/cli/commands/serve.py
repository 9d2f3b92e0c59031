"""Serve bundles over HTTP by the Open Inference Protocol v2; a bundle that isn't reproduced on this machine isn't served.

  lightning-accel serve artifacts --port 8000
  lightning-accel serve digits=artifacts/digits faces=artifacts/faces --workers 2

SIGTERM answers what was asked and ends; SIGHUP loads the bundles again, and keeps those whose new files aren't reproduced.
Exit code: 0 after SIGTERM, 130 after Ctrl-C; 1 if a bundle isn't reproduced or can't be loaded.
"""

import argparse
import asyncio
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_accel.core.optional import require
from lightning_accel.engines.manifest import read_manifest
from lightning_accel.errors import InvalidArgumentError, LightningAccelError

if TYPE_CHECKING:
    from lightning_accel.serving.app import InferenceServer, ServedModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "bundles", nargs="+", metavar="[NAME=]BUNDLE", help="a bundle's folder, and its name in the paths"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; default: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="port, or 0 for any free one; default: 8000")
    parser.add_argument("--engine", help="engine to run; default: the one in the manifest")
    parser.add_argument("--workers", type=int, default=1, help="processes for each bundle; default: 1")
    parser.add_argument(
        "--threads", type=int, help="threads of each worker's engine; default: the cores, shared among workers"
    )
    parser.add_argument("--max-batch", type=int, default=32, help="most rows that are computed together; default: 32")
    parser.add_argument("--batch-wait-ms", type=float, default=2.0, help="time a request waits for others; default: 2")
    parser.add_argument(
        "--pad-to",
        type=int,
        default=0,
        help="fill each batch up to this size, so that a row's bits don't depend on others",
    )
    parser.add_argument("--queue", type=int, default=1024, help="most rows that wait; beyond them: 503; default: 1024")
    parser.add_argument(
        "--timeout", type=float, default=30.0, help="seconds within which a request is answered; default: 30"
    )
    parser.add_argument(
        "--stall",
        type=float,
        default=10.0,
        help="seconds after which a worker that doesn't answer is replaced; default: 10",
    )
    parser.add_argument("--max-body-mb", type=float, default=64.0, help="largest body of a request; default: 64")
    parser.add_argument(
        "--canary-seconds",
        type=float,
        default=60.0,
        help="time between two runs of the kept samples; 0: at the start only",
    )
    parser.add_argument(
        "--shadow",
        type=float,
        default=0.0,
        help="percent of the requests that run on the float32 reference, too, to be compared; default: 0",
    )
    parser.add_argument(
        "--sagemaker", action="store_true", help="answer at /ping and /invocations, too; with one bundle"
    )
    parser.add_argument("--no-canary", action="store_true", help="serve without reproducing the kept samples")
    parser.add_argument("--allow-nonfinite", action="store_true", help="pass NaN and infinity on to the network")
    parser.add_argument(
        "--token-file", type=Path, help="file with a token that requests must bring; health and metrics stay open"
    )


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal ends it."""
    require("starlette", "serve", "Serving")
    require("uvicorn", "serve", "Serving")
    require("prometheus_client", "serve", "Serving")
    return asyncio.run(_serve(arguments))


async def _serve(arguments: argparse.Namespace) -> int:
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves signals to this command: uvicorn raises them again after it has drained, which ends the process too early."""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    server, received = _server(arguments), list[int]()
    with _listening(arguments.host, arguments.port) as listening:  # before anything is loaded: the port may be taken
        await server.start()
        for model in server.models.values():
            print(_says(model), flush=True)
        config = uvicorn.Config(server.app(), log_level="warning", timeout_graceful_shutdown=int(arguments.timeout) + 1)
        http = Server(config)
        reloads: set[asyncio.Task[None]] = set()

        def reload() -> None:
            task = asyncio.create_task(_reload(server))
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        def end(number: int) -> None:
            http.should_exit, http.force_exit = True, bool(received)  # the second signal doesn't wait
            received.append(number)

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, reload)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, end, number)
        host, port = listening.getsockname()[:2]
        print(f"Listening at http://{host}:{port}", flush=True)
        try:
            await http.serve([listening])
        finally:
            await server.close()
    return 130 if signal.SIGINT in received else 0


def _server(arguments: argparse.Namespace) -> "InferenceServer":
    from lightning_accel.serving.app import InferenceServer, ServerSettings
    from lightning_accel.serving.pool import PoolSettings
    from lightning_accel.serving.worker import WorkerSettings

    for name in ("workers", "max_batch", "queue"):
        _at_least(name, getattr(arguments, name), 1)
    for name in ("timeout", "stall", "max_body_mb"):
        _at_least(name, getattr(arguments, name), 0.001)
    if not 0 <= arguments.shadow <= 100:
        raise InvalidArgumentError(f"Option `--shadow` must be from 0 to 100 percent, but got {arguments.shadow}.")
    for name in ("batch_wait_ms", "canary_seconds", "pad_to", "port"):
        _at_least(name, getattr(arguments, name), 0)
    if arguments.port > 65535:
        raise InvalidArgumentError(f"Option `--port` must be at most 65535, but got {arguments.port}.")
    if arguments.threads is not None:
        _at_least("threads", arguments.threads, 1)
    if arguments.pad_to and arguments.pad_to != arguments.max_batch and arguments.max_batch != 32:
        raise InvalidArgumentError(
            f"Option `--pad-to` must equal `--max-batch`, {arguments.max_batch}, but got {arguments.pad_to}. Leave one of them out."
        )
    largest = arguments.pad_to or arguments.max_batch
    threads = arguments.threads or max(1, len(os.sched_getaffinity(0)) // arguments.workers)
    models = {
        name: PoolSettings(
            WorkerSettings(bundle, arguments.engine, threads, not arguments.no_canary, largest),
            arguments.workers,
            arguments.batch_wait_ms / 1000,
            arguments.queue,
            arguments.stall,
            arguments.canary_seconds,
            arguments.pad_to,
            arguments.shadow / 100,
        )
        for name, bundle in _bundles(arguments.bundles).items()
    }
    if arguments.sagemaker and len(models) > 1:
        raise InvalidArgumentError(f"Option `--sagemaker` must come with one bundle, but got {list(models)}.")
    limit, finite = int(arguments.max_body_mb * 2**20), not arguments.allow_nonfinite
    token = _token(arguments.token_file)
    return InferenceServer(models, ServerSettings(limit, arguments.timeout, token, finite, arguments.sagemaker))


def _at_least(name: str, value: float, least: float) -> None:
    if not value >= least:
        raise InvalidArgumentError(f"Option `--{name.replace('_', '-')}` must be at least {least}, but got {value}.")


def _bundles(given: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in given:
        name, equals, path = text.rpartition("=")
        folder = Path(path)
        read_manifest(folder)
        name = name if equals else folder.resolve().name
        if not name or "/" in name or name in found:
            raise InvalidArgumentError(
                f"Argument `bundles` must give each bundle a name of its own without `/`, as in NAME=BUNDLE, but got {text!r}."
            )
        found[name] = folder
    return found


def _token(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(
            f"Option `--token-file` must be a readable file, but got {path}: {error}."
        ) from error
    if not token.isascii() or not token or " " in token:
        raise InvalidArgumentError(f"Option `--token-file` must hold one ASCII word, but {path} doesn't.")
    return token


def _listening(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise InvalidArgumentError(
            f"Options `--host` and `--port` must be an address that is free on this machine, but got {host}:{port}: {error}."
        ) from error
    # Connections inherit it. asyncio would set it itself, but doesn't know this socket as TCP; without it each answer waits 40 ms for
    # the client's acknowledgement of its headers.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def _says(model: "ServedModel") -> str:
    served = model.pool.served
    proven = f"{served.samples} kept samples reproduced" if served.samples else "NOT CHECKED (--no-canary)"
    text = f"{model.name}: {served.engine}, {model.settings.workers} workers, manifest {served.digest[:12]}, {proven}"
    if model.settings.pad_to or not any(served.variant.values()):
        return text
    size, rows = max(served.variant.items(), key=lambda item: item[1])
    return f"{text}; the bits of {rows} of {served.samples} rows depend on the batch size, 1 or {size}: --pad-to {size} fixes it"


async def _reload(server: "InferenceServer") -> None:
    for name in server.models:
        try:
            print(f"Reloaded {_says(await server.reload(name))}", flush=True)
        except LightningAccelError as error:
            print(f"{name} was not reloaded, and the bundle before is served: {error}", flush=True)
