"""Try in half a minute whether a module can be captured, exported, quantized and built."""

import os
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from lightning_accel.calls.batches import Call, canonical_call, given_call
from lightning_accel.calls.contexts import has_forward, isolated_random, mode, own_signature
from lightning_accel.calls.shapes import describe_inputs
from lightning_accel.calls.user_code import user_line
from lightning_accel.core.arguments import above, checked
from lightning_accel.core.callback import compression_callbacks
from lightning_accel.core.checkpoints import unreadable
from lightning_accel.core.decibels import POOR
from lightning_accel.core.packages import is_lightning_module
from lightning_accel.core.strategies import offer_of, require
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.registry import all_engines, engine_named, resolve
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.onnx.export import OnnxExport, export_onnx
from lightning_accel.quantization.arithmetic.targets import Target, cannot_reproduce, finer_targets, target_of
from lightning_accel.quantization.graph.capture import capture
from lightning_accel.quantization.graph.prepare import QuantizedForward, quantized_forwards
from lightning_accel.quantization.ptq import quantize
from lightning_accel.verification.engine_trial import try_engine
from lightning_accel.verification.exported import varied
from lightning_accel.verification.file import prove_nodes
from lightning_accel.verification.integers import check_integers
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.signal import against_float, poorest

_SAMPLES = 8
# Functions that aren't interrupted. Python drops what finalizers and callbacks of weak references raise; a context manager or an import
# that stops half-way leaves the process in a state that nothing undoes.
_WHOLE = frozenset({"__del__", "remove", "_remove", "__enter__", "__exit__", "_find_and_load"})
# Files of torch's stacks of dispatch modes.
_STACKS = (os.path.join("torch", "_ops.py"), os.path.join("utils", "_python_dispatch.py"))
_AGAIN_S = 1.0  # after which the alarm rings again, should it have been dropped all the same


class _OutOfTimeError(BaseException):
    """The time is over; no `except Exception` on the way may take it for a failure of what it interrupts."""


@dataclass
class Finding:
    """Result of one step.

    Args:
        step: the step: ``forward``, ``train``, ``capture``, ``export``, ``quantize``, or ``build`` and an engine.
        status: ``"ok"``, ``"stands in the way"``, ``"not here"`` (an engine isn't installed) or ``"not tried"``.
        detail: the result, or the reason.
        where: file and line of what stands in the way, where it is known.
        seconds: that it took.
        lines: more of it, for instance the operators that stay float.
    """

    step: str
    status: str
    detail: str = ""
    where: str = ""
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        place = f" (at {self.where})" if self.where and self.where not in self.detail else ""
        return "\n".join(
            [f"{self.step:19s} {self.status}: {self.detail}{place}", *(f"    {line}" for line in self.lines)]
        )


