"""Put fake-quantization into a module's ``forward``, and remove it again.

A train graph and an eval graph are captured from the same module. They share its parameters and buffers, and one bank of
ranges, so switching modes needs no capture. The eval graph folds batch norm as the conversion does, so that it computes the
exported network.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from lightning_accel.calls.example import canonical_call, own_signature
from lightning_accel.calls.shapes import InputGuard, plain_call
from lightning_accel.core import structure
from lightning_accel.core.structure import Change
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.arithmetic.observers import RangeBank
from lightning_accel.quantization.arithmetic.targets import ATTENTION, Target
from lightning_accel.quantization.graph.attention import take_apart_attention
from lightning_accel.quantization.graph.capture import Bindings, capture
from lightning_accel.quantization.graph.forms import forms_of
from lightning_accel.quantization.graph.insert import DYNAMIC, freeze_norms, place_fake_quants
from lightning_accel.quantization.graph.plan import QuantizationPlan, plan_points
from lightning_accel.quantization.graph.sync_norm import synchronize_norms

ACTIVATIONS = ("static", "dynamic", "float")
_NOT_LINEAR = "the range of the moment is for linear layers"
_Modes = tuple[bool, ...]  # the mode of each submodule


class QuantizedForward:
    """Replacement of a module's ``forward``: two captured graphs with fake-quantization over the module's own tensors.

    Args:
        module: module whose ``forward`` is replaced; otherwise not changed.
        inputs: from :func:`~lightning_accel.calls.shapes.describe_inputs`.
        target: arithmetic to simulate.
        include: globs of operators.
        exclude: globs of operators; wins.
        path: the module's name, for messages.
        ranges: how ranges are learned, see :class:`~lightning_accel.quantization.arithmetic.observers.RangeBank`.
        activations: ``"static"``: one range for all calls; ``"dynamic"``: inputs of linear layers by their range in each call;
            ``"float"``: activations aren't quantized, only weights.

    Raises:
        CaptureError: the module can't be captured.
        InvalidArgumentError: nothing is left to quantize, or a glob matches nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: Mapping[str, Any],
        target: Target,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        path: str = "",
        ranges: str = "moving_average",
        activations: str = "static",
    ) -> None:
        if activations not in ACTIVATIONS:
            raise InvalidArgumentError(f"Argument `activations` must be one of {ACTIVATIONS}, but got {activations!r}.")
        if activations == "dynamic" and target.signed_activations:
            raise InvalidArgumentError(
                f'Argument `activations` must be "static" or "float" for the target {target.name!r}, but got "dynamic": ONNX quantizes by '
                'the range of the moment to uint8 alone. Use the target "onnxruntime".'
            )
        self.module, self.inputs, self.path, self.target = module, inputs, path, target
        self.ranges, self.activations = ranges, activations
        self.include, self.exclude = tuple(include), tuple(exclude)
        self._signature = own_signature(module)
        self._guard = InputGuard(inputs, path or type(module).__name__)
        self.bank: RangeBank
        self._graphs: dict[_Modes, GraphModule] = {}
        self._build()

    def _build(self) -> None:
        """Capture both graphs on the module's present device; existing ranges are kept."""
        with torch.inference_mode(False):
            graphs = {training: self._capture(training) for training in (True, False)}
            plans = {training: self._plan_of(graph, training) for training, graph in graphs.items()}
            self.forms = forms_of(plans[False], self.activations)
            tensors = _shared_tensors(plans, self.path)
            if not hasattr(self, "bank"):
                keys = list(dict.fromkeys(tensors.values()))
                self.bank = RangeBank(keys, self.target, self.ranges)
            for training, graph in graphs.items():
                place_fake_quants(graph, plans[training], tensors, self.bank, training)
            synchronize_norms(graphs[True], self.module)
        self.kept_float, self._plan, self._tensors = plans[False].kept_float, plans[False], tensors
        self.quantized = list(dict.fromkeys(point.operator for point in plans[False].points))
        self._parts = list(self.module.modules())
        self._graphs = {(training,) * len(self._parts): graph for training, graph in graphs.items()}
        self._bindings = {modes: Bindings(graph, self.module) for modes, graph in self._graphs.items()}
        self._device, self._norms_frozen = _device_of(self.module), False
        self.bank.to(self._device)

    def _capture(self, training: bool | None) -> GraphModule:
        graph = capture(self.module, self.inputs, training, self.path)
        if ATTENTION in self.target.operators and self.activations == "static":
            take_apart_attention(graph)
        return graph

    def _plan_of(self, graph: GraphModule, training: bool) -> QuantizationPlan:
        plan = plan_points(graph, self.target, self.include, self.exclude, training=training)
        if self.activations != "static":
            plan.dynamic = self.activations == "dynamic"
            all_weights = [p for p in plan.points if p.weight]
            points = [p for p in all_weights if not plan.dynamic or p.node.target in DYNAMIC]
            for point in plan.points:
                if point.operator not in {p.operator for p in points}:
                    weighted = point.operator in {p.operator for p in all_weights}
                    plan.kept_float[point.operator] = _NOT_LINEAR if weighted else "it has no weight"
            plan.points = points
        return plan

    def _build_mixed(self, modes: "_Modes") -> None:
        """Capture a graph for submodules in different modes, e.g. with a frozen batch norm."""
        with torch.inference_mode(False):
            graph = self._capture(None)
            plan = self._plan_of(graph, training=True)
            keys = {p.key for p in self._plan.points}
            plan.points = [p for p in plan.points if p.key in keys]
            if {p.key for p in plan.points} != keys or any(
                plan.counts[g] != self._plan.counts[g] for g in self._plan.groups.values()
            ):
                raise InvalidArgumentError(
                    f"Submodules of the quantized `{self.path or type(self.module).__name__}` must run the same operators in train and "
                    "eval mode to be held in either, but some don't. Put the whole module in one mode."
                )
            place_fake_quants(graph, plan, self._tensors, self.bank, modes[0])
            synchronize_norms(graph, self.module)
        self._graphs[modes], self._bindings[modes] = graph, Bindings(graph, self.module)
        self._norms_frozen = False

    def forget_graphs(self) -> None:
        """Capture again at the next call, after submodules were replaced by others with the same tensors."""
        self._graphs, self._bindings = {}, {}

    def graph(self, training: bool) -> GraphModule:
        """The captured graph of a mode, over the module's present tensors."""
        if not self._graphs or _device_of(self.module) != self._device:
            self._build()  # a graph contains constants on the device of its capture
        modes = (training,) * len(self._parts)
        if training == self.module.training:
            modes = tuple([part.training for part in self._parts])
            if modes not in self._graphs:
                self._build_mixed(modes)
        if self.bank.norms_frozen and not self._norms_frozen:
            for graph in self._graphs.values():
                freeze_norms(graph)
            self._norms_frozen = True
        self._bindings[modes].sync()
        return self._graphs[modes]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same signature and result as the module's own ``forward``."""
        args, kwargs = self.checked(args, kwargs)
        return self.graph(self.module.training).forward(*args, **kwargs)

    def checked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments in the form that the graphs take.

        Raises:
            InvalidArgumentError: they differ from the captured inputs in more than the batch.
        """
        args, kwargs = plain_call(*canonical_call(self._signature, args, kwargs))
        self._guard.check(args, kwargs)
        return args, kwargs

    @property
    def __code__(self) -> Any:
        """Lightning uses this attribute to detect an overridden ``forward``."""
        return type(self).__call__.__code__

    def __getstate__(self) -> dict[str, Any]:
        """All state except the graphs, which are captured again on demand."""
        return {**self.__dict__, "_graphs": {}, "_bindings": {}, "_parts": [], "_plan": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> "QuantizedForward":
        """Copy for a copied module, e.g. by EMA: ranges are copied, graphs are captured again on first use."""
        copy = object.__new__(type(self))
        memo[id(self)] = copy
        copy.__dict__.update(self.__getstate__(), module=deepcopy(self.module, memo), bank=deepcopy(self.bank, memo))
        return copy


def _device_of(module: nn.Module) -> torch.device:
    tensor = next(module.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _shared_tensors(plans: Mapping[bool, QuantizationPlan], path: str) -> dict[str, str]:
    """Map operands to tensors of the eval graph, and restrict each plan to the points of both graphs.

    Raises:
        InvalidArgumentError: nothing is left.
    """
    kept = plans[False].kept_float
    trained = {point.key for point in plans[True].points}
    for point in plans[False].points:
        if point.key not in trained:
            kept[point.operator] = "runs in evaluation only, so training can't learn its range"
    for name, group in plans[False].groups.items():
        if plans[True].counts[group] != plans[False].counts[group] and name not in kept:
            kept[name] = f"`{group[0] or 'forward'}` runs {group[1]} a different number of times in training"
    plans[False].points = [p for p in plans[False].points if p.operator not in kept]
    shipped = {p.key for p in plans[False].points}
    plans[True].points = [p for p in plans[True].points if p.key in shipped]
    if not shipped:
        raise InvalidArgumentError(
            f"Argument `include` must leave an operator to quantize, but got none in {f'`{path}`' if path else 'the module'}. "
            f"Kept in float: {kept or 'nothing, since it has no operator that can be quantized'}."
        )
    return plans[False].tensors()


def quantized_forwards(module: nn.Module) -> dict[str, QuantizedForward]:
    """Quantized forwards that are in place, by dotted path of their module."""
    forwards = {path: m.__dict__.get("forward") for path, m in module.named_modules()}
    return {path: f for path, f in forwards.items() if isinstance(f, QuantizedForward)}


def quantize_change(forward: QuantizedForward, owner: str) -> Change:
    """Record of a quantized forward, to rebuild it on another instance of the module."""
    args = {
        "module": forward.path,
        "inputs": forward.inputs,
        "target": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(forward.target).items()},
        "include": list(forward.include),
        "exclude": list(forward.exclude),
        "ranges": forward.ranges,
        "activations": forward.activations,
    }
    return Change("quantize", owner, args)


def _replay(module: nn.Module, change: Change) -> None:
    args = change.args
    owner = module.get_submodule(args["module"])
    lists = {key: tuple(value) for key, value in args["target"].items() if isinstance(value, list)}
    target = Target(**{**args["target"], **lists})
    if args["module"] not in quantized_forwards(module):
        owner.__dict__["forward"] = QuantizedForward(
            owner,
            args["inputs"],
            target,
            args["include"],
            args["exclude"],
            args["module"],
            args["ranges"],
            args["activations"],
        )


def _undo(module: nn.Module, change: Change) -> None:
    module.get_submodule(change.args["module"]).__dict__.pop("forward", None)


def _restore(module: nn.Module, change: Change, state: dict[str, Any]) -> None:
    path = change.args["module"]
    quantized_forwards(module)[path].bank.load_state_dict(state["ranges"][path])


structure.register("quantize", structure.ChangeHandler(_replay, _undo, _restore))


def quantization_map(module: nn.Module) -> dict[str, str]:
    """Operators of the quantized parts by name: ``"int8"``, or the reason why it stays float; in the module's order."""
    found: dict[str, str] = {}
    for path, forward in quantized_forwards(module).items():
        before = f"{path}." if path else ""
        found |= {f"{before}{name}": "int8" for name in forward.quantized}
        found |= {f"{before}{name}": f"float: {why}" for name, why in forward.kept_float.items()}
    order = {name: index for index, (name, _) in enumerate(module.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))
