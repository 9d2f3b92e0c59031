import hashlib
import json

import pytest

from lightning_accel.engines.manifest import manifest_digest
from tests.support import onnx_models as models


@pytest.fixture
def bundle(tmp_path):
    """A bundle as the exporter writes it; returns its directory and a function that rewrites the manifest."""
    folder = tmp_path / "bundle"
    (folder / "engines").mkdir(parents=True)
    models.linear(folder / "model.onnx")
    (folder / "engines" / "model.tensorrt_rtx.engine").write_bytes(b"plan")
    files = {
        name: {"sha256": hashlib.sha256((folder / name).read_bytes()).hexdigest(), "bytes": 1}
        for name in ("model.onnx", "engines/model.tensorrt_rtx.engine")
    }
    manifest = {
        "schema": 1,
        "files": files,
        "default": {"engine": "onnxruntime", "file": "model.onnx"},
        "engines": {
            "onnxruntime": {"file": "model.onnx"},
            "tensorrt": {"file": "engines/model.tensorrt_rtx.engine"},
        },
    }

    def write(**changes):
        changed = {**manifest, **changes}
        (folder / "manifest.json").write_text(json.dumps({**changed, "sha256": manifest_digest(changed)}))
        return folder

    write()
    return folder, write