@checked(seconds=above(0))
def check(
    module: nn.Module,
    inputs: Any,
    *,
    target: str = "portable",
    engines: Sequence[str] | None = None,
    seconds: float = 30.0,
    spent: float = 0.0,
    trainer: L.Trainer | None = None,
) -> list[Finding]:
    """Try every step after training on the module as it is.

    Args:
        module: any module; mode and weights stay as they are.
        inputs: example of a call: a tensor, a tuple of positional or a dict of keyword arguments, or ``(args, kwargs)``.
        target: arithmetic to quantize for; a network that was trained with fake-quant has one already.
        engines: to build; ``None``: those that are installed.
        seconds: limit of this process's time on the CPU, so that other processes don't count, and of a quarter of the time that passes; a
            running step is interrupted, and remaining ones aren't tried.
        spent: seconds spent before the call.
        trainer: whose callbacks are compared with what its strategy allows.

    Returns:
        A finding for each step. A step that needs another's result is ``"not tried"`` if that one failed.

    Raises:
        InvalidArgumentError: an unknown target or engine, or no time.

    Example:
        >>> for finding in check(nn.Linear(4, 2), torch.zeros(2, 4)):  # doctest: +SKIP
        ...     print(finding)
    """
    trained = list(quantized_forwards(module).values())
    wanted = trained[0].target if trained else target_of(target)
    buildable = {spec.name: spec for spec in all_engines() if spec.source != "program"}
    installed = [name for name, spec in buildable.items() if spec.installed()]
    chosen = installed if engines is None else list(engines)
    if unknown := [engine for engine in chosen if engine not in buildable]:
        raise InvalidArgumentError(f"Argument `engines` must be among {list(buildable)}, but got {unknown}.")
    call = canonical_call(own_signature(module), *given_call(inputs))
    clock = _Clock(seconds - spent)
    findings: list[Finding] = []
    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, isolated_random():
        quantizing: tuple[str, Callable[[], tuple[str, list[str]]]] = (
            ("export", partial(_quantized, trained, made))
            if trained
            else ("capture", partial(_quantize, module, call, wanted.name, Path(folder), made))
        )
        steps: list[tuple[str, str, Callable[[], tuple[str, list[str]]]]] = [
            ("train", "", partial(_train, module, trainer)),
            ("forward", "", partial(_forward, module, call)),
            ("capture", "forward", partial(_capture, module, call)),
            ("export", "capture", partial(_export, module, call, Path(folder), made)),
            ("quantize", *quantizing),
        ]
        steps += [
            (f"build {engine}", "", partial(_build, engine, module, wanted, made, Path(folder))) for engine in chosen
        ]
        for name, needs, step in steps:
            if name.startswith("build "):
                needs = _needs(name.removeprefix("build "), wanted, made)
            failed = next((f for f in findings if f.step == needs and f.status != "ok"), None)
            if failed is not None:
                findings.append(Finding(name, "not tried", f"it needs what `{needs}` makes"))
                continue
            findings.append(_tried(name, step, module, clock, seconds))
    return findings


def _tried(
    name: str, step: Callable[[], tuple[str, list[str]]], module: nn.Module, clock: "_Clock", seconds: float
) -> Finding:
    started = time.monotonic()
    try:
        if clock.left() <= 0:
            raise _OutOfTimeError
        with _alarm(clock):
            detail, lines = step()
        found = Finding(name, "ok", detail, lines=lines)
    except (Exception, _OutOfTimeError) as error:  # torch.export and the engines raise a dozen unrelated types
        found = _failed(name, error, module, seconds)
    found.seconds = round(time.monotonic() - started, 2)
    return found


def _failed(name: str, error: BaseException, module: nn.Module, seconds: float) -> Finding:
    context: BaseException | None = error  # what is interrupted may fail once more while it cleans up
    while context is not None and not isinstance(context, _OutOfTimeError):
        context = context.__context__
    if context is not None:
        return Finding(name, "not tried", f"the {seconds:g} s are over: give it more with `seconds`")
    if isinstance(error, ModuleNotFoundError):
        return Finding(name, "not here", str(error))
    text = " ".join(str(error).split()) or type(error).__name__
    return Finding(name, "stands in the way", text[:1500], user_line(error, module))


def _train(module: nn.Module, trainer: L.Trainer | None) -> tuple[str, list[str]]:
    """Check what the callbacks require of the module and, with a Trainer, of its strategy."""
    if not is_lightning_module(module):
        return "no LightningModule: the functions take it, the callbacks want one", []
    allowed = "" if trainer is None else _check_strategy(trainer)
    if not has_forward(module):
        raise InvalidArgumentError(
            f"Argument `model` must have a `forward` to export, but {type(module).__name__} has none. Write one that takes the "
            "network's inputs and returns its outputs."
        )
    objects = unreadable(dict(module.hparams_initial))
    lines = [
        f"the hyper-parameter `{name}` holds a {kind}: to load a checkpoint pass it, load_from_checkpoint(..., {name}=...)"
        for name, kind in objects.items()
    ]
    way = (
        "automatic optimization"
        if module.automatic_optimization
        else "manual optimization, whose steps are training batches"
    )
    return f"{way}, and a `forward`{allowed}", lines


