"""The page about a GPU machine: sections are processes of their own, and one that fails is a line; never run on a GPU here."""

import sys

import pytest
import torch

from experiments import gpu_check


def test_it_says_that_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    if torch.cuda.is_available():
        pytest.skip("tells what happens without a GPU")
    with pytest.raises(SystemExit, match="There must be an NVIDIA GPU that PyTorch can use, but there is none: GPU"):
        gpu_check.main()


def test_a_section_runs_apart_and_prints_its_ratios(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--quick", "--only", "step ratios"])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    out = capsys.readouterr().out
    assert ended.value.code == 0, out
    assert "step ratios: ok" in out
    assert "quantization-aware: " in out
    assert out.endswith("0 of 1 sections failed\n")


def test_a_section_that_fails_is_told(monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT_S", 0.01)
    status, lines, _ = gpu_check.apart("step ratios", "cpu", True)
    assert (status, lines) == ("failed", ["it took longer than 0.01 s"])
    monkeypatch.undo()
    status, lines, _ = gpu_check.apart("step ratios", "nowhere", True)
    assert status == "failed"
    assert lines
