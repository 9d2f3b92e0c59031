"""Entry points: objects that other distributions add to a registry of this package."""

import warnings
from importlib.metadata import EntryPoint, entry_points
from typing import Any

_failed: set[tuple[str, str]] = set()  # group and name of the entry points that were reported


def entry_point_names(group: str) -> list[str]:
    """Names of the entry points of a group, without those that could not be loaded."""
    return [point.name for point in entry_points(group=group) if (group, point.name) not in _failed]


def load_entry_point(group: str, name: str, expected: type | None = None) -> Any | None:
    """Load an entry point.

    One that can't be loaded is reported once by a warning, so that a broken distribution doesn't disable this package.

    Args:
        group: e.g. ``"lightning_accel.engines"``.
        name: of the entry point.
        expected: type that the loaded object must have; ``None``: it must be callable.

    Returns:
        The object; ``None`` if there is no such entry point or it can't be loaded.
    """
    if name not in entry_point_names(group):
        return None
    point: EntryPoint = next(iter(entry_points(group=group, name=name)))
    try:
        found = point.load()
        if not (callable(found) if expected is None else isinstance(found, expected)):
            wanted = "a callable" if expected is None else f"a {expected.__name__}"
            raise TypeError(f"it must be {wanted}, but it is {found!r}")
    except Exception as error:  # a foreign module may raise anything
        _failed.add((group, name))
        warnings.warn(f"Entry point `{name}` of group `{group}` can't be loaded: {error}", stacklevel=3)
        return None
    return found
