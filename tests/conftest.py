import signal
from collections.abc import Callable

import lightning as L
import pytest
import torch

# A shell starts its background jobs with Ctrl-C ignored; the tests, and what they start, are to feel it.
signal.signal(signal.SIGINT, signal.default_int_handler)


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
