"""Compare the outputs of two implementations of a network on real batches, at several batch sizes.

Only numpy is needed, so an engine can be compared with its file on the machine it runs on.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lightning_accel.core.arguments import checked
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.verification.limits import judge
from lightning_accel.verification.outputs import OutputErrors
from lightning_accel.verification.result import Verification
from lightning_accel.verification.tolerances import FLOAT, Tolerance

Feeds = Mapping[str, np.ndarray]
Network = Callable[[Feeds], Mapping[str, np.ndarray]]
Memory = dict[bytes, Mapping[str, np.ndarray]]  # digest of inputs -> outputs

_SHARES = (0.5, 0.9, 0.99, 0.999, 1.0)
_REMEMBERED = 2**28  # bytes of outputs that are kept


@dataclass
class Remembered:
    """A network that runs once on the same inputs, so that comparing it with several others costs one run.

    Args:
        network: outputs depend on its inputs alone.
        memory: outputs by the digest of their inputs, of a network that computes the same; at most 256 MB are kept.
    """

    network: Network
    memory: Memory = field(default_factory=dict)

    def __call__(self, feeds: Feeds) -> Mapping[str, np.ndarray]:
        """Outputs by name; not to be changed."""
        key = _digest(feeds)
        if key not in self.memory:
            outputs = self.network(feeds)
            held = sum(
                np.asarray(array).nbytes for known in (*self.memory.values(), outputs) for array in known.values()
            )
            if held > _REMEMBERED:
                return outputs
            self.memory[key] = outputs
        return self.memory[key]


def _digest(feeds: Feeds) -> bytes:
    made = hashlib.blake2b(digest_size=16)
    for name, array in feeds.items():
        made.update(f"{name} {array.dtype} {array.shape} ".encode())
        made.update(array.tobytes())
    return made.digest()


@checked()
def verify(
    reference: Network,
    network: Network,
    samples: Feeds,
    *,
    engine: str = "engine",
    batch_sizes: Sequence[int] = (1, 8, 64),
    tolerance: Tolerance = FLOAT,
    few: int = 64,
    check_agreement: bool = True,
    axes: Mapping[str, Mapping[int, str]] | None = None,
) -> Verification:
    """Compare two implementations of a network on the same samples, at several batch sizes and lengths.

    Args:
        reference: named arrays in, named arrays out; the correct one.
        network: the implementation to check, with the same interface, e.g. ``runner.run``.
        samples: inputs, each ``(S, ...)`` with the samples along the first dimension.
        engine: name for the result.
        batch_sizes: the largest is run over all samples, the others over ``few``.
        tolerance: limits.
        few: samples for the smaller batch sizes and for the shorter lengths.
        check_agreement: apply the limits for predictions and thresholds; the largest logits of an untrained network are ties, and outputs
            that aren't logits have none.
        axes: dynamic axes beyond the batch, ``{input: {axis: symbol}}``: samples are also cut to half of each length.

    Returns:
        The measurements; ``failures`` lists exceeded limits, for which nothing is raised.

    Raises:
        InvalidArgumentError: samples of different numbers, or none; networks with different outputs.

    Example:
        >>> twice = lambda feeds: {"y": feeds["x"] * 2}
        >>> verify(twice, twice, {"x": np.ones((4, 3), np.float32)}, batch_sizes=(1, 4)).max_error
        0.0
    """
    sizes = {name: len(array) for name, array in samples.items()}
    if not sizes or len(set(sizes.values())) != 1 or min(sizes.values()) == 0:
        raise InvalidArgumentError(
            f"Argument `samples` must hold the same number of samples (at least 1) of each input, but got {sizes}."
        )
    total = next(iter(sizes.values()))
    ordered = sorted({min(size, total) for size in batch_sizes})
    used = {size: total if size == ordered[-1] else min(few, total) for size in ordered}
    seen = _Comparison(total)
    for size, count in used.items():
        for start, feeds in _batches(samples, size, count):
            seen.add(reference(feeds), network(feeds), start, f"at batch size {len(next(iter(feeds.values())))}")
    lengths: dict[str, list[int]] = {}
    for symbol, length, short in _shorter(samples, axes or {}):
        lengths.setdefault(symbol, [length]).append(-(-length // 2))
        for start, feeds in _batches(short, ordered[-1], min(few, total)):
            seen.add(reference(feeds), network(feeds), start, f"at `{symbol}` {-(-length // 2)}")
    result = seen.result(engine, total, used, tolerance)
    result.lengths, result.judge_predictions = lengths, check_agreement
    return judge(result)


def _batches(samples: Feeds, size: int, count: int) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    for start in range(0, count, size):
        yield start, {name: array[start : min(start + size, count)] for name, array in samples.items()}


def _shorter(samples: Feeds, axes: Mapping[str, Mapping[int, str]]) -> Iterator[tuple[str, int, dict[str, np.ndarray]]]:
    """Samples with one dynamic axis cut to its first half, one symbol after the other."""
    for symbol in dict.fromkeys(s for of_input in axes.values() for s in of_input.values()):
        lengths = {samples[n].shape[a] for n, of_input in axes.items() for a, s in of_input.items() if s == symbol}
        if len(lengths) != 1:
            raise InvalidArgumentError(
                f"Argument `samples` must have one length along `{symbol}`, but got {sorted(lengths)}."
            )
        length = lengths.pop()
        if length < 2:
            continue
        short = dict(samples)
        for name, of_input in axes.items():
            for axis, owner in of_input.items():
                if owner == symbol:
                    short[name] = short[name].take(range(-(-length // 2)), axis)
        yield symbol, length, short


class _Comparison:
    """Collects the differences between two networks' outputs, batch by batch."""

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.outputs: dict[str, OutputErrors] = {}
        self.broken: list[str] = []

    def add(self, want: Mapping[str, Any], got: Mapping[str, Any], start: int, where: str) -> None:
        if want.keys() != got.keys():
            raise InvalidArgumentError(
                f"Both networks must have the same outputs, but got {sorted(want)} and {sorted(got)}."
            )
        for name in want:
            a, b = np.asarray(want[name]), np.asarray(got[name])
            if a.shape != b.shape:
                self.broken.append(f"output `{name}` has shape {b.shape} instead of {a.shape} {where}")
                continue
            self.outputs.setdefault(name, OutputErrors(name, self.samples)).add(a, b, start)

    def result(self, engine: str, samples: int, batch_sizes: dict[int, int], tolerance: Tolerance) -> Verification:
        floats = {name: output for name, output in self.outputs.items() if output.errors}
        shares = [np.concatenate(output.errors) / output.span for output in floats.values()]
        errors = np.concatenate(shares) if shares else np.zeros(1) if self.outputs else np.array([np.inf])
        p99 = float(np.quantile(errors, 0.99, method="higher"))
        predictions = {
            name: found
            for name, output in floats.items()
            if (found := output.predictions(min(p99, tolerance.p99))) is not None
        }
        known = [p.agreement_decided for p in predictions.values() if p.agreement_decided is not None]
        summaries = {name: output.summary() for name, output in self.outputs.items()}
        return Verification(
            engine=engine,
            samples=samples,
            batch_sizes=batch_sizes,
            median_error=float(np.quantile(errors, 0.5, method="lower")),
            p99_error=p99,
            max_error=float(errors.max()),
            agreement=min((p.agreement for p in predictions.values()), default=None),
            tolerance=tolerance,
            distribution={f"{share:.1%}": float(np.quantile(errors, share, method="higher")) for share in _SHARES},
            cosine=min((c for output in floats.values() for c in output.cosines), default=None),
            decided=min((p.decided for p in predictions.values()), default=None),
            agreement_decided=min(known, default=None),
            equal=min((line["equal"] for line in summaries.values() if "equal" in line), default=None),
            same_side=min((line["same_side"] for line in summaries.values() if "same_side" in line), default=None),
            outputs=summaries,
            broken=list(self.broken),
            channels={
                f"{name}, axis {axis}": axis_errors.result(name, output.span)
                for name, output in floats.items()
                for axis, axis_errors in output.axes.items()
            },
            memberships={key: sets for output in self.outputs.values() for key, sets in output.memberships().items()},
            predictions=predictions,
        )
