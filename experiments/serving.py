"""Rate and latency of `lightning-accel serve` against the runner in a loop, and what faults cost those who made none.

ResNet-18 at 64 pixels, random weights, ONNX Runtime, one worker with one thread, on loopback; clients send one image each, in
binary. Rounds of the runner and of the server take turns, since other processes share the machine.

    python -m experiments.serving [--quick]
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import lightning as L
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from experiments import print_environment
from tests.support.networks import ResNet, with_statistics

BATCH, CLIENTS, RATE, TAIL = 16, (1, 8, 32), 0.9, 3.0


class Task(L.LightningModule):
    """A network and its loss."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        return cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Cross-entropy."""
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """A small rate."""
        return torch.optim.SGD(self.parameters(), 1e-3)


def write_bundle(folder: Path, width: int, pixels: int) -> None:
    """Fit for two steps and export."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    x, y = torch.randn(32, 3, pixels, pixels), torch.randint(0, 10, (32,))
    loader = DataLoader(TensorDataset(x, y), 16)
    export = la.ModelExport(str(folder), engines=["onnxruntime"], precision="fp32", keep_samples=16, samples=32)
    settings: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=1, callbacks=[export], accelerator="cpu", enable_checkpointing=False, **settings)
    trainer.fit(Task(with_statistics(ResNet(width=width), x)), loader, loader)


class Server:
    """`lightning-accel serve` with one worker, and its address."""

    def __init__(self, folder: Path, *options: str) -> None:
        command = [sys.executable, "-m", "lightning_accel", "serve", f"net={folder}", "--port", "0", "--threads", "1"]
        command += ["--max-batch", str(BATCH), "--canary-seconds", "0", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("Listening at "):
                self.url = line.removeprefix("Listening at ").strip()
                return
        raise RuntimeError("the server ended")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def workers(self) -> list[int]:
        """Processes that hold the engine."""
        found = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "spawn_main"], capture_output=True, text=True
        )
        return [int(pid) for pid in found.stdout.split()]


def request_of(x: np.ndarray) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request in binary."""
    entry = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "parameters": {"binary_data_size": x.nbytes}}
    head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
    return head + x.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


def ask(client: httpx.Client, x: np.ndarray) -> tuple[int, np.ndarray | None, float]:
    """Status, result and seconds of a request."""
    body, headers = request_of(x)
    since = time.perf_counter()
    try:
        response = client.post("/v2/models/net/infer", content=body, headers=headers)
    except httpx.HTTPError:
        return 0, None, time.perf_counter() - since
    seconds = time.perf_counter() - since
    if response.status_code != 200:
        return response.status_code, None, seconds
    length = int(response.headers["Inference-Header-Content-Length"])
    return 200, np.frombuffer(response.content[length:], np.float32), seconds


def load(url: str, images: np.ndarray, clients: int, count: int) -> tuple[float, np.ndarray, list[np.ndarray | None]]:
    """Requests a second, seconds of each, and results, of ``count`` requests from so many clients."""
    limits = httpx.Limits(max_connections=clients)
    with httpx.Client(base_url=url, timeout=60, limits=limits) as client, ThreadPoolExecutor(clients) as pool:
        since = time.perf_counter()
        found = list(pool.map(lambda i: ask(client, images[i % len(images)][None]), range(count)))
        seconds = time.perf_counter() - since
    return count / seconds, np.array([s for *_, s in found]), [result for _, result, _ in found]


