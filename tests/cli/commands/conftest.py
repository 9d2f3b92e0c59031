import numpy as np
import pytest
import torch

from lightning_accel.export.held_out import HeldOut
from lightning_accel.export.pipeline import write_bundle
from lightning_accel.export.spec import ExportSpec
from lightning_accel.quantization.arithmetic.targets import target_of
from tests.quantization.graph.test_prepare import quantized
from tests.support.models import Classifier, images, loader


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """A bundle as ModelExport writes it (int8, three engines, kept samples), and more samples in a file."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT for RTX is an optional engine; it builds without a GPU")
    torch.manual_seed(0)
    folder, module = tmp_path_factory.mktemp("commands"), Classifier()
    quantized(module, images(64).tensors[0], target=target_of("portable"), learn=20)
    order = ExportSpec(
        module=module.eval(),
        part=module,
        data=HeldOut(loader(64, 32, seed=5), "test"),
        engines=["onnxruntime", "tensorrt", "openvino"],
        precision="int8",
        metadata={"class_names": ["a", "b", "c", "d"]},
        keep_samples=16,
    )
    write_bundle(order, folder / "bundle")
    np.savez(folder / "more.npz", x=images(40, 9).tensors[0].numpy())
    return folder
