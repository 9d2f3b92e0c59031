"""Record the arguments and results of a method while other code runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lightning_accel.core.patching import swapped
from lightning_accel.errors import InvalidArgumentError

Observer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def resolve(root: nn.Module, path: str | None) -> tuple[Any, str]:
    """Resolve a dotted path to an object and a method name; a module resolves to its ``forward``, ``None`` to the root's.

    Raises:
        InvalidArgumentError: the path doesn't exist, or isn't callable.
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
    """Context in which calls of ``owner.method`` go through an observer, which makes the actual call.

    The method is replaced on the instance, which covers ``self(x)`` and ``self.forward(x)``. An earlier replacement, such as
    quantization, is called by the observer and restored afterwards.
    """
    function = getattr(owner, method)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return observer(function, args, kwargs)

    with swapped(owner, method, call):
        yield


@contextmanager
def called_submodules(root: nn.Module) -> Iterator[list[str]]:
    """Collect the names of outermost called submodules, in order of their first call."""
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
