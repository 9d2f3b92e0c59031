"""Split a batch that is larger than an engine's limit, and concatenate the results."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lightning_accel.errors import EngineError, InvalidArgumentError


def split_sizes(total: int, smallest: int, largest: int) -> list[int]:
    """Sizes of the fewest, nearly equal parts of a batch within the limits of an engine.

    Args:
        total: samples.
        smallest: fewest samples in a call.
        largest: most samples in a call.

    Raises:
        InvalidArgumentError: there is no such split.

    Example:
        >>> split_sizes(65, 1, 64)
        [33, 32]
    """
    parts = -(-total // largest)
    if total < smallest or total // parts < smallest:
        raise InvalidArgumentError(
            f"Argument `feeds` must hold a batch that splits into calls of {smallest} to {largest} samples, but got {total}."
        )
    size, rest = divmod(total, parts)
    return [size + 1] * rest + [size] * (parts - rest)


def run_split(
    run: Callable[[dict[str, np.ndarray]], list[np.ndarray]],
    feeds: Mapping[str, np.ndarray],
    sizes: Sequence[int],
    batched: Sequence[str],
) -> list[np.ndarray]:
    """Run a batch in parts.

    Args:
        run: one call of the engine.
        feeds: inputs by name.
        sizes: samples of each part.
        batched: inputs whose first dimension is the batch; the others are passed unchanged to each call.

    Returns:
        The outputs, concatenated along their first dimension.

    Raises:
        EngineError: the first dimension of an output isn't the batch.
    """
    results: list[list[np.ndarray]] = []
    start = 0
    for size in sizes:
        part = {n: a[start : start + size] if n in batched else a for n, a in feeds.items()}
        results.append(run(part))
        if any(array.ndim == 0 or len(array) != size for array in results[-1]):
            raise EngineError(
                f"A batch can be split only if each output has a row for each sample, but not here: {size}."
            )
        start += size
    return [np.concatenate(parts) for parts in zip(*results, strict=True)]
