"""Space for all rows is reserved at once: a full disk is an error and doesn't kill the process."""

import subprocess
import sys

import numpy as np

from lightning_accel.distillation.cache.rowfile import RowFile

# The limit on the size of files stands for a full disk; both are reported where space is reserved.
FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
import torch
from torch.utils.data import TensorDataset
from lightning_accel import TeacherCache
cache = TeacherCache(sys.argv[1], storage="float32")
data = TensorDataset(torch.zeros(40_000, 1))
try:
    cache.open(torch.nn.Linear(1, 10), None, data, {"": torch.zeros(2, 10)}, create=True)
except ValueError as error:
    print(error)
"""


def test_a_cache_that_does_not_fit_is_refused_before_training(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "c")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # 40,000 samples: 10 numbers of 4 bytes, a digest of 8, and two checksums of 4
    assert done.stdout.startswith(
        "Argument `dirpath` of TeacherCache must be a folder with 2.2 MB free that can be written to"
    )
    assert "File too large" in done.stdout


def test_space_is_there_before_the_first_row(tmp_path):
    file = RowFile(tmp_path / "rows", rows=1000, row_bytes=1020)
    assert (tmp_path / "rows").stat().st_blocks * 512 >= 1000 * 1024
    file.write(np.array([7]), np.full((1, 1020), 3, np.uint8))
    again = RowFile(tmp_path / "rows", rows=1000, row_bytes=1020)
    assert again.valid().nonzero()[0].tolist() == [7]
