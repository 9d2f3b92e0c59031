import pytest
import torch
from torch import nn

from lightning_accel.distillation.teachers.memory import bytes_to_move, check_fits, check_teacher_fits


def test_a_teacher_that_does_not_fit_is_refused_with_how_to_shard_it():
    with pytest.raises(
        ValueError, match=r"each of 8 ranks, but got one of 140\.0 GB, and cuda:0 has 60\.0 GB free.*fully_shard"
    ):
        check_fits(140_000_000_000, 60_000_000_000, "cuda:0", 8)
    check_fits(10, 10, "cuda:0", 8)


def test_what_lies_on_the_device_needs_no_room():
    teacher = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # 8 + 4 weights, 4 statistics, and a count of 8 bytes
    assert bytes_to_move(teacher, torch.device("cuda", 0)) == 4 * 16 + 8
    assert bytes_to_move(teacher, torch.device("cpu")) == 0
    check_teacher_fits(teacher, torch.device("cpu"), 2)
