"""Write a bundle as a package for a platform."""

import json
import shutil
import sys
import tarfile
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel import __version__
from lightning_accel.bundle.model_card import model_card
from lightning_accel.bundle.writer import staged
from lightning_accel.core.arguments import checked, one_of
from lightning_accel.core.optional import require
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.manifest import check_files, read_manifest
from lightning_accel.errors import InvalidArgumentError

KINDS = ("oci", "sagemaker", "hf-endpoint", "azureml", "mlflow")
_HERE = Path(__file__).parent
_ENGINES = {
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "pytorch": "torch",
}  # and their packages

_DOCKERFILE = """\
# Written by lightning-accel {version}. Build and run:
#   docker build -t {name} . && docker run -p {port}:{port} {name}
FROM python:{python}-slim
WORKDIR /app
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
{copy}
USER 65534
ENV HOME=/tmp
EXPOSE {port}
HEALTHCHECK CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}{health}')"]
{start}
"""
_SERVE = """\
#!/bin/sh
# SageMaker starts the container with the argument `serve`, and unpacks model.tar.gz to /opt/ml/model.
exec python -m lightning_accel serve "model=${LIGHTNING_ACCEL_MODEL:-/opt/ml/model}" \\
  --host 0.0.0.0 --port "${LIGHTNING_ACCEL_PORT:-8080}" --sagemaker
"""
_CONDA = """\
name: {name}
channels: [conda-forge]
dependencies:
  - python={python}
  - pip
  - pip:
{pip}
"""


@checked(kind=one_of(*KINDS))
def write_package(bundle: str | Path, kind: str, out: str | Path, *, name: str | None = None) -> Path:
    """Write a bundle as a package that a platform deploys: the whole bundle, pinned requirements, and a thin entry point.

    Every entry point checks the files against the manifest, and reproduces the kept samples, if there are any, before it answers.

    Args:
        bundle: its folder.
        kind: ``"oci"``: a Dockerfile for `lightning-accel serve`; ``"sagemaker"``: an image and ``model.tar.gz``; ``"hf-endpoint"``: a
            repository for the Hugging Face Hub with a model card and ``handler.py``; ``"azureml"``: ``score.py`` and its environment;
            ``"mlflow"``: a model from code, which needs ``mlflow``.
        out: folder of the package; an earlier package there is replaced.
        name: of the model; default: that of the bundle's folder.

    Returns:
        The package's folder.

    Raises:
        InvalidArgumentError: the bundle changed after it was written, or the folder holds something else.
        MissingPackageError: ``mlflow`` isn't installed.
    """
    bundle, out = Path(bundle), Path(out)
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    called = name or bundle.resolve().name
    if not called.replace("-", "").replace("_", "").replace(".", "").isalnum():
        raise InvalidArgumentError(f"Argument `name` must be letters, digits, `-`, `_` and `.`, but got {called!r}.")
    if out.exists() and any(out.iterdir()) and not (out / "package.json").is_file():
        raise InvalidArgumentError(
            f"Argument `out` must be a new or empty folder, or an earlier package, but got {out}."
        )
    if bundle.resolve() == out.resolve() or bundle.resolve() in out.resolve().parents:
        raise InvalidArgumentError(f"Argument `out` must not lie in the bundle, but got {out}.")
    writers: dict[str, Callable[[Path, Path, str, Mapping[str, Any]], None]] = {
        "oci": _oci,
        "sagemaker": _sagemaker,
        "hf-endpoint": _hf_endpoint,
        "azureml": _azureml,
        "mlflow": _mlflow,
    }
    with staged(out) as folder:
        writers[kind](bundle, folder, called, manifest)
        about = {"kind": kind, "name": called, "bundle": manifest["sha256"], "version": __version__}
        (folder / "package.json").write_text(json.dumps(about, indent=2) + "\n")
    return out


