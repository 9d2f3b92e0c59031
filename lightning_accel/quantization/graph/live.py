"""Run a module's own ``forward`` with fake-quantization at its call sites."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.utils.checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_accel.core.patching import Patches, swapped
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.arithmetic.fake_quant import fake_quantize_weight, per_channel, quantize_weight
from lightning_accel.quantization.arithmetic.observers import PLAIN, RangeBank, SeenOperator
from lightning_accel.quantization.graph.actions import Actions, SiteAction
from lightning_accel.quantization.graph.attention import attention
from lightning_accel.quantization.graph.folding import DynamicLinear, fold_norm
from lightning_accel.quantization.graph.sites import Calls, Names, Site, SiteMode

_NORM = "batch_norm"


@dataclass
class LivePlan:
    """What is done where, while a module's own ``forward`` runs.

    Args:
        actions: at each call site.
        readers: operators that read each row of the bank; while all of them are off, it isn't quantized.
        calls: of each function in one run, in training (True) and in evaluation (False).
        name: of the module, for messages.
    """

    actions: Actions
    readers: Mapping[int, frozenset[str]]
    calls: Mapping[bool, Calls]
    name: str
    names: Names = field(default_factory=dict)  # of the submodules

    def __post_init__(self) -> None:
        self.sites: dict[str, dict[str, dict[int, SiteAction]]] = {}
        for (path, function, index), action in self.actions.items():
            self.sites.setdefault(path, {}).setdefault(function, {})[index] = action
            if action.norm is not None:
                path, function, index = action.norm.site
                self.sites.setdefault(path, {}).setdefault(function, {}).setdefault(index, SiteAction())
        known = {(path, function) for path, functions in self.sites.items() for function in functions}
        self.calls = {mode: Counter({key: calls[key] for key in known}) for mode, calls in self.calls.items()}

    def plain(self) -> dict[str, Any]:
        """The plan as plain values, see :meth:`of`."""
        return {
            "actions": [[list(site), action.plain()] for site, action in self.actions.items()],
            "readers": [[row, sorted(names)] for row, names in self.readers.items()],
            "calls": [[mode, [[*key, count] for key, count in calls.items()]] for mode, calls in self.calls.items()],
            "name": self.name,
        }

    @staticmethod
    def of(plain: Mapping[str, Any]) -> "LivePlan":
        """The plan of plain values from :meth:`plain`."""
        return LivePlan(
            {(site[0], site[1], site[2]): SiteAction.of(action) for site, action in plain["actions"]},
            {row: frozenset(names) for row, names in plain["readers"]},
            {mode: Counter({(path, function): n for path, function, n in calls}) for mode, calls in plain["calls"]},
            plain["name"],
        )

    def __getstate__(self) -> dict[str, Any]:
        """All state except the submodules themselves."""
        return {**vars(self), "names": {}}

    def check(self, calls: Calls, training: bool) -> None:
        """Check that each function ran as often as planned: calls are told apart by their order.

        Raises:
            InvalidArgumentError: one ran another number of times, though its submodule ran.
        """
        check_calls(self.calls[training], calls, self.name)


def check_calls(wanted: Calls, calls: Calls, name: str) -> None:
    """Check that each function that was called was called as often as wanted, wherever a number is.

    Args:
        wanted: numbers of calls.
        calls: of one run.
        name: of the module, for the message.

    Raises:
        InvalidArgumentError: one was called more often, or less often.
    """
    for (path, function), count in calls.items():
        if count != (expected := wanted.get((path, function), count)):
            where = ".".join(filter(None, (name, path)))
            raise InvalidArgumentError(
                f"Module `{where}` must call `{function}` {expected} times, as when quantization was planned, but got {count}. "
                "Python in `forward` has chosen another way. Put each way into a submodule of its own, or leave it out of "
                "quantization with `exclude`."
            )


class FakeQuantMode(SiteMode):
    """Quantizes operands, results and weights at the call sites of one call of a module's ``forward``.

    Args:
        root: the module.
        plan: what is done where.
        bank: ranges and target, and whether fake-quantization is active.
    """

    def __init__(self, root: nn.Module, plan: LivePlan, bank: RangeBank) -> None:
        super().__init__(root, plan.names)
        self._plan, self._bank, self._sites, self._readers = plan, bank, plan.sites, plan.readers
        self._training = root.training
        self._absorbed: set[Site] = set()  # batch norms that were folded into the operator before them
        self._twins: dict[tuple[int, int, bool], tuple[torch.Tensor, int, torch.Tensor]] = {}
        self._originals: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # of quantized results that are returned
        self._frozen: list[tuple[nn.Module, Patches]] = []  # batch norms that run on their statistics

    def run(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of ``forward`` with quantized call sites.

        Raises:
            InvalidArgumentError: a function ran another number of times than planned.
        """
        try:
            with self.active(), self._repeated():
                result = forward(*args, **kwargs)
        finally:
            self._clear()
        self._plan.check(self.counts, self._training)
        return pytree.tree_map(self._original, result) if self._originals else result

    def _clear(self) -> None:
        self._twins = {}
        while self._frozen:
            self._frozen.pop()[1].undo()

    def _original(self, value: Any) -> Any:
        found = self._originals.get(id(value))
        return value if found is None else found[1]

    @override
    def entered(self, module: nn.Module, path: str) -> None:
        frozen = self._bank.norms_frozen and self._training and isinstance(module, _BatchNorm) and module.training
        if frozen and module.running_mean is not None:  # otherwise there are no statistics to run on
            patches = Patches()
            patches.swap(module, "training", False)
            self._frozen.append((module, patches))

    @override
    def left(self, module: nn.Module, result: Any) -> Any:
        if self._frozen and self._frozen[-1][0] is module:
            self._frozen.pop()[1].undo()
        if isinstance(module, nn.SyncBatchNorm):  # its synchronized form calls no torch function
            action = self._sites.get(self.path, {}).get(_NORM, {}).get(0)
            if action is not None and action.result is not None and not self.counts[self.path, _NORM]:
                return self._quantized(action.result, result)
        return None

    @override
    def called(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        here = self._sites.get(self.path)
        found = None if here is None else here.get(name)
        call = func
        if name == _NORM and self._bank.norms_frozen and self._training:
            call = partial(_on_statistics, func)
        if found is None:
            return call(*args, **kwargs)
        key = self.path, name
        index = self.counts[key]
        self.counts[key] = index + 1
        action = found.get(index)
        if action is None:
            return call(*args, **kwargs)
        if (*key, index) in self._absorbed:
            call = _first_argument
        return self._act(action, call, args, kwargs, name)

    def _act(
        self, action: SiteAction, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], name: str
    ) -> Any:
        if action.attention:
            return attention(self._attending(action), *args, **kwargs)
        row, clip, bank = action.result, action.clip, self._bank
        overwrites = name.endswith("_") and not name.endswith("__")
        if clip is not None:
            overwrites = overwrites or kwargs.get("inplace") is True or any(value is True for value in args[-1:])
        if clip is not None and row is not None and self._training and bank.active:
            # The activation and its quantization in one pass.
            x = _first_argument(*args, **kwargs)
            if not overwrites or (bank.overwritable(x) and not action.returned):
                quantized = self._quantized(row, x, clip, in_place=overwrites)
                if action.returned:
                    self._originals[id(quantized)] = quantized, func(*args, **kwargs)
                return quantized
        given, kwargs = list(args), dict(kwargs)
        overwritten = None
        if bank.active and overwrites and (row is not None or (0, "input") in action.operands):
            overwritten = _get(given, kwargs, (0, "input"))
            if torch.is_grad_enabled() or action.returned:
                # The values before and after are needed: the function overwrites a copy, whose result goes to the tensor.
                _put(given, kwargs, (0, "input"), overwritten.clone())
        for place, operand in action.operands.items():
            _put(given, kwargs, place, self._twin(operand, _get(given, kwargs, place)))
        if action.joined:
            parts = list(_get(given, kwargs, (0, "tensors")))
            for index, operand in action.joined.items():
                parts[index] = self._twin(operand, parts[index])
            _put(given, kwargs, (0, "tensors"), parts)
        result = self._weighed(action, func, given, kwargs) if action.operator else func(*given, **kwargs)
        quantized = result if row is None else self._quantized(row, result)
        if overwritten is not None:
            shown = _Overwrite.apply(overwritten, quantized)  # type: ignore[no-untyped-call]  # torch has no annotation for it
            quantized = shown if shown.dtype is quantized.dtype else quantized
        if action.returned and quantized is not result:
            self._originals[id(quantized)] = quantized, result
        return quantized

    def _attending(self, action: SiteAction) -> Callable[[str, int, torch.Tensor], torch.Tensor]:
        def quantized(part: str, index: int, x: torch.Tensor) -> torch.Tensor:
            row = action.attention.get((part, index))
            return x if row is None else self._twin(row, x)

        return quantized

    def _quantized(
        self, row: int, x: torch.Tensor, clip: tuple[float, float] = (-torch.inf, torch.inf), in_place: bool = False
    ) -> torch.Tensor:
        if self._bank.off and self._readers[row] <= self._bank.off:
            return (
                x if clip == (-torch.inf, torch.inf) else x.clamp(*(None if abs(v) == torch.inf else v for v in clip))
            )
        return self._bank.quantize(row, x, self._training, clip, in_place)

    def _twin(self, row: int, x: torch.Tensor) -> torch.Tensor:
        """The quantized form of a tensor, made once for all of its readers."""
        version = 0 if x.is_inference() else x._version
        key = id(x), row, torch.is_grad_enabled()
        known = self._twins.get(key)
        if known is None or known[0] is not x or known[1] != version:
            known = self._twins[key] = (x, version, self._quantized(row, x))
        return known[2]

    def _weighed(self, action: SiteAction, func: Any, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The operator with its weight quantized; in evaluation with the batch norm after it."""
        bank = self._bank
        if not bank.active and bank.tap is None:
            return func(*args, **kwargs)
        weight = _get(args, kwargs, action.weight)
        if not bank.active:
            return (
                self._tapped(action, func, args, kwargs, weight) if action.kind == "static" else func(*args, **kwargs)
            )
        if action.kind == "dynamic":
            x, bias = _get(args, kwargs, (0, "input")), _get(args, kwargs, (2, "bias"), None)
            return DynamicLinear(bank, action.operator).forward(x, weight, bias)
        if self._training:
            if torch.is_grad_enabled():
                bank.unfix(action.operator, action.norm is not None)
            refined = bank.refined.get(action.operator, PLAIN)
            _put(args, kwargs, action.weight, fake_quantize_weight(refined.scaled(weight), action.axis, bank.target))
            if refined.shift is not None and action.norm is None:
                bias = _get(args, kwargs, (2, "bias"), None)
                _put(args, kwargs, (2, "bias"), refined.shift if bias is None else bias + refined.shift)
            return func(*args, **kwargs)
        if action.operator in bank.off:
            if bank.smooth.keys() & {row for row in action.operands.values() if not self._readers[row] <= bank.off}:
                _put(args, kwargs, action.weight, bank.refined[action.operator].scaled(weight))
            return func(*args, **kwargs)
        if action.kind == "embedding":
            integers, scale = quantize_weight(weight, None, bank.target)
            _put(args, kwargs, action.weight, integers)
            return func(*args, **kwargs) * scale
        bias, (norm, epsilon) = _get(args, kwargs, (2, "bias"), None), self._norm_of(action)
        if action.norm is not None and epsilon is not None:
            self._absorbed.add(action.norm.site)
        axis, refined = action.axis or 0, bank.refined.get(action.operator, PLAIN)
        integers, scale, bias = fold_norm(weight, bias, axis, bank.target, norm, epsilon, refined)
        _put(args, kwargs, action.weight, integers * per_channel(scale, weight.ndim, axis))
        _put(args, kwargs, (2, "bias"), bias)
        if bank.tap is not None:
            return self._tapped(action, func, args, kwargs, weight)
        return func(*args, **kwargs)

    def _norm_of(self, action: SiteAction) -> tuple[tuple[torch.Tensor | None, ...], float | None]:
        """Tensors and epsilon of the batch norm that is folded into an operator; none in training."""
        if action.norm is None or self.root.get_submodule(action.norm.owner).training:
            return (), None
        return tuple(None if name is None else self._tensor(name) for name in action.norm.tensors), action.norm.epsilon

    def _tapped(
        self, action: SiteAction, func: Any, args: list[Any], kwargs: dict[str, Any], weight: torch.Tensor
    ) -> torch.Tensor:
        """The operator's result, shown to the bank's tap, which may replace it while quantization is active."""
        tap, result = self._bank.tap, func(*args, **kwargs)
        assert tap is not None
        function = getattr(func, "__qualname__", "").rpartition(".")[2]
        channel = result.ndim - 1 if function == "linear" else 1
        x = _get(args, kwargs, (0, "input"))

        def run(other: torch.Tensor) -> torch.Tensor:
            given, named = list(args), dict(kwargs)
            _put(given, named, action.weight, other)
            _put(given, named, (2, "bias"), None)
            found: torch.Tensor = func(*given, **named)
            return found

        shown = result
        norm, epsilon = ((), None) if self._bank.active else self._norm_of(action)
        if epsilon is not None:
            gamma, beta, mean, variance = norm
            shown = torch.nn.functional.batch_norm(result.movedim(channel, 1), mean, variance, gamma, beta, eps=epsilon)
            shown = shown.movedim(1, channel)
        seen = SeenOperator(action.operator, weight, action.axis or 0, x, run, shown, channel, function)
        replaced = tap.seen(seen)
        return replaced if self._bank.active else result

    def _tensor(self, name: str) -> torch.Tensor:
        owner, _, key = name.rpartition(".")
        found: torch.Tensor = getattr(self.root.get_submodule(owner), key)
        return found

    @contextmanager
    def _repeated(self) -> Iterator[None]:
        """Let activation checkpoints that are made inside the block run what they run again in the same way."""
        if not (self._training and torch.is_grad_enabled()):
            yield
            return
        module: Any = torch.utils.checkpoint
        inner, reentrant = module._checkpoint_without_reentrant_generator, module.CheckpointFunction

        def generator(function: Any, *args: Any, **kwargs: Any) -> Any:
            return inner(self._again(function), *args, **kwargs)

        class Reentrant:
            @staticmethod
            def apply(function: Any, *args: Any) -> Any:
                return reentrant.apply(self._again(function, first=True), *args)

        with (
            swapped(module, "_checkpoint_without_reentrant_generator", generator),
            swapped(module, "CheckpointFunction", Reentrant),
        ):
            yield

    def _again(self, function: Callable[..., Any], first: bool = False) -> Callable[..., Any]:
        """A function that runs again, in backward, at the call sites of the present run.

        Args:
            function: what an activation checkpoint runs.
            first: whether its first call belongs to the present run.
        """
        path, counts = self.path, self.counts.copy()

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal first
            if first:
                first = False
                return function(*args, **kwargs)
            self.path, self.counts, self._training = path, counts.copy(), True
            learning, self._bank.learning = self._bank.learning, False  # it was observed the first time
            try:
                with self.active():
                    return function(*args, **kwargs)
            finally:
                self._bank.learning = learning
                self._clear()

        return run


class _Overwrite(torch.autograd.Function):
    """Overwrite a tensor by another; the gradient goes to the other."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(x)
        return x.copy_(other)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, grads[0]


def _first_argument(*args: Any, **kwargs: Any) -> Any:
    return args[0] if args else kwargs["input"]


def _get(args: list[Any], kwargs: Mapping[str, Any], place: tuple[int, str], *default: Any) -> Any:
    if place[0] < len(args):
        return args[place[0]]
    return kwargs.get(place[1], *default) if default else kwargs[place[1]]


def _put(args: list[Any], kwargs: dict[str, Any], place: tuple[int, str], value: Any) -> None:
    if place[0] < len(args):
        args[place[0]] = value
    else:
        kwargs[place[1]] = value


def _on_statistics(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``functional.batch_norm`` on its running statistics, if it has any."""
    given = list(args)
    if _get(given, kwargs, (1, "running_mean"), None) is not None:
        _put(given, kwargs, (5, "training"), False)
    return func(*given, **kwargs)
