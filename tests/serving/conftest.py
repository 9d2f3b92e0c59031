"""Bundles, and servers as processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la


class Pixels(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Words(Pixels):
    """The engine fails at a token that the table doesn't hold, which no check of shapes and types sees."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(1), nn.Linear(20, 3))


def write_bundle(module: type, folder: Path, seed: int = 0, *quantizing: L.Callback) -> Path:
    torch.manual_seed(seed)
    x = torch.randint(0, 10, (32, 5)) if module is Words else torch.randn(32, 4)
    loader = DataLoader(TensorDataset(x, torch.randint(0, 3, (32,))), 16)
    export = la.ModelExport(
        str(folder), engines=["onnxruntime"], precision=None if quantizing else "fp32", keep_samples=16
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder.parent,
        callbacks=[*quantizing, export],
    )
    trainer.fit(module(), loader, loader)
    return folder


@pytest.fixture(scope="session")
def bundles(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("served")
    return {
        "pixels": write_bundle(Pixels, folder / "pixels"),
        "words": write_bundle(Words, folder / "words"),
        "newer": write_bundle(Pixels, folder / "newer", seed=1),
        "int8": write_bundle(Pixels, folder / "int8", 0, la.PostTrainingQuantization("onnxruntime")),
    }


class Server:
    """A server's process, and a client of it."""

    def __init__(self, process: subprocess.Popen, url: str, said: list[str]) -> None:
        self.process, self.url, self.said = process, url, said
        self.client = httpx.Client(base_url=url, timeout=30, limits=httpx.Limits(max_connections=64))

    def infer(self, model: str, x, **headers) -> httpx.Response:
        """One request in JSON with one input."""
        array = torch.as_tensor(x).numpy()
        datatype = {"float32": "FP32", "int64": "INT64"}[str(array.dtype)]
        name = "x"
        body = {"inputs": [{"name": name, "datatype": datatype, "shape": list(array.shape), "data": array.tolist()}]}
        return self.client.post(f"/v2/models/{model}/infer", content=json.dumps(body), headers=headers)

    def workers(self) -> list[int]:
        """Processes that hold an engine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        threads = Path(f"/proc/{self.process.pid}/task").iterdir()
        children += [pid for thread in threads for pid in (thread / "children").read_text().split()]
        return sorted({int(pid) for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()})

    def metric(self, text: str) -> float:
        """Value of the metric whose line begins with ``text``."""
        found = re.search(rf"^{re.escape(text)}\S* (\S+)$", self.client.get("/metrics").text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def wait_until(self, condition, seconds: float = 60.0) -> None:
        until = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < until, "it took too long"
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.05)


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "lightning_accel", "serve", *map(str, arguments)]


@contextmanager
def serving(*arguments):
    """A server that is ready, with ``--port 0``; it is killed at the end if it still runs."""
    process = subprocess.Popen(
        command(*arguments, "--port", 0),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line.strip())
            if line.startswith("Listening at "):
                break
        else:
            raise AssertionError(f"the server ended: {said}")
        server = Server(process, said[-1].removeprefix("Listening at "), said)
        with server.client:
            yield server
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
