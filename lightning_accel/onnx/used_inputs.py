"""Remove inputs from a captured program that its outputs don't depend on: targets, masks, and whatever else the batch holds."""

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.fx import Node
from torch.utils import _pytree as pytree

_SIZE = torch.ops.aten.sym_size.int


def needed_nodes(program: ExportedProgram, *, sizes: bool = True) -> set[Node]:
    """Nodes that the outputs depend on.

    Operators that write into a tensor count, for later readers of that tensor name it and not them.

    Args:
        program: a captured program.
        sizes: whether a tensor counts that only its sizes are read of.
    """
    needed: set[Node] = set()
    for node in reversed(program.graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op == "output" or node in needed or (schema is not None and schema.is_mutable):
            needed.add(node)
            needed.update(node.all_input_nodes if sizes or node.target is not _SIZE else ())
    return needed


def _take_sizes_of_used_inputs(program: ExportedProgram, inputs: list[Node]) -> None:
    """Read each size from an input whose values are needed, where one has it: the batch is every input's."""
    needed = needed_nodes(program, sizes=False)
    known = {
        str(size): (node, axis)
        for node in reversed(inputs)
        if node in needed
        for axis, size in enumerate(node.meta["val"].shape)
    }
    for node in program.graph.nodes:
        if node.target is _SIZE and node.args[0] in inputs and node.args[0] not in needed:
            size = node.args[0].meta["val"].shape[node.args[1]]
            node.args = known.get(str(size), node.args)


def keep_used_inputs(program: ExportedProgram, keep: tuple[int, ...] = ()) -> list[int]:
    """Drop inputs that no output depends on, and constants; the rest becomes positional.

    Args:
        program: changed in place.
        keep: positions of tensors that stay even so.

    Returns:
        Positions of the dropped tensors among the tensors of the call.
    """
    user = [spec for spec in program.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT]
    leaves = pytree.tree_leaves(program.example_inputs)
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [spec.arg.name for spec in user if isinstance(spec.arg, TensorArgument)]
    _take_sizes_of_used_inputs(program, [placeholders[name] for name in tensors])
    needed = needed_nodes(program)
    kept = [name for i, name in enumerate(tensors) if placeholders[name] in needed or i in keep]
    if len(kept) == len(user):
        return []
    for node in reversed(list(program.graph.nodes)):
        if node.op == "call_function" and node not in needed and not node.users:
            program.graph.erase_node(node)
    gone = {spec.arg.name for spec in user} - set(kept)
    for name in gone:
        program.graph.erase_node(placeholders[name])
    specs = program.graph_signature.input_specs
    specs[:] = [spec for spec in specs if spec.kind is not InputKind.USER_INPUT or spec.arg.name not in gone]
    examples = tuple(leaf for spec, leaf in zip(user, leaves, strict=True) if spec.arg.name in kept)
    entry = program.module_call_graph[0].signature
    assert entry is not None
    entry.inputs[:] = [argument for argument in entry.inputs if argument.name not in gone]
    entry.in_spec = pytree.tree_flatten((examples, {}))[1]
    entry.forward_arg_names = kept
    program._example_inputs = (examples, {})
    program._guards_code = []  # of the inputs as they were nested; runners and InputGuard check them
    program.graph_module.recompile()
    program.validate()
    return [i for i, name in enumerate(tensors) if name not in kept]
