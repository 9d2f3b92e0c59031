"""Apply the translations to a captured program."""

from collections.abc import Mapping
from typing import Any

from torch.export import ExportedProgram

from lightning_accel.onnx.translations import (
    attention,
    bags,
    distances,
    elementwise,
    integers,
    order,
    padding,
    pooling,
    recurrent,
    resizing,
    scatter,
    spectral,
)
from lightning_accel.onnx.translations.rule import Rule, Stand
from lightning_accel.quantization.graph.attention import STORED

_FAMILIES = (
    attention,
    bags,
    distances,
    elementwise,
    integers,
    order,
    padding,
    pooling,
    recurrent,
    resizing,
    scatter,
    spectral,
)
RULES: Mapping[Any, Rule] = {operator: rule for family in _FAMILIES for operator, rule in family.RULES.items()}


def rewritten(program: ExportedProgram) -> ExportedProgram:
    """The program with operators replaced by others of the same results, where a rule says so.

    Args:
        program: from ``torch.export``; stays as it is.

    Returns:
        Another program, or the same one if nothing is to be replaced.
    """
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.find_nodes(op="placeholder"):
        node.meta[STORED] = node.name not in inputs
    found = {
        node: stand
        for node in program.graph.nodes
        if node.op == "call_function" and (rule := RULES.get(node.target)) and (stand := rule(node)) is not None
    }
    if not found:
        return program
    operators = {node: node.target for node in found}
    try:
        for node, stand in found.items():
            node.target = _function(stand)
        traced: ExportedProgram = program.run_decompositions({})  # takes the functions apart into operators
        return traced
    finally:
        for node, operator in operators.items():
            node.target = operator


def _function(stand: Stand) -> Stand:
    """A plain function, which a traced graph takes as an operator; partial ones have no name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return stand(*args, **kwargs)

    return call
