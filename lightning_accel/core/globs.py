"""``include`` / ``exclude``: name globs, the same everywhere."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from lightning_accel.errors import InvalidArgumentError


def as_patterns(argument: str, value: str | Sequence[str] | None) -> tuple[str, ...]:
    """One glob, several or none, as a tuple.

    Raises:
        InvalidArgumentError: an entry is not a string.
    """
    patterns = (value,) if isinstance(value, str) else tuple(value or ())
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise InvalidArgumentError(
                f"Argument `{argument}` must be a name glob or a list of them, but got {pattern!r}."
            )
    return patterns


def select(names: Iterable[str], include: Sequence[str], exclude: Sequence[str], what: str = "parameter") -> list[str]:
    """Names that match a glob of ``include`` (all, if it is empty) and none of ``exclude``, in their order.

    Args:
        names: candidates, e.g. ``["body.0.weight", "head.weight"]``.
        include: globs as in :mod:`fnmatch`; ``*`` also matches dots.
        exclude: globs; wins over ``include``.
        what: what a name stands for, for the error message.

    Raises:
        InvalidArgumentError: a glob matches nothing.
    """
    names = list(names)
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
                raise InvalidArgumentError(
                    f"Argument `{argument}` must match the name of a {what}, but got {pattern!r}, which matches none "
                    f"of: {near or 'nothing to choose from'}."
                )
    return [
        name
        for name in names
        if (not include or any(fnmatchcase(name, p) for p in include))
        and not any(fnmatchcase(name, p) for p in exclude)
    ]