def rates(folder: Path, images: np.ndarray, rounds: int, count: int) -> list[str]:
    """Measure and describe; the last lines are the claims."""
    with la.load_runner(folder, threads=1) as runner, Server(folder) as server:
        legal = [
            np.concatenate([runner(images[i : i + size]) for i in range(0, len(images), size)]) for size in (1, BATCH)
        ]
        load(server.url, images, 8, BATCH * 2)  # kernels and connections
        direct, served, seconds = [], {c: list[float]() for c in CLIENTS}, {c: list[np.ndarray]() for c in CLIENTS}
        wrong = lost = 0
        for _ in range(rounds):
            since, calls = time.perf_counter(), max(1, count // BATCH)
            for i in range(calls):
                runner(images[np.arange(i * BATCH, (i + 1) * BATCH) % len(images)])
            direct.append(calls * BATCH / (time.perf_counter() - since))
            for clients in CLIENTS:
                rate, times, results = load(server.url, images, clients, count)
                served[clients].append(rate)
                seconds[clients].append(times)
                lost += sum(result is None for result in results)
                wrong += sum(
                    result is not None
                    and not any(np.allclose(result, rows[i % len(images)], atol=1e-4) for rows in legal)
                    for i, result in enumerate(results)
                )
    lines = [f"runner, batches of {BATCH}: {np.median(direct):.0f} images a second"]
    for clients in CLIENTS:
        p50, p99 = np.quantile(np.concatenate(seconds[clients]), [0.5, 0.99]) * 1000
        ratio = float(np.median(np.array(served[clients]) / np.array(direct)))
        lines.append(
            f"{clients} clients: {np.median(served[clients]):.0f} images a second, {ratio:.2f}x of the runner; "
            f"p50 {p50:.1f} ms, p99 {p99:.1f} ms ({p99 / p50:.1f}x)"
        )
    best = float(np.median(np.array(served[CLIENTS[-1]]) / np.array(direct)))
    p50, p99 = np.quantile(np.concatenate(seconds[8]), [0.5, 0.99])
    return [
        *lines,
        f"rows that are no result of the runner at batch 1 or {BATCH}: {wrong}; requests without an answer: {lost}",
        f"rate at {CLIENTS[-1]} clients: {best:.2f}x (target: at least {RATE:g}, {'reached' if best >= RATE else 'missed'})",
        f"p99 at 8 clients: {p99 / p50:.2f}x of p50 (target: at most {TAIL:g}, {'reached' if p99 <= TAIL * p50 else 'missed'})",
    ]


def faults(folder: Path, images: np.ndarray, count: int) -> list[str]:
    """Bad requests among good ones, a body that is too long, a slow client, a worker that is killed and one that is stopped."""
    says = []
    with Server(folder, "--stall", "2", "--max-body-mb", "1") as server:
        base, good, bad = server.url, images[:1], images[:1, :, :5]

        def mixed(disturb: Callable[[int], bool]) -> tuple[list[int], list[int]]:
            """Status codes of good requests, and of bad ones, where ``disturb`` says which are bad."""
            codes: tuple[list[int], list[int]] = [], []
            with httpx.Client(base_url=base, timeout=60) as client, ThreadPoolExecutor(16) as pool:
                made = [disturb(i) for i in range(count)]
                for is_bad, (code, *_) in zip(
                    made, pool.map(lambda b: ask(client, bad if b else good), made), strict=True
                ):
                    codes[is_bad].append(code)
            return codes

        def innocent(what: str, codes: list[int]) -> None:
            says.append(f"{what}: {sum(code != 200 for code in codes)} of {len(codes)} innocent requests failed")

        fine, refused = mixed(lambda i: i % 8 == 0)
        innocent(f"one request in 8 bad ({sorted(set(refused))})", fine)
        with httpx.Client(base_url=base, timeout=60) as client:
            says.append(f"2 MB body: {client.post('/v2/models/net/infer', content=b' ' * 2_000_000).status_code}")
        slow = threading.Thread(target=_slowly, args=(base,))
        slow.start()
        innocent("a client that sends a byte a second", mixed(lambda _: False)[0])
        slow.join()
        for number in (signal.SIGKILL, signal.SIGSTOP):
            (worker,) = server.workers()
            killer = threading.Timer(0.3, os.kill, (worker, number))
            killer.start()
            innocent(f"worker gets {number.name}", mixed(lambda _: False)[0])
            killer.join()
            since = time.perf_counter()
            with httpx.Client(base_url=base, timeout=60) as client:
                code, *_ = ask(client, good)
            says.append(f"  afterwards: {code} in {time.perf_counter() - since:.1f} s")
        memory = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
        load(base, images, 8, 4 * count)
        later = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{server.process.pid}/status").read_text())
        if memory and later:
            says.append(
                f"server's memory over {4 * count} requests: {int(memory[1]) / 1024:.0f} -> {int(later[1]) / 1024:.0f} MB"
            )
    return says


def _slowly(url: str) -> None:
    import socket

    host, _, port = url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /v2/models/net/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        for _ in range(3):
            connection.sendall(b" ")
            time.sleep(1)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrow network and few requests")
    arguments = parser.parse_args()
    width, pixels, rounds, count = (8, 32, 1, 48) if arguments.quick else (64, 64, 7, 320)
    print_environment()
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        write_bundle(bundle, width, pixels)
        images = np.random.default_rng(0).normal(size=(64, 3, pixels, pixels)).astype(np.float32)
        for line in faults(bundle, images, count) + rates(bundle, images, rounds, count):
            print(line, flush=True)


if __name__ == "__main__":
    main()
