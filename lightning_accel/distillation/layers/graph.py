"""Locate a layer's output in a captured graph, where submodules don't run and hooks don't fire."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node

from lightning_accel.core.patching import removed
from lightning_accel.errors import InvalidArgumentError


def captured_owner(root: nn.Module, path: str) -> str | None:
    """Path of the module around ``path`` whose ``forward`` is a captured graph; ``None`` if there is none."""
    parts = path.split(".")
    for i in range(len(parts)):
        owner = ".".join(parts[:i])
        if captured_forward(root.get_submodule(owner)) is not None:
            return owner
    return None


def captured_forward(module: nn.Module) -> Any:
    """Captured graphs in place of a module's ``forward``, also behind a wrapper; or None."""
    forward = vars(module).get("forward")
    while forward is not None and not hasattr(forward, "graph"):
        forward = getattr(forward, "__wrapped__", None)
    return forward


def layer_node(graph: GraphModule, path: str) -> Node:
    """Find the node that computes a submodule's output.

    torch.export records the submodules of each operator. A layer's output is the only value that is computed inside of it and read
    outside.

    Args:
        graph: captured graph.
        path: path of the submodule, relative to the captured module.

    Raises:
        InvalidArgumentError: the submodule computes nothing itself, is called more than once, or returns several tensors.
    """
    inside = {node: entry for node in graph.graph.nodes if (entry := _entry(node, path)) is not None}
    made = [_source(node) for node in inside if any(reader not in inside for reader in node.users)]
    outputs = list(dict.fromkeys(made))
    if len(outputs) == 1 and len(set(inside.values())) == 1:
        return outputs[0]
    calls = len(set(inside.values()))
    why = "computes nothing of its own" if not inside else f"is called {calls} times, or returns several tensors"
    raise InvalidArgumentError(
        f"Argument `student_layer` must name a layer that can be located in a graph captured for quantization, but "
        f"{path!r} {why} there. Name the layer before or around it."
    )


def _entry(node: Node, path: str) -> str | None:
    """Call of the submodule that a node belongs to."""
    if node.op not in ("call_function", "call_module"):
        return None
    for key, (name, _) in (node.meta.get("nn_module_stack") or {}).items():
        clean = name.removeprefix("L['self']").removeprefix(".")
        if clean.partition("@")[0] == path:
            result: str | None = key
            return result
    return None


def _source(node: Node) -> Node:
    """The value before fake-quantization, i.e. the layer's output."""
    while node.op == "call_module" and str(node.target).startswith("fake_quant") and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


class _Tap(nn.Module):
    """Identity that passes its input to registered listeners."""

    def __init__(self) -> None:
        super().__init__()
        self.listener: Callable[[Any], None] | None = None

    def forward(self, value: Any) -> None:
        if self.listener is not None:
            self.listener(value)


def _tap_of(graph: GraphModule, path: str) -> _Tap:
    """Tap at a layer's output, inserted at the first call."""
    name = "distillation_tap_of_" + path.replace(".", "_dot_")
    present = getattr(graph, name, None)
    if isinstance(present, _Tap):
        return present
    node = layer_node(graph, path)
    tap = _Tap()
    graph.add_module(name, tap)
    with graph.graph.inserting_after(node):
        graph.graph.call_module(name, (node,))
    graph.recompile()
    return tap


@contextmanager
def tapped(root: nn.Module, owner: str, path: str, keep: Callable[[str, Any], None]) -> Iterator[None]:
    """Context in which ``keep(path, output)`` is called when the graph of ``owner`` has computed a layer's output."""
    module = root.get_submodule(owner)
    graph = captured_forward(module).graph(module.training)
    tap = _tap_of(graph, path.removeprefix(owner).removeprefix("."))
    tap.listener = lambda value: keep(path, value)
    try:
        yield
    finally:
        tap.listener = None


@contextmanager
def without_graphs(root: nn.Module) -> Iterator[None]:
    """Context in which captured graphs in a network are replaced by the original ``forward`` methods."""
    with ExitStack() as stack:
        for module in root.modules():
            if captured_forward(module) is not None:
                stack.enter_context(removed(module, "forward"))
        yield


def remove_taps(root: nn.Module) -> None:
    """Remove all taps from captured graphs in a network."""
    for module in root.modules():
        for graph in getattr(captured_forward(module), "_graphs", {}).values():
            taps = [
                n for n in graph.graph.nodes if n.op == "call_module" and n.target.startswith("distillation_tap_of_")
            ]
            for node in taps:
                graph.graph.erase_node(node)
                delattr(graph, node.target)
            if taps:
                graph.recompile()
