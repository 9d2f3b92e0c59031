"""What happens once, before the first step: layers are found, shapes compared, adapters made, a cache filled."""

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_accel.compression import CompressionCallback
from lightning_accel.distillation.adapters import replace_parameters_
from lightning_accel.distillation.distillation import Distillation, Signals, dtype_of, share_
from lightning_accel.distillation.graph_layers import layer_node, without_graphs
from lightning_accel.distillation.layers import recorded, split_path
from lightning_accel.distillation.recording import resolve
from lightning_accel.distillation.teacher import network_of
from lightning_accel.distillation.teachers import EMATeacher, OnnxTeacher
from lightning_accel.distillation.terms import Pair, pairs_of
from lightning_accel.engines.base import Runner
from lightning_accel.inputs import Call, _by_signature, canonical_call, first_batch, isolated_random, mode


def as_teacher(teacher: Any) -> nn.Module:
    """A teacher as a module: itself, an average of the student, or a file behind a Runner.

    Raises:
        ValueError: none of these.
    """
    if isinstance(teacher, nn.Module):
        return teacher
    if teacher == "ema":
        return EMATeacher()
    if isinstance(teacher, Runner):
        return OnnxTeacher(teacher)
    if isinstance(teacher, str | Path):
        if not Path(teacher).exists():
            raise ValueError(
                f'Argument `teacher` must be an nn.Module, "ema" or the path of an ONNX file, engine or bundle, but got '
                f"{str(teacher)!r}, which does not exist."
            )
        return OnnxTeacher(teacher)
    several = " Write `TeacherEnsemble([...])`." if isinstance(teacher, list | tuple) else ""
    raise ValueError(
        f'Argument `teacher` must be an nn.Module, "ema" or a path, but got a {type(teacher).__name__}.{several}'
    )


def outputs_path(outputs: Any) -> str | None:
    """The path of the module or method in ``outputs``; ``None`` for the student itself."""
    return (split_path(outputs, "outputs")[0] or None) if isinstance(outputs, str) else None


def find_pairs(module: nn.Module, distillation: Distillation) -> dict[str, list[Pair]]:
    """The layers of all terms.

    Raises:
        ValueError: a path leads nowhere.
    """
    teacher = network_of(distillation.teacher)
    return {term.name: pairs_of(term, module, teacher) for term in distillation.terms}


def begin(module: L.LightningModule, distillation: Distillation, inputs: Callable | None) -> None:
    """Find layers, compare shapes, make adapters and give them to the optimizer, fill the cache.

    Raises:
        ValueError: a path that leads nowhere, or shapes that can't be aligned.
    """
    path = outputs_path(distillation.outputs)
    owner, method = resolve(module, path)
    ema = distillation.ema
    if ema is not None:
        name = next((n for n, m in module.named_modules() if m is owner), "")
        ema.begin_(cast(nn.Module, module.student), name, method)
    distillation.pairs = find_pairs(module, distillation)
    _check_graphs(module, distillation)
    if distillation.student_layers():
        with isolated_random():
            batch = module.trainer.precision_plugin.convert_input(_few(first_batch(module.trainer)))
            batch = module._on_before_batch_transfer(batch)
            batch = module.trainer.strategy.batch_to_device(batch)
        student_signals, teacher_signals = probe(module, distillation, call_of(module, path, batch, inputs))
        distillation.build_adapters(student_signals, teacher_signals, dtype_of(module))
        with torch.no_grad():  # a loss that can't take these shapes says so now
            distillation.losses(student_signals, teacher_signals, batch)
        share_(distillation.adapters, module.trainer)
    _restore(distillation, ema)
    parameters = [p for adapter in distillation.adapters.values() for p in adapter.parameters()]
    if parameters:
        replace_parameters_(module.trainer.optimizers[0], [], parameters)


def call_of(module: nn.Module, path: str | None, batch: Any, inputs: Callable | None) -> Call:
    """How the module or method at ``outputs`` is called for a batch, by ``inputs`` or by its signature.

    Raises:
        ValueError: neither tells.
    """
    owner, method = resolve(module, path)
    with without_graphs(module):
        own = signature(getattr(owner, method))
    try:
        if inputs is None:
            args, kwargs = _by_signature(own.parameters, batch)
        else:
            given = inputs(batch)
            named = isinstance(given, dict)
            args, kwargs = ((), given) if named else (given if isinstance(given, tuple) else (given,), {})
        return canonical_call(own, args, kwargs)
    except TypeError as error:
        raise ValueError(
            f"Argument `inputs` must map a batch to the arguments of `{path or 'forward'}{own}`, but a batch of type "
            f"{type(batch).__name__} gave others: {error}. Pass a function of the batch that returns a tuple or a dict."
        ) from None


def probe(module: nn.Module, distillation: Distillation, call: Call) -> tuple[Signals, Signals]:
    """What student and teacher say to one call: no gradients, no statistics, no random numbers used up.

    Raises:
        ValueError: a layer's output is no tensor and isn't selected.
        RuntimeError: a layer isn't called exactly once.
    """
    path = outputs_path(distillation.outputs)
    owner, method = resolve(module, path)
    layers = [name for layer in distillation.student_layers() if (name := split_path(layer, "student_layer")[0])]
    with torch.no_grad(), isolated_random(), mode(module, False), without_graphs(module):
        with recorded(module, list(dict.fromkeys(layers))) as found:
            output = getattr(owner, method)(*call[0], **call[1])
        return distillation.student_signals(found, output), distillation.teach(*call)


def _few(batch: Any) -> Any:
    """Three samples of a batch: shapes don't ask for more."""
    leaves = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    size = len(leaves[0]) if leaves else 0
    return pytree.tree_map(lambda v: v[:3] if isinstance(v, Tensor) and v.ndim and len(v) == size else v, batch)


def _check_graphs(module: L.LightningModule, distillation: Distillation) -> None:
    """Layers must be found in the graphs that will take over from them; that is known now, not at the epoch of the change.

    Raises:
        ValueError: a layer can't be told apart in such a graph.
    """
    names = {name for layer in distillation.student_layers() if (name := split_path(layer, "student_layer")[0])}
    callbacks = [c for c in module.trainer.callbacks if isinstance(c, CompressionCallback)]  # type: ignore[attr-defined]
    for callback in callbacks if names else ():
        prepare = getattr(callback, "prepare", None)
        for owner, forward in (prepare(module.trainer, module) if prepare is not None else {}).items():
            inside = [n for n in names if n != owner and n.startswith(f"{owner}." if owner else "")]
            for name in inside:
                layer_node(forward.graph(True), name.removeprefix(f"{owner}." if owner else ""))


def _restore(distillation: Distillation, ema: EMATeacher | None) -> None:
    """Go on with the adapters and the average of a checkpoint.

    Raises:
        ValueError: the checkpoint holds others.
    """
    state, distillation.restored = distillation.restored, None
    if state is None:
        return
    saved = state.get("adapters", {})
    if saved.keys() != distillation.adapters.keys():
        raise ValueError(
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
            raise ValueError("Argument `ckpt_path` must hold the average of an EMATeacher, but got one without.")
        ema.network.load_state_dict(state["ema"])
