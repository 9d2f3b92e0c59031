"""Check in the first training batches that the modules to quantize are called."""

from typing import Any

import lightning as L
from torch import nn

from lightning_accel.calls.contexts import REPLACED
from lightning_accel.core.patching import Patches
from lightning_accel.errors import InvalidArgumentError


class CallWatch:
    """Checks during one training batch that the modules to quantize are called.

    A mistake is raised in the first step instead of at ``start``, which may be half a run later.

    Args:
        pl_module: the LightningModule.
        paths: of the modules to quantize.
        called: names of what was called in earlier batches; those of this one are added.
    """

    def __init__(self, pl_module: L.LightningModule, paths: list[str], called: set[str]) -> None:
        self._paths = paths
        self._called = called
        self._patches = Patches()
        for path in paths:
            self._wrap(path, pl_module.get_submodule(path))
        for name, child in pl_module.named_children():
            handle = child.register_forward_pre_hook(lambda *_, name=name: self._called.add(name))
            self._patches.on_undo(handle.remove)

    def _wrap(self, path: str, module: nn.Module) -> None:
        """Replace ``forward`` on the instance: a hook would miss ``self.forward(x)``."""
        forward = module.forward

        def seen(*args: Any, **kwargs: Any) -> Any:
            self._called.add(path)
            return forward(*args, **kwargs)

        setattr(seen, REPLACED, vars(module).get("forward"))
        self._patches.swap(module, "forward", seen)

    def remove(self) -> None:
        """Remove all hooks."""
        self._patches.undo()

    @property
    def complete(self) -> bool:
        """Whether all modules were called."""
        return self._called.issuperset(self._paths)

    def check(self) -> None:
        """Raise unless all modules were called.

        Raises:
            InvalidArgumentError: one was not called; the message names the submodules that were.
        """
        for path in self._paths:
            if path not in self._called:
                what = f"`{path}`" if path else "the module's `forward`"
                called = sorted(name for name in self._called if name not in self._paths)
                raise InvalidArgumentError(
                    f"Argument `module` must name a module that `training_step` calls, but got {what}, which it did not call. "
                    f"It called: {', '.join(called) or 'no submodule'}. "
                    + (f'Use QuantizationAwareTraining(module="{called[0]}").' if called else "")
                )
