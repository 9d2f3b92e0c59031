"""Put fake-quantization into a module's ``forward``, and remove it again.

The eval graph of a module is captured to plan what is quantized, and again when the network is exported. Every other call runs the
module's own ``forward``, in training and evaluation alike, and quantizes at the call sites of the plan; in evaluation it folds batch norm
as the conversion does, so that it computes the exported network.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch._compile import _disable_dynamo
from torch.fx import GraphModule

from lightning_accel.calls.batches import canonical_call
from lightning_accel.calls.contexts import (
    isolated_random,
    kept_state,
    mode,
    own_forward,
    own_signature,
    plain_attributes,
    unlogged,
)
from lightning_accel.calls.shapes import InputGuard, example_inputs, plain_call
from lightning_accel.core import structure
from lightning_accel.core.patching import place, take_off
from lightning_accel.core.structure import Change
from lightning_accel.errors import CaptureError, InvalidArgumentError
from lightning_accel.quantization.arithmetic.observers import RangeBank
from lightning_accel.quantization.arithmetic.targets import ATTENTION, Target
from lightning_accel.quantization.graph.actions import actions_of, foldable_norm, reachable
from lightning_accel.quantization.graph.attention import take_apart_attention
from lightning_accel.quantization.graph.capture import CACHES, CALLS, capture, one_rank
from lightning_accel.quantization.graph.forms import SCALED_LINEAR, forms_of
from lightning_accel.quantization.graph.insert import DYNAMIC, place_fake_quants
from lightning_accel.quantization.graph.live import FakeQuantMode, LivePlan, check_calls
from lightning_accel.quantization.graph.plan import QuantizationPlan, plan_points
from lightning_accel.quantization.graph.sites import Calls, counted_calls, quantizable, site_of
from lightning_accel.quantization.graph.smoothable import smoothable_rows

ACTIVATIONS = ("static", "dynamic", "float")
_LEAST_THROWS, _THROWS = 4, 8  # trial runs in training: a coin in them should fall on both sides
_NOT_LINEAR = "the range of the moment is for linear layers"


class QuantizedForward:
    """Replacement of a module's ``forward``: runs it, and quantizes operands, results and weights at its call sites.

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
        record: plan from :meth:`record`; ``None``: it is made from the captured module.

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
        record: Mapping[str, Any] | None = None,
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
        self._guard, self._warned = InputGuard(inputs, path or type(module).__name__), False
        self.replaced_forward: Any = None  # a `forward` that the user has set on the instance
        self.caches: list[str] = []  # classes of those that `forward` returns, and the exported network doesn't
        self.bank: RangeBank
        if record is None:
            self._plan_anew()
        else:
            self.bank = RangeBank(list(record["keys"]), target, ranges)
            self.live, self._forms = LivePlan.of(record["live"]), frozenset(record["forms"])
            self.smoothable = frozenset(record["smoothable"])
            self.quantized, self.kept_float = list(record["quantized"]), dict(record["kept_float"])
            self._calls = self._calls_of(training=False)
            self._attributes = plain_attributes(module)

    def record(self) -> dict[str, Any]:
        """The plan as plain values, to quantize the same on another instance of the module."""
        return {
            "keys": list(self.bank.keys),
            "live": self.live.plain(),
            "forms": sorted(self._forms),
            "smoothable": sorted(self.smoothable),
            "quantized": list(self.quantized),
            "kept_float": dict(self.kept_float),
        }

    def _plan_anew(self) -> None:
        with torch.inference_mode(False):
            graph, plan, tensors = self._planned()
        self.caches = graph.meta[CACHES]
        keys = list(dict.fromkeys(tensors.values()))
        if not hasattr(self, "bank") or self.bank.keys != keys:
            self.bank = RangeBank(keys, self.target, self.ranges)
        self._settle(plan, tensors)

    def _planned(self) -> tuple[GraphModule, QuantizationPlan, dict[str, str]]:
        """The eval graph, its plan, and the shared ranges: key of each activation -> key of its row."""
        graph = capture(self.module, self.inputs, self.path)
        if ATTENTION in self.target.operators and self.activations == "static":
            take_apart_attention(graph)
        plan = plan_points(graph, self.target, self.include, self.exclude)
        if self.activations != "static":
            self._restrict(plan)
        reachable(plan)
        shipped: Calls = graph.meta[CALLS]
        plan.calls = {False: shipped, True: self._calls_in_training(plan) or shipped}
        _in_training_too(plan)
        if not plan.points:
            what = f"`{self.path}`" if self.path else "the module"
            raise InvalidArgumentError(
                f"Argument `include` must leave an operator to quantize, but got none in {what}. "
                f"Kept in float: {plan.kept_float or 'nothing, since it has no operator that can be quantized'}."
            )
        return graph, plan, plan.tensors()

    def _restrict(self, plan: QuantizationPlan) -> None:
        """Leave the points that there are without static activations."""
        plan.dynamic = self.activations == "dynamic"
        all_weights = [p for p in plan.points if p.weight]
        points = [p for p in all_weights if not plan.dynamic or p.node.target in DYNAMIC]
        for point in plan.points:
            if point.operator not in {p.operator for p in points}:
                weighted = point.operator in {p.operator for p in all_weights}
                plan.kept_float[point.operator] = _NOT_LINEAR if weighted else "it has no weight"
        plan.points = points

    def _settle(self, plan: QuantizationPlan, tensors: Mapping[str, str]) -> None:
        rows = {key: self.bank.keys.index(row) for key, row in tensors.items()}
        readers: dict[int, set[str]] = {}
        for point in plan.points:
            if not point.weight:
                readers.setdefault(rows[point.key], set()).add(point.operator)
        frozen = {row: frozenset(names) for row, names in readers.items()}
        what = self.path or type(self.module).__name__
        self.live = LivePlan(actions_of(plan, rows), frozen, plan.calls, what)
        self._forms, self.kept_float = forms_of(plan, self.activations), plan.kept_float
        self.smoothable = smoothable_rows(plan, rows)
        self.quantized = list(dict.fromkeys(point.operator for point in plan.points))
        self._attributes = plain_attributes(self.module)
        first, again = (self._calls_of(training=False, seed=seed) for seed in (0, 1))
        self._calls = first
        if first is not None and again is not None and (differing := _differing(first, again)):
            raise CaptureError(
                f"`forward` of `{what}` must run the same operators in each evaluation, but what {differing} runs depends on random "
                "numbers. Draw them in training only: `if self.training`."
            )

    def _calls_of(self, training: bool, seed: int = 0) -> Calls | None:
        """Calls of each function in a trial run on zeros; ``None`` if it can't run on them.

        The state of the module and of the random generators stays.
        """
        device = _device_of(self.module)
        args, kwargs = example_inputs(self.inputs, device)
        try:
            with (
                kept_state(self.module),
                unlogged(self.module),
                own_forward(self.module),
                one_rank(self.module),
                mode(self.module, training),
                isolated_random(seed),
                torch.no_grad(),
            ):
                return counted_calls(self.module, args, kwargs)
        except Exception:  # whatever a forward raises on zeros: each step compares its calls with the plan's anyway
            return None

    def _calls_in_training(self, plan: QuantizationPlan) -> Calls | None:
        """The same in training; submodules that a coin leaves out (https://arxiv.org/abs/1603.09382) get several throws."""
        wanted = {site[:2] for node in plan.operators.values() if (site := site_of(node)) is not None}
        found: Calls = Counter()
        throws: list[Calls] = []
        for seed in range(_THROWS):
            calls = self._calls_of(training=True, seed=seed)
            if calls is None:
                return None
            throws.append(calls)
            found |= calls
            if seed + 1 >= _LEAST_THROWS and wanted <= found.keys():
                break
        for calls in throws:  # better told now than in the step in which the coin falls
            check_calls(found, calls, self.path or type(self.module).__name__)
        return found

    def follow(self) -> bool:
        """Plan anew if ``forward`` has come to run other operators in evaluation; before ranges are learned, anything may change.

        Returns:
            Whether the plan is another one.

        Raises:
            InvalidArgumentError: with learned ranges, other operators than those would be quantized.
        """
        calls = self._calls_of(training=False)
        if calls is None or self._calls is None or not _differing(calls, self._calls):
            return False
        if self.bank.batches:
            self.graph()  # raises if others would be quantized
        self._plan_anew()
        return True

    def graph(self) -> GraphModule:
        """The eval graph of the module as it is now, with its quantized operators: what is exported.

        Raises:
            CaptureError: it can't be captured.
            InvalidArgumentError: other operators run in it than are quantized.
        """
        with torch.inference_mode(False):
            graph, plan, tensors = self._planned()
            keys = list(dict.fromkeys(tensors.values()))
            now = list(dict.fromkeys(point.operator for point in plan.points))
            if keys != self.bank.keys or now != self.quantized:
                raise InvalidArgumentError(
                    f"`{self.path or type(self.module).__name__}` must run the operators whose ranges were learned, but its `forward` "
                    f"now runs others: {sorted(set(now) ^ set(self.quantized)) or 'in another order'}.{self._changed()} Let what "
                    "it reads be the same from the start of quantization on."
                )
            place_fake_quants(graph, plan, tensors, self.bank)
        return graph

    def _changed(self) -> str:
        """Sentence with the Python values that have changed since the plan was made."""
        now = plain_attributes(self.module)
        found = [
            f"`{name}` was {before!r} and is {now.get(name)!r}"
            for name, before in self._attributes.items()
            if now.get(name) != before
        ]
        return f" Changed since: {'; '.join(found[:5])}." if found else ""

    @property
    def forms(self) -> frozenset[str]:
        """Forms of integer operators in the exported file, see :data:`~lightning_accel.engines.kernel_probe.FORMS`."""
        return self._forms | ({SCALED_LINEAR} if self.bank.smooth else frozenset())

    @property
    def own(self) -> Any:
        """The module's own ``forward``."""
        return (
            type(self.module).forward.__get__(self.module) if self.replaced_forward is None else self.replaced_forward
        )

    @_disable_dynamo  # torch.compile would trace past the function mode, and compile the float network
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Same signature and result as the module's own ``forward``."""
        if not self.module.training and not self._warned:
            self._compare(args, kwargs)
        self.bank.to(_device_of(self.module))
        return FakeQuantMode(self.module, self.live, self.bank).run(self.own, args, kwargs)

    def take_over(self, module: nn.Module | None = None) -> None:
        """Answer the calls of a module's ``forward`` from now on: of the one that was captured, or of its equal."""
        self.module = self.module if module is None else module
        self.replaced_forward = vars(self.module).get("forward")
        place(self.module, "forward", self)

    def _compare(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Warn once of a call in evaluation that the exported network doesn't take."""
        try:
            self._guard.check(*plain_call(*canonical_call(self._signature, args, kwargs)))
        except ValueError as error:
            self._warned = True
            rank_zero_warn(f"{error} It is computed here, but the exported network won't take it.")

    @property
    def __code__(self) -> Any:
        """Lightning uses this attribute to detect an overridden ``forward``."""
        return type(self).__call__.__code__


def _device_of(module: nn.Module) -> torch.device:
    tensor = next(module.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


def _differing(first: Calls, second: Calls) -> str:
    """Submodules that make other quantizable calls in one run than in another, for messages; empty if there are none."""
    first, second = quantizable(first), quantizable(second)
    return ", ".join(
        f"`{path or 'forward'}`" for path in sorted({key[0] for key in (first - second) | (second - first)})
    )


def _in_training_too(plan: QuantizationPlan) -> None:
    """Keep those operators float whose function runs another number of times in training, so that calls can't be matched."""
    for name, node in plan.operators.items():
        sites = {
            site for made in (node, foldable_norm(node)) if made is not None and (site := site_of(made)) is not None
        }
        for path, function, _ in sites:
            trained, shipped = (plan.calls[training][path, function] for training in (True, False))
            if name in plan.kept_float or trained == shipped:
                continue
            plan.kept_float[name] = (
                f"`{path or 'forward'}` runs {function} a different number of times in training"
                if trained
                else "runs in evaluation only, so training can't learn its range"
            )
    plan.points = [p for p in plan.points if p.operator not in plan.kept_float]


def release(module: nn.Module) -> None:
    """Give a module its own ``forward`` back."""
    forward = vars(module).get("forward")
    if isinstance(forward, QuantizedForward) and forward.replaced_forward is not None:
        place(module, "forward", forward.replaced_forward)
    else:
        take_off(module, "forward")


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
        "plan": forward.record(),
    }
    return Change("quantize", owner, args)


def _replay(module: nn.Module, change: Change) -> None:
    args = change.args
    owner = module.get_submodule(args["module"])
    lists = {key: tuple(value) for key, value in args["target"].items() if isinstance(value, list)}
    target = Target(**{**args["target"], **lists})
    if args["module"] not in quantized_forwards(module):
        QuantizedForward(
            owner,
            args["inputs"],
            target,
            args["include"],
            args["exclude"],
            args["module"],
            args["ranges"],
            args["activations"],
            args["plan"],
        ).take_over()


def _undo(module: nn.Module, change: Change) -> None:
    release(module.get_submodule(change.args["module"]))


def _save(module: nn.Module, change: Change) -> dict[str, Any]:
    return quantized_forwards(module)[change.args["module"]].bank.state_dict()


def _restore(module: nn.Module, change: Change, state: dict[str, Any]) -> None:
    quantized_forwards(module)[change.args["module"]].bank.load_state_dict(state)


structure.register("quantize", structure.ChangeHandler(_replay, _undo, _save, _restore))


def quantization_map(module: nn.Module) -> dict[str, str]:
    """Operators of the quantized parts by name: ``"int8"``, or the reason why it stays float; in the module's order."""
    found: dict[str, str] = {}
    for path, forward in quantized_forwards(module).items():
        before = f"{path}." if path else ""
        found |= {f"{before}{name}": "int8" for name in forward.quantized}
        found |= {f"{before}{name}": f"float: {why}" for name, why in forward.kept_float.items()}
    order = {name: index for index, (name, _) in enumerate(module.named_modules())}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))
