"""What is done at each call site of a ``forward`` to compute the quantized network: from the plan of its captured graph."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from torch.fx import Node

from lightning_accel.quantization.graph.attention import PARTS
from lightning_accel.quantization.graph.operators import JOINS, clip_of, reshapes
from lightning_accel.quantization.graph.plan import KNOWN, WEIGHTED, QuantizationPlan, QuantizationPoint, aten
from lightning_accel.quantization.graph.sites import Site, operand_of, site_of


@dataclass(frozen=True)
class FoldedNorm:
    """A batch norm that is folded into the operator before it in evaluation.

    Args:
        site: where it is called.
        tensors: names of scale, shift, mean and variance in the module; ``None``: it has none.
        epsilon: added to the variance.
    """

    site: Site
    tensors: tuple[str | None, ...]
    epsilon: float

    @property
    def owner(self) -> str:
        """Path of the batch norm."""
        return (self.tensors[2] or "").rpartition(".")[0]


@dataclass
class SiteAction:
    """What is done at one call site.

    Args:
        operands: position and keyword of each argument to quantize -> row in the bank.
        joined: position of each tensor to quantize in the list that is the first argument -> row.
        result: row of the result; ``None``: it isn't quantized.
        clip: limits, if the function is a clipping activation.
        returned: whether the network returns the result: it returns what was there before quantization.
        operator: name of the operator, if it has a weight to quantize.
        kind: of the operator with a weight: ``"static"``, ``"dynamic"`` or ``"embedding"``.
        weight: position and keyword of the weight.
        axis: output channels of the weight; ``None``: one scale for all of it.
        norm: the batch norm to fold in evaluation.
        attention: rows of the operands of attention that is computed in parts, by part and position.
    """

    operands: dict[tuple[int, str], int] = field(default_factory=dict)
    joined: dict[int, int] = field(default_factory=dict)
    result: int | None = None
    clip: tuple[float, float] | None = None
    returned: bool = False
    operator: str = ""
    kind: str = ""
    weight: tuple[int, str] = (1, "weight")
    axis: int | None = None
    norm: FoldedNorm | None = None
    attention: dict[tuple[str, int], int] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """The action as plain values, without those that it does nothing with; see :meth:`of`."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found |= {name: [[*key, row] for key, row in found[name].items()] for name in ("operands", "attention")}
        found["joined"] = [list(item) for item in self.joined.items()]
        found |= {name: list(found[name]) if found[name] else None for name in ("clip", "weight")}
        found["norm"] = (
            None if self.norm is None else [list(self.norm.site), list(self.norm.tensors), self.norm.epsilon]
        )
        empty = SiteAction()
        return {name: value for name, value in found.items() if getattr(self, name) != getattr(empty, name)}

    @staticmethod
    def of(plain: Mapping[str, Any]) -> "SiteAction":
        """The action of plain values from :meth:`plain`."""
        given = dict(plain)
        for name in ("operands", "attention"):
            given[name] = {(first, second): row for first, second, row in given.get(name, [])}
        given["joined"] = dict(given.get("joined", []))
        for name in ("clip", "weight"):
            if name in given:
                given[name] = tuple(given[name])
        if "norm" in given:
            site, tensors, epsilon = given["norm"]
            given["norm"] = FoldedNorm((site[0], site[1], site[2]), tuple(tensors), epsilon)
        return SiteAction(**given)


Actions = dict[Site, SiteAction]


def reachable(plan: QuantizationPlan) -> None:
    """Restrict a plan to the operators that can be quantized at their call sites, in place; others are named with the reason."""
    sites = _Sites(plan)
    for name, node in plan.operators.items():
        if name not in plan.kept_float and (reason := sites.why_not(name, node)):
            plan.kept_float[name] = reason
    kept = [p for p in plan.points if p.operator not in plan.kept_float]
    plan.points = [replace(p, shared=p.shared and all(sites.makes(root) for root in p.roots)) for p in kept]


class _Sites:
    """Call sites of a graph's nodes."""

    def __init__(self, plan: QuantizationPlan) -> None:
        nodes = list(next(iter(plan.operators.values())).graph.nodes) if plan.operators else []
        self._last = {site: node for node in nodes if (site := site_of(node)) is not None}
        found = [(node, site_of(node)) for node in nodes if node.op == "call_function" and node.target in KNOWN]
        self._known = Counter(site for node, site in found if node.meta.get("operator_name") not in PARTS)
        self._points: dict[str, list[QuantizationPoint]] = {}
        for point in plan.points:
            self._points.setdefault(point.operator, []).append(point)

    def makes(self, node: Node) -> bool:
        """Whether a value is the result of a call."""
        site = site_of(node)
        return site is not None and self._last[site] is node

    def why_not(self, name: str, node: Node) -> str:
        """Reason why an operator can't be quantized where it is called; empty if it can."""
        if node.meta.get("operator_name") in PARTS:
            return ""
        site = site_of(node)
        if site is None:
            return "no call of a torch function makes it"
        positions = [p.index for p in self._points.get(name, []) if p.index is not None]
        if self._known[site] > 1 or any(operand_of(site, index) is None for index in positions):
            return f"it is computed inside of `{site[1]}`, whose operands can't be replaced"
        if any(site_of(reader) is None for p in self._points.get(name, []) for _, reader in p.moved):
            return "no call of a torch function moves its data"
        results = [root for p in self._points.get(name, []) if p.index is None for root in p.roots]
        norm = foldable_norm(node)
        if not all(self.makes(made) for made in [*results, *([norm] if norm is not None else [])]):
            return "its result isn't the result of a torch function"
        return ""


