"""A real server on loopback: right rows, clear refusals, and nothing that one request does to another."""

import json
import os
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import lightning_accel as la
from tests.serving.conftest import command, serving

ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def server(bundles):
    arguments = (f"pixels={bundles['pixels']}", f"words={bundles['words']}", "--max-batch", 8, "--batch-wait-ms", 20)
    with serving(*arguments, "--stall", 2, "--max-body-mb", 0.05) as running:
        yield running


@pytest.fixture(scope="module")
def runner(bundles):
    with la.load_runner(bundles["pixels"]) as found:
        yield found


def outputs(response):
    (output,) = response.json()["outputs"]
    return np.array(output["data"], np.float32).reshape(output["shape"])


def test_every_row_is_the_runner_s(server, runner, bundles):
    x = torch.randn(200, 3, 4)
    with ThreadPoolExecutor(16) as clients:
        responses = list(clients.map(lambda rows: server.infer("pixels", rows), x))
    assert {r.status_code for r in responses} == {200}
    for rows, response in zip(x, responses, strict=True):
        assert np.allclose(outputs(response), runner(rows.numpy()), atol=1e-6)
    sizes = [int(r.headers["lightning-accel-batch-size"]) for r in responses]
    assert 3 < max(sizes) <= 8  # of several requests, and no larger than asked for
    digest = json.loads((bundles["pixels"] / "manifest.json").read_text())["sha256"]
    assert {r.headers["lightning-accel-manifest"] for r in responses} == {digest}
    assert server.metric('lightning_accel_requests_total{code="200",model="pixels"}') >= 200


def test_numbers_in_json_and_in_binary_are_the_same_bits(server):
    x = torch.randn(5, 4)
    plain = outputs(server.infer("pixels", x))
    header = {
        "id": "one",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [5, 4], "parameters": {"binary_data_size": 80}}],
        "outputs": [{"name": "output", "parameters": {"binary_data": True}}],
    }
    head = json.dumps(header).encode()
    response = server.client.post(
        "/v2/models/pixels/versions/1/infer",
        content=head + x.numpy().tobytes(),
        headers={"Inference-Header-Content-Length": str(len(head))},
    )
    assert response.status_code == 200
    length = int(response.headers["Inference-Header-Content-Length"])
    answer = json.loads(response.content[:length])
    assert answer["id"] == "one"
    assert answer["outputs"][0]["parameters"] == {"binary_data_size": 60}
    assert np.array_equal(np.frombuffer(response.content[length:], np.float32).reshape(5, 3), plain)


@pytest.mark.parametrize("model", ["pixels", "words"])
def test_one_bad_request_fails_for_itself_only(server, model):
    """Shapes are refused before the queue; a token outside the table fails in the engine, with others in its batch."""
    good = torch.randn(1, 4) if model == "pixels" else torch.randint(0, 10, (1, 5))
    bad = torch.randn(1, 5) if model == "pixels" else torch.full((1, 5), 99)

    def ask(index):
        return index % 8 == 0, server.infer(model, bad if index % 8 == 0 else good)

    with ThreadPoolExecutor(16) as clients:
        found = list(clients.map(ask, range(128)))
    assert {response.status_code for is_bad, response in found if not is_bad} == {200}
    assert {response.status_code for is_bad, response in found if is_bad} == {400 if model == "pixels" else 500}
    assert len({response.content for is_bad, response in found if not is_bad}) == 1
    if model == "words":
        assert "The engine can't run this request" in next(r for is_bad, r in found if is_bad).json()["error"]


def test_a_killed_worker_loses_nothing(server):
    x = torch.randn(1, 4)
    want = outputs(server.infer("pixels", x))
    (first, *_) = server.workers()
    restarts = server.metric('lightning_accel_worker_restarts_total{model="pixels"}')
    restarts += server.metric('lightning_accel_worker_restarts_total{model="words"}')

    def ask(index):
        if index == 40:
            os.kill(first, signal.SIGKILL)
        return server.infer("pixels" if index % 2 else "words", x if index % 2 else torch.ones(1, 5, dtype=torch.int64))

    with ThreadPoolExecutor(8) as clients:
        responses = list(clients.map(ask, range(160)))
    assert {r.status_code for r in responses} == {200}
    assert np.array_equal(outputs(server.infer("pixels", x)), want)
    server.wait_until(lambda: len(server.workers()) == 2 and server.client.get("/v2/health/ready").status_code == 200)
    now = server.metric('lightning_accel_worker_restarts_total{model="pixels"}')
    now += server.metric('lightning_accel_worker_restarts_total{model="words"}')
    assert now == restarts + 1