def requirements(manifest: Mapping[str, Any], *, serve: bool) -> list[str]:
    """Pinned packages that the bundle's default engine needs, in the versions of this environment."""
    extras = "runtime,serve" if serve else "runtime"
    packages = ["numpy", "onnx", "onnxruntime", _ENGINES.get(manifest["default"]["engine"], "onnxruntime")]
    packages += ["starlette", "uvicorn", "prometheus-client"] if serve else []
    pinned = []
    for package in dict.fromkeys(packages):
        try:
            pinned.append(f"{package}=={version(package).partition('+')[0]}")
        except PackageNotFoundError:  # of another machine's engine
            pinned.append(package)
    return [f"lightning-accel[{extras}]=={__version__}", *pinned]


def _oci(bundle: Path, folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    shutil.copytree(bundle, folder / "bundle")
    _write_requirements(folder, manifest, serve=True)
    start = ["python", "-m", "lightning_accel", "serve", f"{name}=bundle", "--host", "0.0.0.0", "--port", "8000"]
    _write_dockerfile(folder, name, 8000, "/v2/health/ready", "COPY bundle bundle", f"CMD {json.dumps(start)}")


def _sagemaker(bundle: Path, folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    with tarfile.open(folder / "model.tar.gz", "w:gz") as archive:
        for file in sorted(bundle.rglob("*")):
            archive.add(file, file.relative_to(bundle).as_posix(), recursive=False)
    _write_requirements(folder, manifest, serve=True)
    (folder / "serve").write_text(_SERVE)
    (folder / "serve").chmod(0o755)
    _write_dockerfile(folder, name, 8080, "/ping", "COPY --chmod=755 serve /usr/local/bin/serve", 'CMD ["serve"]')


def _hf_endpoint(bundle: Path, folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    shutil.copytree(bundle, folder / "bundle")
    shutil.copy2(_HERE / "hf_handler.py", folder / "handler.py")
    _write_requirements(folder, manifest, serve=False)
    with load_runner(bundle) as runner:
        card = model_card(name, manifest, runner.inputs, runner.outputs)
    (folder / "README.md").write_text(card, encoding="utf-8")


def _azureml(bundle: Path, folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    shutil.copytree(bundle, folder / "model" / "bundle")
    (folder / "code").mkdir()
    shutil.copy2(_HERE / "azureml_score.py", folder / "code" / "score.py")
    pip = "\n".join(
        f"      - {line}" for line in ["azureml-inference-server-http", *requirements(manifest, serve=False)]
    )
    (folder / "conda.yaml").write_text(_CONDA.format(name=name, python=_python(), pip=pip))


def _mlflow(bundle: Path, folder: Path, name: str, manifest: Mapping[str, Any]) -> None:
    mlflow = require("mlflow", "mlflow", "`package --mlflow`")
    schema, models = require("mlflow.types.schema", "mlflow", "`package --mlflow`"), mlflow.models
    with load_runner(bundle) as runner:
        sides = [
            schema.Schema(
                [
                    schema.TensorSpec(
                        np.dtype(spec.dtype), tuple(-1 if size is None else size for size in spec.shape), spec.name
                    )
                    for spec in specs
                ]
            )
            for specs in (runner.inputs, runner.outputs)
        ]
    mlflow.pyfunc.save_model(
        str(folder / "model"),
        python_model=str(_HERE / "mlflow_model.py"),
        artifacts={"bundle": str(bundle)},
        signature=models.ModelSignature(*sides),
        pip_requirements=requirements(manifest, serve=False),
        metadata={"name": name, "manifest_sha256": manifest["sha256"]},
    )


def _write_requirements(folder: Path, manifest: Mapping[str, Any], *, serve: bool) -> None:
    (folder / "requirements.txt").write_text("\n".join(requirements(manifest, serve=serve)) + "\n")


def _write_dockerfile(folder: Path, name: str, port: int, health: str, copy: str, start: str) -> None:
    text = _DOCKERFILE.format(
        version=__version__, name=name, port=port, python=_python(), copy=copy, health=health, start=start
    )
    (folder / "Dockerfile").write_text(text)


def _python() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"
