"""Operators that no file can hold, by name, with the user's line and a way out."""

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node

from lightning_accel.calls.user_code import node_line
from lightning_accel.errors import CaptureError
from lightning_accel.onnx.translations.rule import argument
from lightning_accel.onnx.used_inputs import needed_nodes

_SWITCHES = ("train", "training")  # off in evaluation
_SHARES = ("dropout_p", "dropout", "p")  # 0 where nothing is dropped


def check_deterministic(program: ExportedProgram, module: nn.Module) -> None:
    """Check that the outputs depend on no random numbers.

    Args:
        program: the module's ``forward`` in evaluation.
        module: for the message.

    Raises:
        CaptureError: they do; the message names the first such operator and the user's line.
    """
    needed = needed_nodes(program)
    for node in program.graph.nodes:
        if node in needed and node.op == "call_function" and _is_random(node):
            raise CaptureError(
                f"Argument `module` must compute the same outputs for the same inputs, or no file can equal it, but got "
                f"{type(module).__name__}, which draws random numbers in evaluation: `{name_of(node)}`{_at(node)}. Make them an "
                "input of `forward`, or draw them in training only: `F.dropout(x, p, self.training)`."
            )


def unwritable(error: BaseException, program: ExportedProgram, module: nn.Module) -> str:
    """Words for an error of torch's exporter: the operator, its line, and what to do instead.

    Args:
        error: what the exporter raised.
        program: what it was given.
        module: for the message.
    """
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    node = _failing_node(error)
    reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), type(cause).__name__)
    if node is None:
        return f"Argument `module` must be one that torch.onnx can write, but got {type(module).__name__}: {reason}."
    source = next((n for n in program.graph.nodes if node_line(n) and node_line(n) == node_line(node)), node)
    if "No ONNX function found" in reason:
        reason = "ONNX has no such operator, and neither torch.onnx nor this library writes it as others"
    return (
        f"Argument `module` must hold operators that can be written as ONNX, but got `{name_of(node)}` in "
        f"{type(module).__name__}{_at(source)}: {reason.rstrip('.')}. Compute it from other operators, move it behind the network "
        "(ModelExport(module=...) ships a part), or ship the engine `pytorch`."
    )


def name_of(node: Node) -> str:
    """An operator's name as PyTorch prints it: ``aten.median.dim``."""
    return (
        str(node.target)
        if isinstance(node.target, torch._ops.OpOverload)
        else str(getattr(node.target, "__name__", node))
    )


def _at(node: Node) -> str:
    line = node_line(node)
    return f" (at {line})" if line else ""


def _is_random(node: Node) -> bool:
    operator: Any = node.target
    if torch.Tag.nondeterministic_seeded not in getattr(operator, "tags", ()):
        return False
    known = {entry.name for entry in operator._schema.arguments}
    if any(name in known and not argument(node, name) for name in _SWITCHES):
        return False
    switched = any(name in known for name in _SWITCHES)
    share = next((argument(node, name) for name in _SHARES if name in known), None)
    return not (share == 0 and (switched or "dropout" in str(operator) or "attention" in str(operator)))


def _failing_node(error: BaseException) -> Node | None:
    """The node that torch's exporter was translating, from the frames of its error."""
    seen: BaseException | None = error
    found: Node | None = None
    while seen is not None:
        trace = seen.__traceback__
        while trace is not None:
            if trace.tb_frame.f_globals.get("__name__", "").startswith("torch.onnx"):
                node = trace.tb_frame.f_locals.get("node")
                found = node if isinstance(node, Node) else found
            trace = trace.tb_next
        seen = seen.__cause__
    return found
