"""Registries: objects by name, open to other distributions."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from lightning_accel.errors import InvalidArgumentError

T = TypeVar("T")


class Registry(Generic[T]):
    """Objects by name: those of this package, then those of other distributions, then those registered in this process.

    A distribution adds one by an entry point, which is loaded when it is first asked for. One that can't be loaded is reported once by
    a warning, so that a broken distribution doesn't disable this package.

    Args:
        what: one of the objects in words, e.g. ``"engine"``.
        group: of the entry points, e.g. ``"lightning_accel.engines"``.
        builtin: names of the objects of this package; their order is that of :meth:`names`.
        load: returns the object of this package with a name.
        expected: type of the objects; ``None``: they are callable.

    Example:
        >>> shapes = Registry("shape", "lightning_accel.shapes", ["square"], lambda name: 4)
        >>> shapes.register("triangle", 3)
        >>> list(shapes), shapes.find("square"), shapes.find("circle")
        (['square', 'triangle'], 4, None)
    """

    def __init__(
        self, what: str, group: str, builtin: Iterable[str], load: Callable[[str], T], expected: type | None = None
    ) -> None:
        self.what, self.group, self.expected = what, group, expected
        self._builtin, self._load = tuple(builtin), load
        self._registered: dict[str, T] = {}
        self._broken: set[str] = set()  # entry points that were reported

    def __iter__(self) -> Iterator[str]:
        """Names of all objects."""
        found = [point.name for point in entry_points(group=self.group) if point.name not in self._broken]
        return iter(dict.fromkeys([*self._builtin, *found, *self._registered]))

    @property
    def registered(self) -> Mapping[str, T]:
        """What was registered in this process, by name."""
        return MappingProxyType(self._registered)

    def register(self, name: str, value: T, argument: str = "name") -> None:
        """Add an object in this process. Adding an equal one again does nothing.

        Args:
            name: of the object.
            value: the object.
            argument: argument that the name belongs to, for the error message.

        Raises:
            InvalidArgumentError: another object has this name.
        """
        known = self.find(name)
        if known is not None and known != value:
            rule = "be one" if argument == "name" else "have a name"
            raise InvalidArgumentError(
                f"Argument `{argument}` must {rule} that no other {self.what} has, but got {name!r}."
            )
        if name not in self._builtin:
            self._registered[name] = value

    def unregister(self, name: str) -> None:
        """Remove an object that :meth:`register` added.

        Raises:
            InvalidArgumentError: there is none of that name.
        """
        if name not in self._registered:
            raise InvalidArgumentError(f"Argument `name` must be one of {sorted(self._registered)}, but got {name!r}.")
        del self._registered[name]

    def find(self, name: str) -> T | None:
        """The object with a name; ``None`` if there is none, or it can't be loaded."""
        if name in self._builtin:
            return self._load(name)
        if name in self._registered:
            return self._registered[name]
        found: T | None = self._from_distribution(name)
        return found

    def get(self, name: str, argument: str, hint: str = "") -> T:
        """The object with a name.

        Args:
            name: of the object.
            argument: argument that the name was passed as, for the error message; one that ends in ``s`` holds several.
            hint: sentence that ends the error message.

        Raises:
            InvalidArgumentError: no object has this name.
        """
        found = self.find(name)
        if found is None:
            rule = "hold some of" if argument.endswith("s") else "be one of"
            raise InvalidArgumentError(
                f"Argument `{argument}` must {rule} {sorted(self)}, but got {name!r}.{self.suggestion(name)}{hint}"
            )
        return found

    def suggestion(self, name: str) -> str:
        """Sentence with the name that was probably meant; empty if none is near."""
        near = get_close_matches(name, list(self), n=1) if isinstance(name, str) else []
        return f" Did you mean {near[0]!r}?" if near else ""

    def _from_distribution(self, name: str) -> Any:
        points = entry_points(group=self.group, name=name)
        if not points or name in self._broken:
            return None
        try:
            found = next(iter(points)).load()
            if not (callable(found) if self.expected is None else isinstance(found, self.expected)):
                wanted = "callable" if self.expected is None else f"of type {self.expected.__name__}"
                raise TypeError(f"it must be {wanted}, but it is {found!r}")
        except Exception as error:  # a foreign module may raise anything
            self._broken.add(name)
            warnings.warn(f"Entry point `{name}` of group `{self.group}` can't be loaded: {error}", stacklevel=4)
            return None
        return found
