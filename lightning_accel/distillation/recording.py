"""Record the arguments and results of a method while other code runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_accel.errors import InvalidArgumentError

Observer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_ABSENT = object()


def resolve(root: nn.Module, path: str | None) -> tuple[Any, str]:
    """Object and method name that a dotted path stands for; a module stands for its ``forward``, ``None`` for the root.

    Raises:
        InvalidArgumentError: the path leads nowhere, or to something that can't be called.
    """
    owner: Any = root
    if path is None:
        return root, "forward"
    *parents, last = path.split(".")
    for name in parents:
        owner = getattr(owner, name, None)
    target = getattr(owner, last, None)
    if isinstance(target, nn.Module):
        return target, "forward"
    if not callable(target):
        children = ", ".join(name for name, _ in root.named_children()) or "none"
        raise InvalidArgumentError(
            f"Argument `outputs` must be the dotted path of a submodule or method of the student, but got {path!r}. "
            f"Its submodules: {children}."
        )
    return owner, last


@contextmanager
def observed(owner: Any, method: str, observer: Observer) -> Iterator[None]:
    """Route calls of ``owner.method`` through an observer, which makes the call itself; afterwards all is as before.

    The method is replaced on the instance, so ``self(x)`` and ``self.forward(x)`` both pass; what may already lie there
    (a captured graph, say) is what gets called, and is put back.
    """
    attributes = vars(owner)
    placed = attributes.get(method, _ABSENT)
    function = getattr(owner, method)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return observer(function, args, kwargs)

    attributes[method] = call
    try:
        yield
    finally:
        if placed is _ABSENT:
            attributes.pop(method, None)
        else:
            attributes[method] = placed


@contextmanager
def called_submodules(root: nn.Module) -> Iterator[list[str]]:
    """Collect the names of submodules called from outside of each other, in order of their first call."""
    names = {id(module): name for name, module in root.named_modules() if name}
    called: list[str] = []

    def note(module: nn.Module, _: Any) -> None:
        name = names.get(id(module))
        if name is not None and not any(name == other or name.startswith(f"{other}.") for other in called):
            called.append(name)

    handle = register_module_forward_pre_hook(note)
    try:
        yield called
    finally:
        handle.remove()