def _check_strategy(trainer: L.Trainer) -> str:
    """What the Trainer's strategy allows, for a sentence.

    Raises:
        InvalidArgumentError: a callback needs more.
    """
    for callback in compression_callbacks(trainer):
        require(trainer, type(callback).__name__, callback.needs, callback.sharded_instead)
    offer = offer_of(trainer.strategy)
    return f"; {offer.name}: ranks that {' and '.join(sorted(c.value for c in offer.capabilities)) or 'hold nothing whole'}"


def _forward(module: nn.Module, call: Call) -> tuple[str, list[str]]:
    with mode(module, False), torch.no_grad():
        module(*call[0], **call[1])
    return f"{sum(p.numel() for p in module.parameters()):,} parameters", []


def _capture(module: nn.Module, call: Call) -> tuple[str, list[str]]:
    graph = capture(module, describe_inputs(*call)).graph
    return f"{sum(node.op == 'call_function' for node in graph.nodes)} operators", []


def _export(module: nn.Module, call: Call, folder: Path, made: dict[str, Any]) -> tuple[str, list[str]]:
    export = export_onnx(module, call, folder / "float.onnx")
    made["export"] = export, call
    with mode(module, False):
        nodes = prove_nodes(export, _samples(export, call), "the file")
    with load_runner(export.path, "onnxruntime", emulate=True) as runner:
        runner.run({name: array[:1] for name, array in _samples(export, call).items()})
    return f"{nodes.nodes} of {nodes.of} nodes compute what PyTorch does; it runs at batch sizes 1 and {_SAMPLES}", []


def _quantize(module: nn.Module, call: Call, target: str, folder: Path, made: dict[str, Any]) -> tuple[str, list[str]]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is coarse")  # a line of this step's own says so
        small = quantize(
            module, [call], target=target, ranges="min_max", effort="low", inputs=partial(_arguments, module)
        )
    export = export_onnx(small, call, folder / "int8.onnx")
    counts = check_integers(export.path, export.trained)
    forwards = list(quantized_forwards(small).values())
    made["quantize"], made["network"] = (export, call), ModuleNetwork(small, export)
    made["forms"] = frozenset().union(*(forward.forms for forward in forwards))
    detail, lines = _told(f"{target}: ", forwards, counts["integers"])
    noise, warning = _noise(module, made["network"], export, call)
    return f"{detail}{noise}", [*warning, *lines]


def _noise(module: nn.Module, quantized: ModuleNetwork, export: OnnxExport, call: Call) -> tuple[str, list[str]]:
    """Signal-to-noise ratio against the float network on the example; a line of advice where it is poor."""
    samples = varied(export.example.named(call), _SAMPLES, 0)
    with mode(module, False):
        found = poorest(against_float(quantized, ModuleNetwork(module, export), samples).decibels)
    if found is None:
        return "", []
    name, ratio = found
    text = f", `{name}` {ratio:.1f} dB above its rounding noise on the example"
    if ratio >= POOR:
        return text, []
    ways = "`quantize` with training data takes outliers back (effort); `sensitivity` says what to keep in float; QAT trains with it."
    (forward, *_) = quantized_forwards(quantized.module).values()
    return text, [f"coarse: a tenth of the signal or more is noise.{finer_targets(forward.target)} {ways}"]


def _quantized(forwards: Sequence[QuantizedForward], made: dict[str, Any]) -> tuple[str, list[str]]:
    """Inspect an exported network that was quantized in training."""
    export, _ = made["quantize"] = made["export"]
    made["forms"] = frozenset().union(*(forward.forms for forward in forwards))
    integers = check_integers(export.path, export.trained)["integers"]
    return _told(f"quantized already, for {forwards[0].target.name}: ", forwards, integers)


