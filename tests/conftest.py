import signal
from collections.abc import Callable

import lightning as L
import pytest
import torch

# A shell starts its background jobs with Ctrl-C ignored; the tests, and what they start, are to feel it.
signal.signal(signal.SIGINT, signal.default_int_handler)


# With a file to each process these would start last, as they have few tests, and the other processes would wait for them.
_LONGEST = (
    "tests/test_docs.py",
    "tests/test_experiments.py",
    "tests/integration/test_ordinary_networks.py",
    "tests/integration/test_engines_and_precisions.py",
    "tests/integration/test_export.py",
    "tests/planning/compression/test_compress.py",
    "tests/onnx/test_operators.py",
    "tests/integration/test_batch_axes.py",
    "tests/integration/test_several_optimizers.py",
    "tests/integration/test_fsdp.py",
)


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest; `--no-loadscope-reorder` keeps this order."""
    order = {name: index for index, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0], len(order)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def trainer(tmp_path) -> Callable[..., L.Trainer]:
    """Make a quiet Trainer that writes into the test's folder."""

    def make(*callbacks: L.Callback, **kwargs) -> L.Trainer:
        settings = {
            "accelerator": "cpu",
            "max_epochs": 2,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
        }
        return L.Trainer(callbacks=list(callbacks), **{**settings, **kwargs})

    return make
