"""Observers: learn the ranges of activations from training data."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.arithmetic.fake_quant import activation_qparams, straight_through, straight_through_
from lightning_accel.quantization.arithmetic.targets import Target

METHODS = ("moving_average", "min_max", "percentile", "mse", "lsq")
PERCENTILE = 99.99
_SAMPLE = 2**16  # sample size of percentile and mse
_CPU = torch.device("cpu")
_NO_CLIP = (-torch.inf, torch.inf)


def _stride(count: int) -> int:
    """Stride of a sample of values, coprime to the tensor's size, so that no channel is skipped."""
    stride = max(1, count // _SAMPLE)
    while math.gcd(stride, count) > 1:
        stride += 1
    return stride


class Ranks(Protocol):
    """Reductions over the ranks of a distributed run."""

    def extremes(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest ``low`` and largest ``high`` of all ranks."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over all ranks."""


@dataclass(frozen=True)
class Refined:
    """What calibration has found for an operator beyond the nearest integers of its weight.

    Args:
        integers: of the weight, int8; ``None``: the nearest ones.
        shift: added to each output channel ``(C,)``; ``None``: nothing.
        factor: of the weights of each input ``(inputs,)``, whose values the bank divides by it; ``None``: 1.
    """

    integers: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    factor: torch.Tensor | None = None

    def scaled(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight times ``factor``."""
        return weight if self.factor is None else weight * self.factor

    def to(self, device: torch.device) -> "Refined":
        """On another device."""
        return Refined(*(None if t is None else t.to(device) for t in self.tensors().values()))

    def tensors(self) -> dict[str, torch.Tensor | None]:
        """The tensors by name."""
        return {"integers": self.integers, "shift": self.shift, "factor": self.factor}


PLAIN = Refined()


class Tap(Protocol):
    """Sees the operators with weights while calibration runs, and may replace their results."""

    def seen(self, operator: "SeenOperator") -> torch.Tensor:
        """Called with each operator; returns its result."""


@dataclass(frozen=True)
class SeenOperator:
    """An operator with a weight in one evaluation.

    Args:
        name: in the plan.
        weight: float, channels along ``axis``.
        axis: output channels of the weight.
        x: input; quantized, if quantization is active.
        run: from a weight to the operator's result, without bias and batch norm.
        result: with bias, and with the batch norm after it.
        channel: dimension of the output channels in the result.
        function: name of the torch function, such as ``"linear"``.
    """

    name: str
    weight: torch.Tensor
    axis: int
    x: torch.Tensor
    run: Callable[[torch.Tensor], torch.Tensor]
    result: torch.Tensor
    channel: int
    function: str


class RangeBank:
    """Ranges of all activations of one captured module, updated together once per step.

    They are stored in vectors outside of the module, whose ``state_dict`` is not changed.

    Args:
        keys: names of the quantized tensors, e.g. ``"layer1.0.conv1:input"``.
        target: arithmetic to simulate.
        method: how a range is computed: ``"moving_average"`` of each batch's smallest and largest; ``"min_max"``
            of all batches; ``"percentile"``: range of 99.99 % of a batch, averaged over batches; ``"mse"``: the
            range with the smallest squared rounding error, averaged over batches; ``"lsq"``: starts as ``"mse"``, then the
            scale is learned by gradient (https://arxiv.org/abs/1902.08153).
        momentum: weight of a new batch in the moving average.
    """

    def __init__(
        self,
        keys: list[str],
        target: Target,
        method: str = "moving_average",
        momentum: float = 0.05,
    ) -> None:
        if method not in METHODS:
            raise InvalidArgumentError(f"Argument `ranges` must be one of {METHODS}, but got {method!r}.")
        self.keys, self.target, self.method, self.momentum = keys, target, method, momentum
        self.active = False  # fake-quantization is active
        self.learning = False  # forwards in train mode are observed
        self.calibrating = False  # forwards in eval mode are observed too
        self.frozen = False  # ranges are fixed
        self.norms_frozen = False  # batch norms use their running statistics in training
        self.off: frozenset[str] = frozenset()  # operators that temporarily compute in float
        self.refined: dict[str, Refined] = {}  # by operator
        self.smooth: dict[
            int, torch.Tensor
        ] = {}  # row -> what its channels (the last dimension) are multiplied by before quantization
        self.tap: Tap | None = None
        self.low = torch.zeros(len(keys))
        self.high = torch.zeros(len(keys))
        self.batches = 0  # batches seen so far
        self.observed = torch.zeros(len(keys), dtype=torch.bool)  # tensors that had values in one of them
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._steps: torch.Tensor | None = None  # logarithms of learned scales
        self._moments: list[torch.Tensor] = []
        self._updates = 0
        self._unfixed = False
        self.refresh()

    @property
    def watches(self) -> bool:
        """Whether training batches still update the ranges."""
        return not self.frozen and not (self.active and self.method in ("percentile", "mse", "lsq"))

    def refresh(self) -> None:
        """Derive scales and zero points from the ranges."""
        self.scales, self.zero_points = activation_qparams(self.low, self.high, self.target)
        if self._steps is not None:
            self.scales = self._steps.detach().clone()
        self._grids: dict[tuple[int, tuple[float, float]], tuple[torch.Tensor, int, int, tuple[float, float]]] = {}
        self._values = (self.scales.tolist(), self.zero_points.tolist())

    def _grid(self, index: int, clip: tuple[float, float]) -> tuple[torch.Tensor, int, int, tuple[float, float]]:
        """Scale, smallest and largest integer relative to the zero point, and the limits of the gradient."""
        found = self._grids.get((index, clip))
        if found is None:
            step, zero = self._values[0][index], self._values[1][index]
            low, high = self.target.limits[0] - zero, self.target.limits[1] - zero
            edges = ((low - 0.5) * step, (high + 0.5) * step)
            if clip != _NO_CLIP:
                scale = self.scales[index]
                low = max(low, int((torch.tensor(clip[0], device=scale.device) / scale).round()))
                if clip[1] != torch.inf:
                    high = min(high, int((torch.tensor(clip[1], device=scale.device) / scale).round()))
                edges = max(edges[0], clip[0]), min(edges[1], clip[1])
            found = self._grids[index, clip] = (self.scales[index], low, high, edges)
        return found

    def to(self, device: torch.device) -> None:
        """Move to the device of the activations."""
        if self.low.device != device:
            self.low, self.high, self.observed = self.low.to(device), self.high.to(device), self.observed.to(device)
            if self._steps is not None:
                self._steps = self._steps.detach().to(device).requires_grad_()
                self._moments = [m.to(device) for m in self._moments]
            self.refined = {name: refined.to(device) for name, refined in self.refined.items()}
            self.smooth = {row: factor.to(device) for row, factor in self.smooth.items()}
            self.refresh()

    def quantize(
        self,
        index: int,
        x: torch.Tensor,
        training: bool,
        clip: tuple[float, float] = _NO_CLIP,
        in_place: bool = False,
    ) -> torch.Tensor:
        """Fake-quantize tensor ``index``; in training its range is recorded first.

        Args:
            index: row of the tensor.
            x: any shape.
            training: whether the forward pass is in train mode.
            clip: limits to clip ``x`` to first, with zero gradient outside; replaces a fused activation.
            in_place: whether ``x`` itself gets the values, see :meth:`overwritable`.
        """
        if (training or self.calibrating) and self.learning and self.watches:
            self._note(index, x.detach(), clip)
        if not self.active:
            return x if clip == _NO_CLIP else x.clamp(*(None if abs(v) == torch.inf else v for v in clip))
        if index in self.smooth:
            x = x.float() * self.smooth[index]
        scale, low, high, edges = self._grid(index, clip)
        learn = training and self._steps is not None and not self.frozen
        if learn:
            scale = self._steps[index]  # type: ignore[index]
        if in_place:
            return straight_through_(x, scale, low, high, edges)
        return straight_through(x if x.dtype is torch.float32 else x.float(), scale, low, high, edges, learn)

    def overwritable(self, x: torch.Tensor) -> bool:
        """Whether a tensor can be fake-quantized in place, while fake-quantization is active."""
        return x.dtype is torch.float32 and not x._is_view() and not x.is_inference() and self._steps is None

    def _note(self, index: int, x: torch.Tensor, clip: tuple[float, float]) -> None:
        if x.numel() == 0:  # an expert without tokens, a cache before the first one
            return
        low, high = x.aminmax()
        if self.method in ("percentile", "mse", "lsq") and bool(torch.isfinite(low) & torch.isfinite(high)):
            flat = x.flatten()
            flat = flat[:: _stride(flat.numel())].float().clamp(*clip)
            if self.method == "percentile":
                low, high = torch.quantile(flat, flat.new_tensor([1 - PERCENTILE / 100, PERCENTILE / 100])).unbind()
            else:
                low, high = self.least_error(flat)
        elif clip != _NO_CLIP:
            low, high = low.clamp(*clip), high.clamp(*clip)
        if index in self._seen:
            low, high = torch.minimum(low, self._seen[index][0]), torch.maximum(high, self._seen[index][1])
        self._seen[index] = (low, high)

    def least_error(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The range with the smallest mean squared rounding error among 40 proportionally shrunk ranges."""
        shrunk = torch.linspace(0.2, 1.0, 40, device=values.device)
        low, high = (bound * shrunk for bound in values.aminmax())
        scales, zeros = activation_qparams(low, high, self.target)
        smallest, largest = self.target.limits
        errors = []
        for scale, zero in zip(scales, zeros, strict=True):
            rounded = torch.div(values, scale).round_().clamp_(smallest - zero, largest - zero).mul_(scale)
            errors.append((rounded - values).square_().mean())
        best = torch.stack(errors).argmin()
        return low[best], high[best]

    def update(self, ranks: Ranks | None = None) -> None:
        """Merge the ranges recorded since the last call into the current ranges.

        Args:
            ranks: reductions over the ranks of a distributed run; every rank must call this.

        Raises:
            InvalidArgumentError: a range isn't finite; the message names the tensor.
        """
        if not self.watches or (not self._seen and ranks is None):
            self._seen.clear()
            return
        low, high, first = self.low.clone(), self.high.clone(), ~self.observed
        if self._seen:
            index = torch.tensor(list(self._seen), device=low.device)
            low[index] = torch.stack([pair[0].float() for pair in self._seen.values()])
            high[index] = torch.stack([pair[1].float() for pair in self._seen.values()])
            self.observed[index] = True
        self._seen.clear()
        if ranks is not None:
            low, high = ranks.extremes(low, high)
            self.observed |= (low != 0) | (high != 0)  # on another rank
        finite = torch.isfinite(low) & torch.isfinite(high)
        if not bool(finite.all()):
            names = [self.keys[i] for i in torch.nonzero(~finite).flatten().tolist()]
            raise InvalidArgumentError(
                f"Activations must be finite while ranges are learned, but got NaN or Inf first at {names[0]}."
            )
        if self.method == "min_max":
            merged = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            weight = self.momentum if self.method == "moving_average" else 1 / (self.batches + 1)
            merged = torch.lerp(self.low, low, weight), torch.lerp(self.high, high, weight)
        # A tensor's first values are its range: there is nothing yet that they could be merged with.
        self.low, self.high = torch.where(first, low, merged[0]), torch.where(first, high, merged[1])
        self.batches += 1
        self.refresh()

    def check_observed(self) -> None:
        """Check that every tensor had values while ranges were learned.

        Raises:
            InvalidArgumentError: one had none; the message names it.
        """
        missing = [key for key, seen in zip(self.keys, self.observed.tolist(), strict=True) if not seen]
        if missing and self.batches:
            raise InvalidArgumentError(
                f"Activations must have values while ranges are learned, but got none, or empty tensors only, at {missing[:5]}"
                f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}: an expert without tokens, a cache before its first "
                "entry, a branch that was not taken. Give more batches or other samples, or name the operators in `exclude`."
            )

    def unfix(self, operator: str, normed: bool) -> None:
        """Let training decide what calibration has fixed for an operator: its integers, and its shift before a batch norm.

        Integers that stayed would be exported in place of the trained weight's; a batch norm takes a shift of its input back.

        Args:
            operator: name in the plan.
            normed: whether a batch norm follows.
        """
        refined = self.refined.get(operator, PLAIN)
        shift = None if normed else refined.shift
        if refined.integers is None and shift is refined.shift:
            return
        self.refined[operator] = replace(refined, integers=None, shift=shift)
        if not self._unfixed:
            self._unfixed = True
            warnings.warn(
                'Training goes on after `effort="standard"` or "high": the integers that calibration has chosen, and its shifts before '
                "batch norms, are dropped, since the weights change. Quantize again after training to choose new ones.",
                stacklevel=2,
            )

    def refined_state(self) -> "tuple[dict[str, Refined], dict[int, torch.Tensor], torch.Tensor, torch.Tensor]":
        """What steps after calibration change, to undo one by :meth:`load_refined`."""
        return dict(self.refined), dict(self.smooth), self.low.clone(), self.high.clone()

    def load_refined(
        self, state: "tuple[dict[str, Refined], dict[int, torch.Tensor], torch.Tensor, torch.Tensor]"
    ) -> None:
        """Restore what :meth:`refined_state` returned."""
        self.refined, self.smooth, self.low, self.high = state
        self.refresh()

    def activate(self) -> None:
        """Activate fake-quantization."""
        self.active = True
        if self.method == "lsq" and self._steps is None:
            self._steps = self.scales.clone().requires_grad_()
            self._moments = [torch.zeros_like(self.scales), torch.zeros_like(self.scales)]

    def learn_steps(self, lr: float, ranks: Ranks | None = None) -> None:
        """One step of Adam (https://arxiv.org/abs/1412.6980) on the logarithms of the scales, with the recorded gradients.

        Args:
            lr: relative change of a scale in one step.
            ranks: reductions over the ranks of a distributed run; every rank must call this.
        """
        if self._steps is None or self.frozen:
            return
        grad = torch.zeros_like(self._moments[0]) if self._steps.grad is None else self._steps.grad
        grad = grad if ranks is None else ranks.mean(grad)
        self._steps.grad = None
        if not bool(torch.isfinite(grad).all()):
            return  # a gradient scaler skips this step for the weights too
        grad = grad * self._steps.detach()
        first, second = self._moments
        first.lerp_(grad, 0.1)
        second.lerp_(grad.square(), 0.001)
        self._updates += 1
        mean, deviation = first / (1 - 0.9**self._updates), (second / (1 - 0.999**self._updates)).sqrt()
        with torch.no_grad():
            self._steps.mul_(torch.exp(-lr * mean / (deviation + 1e-12)))
        self.refresh()

    def forget_gradients(self) -> None:
        """Discard the gradients of learned scales that were recorded since their last step."""
        if self._steps is not None:
            self._steps.grad = None

    def forget(self) -> None:
        """Discard the ranges recorded since the last update."""
        self._seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """Ranges by name, on the CPU."""
        return {
            "keys": list(self.keys),
            "low": self.low.cpu(),
            "high": self.high.cpu(),
            "observed": self.observed.cpu(),
            "batches": self.batches,
            "active": self.active,
            "frozen": self.frozen,
            "norms_frozen": self.norms_frozen,
            "steps": None if self._steps is None else self._steps.detach().cpu(),
            "step_gradients": None if self._steps is None or self._steps.grad is None else self._steps.grad.cpu(),
            "moments": [m.cpu() for m in self._moments],
            "updates": self._updates,
            "refined": {name: refined.to(_CPU).tensors() for name, refined in self.refined.items()},
            "smooth": {row: factor.cpu() for row, factor in self.smooth.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore saved ranges.

        Raises:
            InvalidArgumentError: they belong to other tensors.
        """
        if state["keys"] != self.keys:
            raise InvalidArgumentError(
                f"Argument `ckpt_path` must hold ranges of this network's tensors, but got {len(state['keys'])} ranges for "
                f"{len(self.keys)} tensors, or other names. Resume with the same model and `include`/`exclude`."
            )
        device = self.low.device
        self.low, self.high = state["low"].to(device), state["high"].to(device)
        known = state.get("observed", torch.zeros_like(self.low, dtype=torch.bool)).to(device)
        self.observed = known | (self.low != 0) | (self.high != 0)
        self.batches, self.active = state["batches"], state["active"]
        self.frozen, self.norms_frozen = state["frozen"], state["norms_frozen"]
        self._steps = None if state["steps"] is None else state["steps"].to(device).requires_grad_()
        if self._steps is not None and state.get("step_gradients") is not None:  # being accumulated over batches
            self._steps.grad = state["step_gradients"].to(device)
        self._moments = [m.to(device) for m in state["moments"]]
        self._updates = state["updates"]
        self.refined = {name: Refined(**found).to(device) for name, found in state["refined"].items()}
        self.smooth = {row: factor.to(device) for row, factor in state["smooth"].items()}
        self.refresh()
