"""Targets are found by their usual names in dicts, dataclasses and namedtuples, and by their place in sequences."""

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch

from lightning_accel.calls.batches import target_from_batch

X, Y, MASK = torch.zeros(4, 3), torch.arange(4), torch.ones(4)
Named = namedtuple("Named", "image mask label")
Plain = namedtuple("Plain", "a b")


@dataclass
class Record:
    label: torch.Tensor
    image: torch.Tensor


@pytest.mark.parametrize(
    ("batch", "inputs", "found"),
    [
        ((X, Y), 1, Y),
        ((X, MASK, Y), 2, Y),
        ([X, MASK, Y], None, Y),
        ({"image": X, "labels": Y}, None, Y),
        ({"image": X, "class_label": Y}, None, Y),
        ({"a_label": Y, "b_label": Y}, None, None),  # which of them isn't known
        ({"image": X}, None, None),
        (Named(X, MASK, Y), 1, Y),  # a mask that `forward` doesn't get in evaluation isn't the target
        (Named(X, MASK, None), 1, None),
        (Plain(X, Y), 1, Y),
        (Record(Y, X), 1, Y),
        (X, None, None),
        ((X,), 1, None),
    ],
)
def test_the_target_of_a_batch(batch, inputs, found):
    assert target_from_batch(batch, inputs) is found
