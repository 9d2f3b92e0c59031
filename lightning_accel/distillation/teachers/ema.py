"""Teacher that is an exponential moving average of the student."""

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.calls.contexts import own_forwards
from lightning_accel.core import structure
from lightning_accel.core.arguments import checked
from lightning_accel.core.patching import swapped
from lightning_accel.errors import InvalidArgumentError, RunError


class EMATeacher(nn.Module):
    """Exponential moving average of the student (https://arxiv.org/abs/1703.01780): self-distillation.

    Built from the student when ``fit`` begins, without its quantization, so it stays float while the student is
    quantized. It is part of the training's state: the checkpoint keeps it beside the student, and a resume goes on with it.

    Args:
        decay: decay of the average per optimizer step, in [0, 1).
        warmup: whether the first steps use ``min(decay, (1 + step) / (10 + step))``, so that the untrained start decays fast.

    Raises:
        InvalidArgumentError: ``decay`` is out of its range.

    Example:
        >>> EMATeacher(decay=0.99).decay
        0.99
    """

    layers_in = "network"

    @checked()
    def __init__(self, decay: float = 0.999, warmup: bool = True) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise InvalidArgumentError(f"Argument `decay` must be in [0, 1), but got {decay}.")
        self.decay, self.warmup = decay, warmup
        self.network: nn.Module | None = None
        self._method, self._path = "forward", ""

    def begin_(self, student: nn.Module, path: str, method: str) -> None:
        """Copy the submodule of a student whose ``method`` computes the logits."""
        part = student.get_submodule(path)
        attached = swapped(part, "_trainer", None) if "_trainer" in vars(part) else nullcontext()
        with own_forwards(part), attached:  # a run isn't part of the network
            self.network = copy.deepcopy(part).eval().requires_grad_(False)
        self._path, self._method = path, method

    def averaged(self, student: nn.Module) -> nn.Module:
        """The submodule of a student that is averaged."""
        return student.get_submodule(self._path)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the averaged network."""
        if self.network is None:
            raise RunError(
                "An EMATeacher exists only in `fit`: it is created from the student at the start of training."
            )
        return getattr(self.network, self._method)(*args, **kwargs)

    def change_(self, change: structure.Change) -> None:
        """Remove the channels that were removed from the student; an average of a submodule is restarted at the next step."""
        if self.network is not None and not self._path:
            structure.apply(self.network, change)

    @torch.no_grad()
    def update_(self, student: nn.Module, step: int, names: frozenset[str] | None = None) -> None:
        """Update the average after an optimizer step.

        Args:
            student: as in :meth:`begin_`. A change of its shapes restarts the average.
            step: number of steps before this one.
            names: parameters and buffers of :meth:`averaged` to update, where several optimizers take their steps; ``None``: all.
        """
        ours, theirs = self._state(self.network), self._state(self.averaged(student))
        if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
            self.begin_(student, self._path, self._method)
            return
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        ours = {k: v for k, v in ours.items() if names is None or k in names}
        floats = [k for k, v in ours.items() if v.is_floating_point()]
        torch._foreach_lerp_([ours[k] for k in floats], [theirs[k] for k in floats], 1 - decay)
        for key, value in ours.items():
            if not value.is_floating_point():
                value.copy_(theirs[key])

    @staticmethod
    def _state(network: nn.Module | None) -> dict[str, Tensor]:
        return {} if network is None else {**dict(network.named_parameters()), **dict(network.named_buffers())}
