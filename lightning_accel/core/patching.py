"""Patch attributes of objects that this library doesn't own, and undo every patch.

No other module assigns attributes of such objects. A patch lies in the instance's ``__dict__``, where it hides the method of the class;
undoing it restores the previous value.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from torch import nn

_ABSENT = object()
Undo = Callable[[], object]


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute on an instance inside the ``with`` block.

    Args:
        owner: the object.
        name: of the attribute.
        value: what it is inside the block.

    Example:
        >>> module = nn.Linear(2, 2)
        >>> with swapped(module, "forward", lambda x: x):
        ...     module(torch.ones(1))
        tensor([1.])
    """
    undo = _swap(owner, name, value)
    try:
        yield
    finally:
        undo()


@contextmanager
def removed(owner: Any, name: str) -> Iterator[Any]:
    """Remove an attribute of an instance inside the ``with`` block, so that the class's applies; yields its value, or ``None``."""
    before = vars(owner).pop(name, _ABSENT)
    try:
        yield None if before is _ABSENT else before
    finally:
        _put(owner, name, before)


@contextmanager
def swapped_child(owner: nn.Module, name: str, child: nn.Module) -> Iterator[None]:
    """Set a submodule inside the ``with`` block; the order of the submodules stays."""
    before = owner._modules[name]
    owner._modules[name] = child
    try:
        yield
    finally:
        owner._modules[name] = before


def place(owner: Any, name: str, value: Any) -> None:
    """Set an attribute on an instance permanently: a ``forward`` that a recorded structural change replaces."""
    vars(owner)[name] = value


def take_off(owner: Any, name: str) -> None:
    """Undo :func:`place`; the attribute of the class applies again."""
    vars(owner).pop(name, None)


def _swap(owner: Any, name: str, value: Any) -> Undo:
    before = vars(owner).get(name, _ABSENT)
    vars(owner)[name] = value
    return lambda: _put(owner, name, before)


def _put(owner: Any, name: str, value: Any) -> None:
    if value is _ABSENT:
        vars(owner).pop(name, None)
    else:
        vars(owner)[name] = value


class Patches:
    """Patches that are undone together, last first.

    Example:
        >>> module, patches = nn.Linear(2, 2), Patches()
        >>> take_off = patches.swap(module, "forward", lambda x: x)
        >>> patches.undo()
        >>> "forward" in vars(module)
        False
    """

    def __init__(self) -> None:
        self._undo: list[Undo] = []

    def swap(self, owner: Any, name: str, value: Any) -> Undo:
        """Set an attribute on an instance until :meth:`undo`, or until the returned function is called."""
        return self.on_undo(_swap(owner, name, value))

    def on_undo(self, undo: Undo) -> Undo:
        """Register a function that is called once: by :meth:`undo`, or by the returned function."""

        def once() -> None:
            if once in self._undo:
                self._undo.remove(once)
                undo()

        self._undo.append(once)
        return once

    def undo(self) -> None:
        """Undo all patches."""
        while self._undo:
            self._undo[-1]()


_RUNS: "weakref.WeakKeyDictionary[L.Trainer, Patches]" = weakref.WeakKeyDictionary()


def current_run(trainer: L.Trainer) -> object | None:
    """What stands for the trainer's current run: another object in each; ``None`` before it has patches and after its teardown."""
    return _RUNS.get(trainer)


def patches_of_run(trainer: L.Trainer) -> Patches:
    """Patches of the trainer's current run, undone when it ends: normally, or by an exception in any hook.

    Lightning calls no ``teardown`` hook of callbacks or modules after an exception, but always tears the strategy down.
    """
    if trainer not in _RUNS:
        patches = _RUNS[trainer] = Patches()
        teardown = trainer.strategy.teardown

        def undo_and_teardown() -> None:
            _RUNS.pop(trainer, None)
            patches.undo()
            teardown()

        patches.swap(trainer.strategy, "teardown", undo_and_teardown)
    return _RUNS[trainer]
