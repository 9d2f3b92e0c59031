"""Verify a bundle on this machine, without torch.

The file in the bundle was proven equal to the network when it was written. The outputs of its engines on this GPU or CPU and with
these versions are compared with that file, run without optimizations.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.core.arguments import NOT_EMPTY, Rule, checked
from lightning_accel.core.arrays import read_named
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.manifest import check_files, read_manifest
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.verification import tolerances
from lightning_accel.verification.compare import verify
from lightning_accel.verification.engine import prove_engine
from lightning_accel.verification.layout import Layout
from lightning_accel.verification.null_divergence import NullDivergence
from lightning_accel.verification.result import Verification

SAMPLES, REFERENCE = "samples.npz", "reference.onnx"
_FLOAT = ("fp32", "fp16", "bf16")


_SIZES = Rule("sizes of at least 1", lambda sizes: len(sizes) > 0 and min(sizes) >= 1)


@dataclass(frozen=True)
class EngineProof:
    """Result for one engine of a bundle, or for the file itself.

    Args:
        engine: name of the engine, or what was compared.
        file: the file that was run.
        check: the comparison; ``None`` if the engine can't run on this machine.
        reason: why it can't.
    """

    engine: str
    file: str
    check: Verification | None
    reason: str = ""

    @property
    def status(self) -> str:
        """``"passed"``, ``"failed"`` or ``"not run here"``."""
        return "not run here" if self.check is None else "passed" if self.check.passed else "failed"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        numbers = None if self.check is None else self.check.to_dict()
        return {
            "engine": self.engine,
            "file": self.file,
            "status": self.status,
            "reason": self.reason,
            "check": numbers,
        }

    def __str__(self) -> str:
        if self.check is None:
            return f"{self.engine} ({self.file}): not run here: {self.reason}"
        c = self.check
        sizes = ", ".join(map(str, c.batch_sizes))
        agreement = "" if c.agreement is None else f", agreement {c.agreement:.2%}"
        numbers = f"median {c.median_error:.1e}, 99 % {c.p99_error:.1e}, largest {c.max_error:.1e} of the output range{agreement}"
        says = f"{self.engine} ({self.file}): {self.status}: {c.samples} samples, batches of {sizes}: {numbers}"
        return f"{says}; {'; '.join(c.failures)}" if c.failures else says


@checked(engines=NOT_EMPTY, batch_sizes=_SIZES)
def verify_bundle(
    folder: str | Path,
    samples: Mapping[str, np.ndarray] | None = None,
    *,
    engines: Sequence[str] | None = None,
    batch_sizes: Sequence[int] = (1, 7, 32),
) -> list[EngineProof]:
    """Check every file of a bundle, and the outputs of its engines on this machine.

    Args:
        folder: the bundle.
        samples: inputs by name, each ``(S, ...)`` with the samples in front, whichever axis they are in a call (of a fixed batch, a
            sample is a call), and inputs without a batch as they are; with the trained network's outputs by name, the file is compared
            with them too. ``None`` takes the samples in the bundle, if it was written with any.
        engines: engines to run; ``None`` means all in the bundle.
        batch_sizes: as in :func:`~lightning_accel.verification.compare.verify`.

    Returns:
        One entry for the file, if there are outputs to compare it with, and one for each engine.

    Raises:
        MissingFileError: there is no bundle, or one of its files is missing.
        InvalidArgumentError: the bundle changed after it was written, or samples or engines that don't fit it.

    Example:
        >>> for line in verify_bundle("artifacts", {"x": images}):  # doctest: +SKIP
        ...     print(line)
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    shipped = list(manifest["engines"])
    if unknown := [engine for engine in engines or () if engine not in shipped]:
        raise InvalidArgumentError(f"Argument `engines` must be among the bundle's {shipped}, but got {unknown}.")
    feeds, wanted = split_samples(_samples_of(folder, samples), manifest)
    layout = Layout.of_bundle(manifest, feeds)
    feeds = {name: array for name, array in feeds.items() if name not in layout.constants}
    predicts = manifest.get("output_kind") != "values"
    axes = {name: {int(a): s for a, s in of.items()} for name, of in manifest.get("axes", {}).items()}
    proofs: list[EngineProof] = []
    with ExitStack() as stack:
        files = {proven_file(manifest, line["precision"]) for _, line, _ in _lines(manifest, engines)}
        files.add(proven_file(manifest, manifest["precision"]))
        right = {f: stack.enter_context(load_runner(folder / f, "onnxruntime", emulate=True)) for f in files}
        _check_numbers(feeds, layout, folder / proven_file(manifest, "fp32"))
        if wanted:
            file = proven_file(manifest, manifest["precision"])
            limits = tolerances.FILES["int8" if manifest["precision"] == "int8" else "fp32"]
            known = _Known(feeds, wanted)
            check = verify(
                known,
                layout.adapt(right[file].run),
                feeds,
                engine="file (as written)",
                tolerance=limits,
                batch_sizes=(known.count,),
                check_agreement=predicts,
            )
            if not check.passed:
                check = check.against(NullDivergence(folder / file, feeds, layout=layout).noise(limits))
            proofs.append(EngineProof("file as written, against what was trained", file, check))
        for engine, line, is_default in _lines(manifest, engines):
            try:
                runner = stack.enter_context(load_runner(folder, None if is_default else engine))
            except (RuntimeError, ModuleNotFoundError) as error:  # no GPU, another version, a package that isn't here
                proofs.append(EngineProof(engine, line["file"], None, str(error)))
                continue
            proven = proven_file(manifest, line["precision"])
            check, _ = prove_engine(
                right[proven].run,
                runner,
                feeds,
                file=folder / proven,
                precision=line["precision"],
                null=NullDivergence(folder / proven, feeds, layout=layout),
                tolerance=tolerances.ENGINES[line["precision"]],
                batch_sizes=batch_sizes,
                axes=axes,
                check_agreement=predicts,
                layout=layout,
            )
            proofs.append(EngineProof(engine, line["file"], check))
    return proofs


