"""Code that computes otherwise for another batch size is refused, and its line is named."""

import inspect

import pytest
import torch
from torch import nn

from lightning_accel.errors import CaptureError
from lightning_accel.onnx.export import export_onnx
from lightning_accel.quantization import quantize


class Length(nn.Linear):
    def forward(self, x):
        return super().forward(x).reshape(len(x), -1)  # here


class Integer(nn.Linear):
    def forward(self, x):
        return super().forward(x).reshape(int(x.shape[0]), -1)  # here


class Samples(nn.Linear):
    def forward(self, x):
        return torch.stack([sample * 2 for sample in super().forward(x)])  # here


class Positions(nn.Linear):
    def forward(self, x):
        h = super().forward(x)
        return torch.stack([h[i] for i in range(h.shape[0])])  # here


class Token(nn.Module):
    def __init__(self, *sizes):
        super().__init__()
        self.token, self.head = nn.Parameter(torch.randn(1, sizes[0])), nn.Linear(*sizes)

    def forward(self, x):
        return self.head(x + self.token.expand(len(x), -1))  # here


class Compared(nn.Linear):
    def forward(self, x):
        h = super().forward(x)
        if h.shape[0] > 2:  # here
            return 2 * h
        return h


def line_of(module):
    lines, first = inspect.getsourcelines(module)
    return f"{__file__}:{first + next(i for i, line in enumerate(lines) if '# here' in line)}"


@pytest.mark.parametrize("module", [Length, Integer, Samples, Positions, Token])
def test_the_line_that_makes_the_batch_a_constant_is_named(module, tmp_path):
    expected = f"whose code makes the size a constant at {line_of(module)}. Take it as `x.shape"
    with pytest.raises(CaptureError, match="takes a batch of any size") as error:
        export_onnx(module(4, 2).eval(), torch.randn(5, 4), tmp_path / "n.onnx")
    assert expected in str(error.value)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CaptureError) as error:
        quantize(module(4, 2), [torch.randn(5, 4)])
    assert expected in str(error.value)


def test_the_line_that_takes_another_way_for_some_sizes_is_named(tmp_path):
    with pytest.raises(CaptureError) as error:
        export_onnx(Compared(4, 2).eval(), torch.randn(5, 4), tmp_path / "n.onnx")
    assert f"takes another way for some sizes at {line_of(Compared)}." in str(error.value)


def test_a_size_that_torch_keeps_is_no_finding(tmp_path):
    class Free(nn.Linear):
        def forward(self, x):
            return super().forward(x).reshape(x.shape[0], -1) + torch.zeros(x.size(0), 2)

    export_onnx(Free(4, 2).eval(), torch.randn(5, 4), tmp_path / "n.onnx")