def test_a_stopped_worker_is_replaced(server):
    stopped = server.workers()
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert server.infer("pixels", torch.randn(1, 4)).status_code == 200  # by the next worker
    server.infer("words", torch.ones(1, 5, dtype=torch.int64))
    server.wait_until(lambda: not set(stopped) & set(server.workers()))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shape": [1, 5], "data": [1.0] * 5}, "must give input `x` in shape (any, 4), but got (1, 5)"),
        ({"shape": [4], "data": [1.0] * 4}, "must give input `x` with 2 dimensions (any, 4), but got 1"),
        ({"shape": [2, 4]}, "must have 8 numbers in `data` for shape [2, 4], but got 4"),
        ({"shape": [-1, 4]}, "must have a shape of integers from 0, but got [-1, 4]"),
        ({"shape": [0, 4], "data": []}, "must hold at least one row, but got a batch of 0"),
        ({"datatype": "FP64"}, "must have the datatype FP32, but got 'FP64'"),
        ({"name": "y"}, "must name the inputs ['x'], but got 'y'"),
        ({"data": [1.0, 2.0, 3.0, float("nan")]}, "must hold finite numbers, but got NaN or infinity"),
        ({"data": [1.0, 2.0, 3.0, 1e60]}, "must hold finite numbers, but got NaN or infinity"),
        ({"data": ["a", "b", "c", "d"]}, "must have `data` of FP32 numbers, but got <U1 values"),
        ({"data": [[1.0], [2.0, 3.0]]}, "must have `data` of equally long lists of numbers"),
        ({"data": None}, "must have `data` as a list, but got NoneType"),
        ({"shape": [9, 4], "data": [1.0] * 36}, "must hold at most 8 rows, but got 9. Split it."),
        ({"parameters": {"binary_data_size": 16}}, "must have `binary_data_size` 16"),
        ({"parameters": 1}, "Field `parameters` must be an object"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_field(server, change, text):
    entry = {"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1.0, 2.0, 3.0, 4.0], **change}
    response = server.client.post("/v2/models/pixels/infer", content=json.dumps({"inputs": [entry]}))
    assert response.status_code == 400
    assert text in response.json()["error"]
    assert "\n" not in response.json()["error"]


@pytest.mark.parametrize(
    ("path", "content", "code", "text"),
    [
        ("pixels/infer", b"\xff\xfe", 400, "The body must be JSON"),
        ("pixels/infer", b"[" * 20_000, 400, "The body must be JSON"),
        ("pixels/infer", b"[]", 400, "must be a JSON object, but got list"),
        ("pixels/infer", b"{}", 400, "Field `inputs` must be a list of objects"),
        ("pixels/infer", b'{"inputs": []}', 400, "but got none for ['x']"),
        ("pixels/infer", b" " * 60_000, 413, "must have at most 52428 bytes, but got 60000 or more"),
        ("faces/infer", b"{}", 404, "must be one of ['pixels', 'words'], but got 'faces'"),
        ("pixels/versions/7/infer", b"{}", 404, "The version must be 1, but got '7'"),
    ],
)
def test_other_bodies_and_paths(server, path, content, code, text):
    response = server.client.post(f"/v2/models/{path}", content=content)
    assert response.status_code == code
    assert text in response.json()["error"]


def test_neither_torch_nor_lightning_is_loaded(server):
    for pid in (server.process.pid, *server.workers()):
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()


def test_metadata_and_health(server, bundles):
    assert server.client.get("/v2/health/live").json() == {"live": True}
    assert server.client.get("/v2/health/ready").json() == {"ready": True}
    assert server.client.get("/v2/models/words/ready").json() == {"ready": True}
    about = server.client.get("/v2/models/words").json()
    assert about["inputs"] == [{"name": "x", "datatype": "INT64", "shape": [-1, 5]}]
    assert about["parameters"]["kept_samples"] == 16
    assert server.said[0].startswith("pixels: onnxruntime, 1 workers, manifest ")
    assert "16 kept samples reproduced" in server.said[0]


def test_reload_serves_the_new_bundle_or_keeps_the_old_one(bundles, tmp_path):
    folder, x = tmp_path / "live", torch.randn(3, 4)

    def place(name):
        subprocess.run(["rm", "-rf", folder], check=True)
        subprocess.run(["cp", "-r", bundles[name], folder], check=True)

    place("pixels")
    (tmp_path / "token").write_text("secret\n")
    with serving(folder, "--token-file", tmp_path / "token", "--pad-to", 8, "--canary-seconds", 0.3) as server:
        assert server.infer("live", x).status_code == 401
        assert server.client.get("/v2/health/ready").status_code == 200
        server.client.headers["Authorization"] = "Bearer secret"
        old = server.infer("live", x)
        assert old.headers["lightning-accel-batch-size"] == "8"
        place("newer")
        model = folder / json.loads((folder / "manifest.json").read_text())["model"]
        model.write_bytes(model.read_bytes()[:100])
        refused = server.client.post("/v2/repository/models/live/load")
        assert refused.status_code == 409
        assert "must have the SHA-256" in refused.json()["error"]
        assert server.infer("live", x).content == old.content
        place("newer")
        answer = server.client.post("/v2/repository/models/live/load")
        assert answer.json() == {"name": "live", "version": "2"}
        new = server.infer("live", x)
        with la.load_runner(bundles["newer"]) as runner:
            assert np.allclose(outputs(new), runner(x.numpy()), atol=1e-6)
        assert new.headers["lightning-accel-manifest"] != old.headers["lightning-accel-manifest"]
        place("pixels")
        server.process.send_signal(signal.SIGHUP)
        server.wait_until(lambda: server.client.get("/v2/models/live").json()["versions"] == ["3"])
        assert outputs(server.infer("live", x)).tolist() == outputs(old).tolist()
        assert server.metric('lightning_accel_canary_failures_total{model="live"}') == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_it_when_all_are_answered(bundles, number, code):
    with serving(bundles["pixels"], "--batch-wait-ms", 300) as server, ThreadPoolExecutor(8) as clients:
        asked = [clients.submit(server.infer, "pixels", torch.randn(1, 4)) for _ in range(8)]
        time.sleep(0.15)  # they wait for their batch
        workers = server.workers()
        server.process.send_signal(number)
        assert {one.result().status_code for one in asked} == {200}
        assert server.process.wait(30) == code
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
        assert not server.process.stdout.read()


def rewritten(bundle, folder, change):
    """A bundle whose samples are others, with a manifest that is in order."""
    from lightning_accel.engines.manifest import manifest_digest, sha256_of

    subprocess.run(["cp", "-r", bundle, folder], check=True)
    with np.load(folder / "samples.npz") as kept:
        samples = dict(kept)
    change(samples)
    np.savez(folder / "samples.npz", **samples)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["samples.npz"]["sha256"] = sha256_of(folder / "samples.npz")
    manifest["sha256"] = manifest_digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_bundle_that_is_not_reproduced_is_not_served(bundles, tmp_path):
    def shift(samples):
        samples["output"] = samples["output"] + 1

    wrong = rewritten(bundles["pixels"], tmp_path / "wrong", shift)
    ended = subprocess.run(command(wrong, "--port", 0), capture_output=True, text=True, env=ENV, check=False)
    assert ended.returncode == 1
    assert "can't be served: The kept samples of" in ended.stderr
    assert "must be reproduced here, but: file as written" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Listening" not in ended.stdout


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--workers", "0"], "Option `--workers` must be at least 1, but got 0"),
        (["--port", "99999"], "Option `--port` must be at most 65535, but got 99999"),
        (["--host", "192.0.2.1"], "must be an address that is free on this machine"),
        (["--pad-to", "8", "--max-batch", "4"], "Option `--pad-to` must equal `--max-batch`, 4, but got 8"),
        (["--token-file", "nothing"], "Option `--token-file` must be a readable file"),
        (["--engine", "openvino"], "must be one of the bundle's"),
    ],
)
def test_options_that_do_not_fit(bundles, capsys, options, text):
    from lightning_accel.cli.main import main

    assert main(["serve", str(bundles["pixels"]), "--port", "0", *options]) in (1, 2)
    assert text in capsys.readouterr().err