def _lines(manifest: Mapping[str, Any], engines: Sequence[str] | None) -> Iterator[tuple[str, Mapping[str, Any], bool]]:
    """Engine, file and precision of each engine; and of the default, where a decision made it another file than the engine's."""
    for engine in engines or manifest["engines"]:
        yield engine, manifest["engines"][engine], False
    default = manifest.get("default", {})
    own = manifest["engines"].get(default.get("engine"), {})
    if "precision" in default and default["file"] != own.get("file") and engines is None:
        yield default["engine"], default, True


def proven_file(manifest: Mapping[str, Any], precision: str) -> str:
    """The verified file that an engine in this precision is built from.

    Engines in other precisions than int8 are built from the float reference, if there is one.
    """
    return REFERENCE if precision in _FLOAT and REFERENCE in manifest["files"] else str(manifest["model"])


def _check_numbers(feeds: Mapping[str, np.ndarray], layout: Layout, file: Path) -> None:
    """Raise if inputs hold NaN that reach the outputs, which nothing could be compared with.

    Args:
        feeds: inputs by name, each ``(S, ...)``.
        layout: how they become the inputs of a call.
        file: the network in float32, since int8 turns NaN into ordinary numbers.

    Raises:
        InvalidArgumentError: they do.
    """
    bad = [name for name, array in feeds.items() if array.dtype.kind in "fc" and np.isnan(array).any()]
    if not bad:
        return
    with load_runner(file, "onnxruntime", emulate=True) as runner:
        outputs = layout.adapt(runner.run)(feeds)
    if any(array.dtype.kind in "fc" and np.isnan(array).any() for array in outputs.values()):
        raise InvalidArgumentError(
            f"Argument `samples` must hold numbers, but got NaN in {bad}, which the network hands on to its outputs. Clean the samples."
        )


class _Known:
    """A network whose outputs are known for exactly these samples."""

    def __init__(self, feeds: Mapping[str, np.ndarray], outputs: dict[str, np.ndarray]) -> None:
        self.count, self.outputs = len(next(iter(feeds.values()))), outputs

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self.outputs


def _samples_of(folder: Path, samples: Mapping[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    if samples is not None:
        return dict(samples)
    if not (folder / SAMPLES).is_file():
        raise InvalidArgumentError(
            f"Argument `samples` must be given for {folder}, which holds none. Pass `--data FILE.npz` with an array for each input, or "
            "export with ModelExport(keep_samples=16)."
        )
    return read_named(folder / SAMPLES, "samples")


def split_samples(
    samples: Mapping[str, np.ndarray], manifest: Mapping[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs, and outputs if they are all there.

    Raises:
        InvalidArgumentError: an input is missing, or an array is neither an input nor an output.
    """
    inputs, outputs = manifest["inputs"], manifest["outputs"]
    missing, unknown = set(inputs) - samples.keys(), samples.keys() - {*inputs, *outputs}
    given = [name for name in outputs if name in samples]
    if missing or unknown or (given and len(given) != len(outputs)):
        raise InvalidArgumentError(
            f"Argument `samples` must hold the inputs {inputs}, and the outputs {outputs} or none of them, but got {sorted(samples)}."
        )
    return {name: samples[name] for name in inputs}, {name: samples[name] for name in given}
