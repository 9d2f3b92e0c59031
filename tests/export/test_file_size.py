import onnx
import torch
from torch import nn

from lightning_accel import quantize
from lightning_accel.export.file_size import size_of, why_not_smaller
from lightning_accel.onnx.export import export_onnx


class Shared(nn.Module):
    """One pair of layers that is called ``depth`` times, as in ALBERT."""

    def __init__(self, depth=6, width=32):
        super().__init__()
        self.depth, self.embed = depth, nn.Embedding(50, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, ids):
        x = self.embed(ids)
        for _ in range(self.depth):
            x = x + self.down(torch.relu(self.up(x)))
        return x


def files(folder, module, x, **settings):
    small = quantize(module, [x], target="onnxruntime", **settings)
    return export_onnx(small, x, folder / "q.onnx"), export_onnx(module, x, folder / "f.onnx")


def test_a_shared_layer_is_stored_once_and_smaller(tmp_path):
    module, ids = Shared(), torch.randint(0, 50, (4, 6))
    parameters = sum(p.numel() for p in module.parameters())
    for activations in ("static", "dynamic", "float"):
        small, large = files(tmp_path, module, ids, activations=activations)
        assert size_of(large.path) > 4 * parameters
        assert size_of(small.path) < 0.75 * size_of(large.path)
        assert why_not_smaller(small.path, large.path) == ""


def test_deeper_sharing_stores_no_further_integers(tmp_path):
    ids = torch.randint(0, 50, (4, 6))
    stored = {}
    for depth in (1, 5):
        small, _ = files(tmp_path, Shared(depth), ids)
        integers = [t for t in onnx.load(small.path).graph.initializer if t.data_type == onnx.TensorProto.INT8]
        stored[depth] = sum(len(t.raw_data) for t in integers if len(t.dims) > 1)
        assert len(small.trained[""].weights) == 1 + 2 * depth
    assert stored[1] == stored[5] == 50 * 32 + 2 * 32 * 128


def test_a_network_of_a_few_weights_says_why_int8_is_larger(tmp_path):
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    small, large = files(tmp_path, module, torch.randn(8, 4))
    says = why_not_smaller(small.path, large.path)
    assert says.startswith(f"The int8 file isn't smaller: {size_of(small.path):,} bytes beside {size_of(large.path):,}")
    assert "nodes and names" in says
    assert "of integers" in says
