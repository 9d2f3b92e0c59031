"""Canary: the samples kept in a bundle must give the outputs that were proven, before and while it is served."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_accel.core.arrays import read_named
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.engines.manifest import read_manifest
from lightning_accel.errors import InvalidArgumentError, VerificationError
from lightning_accel.verification.bundle import SAMPLES, split_samples, verify_bundle
from lightning_accel.verification.layout import Layout


class Canary:
    """The kept samples of a bundle, and what its engine makes of them on this machine.

    Args:
        bundle: its folder.
        engine: to check; ``None``: the bundle's default.

    Raises:
        InvalidArgumentError: the bundle has no samples, or changed after it was written.
    """

    def __init__(self, bundle: Path, engine: str | None) -> None:
        self._bundle, self._manifest = bundle, read_manifest(bundle)
        self._engine = engine or self._manifest["default"]["engine"]
        if not (bundle / SAMPLES).is_file():
            raise InvalidArgumentError(
                f"Argument `bundle` must hold samples to check the engine with, but {bundle} holds none. Export with "
                "ModelExport(keep_samples=16), or serve unchecked with --no-canary."
            )
        feeds, _ = split_samples(read_named(bundle / SAMPLES, "bundle"), self._manifest)
        layout = Layout.of_bundle(self._manifest, feeds)
        self.feeds = {name: array for name, array in feeds.items() if name not in layout.constants}
        self._calls = layout.calls(self.feeds)
        self._first: list[dict[str, np.ndarray]] = []

    def prove(self, runner: Runner) -> None:
        """Verify the bundle as ``lightning-accel verify`` does, and keep the runner's outputs for :meth:`repeat`.

        Raises:
            VerificationError: the engine doesn't compute what was proven.
        """
        for proof in verify_bundle(self._bundle, engines=[self._engine]):
            if proof.status != "passed":
                raise VerificationError(f"The kept samples of {self._bundle} must be reproduced here, but: {proof}")
        self._first = [runner.run(call) for call in self._calls]

    def repeat(self, runner: Runner) -> None:
        """Run the samples again; the same engine on the same machine gives the same bits.

        Raises:
            VerificationError: an output has changed.
        """
        for call, first in zip(self._calls, self._first, strict=True):
            now = runner.run(call)
            for name, want in first.items():
                if not np.array_equal(now[name], want, equal_nan=want.dtype.kind == "f"):
                    raise VerificationError(
                        f"Output `{name}` of the kept samples must stay the same, but it has changed."
                    )


def proven_runner(bundle: Path, engine: str | None, threads: int | None) -> tuple[Runner, bool]:
    """Load an engine of a bundle, and reproduce the kept samples, if there are any.

    Returns:
        The runner, and whether there were samples.

    Raises:
        VerificationError: the engine doesn't compute what was proven.
    """
    runner, kept = load_runner(bundle, engine, threads=threads), (bundle / SAMPLES).is_file()
    if kept:
        Canary(bundle, engine).prove(runner)
    return runner, kept


def variant_rows(runner: Runner, feeds: Mapping[str, np.ndarray], sizes: tuple[int, ...]) -> dict[int, int]:
    """Rows whose bits depend on the size of the batch that they are computed in.

    Args:
        runner: of the network.
        feeds: inputs by name, each ``(N, ...)``.
        sizes: batch sizes to compare with a batch of one.

    Returns:
        For each size how many of the N rows differ from the row computed alone.
    """
    count = len(next(iter(feeds.values())))
    alone = [runner.run({name: array[i : i + 1] for name, array in feeds.items()}) for i in range(count)]
    found = {}
    for size in sizes:
        differing: set[int] = set()
        for start in range(0, count, size):
            rows = [min(start + i, count - 1) for i in range(size)]  # the last row fills the last batch
            got = runner.run({name: np.ascontiguousarray(array[rows]) for name, array in feeds.items()})
            for place, row in enumerate(rows):
                if any(not np.array_equal(got[name][place], alone[row][name][0], equal_nan=True) for name in got):
                    differing.add(row)
        found[size] = len(differing)
    return found
