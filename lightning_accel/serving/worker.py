"""A process that holds a bundle's engine, proves it, and answers batches."""

import os
import signal
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.engines.base import Runner, TensorSpec, load_runner
from lightning_accel.engines.manifest import check_files, read_manifest
from lightning_accel.errors import LightningAccelError
from lightning_accel.serving.canary import Canary, variant_rows
from lightning_accel.verification.layout import is_batch_first

CANARY = "canary"  # asks for :meth:`Canary.repeat` instead of a batch


@dataclass(frozen=True)
class Served:
    """What a worker serves.

    Args:
        engine: its name.
        digest: SHA-256 of the bundle's manifest.
        inputs: of the network.
        outputs: of the network.
        batched: whether each tensor has a batch as its first dimension that may have any size.
        variant: rows of the kept samples whose bits depend on the batch size, by batch size; empty without a canary.
        samples: number of kept samples.
    """

    engine: str
    digest: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool
    variant: dict[int, int]
    samples: int


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker loads.

    Args:
        bundle: its folder.
        engine: ``None``: the bundle's default.
        threads: of the engine.
        canary: whether the bundle's samples must be reproduced.
        max_batch: largest batch that it is asked for.
        file: file of the bundle to run in ONNX Runtime; empty: that of the engine.
    """

    bundle: Path
    engine: str | None
    threads: int | None
    canary: bool
    max_batch: int
    file: str = ""


def work(connection: Connection, settings: WorkerSettings) -> None:
    """Load, prove, and answer until the connection closes.

    The first message is a :class:`Served`, or the text of an error. Then each message is answered by a dict of outputs or by a text.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the server decides when workers end
    try:
        runner, canary, served = _loaded(settings)
    except Exception as error:  # engines raise unrelated types
        connection.send(_text(error))
        return
    connection.send(served)
    parent = os.getppid()
    while True:
        try:
            while not connection.poll(5.0):
                if os.getppid() != parent:  # the server was killed
                    return
            message: Any = connection.recv()
        except (EOFError, OSError):
            break
        if message is None:
            break
        connection.send(_answer(runner, canary, message))
    runner.close()


def _loaded(settings: WorkerSettings) -> tuple[Runner, Canary | None, Served]:
    manifest = read_manifest(settings.bundle)
    canary = Canary(settings.bundle, settings.engine) if settings.canary else None
    if settings.file:
        check_files(settings.bundle, manifest)
    source = settings.bundle / settings.file if settings.file else settings.bundle
    runner = load_runner(source, "onnxruntime" if settings.file else settings.engine, threads=settings.threads)
    batched = is_batch_first(manifest) and all(
        spec.shape and spec.shape[0] is None for spec in (*runner.inputs, *runner.outputs)
    )
    variant: dict[int, int] = {}
    if canary is not None:
        canary.prove(runner)
        if batched:
            variant = variant_rows(
                runner, canary.feeds, tuple(sorted({min(7, settings.max_batch), settings.max_batch} - {1}))
            )
    samples = 0 if canary is None else len(next(iter(canary.feeds.values())))
    about = runner.engine, manifest["sha256"], runner.inputs, runner.outputs
    return runner, canary, Served(*about, batched, variant, samples)


def _answer(runner: Runner, canary: Canary | None, message: Any) -> dict[str, np.ndarray] | str:
    try:
        if message == CANARY:
            if canary is not None:
                canary.repeat(runner)
            return {}
        return runner.run(message)
    except Exception as error:  # engines raise unrelated types
        return _text(error)


def _text(error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return first if isinstance(error, LightningAccelError) else f"{type(error).__name__}: {first}"
