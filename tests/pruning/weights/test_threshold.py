import pytest
import torch

from lightning_accel.pruning.weights import threshold
from lightning_accel.pruning.weights.threshold import keep_highest


def reference(parts, drop):
    """By sorting everything, stably."""
    joined = torch.cat(parts)
    keep = torch.ones(len(joined), dtype=torch.bool)
    keep[torch.sort(joined, stable=True).indices[:drop]] = False
    return keep.split([len(p) for p in parts])


def select(parts, drop):
    return keep_highest([lambda p=p: p for p in parts], [len(p) for p in parts], drop)


@pytest.mark.parametrize("sample", [1 << 18, 64])
@pytest.mark.parametrize("kind", ["normal", "ties", "sorted", "one part far below", "infinite"])
def test_exactly_what_sorting_gives(kind, sample, monkeypatch):
    monkeypatch.setattr(threshold, "_SAMPLE", sample)  # a sample of 64 makes the bracket miss, too
    parts = [torch.randn(1000), torch.randn(300), torch.randn(7)]
    if kind == "ties":
        parts = [p.round() for p in parts]
    if kind == "sorted":
        parts = list(torch.cat(parts).sort().values.split([1000, 300, 7]))
    if kind == "one part far below":
        parts[1] -= 100
    if kind == "infinite":
        parts[0][:400] = -torch.inf
        parts[2][0] = torch.inf
    for drop in (0, 1, 5, 299, 301, 654, 1306, 1307):
        for ours, want in zip(select(parts, drop), reference(parts, drop), strict=True):
            assert torch.equal(ours, want), drop


def test_not_a_number_has_no_place():
    with pytest.raises(ValueError, match=r"must give numbers, but got NaN. Has the training diverged"):
        select([torch.tensor([1.0, torch.nan, 2.0])], 1)
