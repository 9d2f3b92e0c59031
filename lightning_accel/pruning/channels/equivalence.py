"""Verify for each group that removing channels computes the same as zeroing them.

On a copy with random weights in float64, channels are set to zero, then removed; the outputs must be equal. Groups that fail are
kept with the reason, e.g. an operation that normalizes over channels, a forward with a fixed number of channels, or a misread
dependency. Where layers run in train mode only, such as auxiliary heads, the outputs of that mode must be equal, too.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import isfinite

import torch
from torch import nn

from lightning_accel.calls.batches import Call
from lightning_accel.calls.copies import converted, copy_of, few_samples, layers_run, outputs_of
from lightning_accel.core.globs import select
from lightning_accel.pruning.channels.groups import Candidate, Group, candidate_groups
from lightning_accel.pruning.channels.layers import FIXED_HEADS, check_copyable, makes_channels
from lightning_accel.pruning.channels.slices import Chosen, removal_of, removed, spread_units
from lightning_accel.pruning.weights.layers import is_hugging_face_conv1d

NOT_RUN = "forward doesn't run it"
_OTHERWISE = "without some of its channels the others compute something else"
_EXACT, _ROUNDED = (
    1e-9,
    1e-4,
)  # tolerance as a share of the output's range: for float64, and for a forward that requires float32


class _Reference:
    """A copy of a module with random weights, to verify the removal of groups."""

    def __init__(self, module: nn.Module, path: str, call: Call) -> None:
        call = few_samples(call, module.get_submodule(path))
        generator = torch.Generator().manual_seed(0)

        def noise(tensor: torch.Tensor) -> torch.Tensor:
            return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

        def cpu(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.detach().to("cpu", copy=True)
            return tensor.double() if tensor.is_floating_point() else tensor

        self._call = converted(call, lambda t: noise(t) if t.is_floating_point() else cpu(t))
        self.module = copy_of(module, cpu)
        self._part = self.module.get_submodule(path)
        for parameter in self.module.parameters():
            if parameter.is_floating_point():  # initial weights may be constant, which would hide errors
                spread = float(parameter.data.std()) if parameter.numel() > 1 else 0.0
                parameter.data += noise(parameter.data) * max(spread if isfinite(spread) else 0.0, 0.05)
        for part in self.module.modules():
            if isinstance(getattr(part, "running_mean", None), torch.Tensor):
                part.running_mean.add_(0.1 * noise(part.running_mean))  # type: ignore[operator, arg-type]
                part.running_var.add_(noise(part.running_var).abs())  # type: ignore[operator, arg-type]
        self._tolerance = _EXACT
        try:
            self.outputs()
        except RuntimeError:  # the forward casts to float32
            self._tolerance = _ROUNDED
            self.module.float()
            self._call = converted(self._call, lambda t: t.float() if t.is_floating_point() else t)
            self.outputs()
        trained, evaluated = self._layers_run(training=True), self._layers_run(training=False)
        self._trains_more, self._trains_all = bool(trained - evaluated), trained > evaluated

    def _layers_run(self, training: bool) -> set[str]:
        """Layers that run in a mode; empty if the forward fails on random inputs."""
        try:
            return layers_run(self._part, self._call, training)
        except Exception:  # an error of the user's code, unrelated to removal
            return set()

    def outputs(self) -> list[torch.Tensor]:
        """Outputs of the forward."""
        return outputs_of(self._part, self._call)

    def traced(self) -> list[torch.Tensor]:
        """Outputs of the mode that runs all layers, to follow the operations that lead to them."""
        return outputs_of(self._part, self._call, self._trains_all)

    def _compared(self) -> Iterator[tuple[str, list[torch.Tensor]]]:
        """Outputs that must stay as they are, and the mode in words."""
        yield "", [t.detach() for t in self.outputs()]
        if self._trains_more:
            yield " in train mode", [t.detach() for t in outputs_of(self._part, self._call, training=True)]

    def failure(self, groups: Sequence[Group], share: float) -> str:
        """Reason why a share of the units of all groups can't be removed at once; empty if it can."""
        chosen: Chosen = {i: spread_units(g.units, share, i) for i, g in enumerate(groups)}
        removal = removal_of(self.module, groups, chosen)
        with removed(self.module, removal, physically=False):
            expected = dict(self._compared())
        found: dict[str, list[torch.Tensor]] = {}
        try:
            with removed(self.module, removal):
                found.update(self._compared())
        except Exception as error:  # any error of the forward is a reason to keep the channels
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            return f"forward needs all of its channels{' in train mode' if found else ''}: {said}"
        for where, outputs in found.items():
            if [t.shape for t in outputs] != [t.shape for t in expected[where]]:
                return f"it reaches the output{where}"
            for output, wanted in zip(outputs, expected[where], strict=True):
                span = float(wanted.max() - wanted.min()) if wanted.numel() > 1 else float(wanted.abs().sum())
                if not bool((output - wanted).abs().max() <= self._tolerance * span):
                    return f"{_OTHERWISE}{where}"
        return ""


