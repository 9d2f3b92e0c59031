import pytest
import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)

from lightning_accel.core.strategies import Capability, offer_of, refusal, require


class OfRay(DDPStrategy):
    """As Ray Train's: a DDPStrategy of somebody else."""


class Unknown:
    """Not of Lightning."""


@pytest.mark.parametrize("strategy", [SingleDeviceStrategy(torch.device("cpu")), DDPStrategy(), OfRay()])
def test_ranks_of_ddp_hold_whole_tensors(strategy):
    assert offer_of(strategy).capabilities == set(Capability)
    assert not refusal(strategy, "X")


def made(kind):
    return object.__new__(kind)  # their constructors want GPUs or a package


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (made(FSDPStrategy), r"FSDPStrategy \(FSDP1\), which flattens parameters.* or ModelParallelStrategy \(FSDP2\)"),
        (made(DeepSpeedStrategy), r"DeepSpeedStrategy \(DeepSpeed\), whose engine .* makes the steps itself.*FSDP2"),
        (
            ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2),
            r"ModelParallelStrategy, which splits layers over 2 ranks \(tensor parallelism\)\. Set `tensor_parallel_size=1`",
        ),
        (made(Unknown), r"Unknown, which isn't known to this library\. Use a single device, DDP"),
    ],
)
@pytest.mark.parametrize("needed", list(Capability))
def test_others_are_refused_by_name_with_what_to_use(strategy, message, needed):
    assert not offer_of(strategy).capabilities
    text = refusal(strategy, "ChannelPruning", needed)
    assert text.startswith(f"Argument `strategy` must be one whose ranks {needed.value} with ChannelPruning, but got ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(text)


def test_ranks_of_fsdp2_hold_rows(trainer):
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    assert not refusal(strategy, "X", Capability.ROWS)
    assert "(FSDP2), whose ranks hold rows of each tensor. Use a single device or DDP." in refusal(strategy, "X")
    assert refusal(strategy, "X", instead="Do it before.").endswith("Do it before.")
    require(trainer(), "X")