def _told(what: str, forwards: Sequence[QuantizedForward], integers: int) -> tuple[str, list[str]]:
    kept = {name: why for forward in forwards for name, why in forward.kept_float.items()}
    done = sum(len(forward.quantized) for forward in forwards)
    lines = [f"{name} stays float: {why}" for name, why in kept.items()]
    return f"{what}{done} operators in int8, {integers:,} integers in the file", lines


def _needs(engine: str, target: Target, made: Mapping[str, Any]) -> str:
    """Which file an engine can run: the int8 one, unless its kernels compute another arithmetic."""
    return "export" if cannot_reproduce(target, engine, forms=made.get("forms", ())) else "quantize"


def _build(engine: str, module: nn.Module, target: Target, made: dict[str, Any], folder: Path) -> tuple[str, list[str]]:
    needs = _needs(engine, target, made)
    if needs == "export" and made.get("quantize") is made["export"]:  # there is no other file than the int8 one
        raise InvalidArgumentError(cannot_reproduce(target, engine, forms=made["forms"]))
    export, call = made[needs]
    what = "int8" if needs == "quantize" else "fp32; int8 of this target isn't for this engine"
    spec = engine_named(engine)
    if spec.source == "built":
        out = folder / f"model.{engine}"
        entries = resolve(spec.build)(export.path, out, "int8" if needs == "quantize" else "fp32")
        reason = spec.why_unavailable()
        run = f"built, not run: it {reason}" if reason else "runs here"
        size = out.with_name(entries["file"]).stat().st_size
        detail = f"{what}, {entries['library']} {entries['version']}, {size:,} bytes, {run}"
        return detail, list(entries.get("warnings", ()))
    floating, own_call = made.get("export", (None, call))
    if floating is not None:
        with mode(module, False):
            try_engine(floating, ModuleNetwork(module, floating), engine, _samples(floating, own_call))
    if needs == "quantize" and export is not floating:
        try_engine(export, made["network"], engine, _samples(export, call))
    return f"{what}, runs here", []


def _samples(export: OnnxExport, call: Call) -> dict[str, np.ndarray]:
    feeds = export.example.named(call)
    batch = len(next(iter(feeds.values())))
    for name, array in feeds.items():
        if array.ndim == 0 or len(array) != batch:
            raise InvalidArgumentError(
                f"Argument `{name}` must have the batch of {batch} as its first dimension, but got shape {array.shape}: a bundle is "
                "verified sample by sample. Make it a constant of the module, or one value a sample."
            )
    return {name: np.resize(array, (_SAMPLES, *array.shape[1:])) for name, array in feeds.items()}


def _arguments(module: nn.Module, call: Call) -> Any:
    """A call in the form that ``quantize`` takes from ``inputs``."""
    args, kwargs = call
    return dict(own_signature(module).bind(*args, **kwargs).arguments) if kwargs else tuple(args)


class _Clock:
    """The time that is left: of this process on the CPU, and of a quarter of the time that passes, for what waits."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._cpu, self._wall = seconds, time.process_time(), time.monotonic()

    def left(self) -> float:
        cpu, wall = time.process_time() - self._cpu, time.monotonic() - self._wall
        return self._seconds - min(wall, max(cpu, wall / 4))  # with several threads, CPU time passes faster


@contextmanager
def _alarm(clock: _Clock) -> Iterator[None]:
    """Interrupt what takes longer, where the system and the thread allow it; Python between two calls into C, that is."""
    if not hasattr(signal, "SIGALRM") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(number: int, frame: FrameType | None) -> None:
        if (left := clock.left()) > 0:  # other processes had the CPU
            signal.setitimer(signal.ITIMER_REAL, max(left, 0.01), _AGAIN_S)
            return
        whole = frame is not None and frame.f_code.co_filename.endswith(_STACKS)
        while frame is not None and frame.f_globals is not globals():
            if whole or frame.f_code.co_name in _WHOLE:
                signal.setitimer(signal.ITIMER_REAL, 0.01, _AGAIN_S)
                return
            frame = frame.f_back
        raise _OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, clock.left(), _AGAIN_S)
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if left:  # somebody else's alarm goes on
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 0.001), interval)