def find_groups(
    module: nn.Module, call: Call, path: str = "", include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> list[Group]:
    """Find the groups of channels of a module, each verified to be removable or kept with the reason.

    Args:
        module: any module; not changed.
        call: arguments of a ``forward``; values of floating-point tensors don't matter.
        path: dotted path of the submodule that is called; empty for the module itself.
        include: globs of layers whose channels may be removed; empty means all.
        exclude: globs of layers whose channels are kept; takes precedence over ``include``.

    Returns:
        Groups in the order of the layers.

    Raises:
        InvalidArgumentError: a glob matches nothing; the forward can't be run in eval mode; weights are computed by old hooks.
    """
    check_copyable(module)
    reference = _Reference(module, path, call)
    candidates = candidate_groups(reference.module, reference.traced)
    candidates += [Candidate(group, (), ()) for group in _unseen(reference, candidates, path)]
    layers = list(dict.fromkeys(layer for c in candidates for layer in c.group.layers))
    allowed = set(select(layers, include, exclude, "layer with channels"))
    groups, open_ = [c.group for c in candidates], []
    for i, candidate in enumerate(candidates):
        excluded = [layer for layer in candidate.group.layers if layer not in allowed]
        if excluded:
            first = candidate.group.layers[0]
            reason = "it is excluded" if first in excluded else f"`{excluded[0]}`, which shares them, is excluded"
            groups[i] = replace(groups[i], kept=reason)
        elif not groups[i].kept:
            open_.append(i)
    proven = _prove(reference, candidates, groups, open_)
    for i in open_:
        if i not in proven:
            groups[i] = replace(groups[i], kept=groups[i].kept or "it can't leave together with the others")
    return groups


def _unseen(reference: _Reference, candidates: Sequence[Candidate], path: str) -> list[Group]:
    """Layers without a group, each as a kept group."""
    seen = {layer for candidate in candidates for layer in candidate.group.layers}
    layers = {
        name: layer.weight
        for name, layer in reference.module.named_modules()
        if name not in seen
        and makes_channels(reference.module, name)
        and f"{name}.".startswith(f"{path}." if path else "")
    }
    if not layers:
        return []
    total = torch.stack([t.sum() for t in reference.traced() if t.requires_grad]).sum()
    used = torch.autograd.grad(total, list(layers.values()), allow_unused=True)
    groups = []
    for (name, weight), gradient in zip(layers.items(), used, strict=True):
        reason = NOT_RUN if gradient is None else "the operations around it can't be followed"
        if isinstance(reference.module.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            reason = FIXED_HEADS
        units = weight.shape[1 if is_hugging_face_conv1d(reference.module.get_submodule(name)) else 0]
        groups.append(Group(name, (name,), units, units, 1, {}, frozenset(), frozenset(), {}, reason))
    return groups


def _prove(
    reference: _Reference, candidates: Sequence[Candidate], groups: list[Group], wanted: Sequence[int]
) -> list[int]:
    """Positions of groups that can be removed together; tests all at once, otherwise halves and their union."""
    if not wanted:
        return []
    if len(wanted) == 1:
        return _prove_one(reference, candidates[wanted[0]], groups, wanted[0])
    for i in wanted:
        groups[i] = replace(groups[i], attributes=candidates[i].variants[0])
    if not reference.failure([groups[i] for i in wanted], 0.5):
        return list(wanted)
    half = len(wanted) // 2
    proven = _prove(reference, candidates, groups, wanted[:half]) + _prove(reference, candidates, groups, wanted[half:])
    if len(proven) < 2 or not reference.failure([groups[i] for i in proven], 0.5):
        return proven
    accepted: list[int] = []
    for i in proven:
        if not reference.failure([groups[j] for j in (*accepted, i)], 0.5):
            accepted.append(i)
    return accepted


def _prove_one(reference: _Reference, candidate: Candidate, groups: list[Group], i: int) -> list[int]:
    reason = ""
    for attributes in candidate.variants:
        group = replace(groups[i], attributes=attributes)
        reasons = [reference.failure([group], share) for share in (0.0, 0.5)]
        if not any(reasons):
            groups[i] = group
            return [i]
        reason = reason or next(r for r in reasons if r)
    if reason == _OTHERWISE and candidate.norms:
        reason = f"`{candidate.norms[0]}` normalises over its channels: without some the others change"
    groups[i] = replace(groups[i], kept=reason)
    return []
