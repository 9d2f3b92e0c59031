"""Whatever is passed to the public surface, only errors of this library come out, and they name the argument."""

import inspect
import math
import os
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

import lightning_accel as la
from lightning_accel.core.arguments import fits
from lightning_accel.errors import LightningAccelError
from tests.support.models import Classifier

hypothesis = pytest.importorskip("hypothesis", reason="the extra dev installs it")
from hypothesis import strategies as st  # noqa: E402


class Nasty:
    """Equal to nothing, without a length, and with a repr that raises."""

    def __repr__(self):
        raise RuntimeError("no repr")

    def __eq__(self, other):
        return False

    __hash__ = None


ODD = [None, True, False, math.nan, math.inf, -math.inf, "", " ", "\0", "\ud800", "x" * 5000, "*", "[", "~", ".", b"x"]
ODD += [[], (), {}, [None], ["", ""], {"": None}, {1: 2}, {"a": math.nan}, object(), Nasty(), len, int, Path("."), 1j]
ODD += [np.zeros(2), np.float32("nan"), np.int64(3), torch.zeros(1), nn.Linear(1, 1), ["x" * 300], {"x": {0: "b"}}]
VALUES = st.one_of(
    st.sampled_from(ODD), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=3)
)

QUIET, NO_DATA = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), L.LightningDataModule()

# Constructors, and functions that are given values of a wrong type only: what is right would train or read files.
MADE: dict[str, tuple[Any, dict[str, Any]]] = {
    "WeightPruning": (la.WeightPruning, {"sparsity": 0.5}),
    "ChannelPruning": (la.ChannelPruning, {"pruning_ratio": 0.5}),
    "QuantizationAwareTraining": (la.QuantizationAwareTraining, {"target": "portable"}),
    "PostTrainingQuantization": (la.PostTrainingQuantization, {"target": "portable"}),
    "ModelExport": (la.ModelExport, {}),
    "ExactResume": (la.ExactResume, {}),
    "InitialWeights": (la.InitialWeights, {"ckpt_path": "x.ckpt"}),
    "Budgets": (la.Budgets, {}),
    "BenchmarkSettings": (la.BenchmarkSettings, {}),
    "Target": (
        la.quantization.Target,
        {"name": "t", "activations": "int8", "weight_max": 127, "engines": ("onnxruntime",), "why": "x"},
    ),
    "Scheduled": (la.Scheduled, {"first": 0.0, "last": 1.0}),
    "LossTerm": (la.LossTerm, {"loss": "kd"}),
    "TeacherCache": (la.TeacherCache, {"dirpath": "cache"}),
    "EMATeacher": (la.teachers.EMATeacher, {}),
    "TeacherEnsemble": (la.teachers.TeacherEnsemble, {"teachers": [nn.Linear(1, 1)]}),
}
CALLED: dict[str, tuple[Any, dict[str, Any]]] = {
    "quantize": (la.quantize, {"model": nn.Linear(1, 1), "data": [torch.zeros(1, 1)]}),
    "export_onnx": (la.export_onnx, {"module": nn.Linear(1, 1), "inputs": torch.zeros(1, 1), "path": "x.onnx"}),
    "export_bundle": (la.export_bundle, {"model": Classifier(), "data": []}),
    "compress": (
        la.compress,
        {"module": Classifier(), "data": ([], []), "budgets": la.Budgets(max_bytes=1), "trainer": {"max_epochs": 1}},
    ),
    "advise": (la.advise, {"module": Classifier(), "data": ([], []), "trainer": {"max_epochs": 1}}),
    "record_latency_table": (
        la.record_latency_table,
        {"trainer": QUIET, "model": Classifier(), "data": NO_DATA, "path": "x.json"},
    ),
    "check": (la.check, {"module": nn.Linear(1, 1), "inputs": torch.zeros(1, 1)}),
    "load_runner": (la.load_runner, {"path": "nothing"}),
    "verify_bundle": (la.verify_bundle, {"folder": "nothing"}),
    "benchmark": (la.benchmark, {"variants": {}}),
    "benchmark_bundle": (la.benchmark_bundle, {"folder": "nothing"}),
    "compare_bundles": (la.compare_bundles, {"a": "nothing", "b": "nothing"}),
    "load_from_checkpoint": (la.load_from_checkpoint, {"cls": Classifier, "ckpt_path": "nothing"}),
    "lower_precision": (la.onnx.lower_precision, {"path": "nothing", "out": "x.onnx", "precision": "fp16"}),
}
ARGUMENTS = [
    (name, parameter)
    for name, (function, _) in {**MADE, **CALLED}.items()
    for parameter, p in inspect.signature(function).parameters.items()
    if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and parameter not in ("self", "kwargs", "options")
]


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
def test_only_our_errors_come_out(name, argument, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, given = (MADE | CALLED)[name]
    constructor = function.__init__ if isinstance(function, type) else function
    hint = inspect.signature(constructor, eval_str=True).parameters[argument].annotation

    @hypothesis.given(VALUES)
    @hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)
    def call(value):
        if name in CALLED and fits(value, hint):
            return
        try:
            function(**{**given, argument: value})
        except LightningAccelError as error:
            text = str(error)
            assert text
            if name in CALLED:
                assert f"Argument `{argument}` must be" in text

    call()
    assert not os.listdir(tmp_path)  # and nothing was written


def test_what_no_argument_is_called_is_named():
    for function, given in MADE.values():
        with pytest.raises((LightningAccelError, TypeError), match="surprise"):
            function(**given, surprise=1)
