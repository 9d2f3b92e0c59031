"""Write a bundle's engine as a model repository of NVIDIA Triton Inference Server.

``config.pbtxt`` is written from the file's own names, types and shapes, so the two always agree.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.bundle.writer import staged
from lightning_accel.engines.base import TensorSpec, load_runner
from lightning_accel.engines.manifest import check_files, read_manifest, resolve_bundle
from lightning_accel.engines.tensorrt.library import read_info
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.verification.layout import check_batch_first

# Backends that read the files of a bundle; OpenVINO's and PyTorch's read other formats.
BACKENDS = {"onnxruntime": ("onnxruntime", "model.onnx"), "tensorrt": ("tensorrt", "model.plan")}
_TYPES = {
    "bool": "TYPE_BOOL",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    **{f"{kind}{bits}": f"TYPE_{kind.upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
}


def write_triton(
    bundle: str | Path,
    repository: str | Path,
    *,
    name: str,
    engine: str | None = None,
    backend: str | None = None,
    version: int = 1,
    max_batch: int = 64,
) -> Path:
    """Write a bundle as a model of a Triton repository: ``<repository>/<name>/config.pbtxt``, ``<version>/model.onnx``.

    With ``backend="python"`` the version holds the whole bundle and ``model.py``, which reproduces the kept samples before the server
    becomes ready, and runs any engine in a Python of the server that has ``lightning-accel[runtime]``.

    Args:
        bundle: the bundle's folder.
        repository: Triton's model repository; other models in it stay.
        name: the model's name there. A model of that name is replaced whole.
        engine: ``"onnxruntime"`` or ``"tensorrt"``, any with the Python backend; default: the bundle's own.
        backend: ``"python"``, or ``None`` for Triton's backend of the engine.
        version: version of the model, from 1.
        max_batch: largest batch that the server assembles.

    Returns:
        The model's folder.

    Raises:
        InvalidArgumentError: a name or number that Triton rejects, an engine without a Triton backend, or a damaged bundle.
    """
    bundle, repository = Path(bundle), Path(repository)
    if not name or any(sign in name for sign in "/\\") or name.startswith("."):
        raise InvalidArgumentError(f"Argument `name` must be the name of a folder, but got {name!r}.")
    for argument, number in (("version", version), ("max_batch", max_batch)):
        if number < 1:
            raise InvalidArgumentError(f"Argument `{argument}` must be at least 1, but got {number}.")
    if backend not in (None, "python"):
        raise InvalidArgumentError(
            f'Argument `backend` must be "python", or None for the backend of the engine, but got {backend!r}.'
        )
    manifest = read_manifest(bundle)
    check_files(bundle, manifest)
    check_batch_first(manifest, "Triton's batching")
    engine, file = resolve_bundle(bundle, engine)
    if backend is None and engine not in BACKENDS:
        raise InvalidArgumentError(
            f'Argument `engine` must be one of {sorted(BACKENDS)}, or any with backend="python", but got {engine!r}.'
        )
    with load_runner(bundle / manifest["model"], "onnxruntime") as runner:  # its names and shapes are the engine's
        inputs, outputs = runner.inputs, runner.outputs
    labels = manifest.get("metadata", {}).get("class_names")
    if backend == "python":
        return _write_python(bundle, repository / name, engine, str(version), inputs, outputs, max_batch, labels)
    if engine == "tensorrt":
        info = read_info(file)
        if info.library != "tensorrt":
            raise InvalidArgumentError(
                f"Argument `engine` must be one that Triton can load, but got an engine of {info.library}: Triton runs those of the "
                f"standard TensorRT. Build it where that is installed: lightning-accel build {bundle} --engine tensorrt"
            )
        max_batch = min([max_batch, *(shapes[2][0] for shapes in info.profile.values())])
    backend, target = BACKENDS[engine]
    with staged(repository / name) as folder:
        (folder / str(version)).mkdir()
        shutil.copy2(file, folder / str(version) / target)
        weights = file.with_name(f"{file.name}.data")
        if weights.is_file():
            shutil.copy2(weights, folder / str(version) / weights.name)
        if labels is not None:
            (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
        notes = {"source_sha256": manifest["files"][file.relative_to(bundle).as_posix()]["sha256"]}
        text = config_text(name, backend, inputs, outputs, max_batch, labelled=labels is not None, notes=notes)
        (folder / "config.pbtxt").write_text(text)
    return repository / name


def _write_python(
    bundle: Path,
    place: Path,
    engine: str,
    version: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_batch: int,
    labels: Sequence[str] | None,
) -> Path:
    """Write a model of Triton's Python backend: ``<version>/model.py`` and ``<version>/bundle``."""
    with staged(place) as folder:
        shutil.copytree(bundle, folder / version / "bundle")
        shutil.copy2(Path(__file__).with_name("triton_model.py"), folder / version / "model.py")
        if labels is not None:
            (folder / "labels.txt").write_text("".join(f"{label}\n" for label in labels))
        notes = {"engine": engine}
        text = config_text(place.name, "python", inputs, outputs, max_batch, labelled=labels is not None, notes=notes)
        (folder / "config.pbtxt").write_text(text)
    return place


def config_text(
    name: str,
    backend: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    max_batch: int,
    *,
    labelled: bool = False,
    notes: Mapping[str, str] | None = None,
) -> str:
    """The text of ``config.pbtxt``.

    A network whose inputs and outputs all have an open first dimension is batched by the server; another one is served
    as it is.

    Args:
        name: of the model.
        backend: Triton's backend.
        inputs: of the network.
        outputs: of the network.
        max_batch: largest batch that the server assembles.
        labelled: whether ``labels.txt`` names the classes of the first output.
        notes: further parameters.
    """
    batched = all(spec.shape and spec.shape[0] is None for spec in (*inputs, *outputs))
    lines = [f"name: {_quoted(name)}", f"backend: {_quoted(backend)}", f"max_batch_size: {max_batch if batched else 0}"]
    for kind, specs in (("input", inputs), ("output", outputs)):
        for index, spec in enumerate(specs):
            lines += [f"{kind} {{", f"  name: {_quoted(spec.name)}", f"  data_type: {_type_of(spec)}"]
            lines += [f"  dims: {-1 if size is None else size}" for size in spec.shape[1 if batched else 0 :]]
            if batched and len(spec.shape) == 1:  # Triton wants a dimension besides the batch, and takes it away again
                lines += ["  dims: 1", "  reshape { shape: [ ] }"]
            if kind == "output" and labelled and index == 0:
                lines.append('  label_filename: "labels.txt"')
            lines.append("}")
    lines += ["dynamic_batching { }"] if batched else []
    for key, value in sorted((notes or {}).items()):
        lines.append(f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}")
    return "\n".join(lines) + "\n"


def _type_of(spec: TensorSpec) -> str:
    known = _TYPES.get(np.dtype(spec.dtype).name)
    if known is None:
        raise InvalidArgumentError(f"Tensor `{spec.name}` must have a type that Triton knows, but it is {spec.dtype}.")
    return known


def _quoted(text: Any) -> str:
    return json.dumps(str(text), ensure_ascii=False)