def foldable_norm(node: Node) -> Node | None:
    """The batch norm that is folded into an operator with a weight in evaluation: the only reader of its result."""
    if node.target not in WEIGHTED or node.target is aten.embedding.default or len(node.users) != 1:
        return None
    if node.target is aten.linear.default and getattr(node.meta.get("val"), "ndim", 0) != 2:
        return None  # the channels of batch norm aren't the outputs of the linear layer
    norm = next(iter(node.users))
    folded = norm.target is aten.batch_norm.default and norm.args[0] is node and not norm.args[5]
    return norm if folded else None


def actions_of(plan: QuantizationPlan, rows: Mapping[str, int]) -> Actions:
    """What is done at each call site.

    Args:
        plan: restricted by :func:`reachable`.
        rows: key of each activation -> its row in the bank.
    """
    actions: Actions = {}
    made = {root for point in plan.points if point.shared or point.index is None for root in point.roots}
    late = _quantized_late(plan, rows)
    for point, node, site in _of_points(plan):
        action = actions.setdefault(site, SiteAction())
        if point.weight:
            _weigh(action, point, site, plan.dynamic)
            continue
        row = rows[point.key]
        if made.isdisjoint(point.roots) and late.issuperset(point.roots):
            _read(action, point, site, row)
            continue
        for root in point.roots:
            if root in made:
                source = actions.setdefault(_known(site_of(root)), SiteAction())
                source.result, source.clip = row, clip_of(root)
                source.returned = any(user.op == "output" for user in root.users)
        for root, reader in point.moved:
            if root not in made and reader is node:
                _read(action, point, site, row)
            elif (
                root not in made
            ):  # quantized where it begins to be moved: other readers of what is moved read that, too
                _move(actions.setdefault(_known(site_of(reader)), SiteAction()), root, reader, row)
    return {site: action for site, action in actions.items() if action != SiteAction()}


def _quantized_late(plan: QuantizationPlan, rows: Mapping[str, int]) -> set[Node]:
    """Tensors that are only reshaped on their way to operators that quantize them with one range: they do so where they read.

    How often a ``forward`` reshapes may depend on its inputs, and the operators are the same.
    """
    readers: dict[Node, set[tuple[Node, Node]]] = {}
    ranges: dict[Node, set[int]] = {}
    for point in plan.points:
        for root in point.roots:
            readers.setdefault(root, set()).add((point.operand, point.node))
            ranges.setdefault(root, set()).add(rows[point.key])

    def late(root: Node, moved: Node) -> bool:
        own = readers[root]
        return all((moved, user) in own or (reshapes(user) and late(root, user)) for user in moved.users)

    firsts = {(root, reader) for point in plan.points for root, reader in point.moved if reader is not point.node}
    early = {root for root, reader in firsts if not (reshapes(reader) and late(root, reader)) or len(ranges[root]) > 1}
    return readers.keys() - early


def _read(action: SiteAction, point: QuantizationPoint, site: Site, row: int) -> None:
    part, index = point.node.meta.get("operator_name"), _known(point.index)
    if part in PARTS:
        action.attention[str(part), index] = row
    else:
        action.operands[_known(operand_of(site, index))] = row


def _move(action: SiteAction, root: Node, reader: Node, row: int) -> None:
    if reader.target in JOINS:
        parts: Any = reader.args[0]
        action.joined |= {index: row for index, part in enumerate(parts) if part is root}
    else:
        action.operands[0, "input"] = row


def _of_points(plan: QuantizationPlan) -> Iterator[tuple[QuantizationPoint, Node, Site]]:
    for point in plan.points:
        yield point, point.node, _known(site_of(point.node))


def _known(value: Any) -> Any:
    assert value is not None, "the plan is restricted to what is known"
    return value


def _weigh(action: SiteAction, point: QuantizationPoint, site: Site, dynamic: bool) -> None:
    action.operator, action.axis = point.operator, point.axis
    action.weight = _known(operand_of(site, _known(point.index)))
    target = point.node.target
    action.kind = "embedding" if target is aten.embedding.default else "static"
    if dynamic and target is aten.linear.default:
        action.kind = "dynamic"
    norm = None if action.kind != "static" else foldable_norm(point.node)
    if norm is not None:
        tensors = tuple(None if a is None else str(a.target) for a in norm.args[1:5])  # type: ignore[union-attr]
        action.norm = FoldedNorm(_known(site_of(norm)), tensors, float(norm.args[7]))  # type: ignore[arg-type]
