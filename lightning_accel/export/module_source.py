"""Build a module and an example call from command-line arguments."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import numpy as np
import torch
from torch import nn

from lightning_accel.calls.batches import Call, canonical_call
from lightning_accel.calls.contexts import own_signature
from lightning_accel.core.packages import both
from lightning_accel.core.structure import constructor_arguments, load_into, read_checkpoint
from lightning_accel.errors import InvalidArgumentError

_Module = TypeVar("_Module", bound=nn.Module)


def build_module(class_path: str, ckpt: str | Path | None, init: Mapping[str, Any]) -> nn.Module:
    """Build a module from its class path, with a checkpoint's weights if given, in eval mode.

    Args:
        class_path: ``package.module.Class``.
        ckpt: a Lightning checkpoint; its hyper-parameters are used.
        init: constructor arguments; they go over the hyper-parameters.

    Raises:
        MissingFileError: there is no such checkpoint.
        InvalidArgumentError: there is no such class, it isn't a module or can't be built, or the checkpoint doesn't fit.
    """
    where, _, name = class_path.rpartition(".")
    try:
        cls = getattr(import_module(where), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidArgumentError(
            f"Argument `module` must be the path of a class like package.module.Class, but got {class_path!r}: {error}."
        ) from error
    except Exception as error:  # whatever the user's file does when it is read
        raise InvalidArgumentError(
            f"Argument `module` must be in a file that can be imported, but got {class_path!r}: {_told(error)}."
        ) from error
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise InvalidArgumentError(
            f"Argument `module` must be a LightningModule or nn.Module, but got {class_path!r}, which is none."
        )
    if ckpt is not None:
        if not issubclass(cls, both(L.LightningModule)):
            raise InvalidArgumentError(
                f"Argument `--ckpt-path` must be left out for {class_path}, which is no LightningModule, but got {str(ckpt)!r}."
            )
        return _from_checkpoint(cls, class_path, ckpt, init)
    _check_arguments(cls, class_path, init)
    return _built(partial(cls, **init), class_path, init).eval()


def _from_checkpoint(
    cls: type[L.LightningModule], class_path: str, ckpt: str | Path, init: Mapping[str, Any]
) -> nn.Module:
    checkpoint = read_checkpoint(ckpt)
    arguments = constructor_arguments(cls, checkpoint, init)
    _check_arguments(cls, class_path, arguments)
    module = _built(partial(cls, **arguments), class_path, arguments)
    module.configure_model()
    try:
        load_into(module, checkpoint)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise InvalidArgumentError(
            f"Argument `--ckpt-path` must be a checkpoint of {class_path} built with {arguments}, but got {str(ckpt)!r}: "
            f"{' '.join(str(error).split())[:400]}"
        ) from error
    return module.eval()


def _check_arguments(cls: type[nn.Module], class_path: str, arguments: Mapping[str, Any]) -> None:
    try:
        signature(cls).bind(**arguments)
    except TypeError as error:
        raise InvalidArgumentError(
            f"Argument `--init` must give what {class_path}{signature(cls)} needs, but got {dict(arguments)}: {error}. Pass --init "
            "name=value, or --ckpt-path, whose hyper-parameters are used if it has any."
        ) from error


def _built(build: Callable[[], _Module], class_path: str, arguments: Mapping[str, Any]) -> _Module:
    try:
        return build()
    except Exception as error:  # whatever the user's constructor raises
        raise InvalidArgumentError(
            f"Argument `--init` must be what {class_path} can be built with, but got {dict(arguments)}: {_told(error)}."
        ) from error


def _told(error: BaseException) -> str:
    """Text of an error in the user's code, with the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {' '.join(str(error).split())} (at {frames[-1].filename}:{frames[-1].lineno})"


def build_call(module: nn.Module, shapes: Sequence[str], arrays: Mapping[str, np.ndarray] | None) -> Call:
    """An example call of a module's ``forward``: from arrays by name, from shapes, or its ``example_input_array``.

    Args:
        module: module whose signature names the inputs.
        shapes: ``NAME=2x3x32x32``, or ``NAME=2x128:int64``; floats are drawn from a normal distribution, integers are 0 and 1.
        arrays: data by input name.

    Raises:
        InvalidArgumentError: a shape that can't be read, arguments that don't fit, or none of the three.
    """
    if arrays is not None or shapes:
        given = {name: torch.from_numpy(np.array(array)) for name, array in (arrays or {}).items()}
        given |= dict(map(_of_shape, shapes))
        known = own_signature(module).parameters
        given = {name: tensor for name, tensor in given.items() if name in known or arrays is None}
        try:
            return canonical_call(own_signature(module), (), given)
        except TypeError as error:
            raise InvalidArgumentError(
                f"Argument `--shape` or `--data` must give the inputs of `{type(module).__name__}.forward{own_signature(module)}`, but "
                f"got {sorted(given)}: {error}."
            ) from error
    example = getattr(module, "example_input_array", None)
    if example is None:
        raise InvalidArgumentError(
            f"Argument `--shape` must give the inputs of `{type(module).__name__}.forward{own_signature(module)}`, but got none, and the "
            "module has no `example_input_array`. Pass --shape NAME=2x3x32x32 for each, or --data with arrays by name."
        )
    args = example if isinstance(example, tuple) else () if isinstance(example, dict) else (example,)
    return canonical_call(own_signature(module), args, example if isinstance(example, dict) else {})


def required_inputs(module: nn.Module) -> list[str]:
    """Names of the required arguments of ``forward``."""
    return [name for name, p in own_signature(module).parameters.items() if p.default is p.empty]


def _of_shape(text: str) -> tuple[str, torch.Tensor]:
    name, _, rest = text.partition("=")
    sizes, _, kind = rest.partition(":")
    dtype = getattr(torch, kind or "float32", None)
    try:
        shape = [int(size) for size in sizes.split("x")]
    except ValueError:
        shape = []
    if not name or not shape or min(shape) < 1 or not isinstance(dtype, torch.dtype):
        raise InvalidArgumentError(
            f"Argument `--shape` must read NAME=2x3x32x32 or NAME=2x128:int64, but got {text!r}."
        )
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        return name, torch.randn(shape, generator=generator).to(dtype)
    return name, torch.randint(0, 2, shape, generator=generator).to(dtype)
