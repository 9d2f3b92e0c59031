"""What is written quickly is what torch writes by itself, byte for byte."""

import sys
from contextlib import nullcontext

import onnxscript.rewriter
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _registration

import lightning_accel as la
from lightning_accel.onnx import export as exporting
from lightning_accel.onnx.translations.dynamic_linear import TRANSLATIONS
from lightning_accel.onnx.writing import written_quickly
from tests.support.zoo import ZOO, samples

RULES = onnxscript.rewriter._DEFAULT_REWRITE_RULES


class Rewritten(nn.Module):
    """Something for several rules: pads before convolutions, clips in a row, reshapes in a row, halves by slices."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(4, 8, 3), nn.Linear(8, 4)

    def forward(self, x):
        y = torch.relu(torch.clamp(self.conv(nn.functional.pad(x, (1, 1, 1, 1))), -1, 5))
        first, second = y[:, :4], y[:, 4:]
        y = torch.cat([second, first * 1 + 0], 1).flatten(2).unflatten(2, (4, 4)).transpose(1, 2).transpose(1, 2)
        return self.head(y.mean((2, 3)).reshape(-1, 8).reshape(-1, 8))


def network(name):
    torch.manual_seed(0)
    if name == "rewritten":
        return Rewritten().eval(), torch.randn(2, 4, 4, 4)
    return ZOO[name][0]().eval(), samples(name, 2)


@pytest.mark.parametrize(
    ("name", "target"), [("rewritten", None), ("rewritten", "openvino"), ("resnet", "openvino"), ("bert", None)]
)
def test_the_bytes_are_torchs_own(tmp_path, monkeypatch, name, target):
    module, inputs = network(name)
    if target is not None:
        module = la.quantize(module, [inputs], target=target)
    quick = exporting.export_onnx(module, inputs, tmp_path / "quick.onnx").path.read_bytes()
    monkeypatch.setattr(exporting, "written_quickly", nullcontext)
    assert exporting.export_onnx(module, inputs, tmp_path / "own.onnx").path.read_bytes() == quick


def test_a_rule_is_tried_only_where_its_pattern_ends_and_afterwards_everywhere():
    before = [rule.try_rewrite for rule in RULES]
    with written_quickly():
        narrowed = [rule for rule in RULES if "try_rewrite" in vars(rule)]
        assert len(narrowed) > 0.8 * len(RULES)  # this version of onnxscript looks as expected
        assert _registration.ONNXRegistry.from_torchlib() is not None
    assert [rule.try_rewrite for rule in RULES] == before
    assert not any("try_rewrite" in vars(rule) for rule in RULES)


def test_each_export_has_a_registry_of_its_own(monkeypatch):
    own = _registration.ONNXRegistry
    with written_quickly():
        first, second = (_registration.ONNXRegistry().from_torchlib(opset_version=18) for _ in range(2))
        other = _registration.ONNXRegistry().from_torchlib(opset_version=23)
    assert _registration.ONNXRegistry is own
    wanted = own.from_torchlib(opset_version=18)
    assert first.functions.keys() == wanted.functions.keys()
    (target, translation), *_ = TRANSLATIONS.items()
    before = len(second.functions.get(target.name(), []))
    first.register_op(target, translation)
    assert len(second.functions.get(target.name(), [])) == before
    assert (first.opset_version, other.opset_version) == (18, 23)
    monkeypatch.setitem(sys.modules, "torchvision", sys)  # now its operators might be known
    with written_quickly():
        again = _registration.ONNXRegistry().from_torchlib(opset_version=18)
    one = next(name for name, made in second.functions.items() if made[0] is not wanted.functions[name][0])
    assert again.functions[one][0] is not second.functions[one][0]
    with written_quickly():
        last = _registration.ONNXRegistry().from_torchlib(opset_version=18)
    assert last.functions[one][0] is again.functions[one][0]  # made once


def test_other_versions_are_left_alone(monkeypatch):
    class Rule:
        """A rule whose pattern is kept elsewhere."""

        def try_rewrite(self, model, graph, node):
            return None

    rule = Rule()
    monkeypatch.setattr(onnxscript.rewriter, "_DEFAULT_REWRITE_RULES", (rule,))
    with written_quickly():
        assert vars(rule) == {}
