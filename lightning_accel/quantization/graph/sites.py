"""Call sites: names for the calls of torch functions in a ``forward``, the same in every run and in a captured graph.

A call site is the path of the submodule whose ``forward`` runs, the function, and how often that function has been called there before.
While a graph is captured, each node is marked with the call site that made it; while the network trains, the same names tell which
calls to quantize. So the user's own ``forward`` runs in every step, and nothing that it reads can become outdated.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from threading import get_ident
from types import FunctionType
from typing import Any

from torch import nn
from torch.fx import Node
from torch.fx.traceback import annotate, preserve_node_meta
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from lightning_accel.core.patching import swapped

Names = dict[int, tuple[nn.Module, str]]
Site = tuple[str, str, int]  # path of the submodule, name of the function, calls of it there before
Calls = Counter[tuple[str, str]]  # path of a submodule and name of a function -> calls in one run of `forward`
_META = "call_site"


def _without_dispatch(function: Any) -> Callable[..., Any]:
    """A function of ``torch.nn.functional`` that doesn't hand itself to function modes, so that they see what it calls."""
    own = {**function.__globals__, "has_torch_function": lambda *_: False}
    copy = FunctionType(function.__code__, own, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_ENTERED = {f: _without_dispatch(f) for f in (functional.multi_head_attention_forward,)}


class SiteMode(TorchFunctionMode):
    """Base of the modes that see every call of a torch function inside of one module's ``forward``.

    Args:
        root: the module.
        names: submodules and their paths by identity, if they are known from another call.
    """

    def __init__(self, root: nn.Module, names: Names | None = None) -> None:
        super().__init__()
        self.root = root
        self._names: Names = {} if names is None else names
        self._thread = get_ident()
        self.path = ""
        self._outer: list[str] = []
        self.counts: Calls = Counter()

    @contextmanager
    def active(self) -> Iterator[None]:
        """See calls inside the block, with the present path and counts."""
        handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def entered(self, module: nn.Module, path: str) -> None:
        """Called when the ``forward`` of a submodule begins."""

    def left(self, module: nn.Module, result: Any) -> Any:
        """Called when the ``forward`` of a submodule has ended; what it returns replaces the result, unless it is ``None``."""
        return None

    def called(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in place of a torch function; calls it."""
        raise NotImplementedError

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inside = _ENTERED.get(func)
        if inside is not None:
            with self:
                return inside(*args, **(kwargs or {}))
        return self.called(func, getattr(func, "__qualname__", ""), args, kwargs or {})

    def _enter(self, module: nn.Module, args: Any) -> None:
        if get_ident() != self._thread:  # the hooks see all modules of the process
            return
        self._outer.append(self.path)
        # While a network with a shared submodule is captured, torch calls proxies, which have the attributes of the submodules.
        known = self._names.get(id(vars(module)))
        if known is None or vars(known[0]) is not vars(module):  # the first call, or a module that was put in since
            self._names.clear()
            self._names.update((id(vars(part)), (part, name)) for name, part in self.root.named_modules())
            known = self._names.get(id(vars(module)))
        if known is not None:  # a module outside of the tree belongs to the one that calls it
            self.path = known[1]
        self.entered(module, self.path)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> Any:
        if get_ident() != self._thread or not self._outer:
            return None
        replaced = self.left(module, result)
        self.path = self._outer.pop()
        return replaced


class _Marking(SiteMode):
    """Marks the nodes of a graph that is being captured with their call sites."""

    @override
    def called(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = self.path, name
        site = (*key, self.counts[key])
        self.counts[key] += 1
        with annotate({_META: site}):
            return func(*args, **kwargs)


class _Counting(SiteMode):
    """Counts the calls of each function in each submodule."""

    @override
    def called(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.counts[self.path, name] += 1
        return func(*args, **kwargs)


@contextmanager
def marked_sites(module: nn.Module) -> Iterator[list[Calls]]:
    """Mark the nodes of graphs that are captured from a module inside the block; yields the counts of calls of each run."""
    forward = module.forward
    counts: list[Calls] = []

    def marked(*args: Any, **kwargs: Any) -> Any:
        marking = _Marking(module)
        counts.append(marking.counts)
        with marking.active():
            return forward(*args, **kwargs)

    marked.__signature__ = signature(forward)  # type: ignore[attr-defined]  # torch.export binds the arguments to it
    with swapped(module, "forward", marked), preserve_node_meta():
        yield counts


def counted_calls(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Calls:
    """Calls of each function in each submodule when a module's own ``forward`` runs."""
    counting = _Counting(module)
    with counting.active():
        module.forward(*args, **kwargs)
    return counting.counts


def site_of(node: Node) -> Site | None:
    """The call site that made a node of a captured graph; ``None`` if it isn't known."""
    found = (node.meta.get("custom") or {}).get(_META)
    return None if found is None else (found[0], found[1], found[2])


# Positions of the first and the second operand of the operators that can be quantized, and the names of their keywords.
_ROLES: Mapping[str, tuple[tuple[int, str], tuple[int, str]]] = {
    **dict.fromkeys(
        (
            *(f"_VariableFunctionsClass.conv{n}d" for n in (1, 2, 3)),
            *(f"_VariableFunctionsClass.conv_transpose{n}d" for n in (1, 2, 3)),
            "linear",
        ),
        ((0, "input"), (1, "weight")),
    ),
    "embedding": ((1, "weight"), (0, "input")),  # the operator has them the other way round
    **dict.fromkeys(
        (f"{owner}.{name}" for owner in ("TensorBase", "_VariableFunctionsClass") for name in ("add", "matmul")),
        ((0, "input"), (1, "other")),
    ),
    "TensorBase.add_": ((0, "input"), (1, "other")),
    "Tensor.__rmatmul__": ((1, "other"), (0, "self")),
    "TensorBase.bmm": ((0, "input"), (1, "mat2")),
    "_VariableFunctionsClass.bmm": ((0, "input"), (1, "mat2")),
    **dict.fromkeys(("avg_pool2d", "adaptive_avg_pool2d"), ((0, "input"), (0, "input"))),
}

_WHOLE = ("scaled_dot_product_attention",)  # functions that are replaced as a whole


def operand_of(site: Site, index: int) -> tuple[int, str] | None:
    """Position and keyword of an operator's operand among the arguments of the function at a call site; ``None``: not known."""
    roles = _ROLES.get(site[1])
    return None if roles is None else roles[index]


def quantizable(calls: Calls) -> Calls:
    """Those calls that can be quantized."""
    return Counter({key: count for key, count in calls.items() if key[1] in _ROLES or key[1] in _WHOLE})
