"""The examples in docstrings run, and print what they say."""

import doctest
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import lightning_accel as la

ROOT = Path(la.__file__).parent
MODULES = sorted(
    ".".join(("lightning_accel", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
    for path in ROOT.rglob("*.py")
    if ">>>" in path.read_text()
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "nn": nn, "la": la, "np": np, "Path": Path}
    result = doctest.testmod(import_module(name), extraglobs=names, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
