"""Checks and preparation before the first step: find layers, compare shapes, create adapters, fill the cache."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel.calls.batches import Call, call_by_signature
from lightning_accel.calls.contexts import isolated_random, kept_buffers, own_forwards
from lightning_accel.calls.loaders import peek, training_loader, transferred
from lightning_accel.core.finite import check_weights
from lightning_accel.core.shards import parts_of_fsdp
from lightning_accel.distillation.layers.paths import recorded
from lightning_accel.distillation.layers.selection import split_path
from lightning_accel.distillation.recording import resolve
from lightning_accel.distillation.runtime import LOGITS, Answer, Distillation, share_
from lightning_accel.distillation.teachers.base import network_of
from lightning_accel.distillation.teachers.ema import EMATeacher
from lightning_accel.distillation.teachers.onnx import OnnxTeacher
from lightning_accel.distillation.terms import Pair, pairs_of
from lightning_accel.engines.base import Runner
from lightning_accel.errors import InvalidArgumentError

_FEW = 3  # samples: enough for losses of relations between samples


def as_teacher(teacher: Any) -> nn.Module:
    """Convert a teacher to a module: a module, an average of the student, or a file run by an engine.

    Raises:
        InvalidArgumentError: none of these.
    """
    if isinstance(teacher, nn.Module):
        return teacher
    if teacher == "ema":
        return EMATeacher()
    if isinstance(teacher, Runner):
        return OnnxTeacher(teacher)
    if isinstance(teacher, str | Path):
        if not Path(teacher).exists():
            raise InvalidArgumentError(
                f'Argument `teacher` must be an nn.Module, "ema" or the path of an ONNX file, engine or bundle, but got '
                f"{str(teacher)!r}, which does not exist."
            )
        return OnnxTeacher(teacher)
    several = " Write `TeacherEnsemble([...])`." if isinstance(teacher, list | tuple) else ""
    raise InvalidArgumentError(
        f'Argument `teacher` must be an nn.Module, "ema" or a path, but got a {type(teacher).__name__}.{several}'
    )


def outputs_path(outputs: Any) -> str | None:
    """Path of the module or method in ``outputs``; ``None`` for the student itself."""
    return (split_path(outputs, "outputs")[0] or None) if isinstance(outputs, str) else None


def find_pairs(module: nn.Module, distillation: Distillation) -> dict[str, list[Pair]]:
    """Resolve the layers of all terms.

    Raises:
        InvalidArgumentError: a path doesn't exist.
    """
    teacher = network_of(distillation.teacher)
    student = cast(nn.Module, module.student)  # for error messages with the user's class
    return {term.name: pairs_of(term, student, teacher) for term in distillation.terms}


def begin(module: L.LightningModule, distillation: Distillation, inputs: Callable[..., Any] | None) -> None:
    """Resolve layers, compare shapes, create adapters and add them to the optimizer, and fill the cache.

    Raises:
        InvalidArgumentError: the teacher's weights have NaN, a path doesn't exist, or shapes can't be aligned.
    """
    check_weights(distillation.teacher, "teacher", " Load the weights of a trained network.")
    path = outputs_path(distillation.outputs)
    owner, method = resolve(module, path)
    ema = distillation.ema
    if ema is not None:
        name = next((n for n, m in module.named_modules() if m is owner), "")
        ema.begin_(cast(nn.Module, module.student), name, method)
    distillation.pairs = find_pairs(module, distillation)
    _try(module, distillation, inputs)
    _restore(distillation, ema)
    distillation.train_adapters(module, module.trainer)


def _try(module: L.LightningModule, distillation: Distillation, inputs: Callable[..., Any] | None) -> None:
    """Run student and teacher on a few samples, to detect mismatches and to create adapters.

    The call of ``forward`` in ``training_step`` is inferred. Unless layers or ``inputs`` depend on it, a failure is not an error, and a
    success checks the logits only.

    Raises:
        InvalidArgumentError: outputs aren't logits, shapes can't be aligned, or a loss raises an error; with layers, also if the call of
            ``forward`` can't be inferred from the batch.
    """
    trainer, sure = module.trainer, bool(distillation.student_layers()) or inputs is not None
    loader = training_loader(trainer)
    if not sure and (not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset)):
        return  # an iterator can't be inspected without consuming a batch
    try:
        with isolated_random():
            batch = transferred(trainer, peek(loader, samples=_FEW), module.device)
        call = call_of(module, outputs_path(distillation.outputs), batch, inputs)
        found = _answers(module, distillation, call)
    except Exception:
        if sure:
            raise
        return  # the call is known from the first step
    student, teacher = distillation.student_signals(*found[0]), distillation.teacher_signals(*found[1])
    if not sure:
        distillation.check_logits(student[LOGITS], teacher[LOGITS])
        return
    distillation.build_adapters(student, teacher, module)
    with torch.no_grad():  # raises for shapes that a loss doesn't accept
        distillation.losses(student, teacher, batch)
    share_(distillation.adapters, trainer)


def call_of(module: nn.Module, path: str | None, batch: Any, inputs: Callable[..., Any] | None) -> Call:
    """Arguments of the module or method at ``outputs`` for a batch, from ``inputs`` or its signature.

    Raises:
        InvalidArgumentError: the arguments can't be derived.
    """
    owner, method = resolve(module, path)
    with own_forwards(module):
        own = signature(getattr(owner, method))
    return call_by_signature(own, path or "forward", batch, inputs)


def _answers(module: nn.Module, distillation: Distillation, call: Call) -> tuple[Answer, Answer]:
    """Outputs of student and teacher for one call, without gradients, updates of statistics, or effects on random generators."""
    owner, method = resolve(module, outputs_path(distillation.outputs))
    layers = [name for layer in distillation.student_layers() if (name := split_path(layer, "student_layer")[0])]
    with torch.no_grad(), isolated_random(), kept_buffers(module), own_forwards(module):
        with recorded(module, list(dict.fromkeys(layers))) as found:
            # Hooks of FSDP2 gather the parameters: they run in a call of the module only.
            called = owner if method == "forward" and parts_of_fsdp(module) else getattr(owner, method)
            output = called(*call[0], **call[1])
        return (found, output), distillation.call_teacher(*call)


def _restore(distillation: Distillation, ema: EMATeacher | None) -> None:
    """Restore the adapters and the averaged teacher of a checkpoint.

    Raises:
        InvalidArgumentError: the checkpoint has other adapters.
    """
    state, distillation.restored = distillation.restored, None
    if state is None:
        return
    saved = state.get("adapters", {})
    if saved.keys() != distillation.adapters.keys():
        raise InvalidArgumentError(
            f"Argument `ckpt_path` must be resumed with the losses and layers that wrote it, but got adapters "
            f"{sorted(distillation.adapters) or 'none'} for a checkpoint with {sorted(saved) or 'none'}."
        )
    for key, adapter in distillation.adapters.items():
        adapter.load_state_dict(saved[key])
        gradients = state.get("gradients", {}).get(key, [])
        for parameter, gradient in zip(adapter.parameters(), gradients, strict=False):
            parameter.grad = None if gradient is None else gradient.to(parameter.device)
    if ema is not None and ema.network is not None:
        if "ema" not in state:
            raise InvalidArgumentError(
                "Argument `ckpt_path` must hold the average of an EMATeacher, but got one without."
            )
        ema.network.load_state_dict(state["ema"])
