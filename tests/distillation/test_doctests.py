"""The examples in the docstrings of this room say the truth."""

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_accel as la

MODULES = sorted(path.stem for path in (Path(la.__file__).parent / "distillation").glob("*.py") if path.stem[0] != "_")


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    module = import_module(f"lightning_accel.distillation.{name}")
    result = doctest.testmod(module, extraglobs={"torch": torch, "nn": nn, "la": la}, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
