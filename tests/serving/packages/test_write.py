"""Each package runs as a plain process, as its platform would start it, and answers what the runner answers."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

import lightning_accel as la
from lightning_accel.cli.main import main
from lightning_accel.errors import InvalidArgumentError, MissingPackageError
from lightning_accel.serving.packages.bundle_model import BundleModel
from lightning_accel.serving.packages.write import write_package

X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
V2 = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [3, 4], "data": X.reshape(-1).tolist()}]}


def wanted(bundle):
    with la.load_runner(bundle) as runner:
        ((name, array),) = runner.run({"x": X}).items()
        return name, array


@contextmanager
def started(command, folder, **environment):
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(la.__file__).parents[1]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        for line in process.stdout:
            if found := re.match(r"Listening at http://\S+:(\d+)", line):
                break
        else:
            raise AssertionError("it ended")
        with httpx.Client(base_url=f"http://127.0.0.1:{found[1]}", timeout=30) as client:
            yield client
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


def answered(response, bundle):
    assert response.status_code == 200, response.text
    name, array = wanted(bundle)
    (output,) = response.json()["outputs"]
    np.testing.assert_allclose(np.float32(output["data"]).reshape(output["shape"]), array, rtol=1e-6)
    assert output["name"] == name


def test_an_image_serves_the_bundle(bundles, tmp_path, capsys):
    assert main(["package", str(bundles["pixels"]), "--oci", "--out", str(tmp_path / "image")]) == 0
    assert "pixels for oci; next: docker build -t pixels" in capsys.readouterr().out
    dockerfile = (tmp_path / "image" / "Dockerfile").read_text()
    assert set(re.findall(r"^COPY (\S+)", dockerfile, re.MULTILINE)) == {"requirements.txt", "bundle"}
    command = json.loads(re.search(r"^CMD (\[.*\])$", dockerfile, re.MULTILINE)[1])
    assert command[:4] == ["python", "-m", "lightning_accel", "serve"]
    command[0], command[-1] = sys.executable, "0"  # any free port
    with started(command, tmp_path / "image") as client:
        assert client.get("/v2/health/ready").status_code == 200
        answered(client.post("/v2/models/pixels/infer", json=V2), bundles["pixels"])
    pins = (tmp_path / "image" / "requirements.txt").read_text().splitlines()
    assert f"lightning-accel[runtime,serve]=={la.__version__}" in pins
    assert all(re.fullmatch(r"[\w\[\],-]+==[\w.]+", pin) for pin in pins)
    assert {"onnxruntime", "starlette"} <= {pin.partition("==")[0] for pin in pins}


def test_sagemaker_starts_serve_with_what_it_unpacked(bundles, tmp_path):
    write_package(bundles["pixels"], "sagemaker", tmp_path / "package")
    with tarfile.open(tmp_path / "package" / "model.tar.gz") as archive:
        archive.extractall(tmp_path / "model", filter="data")
    environment = {
        "LIGHTNING_ACCEL_MODEL": str(tmp_path / "model"),
        "LIGHTNING_ACCEL_PORT": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    with started([str(tmp_path / "package" / "serve")], tmp_path, **environment) as client:
        assert client.get("/ping").status_code == 200
        answered(client.post("/invocations", json=V2), bundles["pixels"])
        assert client.post("/invocations", json={"inputs": []}).status_code == 400
    assert "COPY --chmod=755 serve /usr/local/bin/serve" in (tmp_path / "package" / "Dockerfile").read_text()


def scripted(code, folder, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(la.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
    )


def test_a_repository_of_the_hub_with_a_handler_and_a_card(bundles, tmp_path):
    write_package(bundles["pixels"], "hf-endpoint", tmp_path / "repo", name="my-pixels")
    code = f"""
import importlib.util, json, sys
spec = importlib.util.spec_from_file_location("handler", "handler.py")
handler = importlib.util.module_from_spec(spec); spec.loader.exec_module(handler)
model = handler.EndpointHandler(".")
print(json.dumps(model({{"inputs": {{"x": {X.tolist()}}}}})))
print(json.dumps(model({{"inputs": {X.tolist()}}})))
assert "torch" not in sys.modules
"""
    done = scripted(code, tmp_path / "repo")
    assert done.returncode == 0, done.stderr
    name, array = wanted(bundles["pixels"])
    for line in done.stdout.splitlines():
        np.testing.assert_allclose(np.float32(json.loads(line)[name]), array, rtol=1e-6)
    card = (tmp_path / "repo" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: onnx\ntags: ")
    assert "# my-pixels" in card
    assert "| input | `x` | float32 | (any, 4) |" in card
    assert re.search(r"\| network fp32 \| onnxruntime \| \d+\.\d\d% \|", card)
    assert "held-out samples, passed" in card
    model = tmp_path / "repo" / "bundle" / "model.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    done = scripted(code, tmp_path / "repo")
    assert done.returncode == 1
    assert "SHA-256" in done.stderr


def test_azureml_scores(bundles, tmp_path):
    write_package(bundles["pixels"], "azureml", tmp_path / "package")
    code = f"import json, score; score.init(); print(json.dumps(score.run(json.dumps({{'inputs': {{'x': {X.tolist()}}}}}))))"
    done = scripted(code, tmp_path / "package" / "code", AZUREML_MODEL_DIR=str(tmp_path / "package" / "model"))
    assert done.returncode == 0, done.stderr
    name, array = wanted(bundles["pixels"])
    np.testing.assert_allclose(np.float32(json.loads(done.stdout)[name]), array, rtol=1e-6)
    assert f"lightning-accel[runtime]=={la.__version__}" in (tmp_path / "package" / "conda.yaml").read_text()


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        ({"y": [[1.0] * 4]}, r"must hold the inputs \['x'\], but got \['y'\]"),
        ({"x": [[1.0] * 4, [1.0]]}, "equally long lists"),
        ({"x": [["a"] * 4]}, "FP32 numbers"),
        ({"x": [[1e39] * 4]}, "finite numbers"),
        ({"x": [[1.0] * 5]}, "shape|dimension|size"),
    ],
)
def test_lists_that_do_not_fit(bundles, inputs, match):
    with pytest.raises(InvalidArgumentError, match=match):
        BundleModel(bundles["pixels"]).run(inputs)


def test_packages_replace_packages_and_nothing_else(bundles, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidArgumentError, match="a new or empty folder, or an earlier package"):
        write_package(bundles["pixels"], "oci", tmp_path / "mine")
    write_package(bundles["pixels"], "oci", tmp_path / "package")
    write_package(bundles["newer"], "azureml", tmp_path / "package")
    assert sorted(f.name for f in (tmp_path / "package").iterdir()) == ["code", "conda.yaml", "model", "package.json"]
    with pytest.raises(InvalidArgumentError, match="must not lie in the bundle"):
        write_package(bundles["pixels"], "oci", bundles["pixels"] / "package")
    with pytest.raises(InvalidArgumentError, match="`name` must be letters"):
        write_package(bundles["pixels"], "oci", tmp_path / "other", name="a b")
    changed = shutil.copytree(bundles["pixels"], tmp_path / "changed")
    (changed / "model.onnx").write_bytes(b"")
    with pytest.raises(InvalidArgumentError):
        write_package(changed, "oci", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_mlflow_that_is_not_installed_is_named(bundles, tmp_path, monkeypatch):
    """`experiments/mlflow_model.py` runs it with the real one."""
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(MissingPackageError, match=r"lightning-accel\[mlflow\]"):
        write_package(bundles["pixels"], "mlflow", tmp_path / "package")
    assert not (tmp_path / "package").exists()
