"""The operator sweep: each operator is right in every engine, or refused by name, or recorded with the engine that lacks it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel import load_runner
from lightning_accel.errors import CaptureError
from lightning_accel.onnx.export import export_onnx
from tests.support.operators import CASES, One

pytestmark = [  # PyTorch's own notes on two of the operators
    pytest.mark.filterwarnings("ignore:index_reduce\\(\\) is in beta"),
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
]
ENGINES = ("onnxruntime", "openvino")
RIGHT = {name: case for name, case in CASES.items() if not case.refused and not case.differs}
PARTS = 12  # networks that the right ones are spread over: an export costs more than the operators in it


class Together(nn.Module):
    """Several operators with one input each, whose results are named after them."""

    def __init__(self, names):
        super().__init__()
        self.parts = nn.ModuleDict({f"part{i}": One(CASES[name]) for i, name in enumerate(names)})
        self.names = names

    def forward(self, inputs):
        return {
            name: [t for t in pytree.tree_leaves(part(inputs[f"x{i}"])) if isinstance(t, torch.Tensor)]
            for i, (name, part) in enumerate(zip(self.names, self.parts.values(), strict=True))
        }


def expected(module, inputs):
    with torch.no_grad():
        return [t.numpy() for t in pytree.tree_leaves(module(inputs)) if isinstance(t, torch.Tensor)]


def wrong(want, got):
    """Words on how an array differs from PyTorch's; empty if it doesn't."""
    if want.shape != got.shape or want.dtype != got.dtype:
        return f"{got.dtype}{list(got.shape)} instead of {want.dtype}{list(want.shape)}"
    if want.dtype.kind != "f":
        return "" if np.array_equal(want, got) else "other values"
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)):
        return "other values are finite"
    largest = np.abs(want[finite]).max(initial=0.0)
    error = np.abs(want[finite].astype(np.float64) - got[finite]).max(initial=0.0)
    return "" if error <= 1e-5 * largest + 1e-12 else f"off by {error / largest:.1e} of the largest value"


@pytest.mark.parametrize("part", range(PARTS))
def test_operators_are_right_in_every_engine_at_two_batch_sizes(tmp_path, part):
    names = list(RIGHT)[part::PARTS]
    module = Together(names).eval()
    inputs = {f"x{i}": CASES[name].input for i, name in enumerate(names)}
    export = export_onnx(module, (inputs,), tmp_path / "operators.onnx")
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    with torch.no_grad():
        owners = [name for name, results in module(inputs).items() for _ in results]
    found = {}
    for engine in ENGINES:
        with load_runner(export.path, engine) as runner:
            for batch in (4, 1):
                few = {name: tensor[:batch] for name, tensor in inputs.items()}
                got = runner.run({name: array[:batch] for name, array in feeds.items()})
                pairs = zip(owners, expected(module, few), (got[n] for n in export.output_names), strict=True)
                found |= {(name, engine, batch): words for name, a, b in pairs if (words := wrong(a, b))}
    assert found == {}


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.refused])
def test_an_operator_without_a_file_is_refused_by_name_before_anything_is_written(tmp_path, name):
    case = CASES[name]
    with pytest.raises(CaptureError, match=case.refused) as raised:
        export_onnx(One(case), case.input, tmp_path / "operator.onnx")
    assert f"{Path(__file__).parents[1] / 'support' / 'operators.py'}:" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.differs])
def test_what_an_engine_lacks_is_recorded(tmp_path, name):
    case = CASES[name]
    export = export_onnx(One(case).eval(), case.input, tmp_path / "operator.onnx")
    for engine in ENGINES:
        if engine in case.differs:
            with pytest.raises(Exception, match=case.differs[engine]), load_runner(export.path, engine) as runner:
                runner.run({"x": case.input.numpy()})
            continue
        with load_runner(export.path, engine) as runner:
            got = runner.run({"x": case.input.numpy()})
        assert [
            wrong(a, got[n]) for a, n in zip(expected(One(case), case.input), export.output_names, strict=True)
        ] == [""]


def test_the_sweep_is_a_hundred_operators():
    assert len(CASES) >= 180
