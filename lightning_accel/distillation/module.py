"""LightningModule that trains a student with a teacher and leaves the student's own code unchanged."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from functools import cache, wraps
from inspect import signature
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_accel.calls.contexts import own_forwards
from lightning_accel.core.arguments import check_arguments
from lightning_accel.core.callback import LOG
from lightning_accel.core.clock import is_manual, step_of
from lightning_accel.core.optimizers import after_steps, ownership_of, release
from lightning_accel.core.packages import (
    both,
    check_one_package,
    counterpart,
    is_lightning_module,
    is_overridden,
    module_bases,
    package_of,
)
from lightning_accel.core.patching import patches_of_run
from lightning_accel.core.shards import settle
from lightning_accel.core.strategies import Capability, require, shards
from lightning_accel.core.structure import Change
from lightning_accel.distillation.by_hand import StepCalls, seen_calls
from lightning_accel.distillation.cache.indexed import IndexedBatch, index_training_data
from lightning_accel.distillation.cache.teacher_cache import TeacherCache
from lightning_accel.distillation.conflicts import conflicts
from lightning_accel.distillation.fill_cache import fill
from lightning_accel.distillation.hparams import keep_own_hparams_
from lightning_accel.distillation.layers.paths import recorded
from lightning_accel.distillation.layers.selection import split_path
from lightning_accel.distillation.logged import log_step
from lightning_accel.distillation.recording import called_submodules, observed, resolve
from lightning_accel.distillation.runtime import Distillation, check_first_losses
from lightning_accel.distillation.scheduled import Scheduled, bounds, move_all
from lightning_accel.distillation.setup import as_teacher, begin, find_pairs, outputs_path
from lightning_accel.distillation.state import average_gradients_, load_state, save_state
from lightning_accel.distillation.supervised import adopt_, supervised_class
from lightning_accel.distillation.teachers.base import freeze_, load_weights_, network_of
from lightning_accel.distillation.teachers.ema import EMATeacher
from lightning_accel.distillation.teachers.memory import check_teacher_fits
from lightning_accel.distillation.terms import LossTerm, make_terms
from lightning_accel.errors import InvalidArgumentError, InvalidArgumentTypeError, RunError


class _SharesStudent(L.LightningModule):
    """Makes the instance; apart from DistillationModule, whose parameters a command line then reads off ``__init__``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An instance of the student's class that shares the student's attributes."""
        student = signature(cls.__init__).bind(None, *args, **kwargs).arguments["student"]
        if not isinstance(student, nn.Module):
            raise InvalidArgumentError(
                f"Argument `student` must be a LightningModule or an nn.Module, but got a {type(student).__name__}."
            )
        if isinstance(student, _SharesStudent):
            raise InvalidArgumentError(
                "Argument `student` must not be distilled already, but got a DistillationModule."
            )
        student_class: Any = type(student)
        module = object.__new__(_distilled_class(student_class))
        object.__setattr__(module, "__dict__", vars(student))
        object.__setattr__(module, "_student", student)
        return module  # type: ignore[return-value]


class DistillationModule(_SharesStudent):
    """Train a student on its own loss and on a teacher's outputs: ``alpha · distillation + (1 - alpha) · task``.

    What comes back *is* the student: an instance of its class, with its attributes, hooks, metrics, optimizers,
    hyper-parameters and ``state_dict`` keys, whose ``training_step`` adds the distillation loss
    (`Hinton et al. 2015 <https://arxiv.org/abs/1503.02531>`_) to what the student's own returned. Checkpoints load with
    ``Student.load_from_checkpoint``, also where this library isn't installed. The teacher is in eval, without gradients,
    follows device and dtype, and is in no ``state_dict``, optimizer or checkpoint. Evaluation doesn't run it.
    Logged: ``distillation_loss`` and ``task_loss``; ``distillation_loss/<name>`` of several losses, and scheduled numbers.

    Args:
        student: a LightningModule with a ``training_step``, or a plain ``nn.Module``, which is then trained on batches
            ``(inputs, target)`` and needs ``task_loss`` and ``optimizer``, in a Trainer of ``lightning``.
        teacher: any module that takes the arguments of the student's ``forward``, frozen in place; the path of an ONNX file,
            engine or bundle; ``"ema"`` for the student's own average. See also :class:`Teacher`, :class:`TeacherEnsemble`.
        losses: a name (``"kd"``, ``"dkd"``, ...), a callable ``(student_logits, teacher_logits) -> scalar`` or a
            :class:`LossTerm`; a list of these; or a mapping from names to weights: ``{"kd": 0.7, "hint": 0.3}``.
        alpha: weight of the distillation loss, in [0, 1]; may be :class:`Scheduled`.
        temperature: of the named losses that have one, above 0; may be :class:`Scheduled`. ``None``: each loss's own.
        outputs: location of the student's logits, ``(N, C)``: ``None`` for the output of ``forward`` (a Tensor, or
            an object with ``logits``); the dotted path of a submodule or method (``"net"``, ``"net.encode"``) when
            ``training_step`` calls that instead, with a selection in brackets (``"net[0]"``, ``"[probabilities]"``) for a tuple
            or dict; a callable from the output of ``forward`` to the logits.
        teacher_outputs: a callable from the teacher's output to its logits, or a selection: ``"[logits]"``, ``"[0]"``.
        teacher_checkpoint: a Lightning checkpoint or state-dict file with the teacher's weights.
        student_layer: path(s) of layers, for the named losses that compare features; see :class:`LossTerm`.
        teacher_layer: the same in the teacher; ``None``: as in the student.
        target: location of the target in a batch: a callable, key or index; ``None``: a common name in a dict, or the last
            element of a sequence.
        mask: location of the padding mask; ``None``: ``attention_mask`` of a dict.
        cache: a :class:`TeacherCache`, so that the teacher runs once per sample instead of once per epoch.
        inputs: maps a batch to the arguments of ``forward``; needed for layers or a cache if they can't be derived from its signature.
        evaluate: whether ``validation_step`` and ``test_step`` run the teacher and log ``val_distillation_loss``.
        task_loss: ``(logits, target) -> scalar``, for an ``nn.Module`` student.
        optimizer: maps parameters to an Optimizer, or to a result of ``configure_optimizers``; for an ``nn.Module``
            student.

    Raises:
        InvalidArgumentError: an argument breaks a rule above; logits of student and teacher differ in shape.
        RunError: logits or a layer weren't computed exactly once in a training step.

    Example:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> module = DistillationModule(student, teacher, task_loss=nn.CrossEntropyLoss(), optimizer=torch.optim.Adam)
        >>> list(module.state_dict())
        ['weight', 'bias']
    """

    __slots__ = ("_distillation", "_inputs", "_student")  # besides the student's shared `__dict__`
    _distillation: Distillation
    _inputs: Callable[..., Any] | None
    _student: nn.Module

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | str | Path,
        losses: Callable[..., Any]
        | str
        | LossTerm
        | list[Callable[..., Any] | str | LossTerm]
        | dict[str, float | Scheduled | LossTerm] = "kd",
        alpha: float | Scheduled = 0.7,
        temperature: float | Scheduled | None = None,
        outputs: Callable[..., Any] | str | None = None,
        teacher_outputs: Callable[..., Any] | str | None = None,
        teacher_checkpoint: str | Path | None = None,
        student_layer: str | list[str] | None = None,
        teacher_layer: str | list[str] | None = None,
        target: Callable[..., Any] | str | int | None = None,
        mask: Callable[..., Any] | str | int | None = None,
        cache: TeacherCache | None = None,
        inputs: Callable[..., Any] | None = None,
        evaluate: bool = False,
        task_loss: Callable[..., Any] | None = None,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer] | None = None,
    ) -> None:
        # no super().__init__(): this object is the initialized student
        typed = {"cache": cache, "inputs": inputs, "evaluate": evaluate, "task_loss": task_loss, "optimizer": optimizer}
        check_arguments(
            DistillationModule.__init__, {"student": student, **typed}
        )  # the others have checks of their own
        network = as_teacher(teacher)
        number = isinstance(alpha, int | float | Scheduled) and not isinstance(alpha, bool)
        if not (number and 0 <= bounds(alpha)[0] <= bounds(alpha)[1] <= 1):
            raise InvalidArgumentError(f"Argument `alpha` must be in [0, 1], but got {alpha!r}.")
        terms = make_terms(losses, temperature, student_layer, teacher_layer)
        if isinstance(teacher_outputs, str):
            split_path(teacher_outputs, "teacher_outputs")
        _check_student(student, task_loss, optimizer)
        if teacher_checkpoint is not None:
            load_weights_(network_of(network), teacher_checkpoint)
        freeze_(network, student)
        if is_lightning_module(student):
            keep_own_hparams_(student, DistillationModule)
        else:
            adopt_(student)
        if cache is not None:
            cache.check_terms(network, terms)
        settings = (outputs, teacher_outputs, target, mask, cache, task_loss, optimizer, evaluate)
        self._distillation = Distillation(network, terms, alpha, *settings)
        self._inputs = inputs

    @property
    def student(self) -> nn.Module:
        """The original student, which shares all state with this module, without distillation."""
        return self._student

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._distillation.teacher

    @property
    def adapters(self) -> dict[str, nn.Module]:
        """Trained layers between student and teacher features, by loss and layers; not exported."""
        return dict(self._distillation.adapters)

    def structure_changed(self, change: Change) -> None:
        """Resize adapters and an averaged teacher after channels of the student were removed.

        Args:
            change: what was made; see :func:`lightning_accel.core.structure.resized`.
        """
        self._distillation.change(change, [name for name, _ in self.named_parameters()], self._trainer)

    def _distill(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the student's training step, record its logits, and add the distillation loss."""
        distillation = self._distillation
        scheduled = distillation.scheduled()
        if scheduled and self._trainer is not None:
            move_all(scheduled.values(), self.trainer)
        if distillation.by_hand or not self.automatic_optimization:
            return self._step_by_hand(step, args, kwargs)
        result, task_loss, signals = self._observe(step, args, kwargs)
        if task_loss is None or distillation.by_hand:
            return result  # skipped batch; Lightning raises for a dict without "loss"
        batch = args[0] if args else next(iter(kwargs.values()), None)
        student, teacher = signals
        loss = self._combined(student, teacher, batch, task_loss)
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def _step_by_hand(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a training step that asks for its distillation losses itself."""
        distillation = self._distillation
        if not distillation.pairs:
            distillation.pairs = find_pairs(self, distillation)
        layers = [module for name in distillation.student_layers() if (module := split_path(name, "student_layer")[0])]
        distillation.step = StepCalls()
        try:
            with seen_calls(self, outputs_path(distillation.outputs), list(dict.fromkeys(layers)), distillation.step):
                return step(*args, **kwargs)
        finally:
            distillation.step = None

    def distill(self, batch: Any, outputs: Any, task_loss: Tensor | None = None) -> Tensor:
        """The distillation loss of one call, for a ``training_step`` that adds it itself.

        It must be called before ``manual_backward`` with manual optimization, and can be with automatic optimization, where a step calls
        the student several times (two views of a contrastive loss). The teacher gets the arguments of the call.

        Args:
            batch: of the step; losses take target and mask from it.
            outputs: what ``forward`` (or what the argument ``outputs`` of the class names) returned in this step: the object itself.
            task_loss: the step's own loss, to be weighted against the distillation loss with ``alpha``.

        Returns:
            ``alpha · distillation + (1 - alpha) · task_loss``, a scalar; without ``task_loss`` the distillation loss alone.

        Raises:
            RunError: outside of ``training_step``, or for an object that no call of the step returned.

        Example:
            >>> class Student(L.LightningModule):
            ...     def training_step(self, batch, batch_idx):
            ...         optimizer, (x, y) = self.optimizers(), batch
            ...         logits = self(x)
            ...         loss = self.distill(batch, logits, nn.functional.cross_entropy(logits, y))
            ...         optimizer.zero_grad()
            ...         self.manual_backward(loss)
            ...         optimizer.step()
        """
        distillation = self._distillation
        if distillation.step is None:
            raise RunError("`distill` must be called in `training_step`, but got a call outside of one.")
        distillation.step.asked += 1
        distillation.by_hand = True
        path = outputs_path(distillation.outputs)
        call = distillation.step.of(outputs, path or "forward")
        if distillation.cache is not None and len(distillation.step.calls) > 1:
            raise RunError(
                f"Argument `cache` must be None where a step calls {path or 'forward'!r} several times, but got a TeacherCache, which has "
                "one output of the teacher for each sample."
            )
        teacher = self._teach(call.args, call.kwargs)
        return self._combined(distillation.student_signals(call.layers, call.output), teacher, batch, task_loss)

    def _combined(
        self, student: dict[str, Tensor], teacher: dict[str, Tensor], batch: Any, task_loss: Tensor | None
    ) -> Tensor:
        """The distillation loss, weighted against the task's if there is one; logged."""
        distillation = self._distillation
        for path, value in student.items():
            if torch.is_grad_enabled() and not value.requires_grad:
                argument = "student_layer" if path else "outputs"
                raise RunError(
                    f"Argument `{argument}` must name a call made with gradients, but {path or distillation.outputs or 'forward'!r} "
                    "was called without. Name the submodule or method that computes it in training_step."
                )
        for key in distillation.follow(student, teacher, self, self._trainer):
            rank_zero_info(f"DistillationModule: the student's channels changed, so the adapter {key!r} is recreated.")
        first = not distillation.checked
        loss, parts = distillation.losses(student, teacher, batch)
        task = {} if task_loss is None else {"task_loss": task_loss.detach()}
        if first:
            own = {} if task_loss is None else {"training_step": task_loss}
            check_first_losses(self, {**own, **parts}, (student, teacher), batch)
        several = {f"distillation_loss/{name}": part.detach() for name, part in parts.items()} if len(parts) > 1 else {}
        numbers = {name: float(number) for name, number in distillation.scheduled().items()}
        log_step(self, {"distillation_loss": loss.detach(), **task, **several, **numbers})
        alpha = float(distillation.alpha)
        return loss if task_loss is None else alpha * loss + (1 - alpha) * task_loss

    def _observe(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Run a step; returns its result, its loss, and outputs of student and teacher; None for a skipped batch."""
        distillation = self._distillation
        path = outputs_path(distillation.outputs)
        if not distillation.pairs:
            distillation.pairs = find_pairs(self, distillation)
        seen: list[tuple[Any, dict[str, Tensor]]] = []

        def observe(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            target = self._teach(args, kwargs)  # first: its activations are freed before the student runs
            output = call(*args, **kwargs)
            seen.append((output, target))
            return output

        layers = [module for name in distillation.student_layers() if (module := split_path(name, "student_layer")[0])]
        with ExitStack() as stack:
            called = [] if distillation.verified else stack.enter_context(called_submodules(self))
            found = stack.enter_context(recorded(self, list(dict.fromkeys(layers))))
            stack.enter_context(observed(*resolve(self, path), observe))
            if (
                self.training and not distillation.verified
            ):  # the first step may show that it asks for its losses itself
                distillation.step = StepCalls()
                stack.enter_context(seen_calls(self, path, list(dict.fromkeys(layers)), distillation.step))
            try:
                result = step(*args, **kwargs)
            finally:
                distillation.step = None
        if distillation.by_hand and self.training:
            return result, None, None

        task_loss = result.get("loss") if isinstance(result, Mapping) else result
        if task_loss is None and self.training:
            return result, None, None
        if len(seen) != 1:
            raise RunError(_not_once(path, len(seen), called))
        distillation.verified = True
        output, target = seen[0]
        return result, task_loss, (distillation.student_signals(found, output), target)

    def _teach(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Outputs of the teacher for the present batch, from the cache if possible."""
        distillation = self._distillation
        if distillation.cache is None or distillation.index is None or distillation.digests is None:
            return distillation.teach(args, kwargs)
        epoch = self.trainer.current_epoch
        found = (distillation.index, distillation.digests)
        return distillation.cache.lookup(*found, self.device, epoch, lambda: distillation.teach(args, kwargs))

    def _evaluate(self, step: Callable[..., Any], stage: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a validation or test step and, with ``evaluate``, log the distillation losses."""
        if not self._distillation.evaluate:
            return step(*args, **kwargs)
        self._distillation.index = None  # the cache holds training data only
        with own_forwards(self) if self._distillation.student_layers() else nullcontext():
            result, _, (student, teacher) = self._observe(step, args, kwargs)
        self._distillation.build_adapters(student, teacher, self)
        loss, _ = self._distillation.losses(student, teacher, args[0] if args else next(iter(kwargs.values())))
        self.log(f"{stage}_distillation_loss", loss)
        return result

    def configure_callbacks(self) -> Any:
        """The student's ``configure_callbacks``; the first hook, so that a Trainer of another package is named as such."""
        check_one_package(self.trainer, student=self._student)
        return super().configure_callbacks()

    def setup(self, stage: str) -> None:
        """The student's ``setup``, and checks of the distillation."""
        super().setup(stage)
        distillation = self._distillation
        distillation.index = None
        if stage == "fit":
            require(self.trainer, "DistillationModule", Capability.ROWS)
            if shards(self.trainer) and distillation.ema is not None:
                raise InvalidArgumentError(
                    "Argument `teacher` must be a trained network where each rank holds rows of the student's tensors (FSDP2), but got an "
                    "average of the student, which would have to be sharded alike. Train with DDP."
                )
            if not shards(self.trainer):  # there `configure_model` may shard it yet
                check_teacher_fits(distillation.teacher, self.trainer.strategy.root_device, self.trainer.world_size)
            distillation.in_charge, distillation.by_hand, distillation.verified = True, False, False
            distillation.restored = None
            distillation.checked.clear()
            distillation.teacher.eval()
            if distillation.cache is not None:
                index_training_data(self.trainer)

    def on_train_start(self) -> None:
        """The student's ``on_train_start``, after the cache is filled."""
        for text in conflicts(self._distillation) if self.trainer.is_global_zero else ():
            LOG.warning("Conflict: %s", text)
        fill(self, self._distillation, self._inputs)
        if self._distillation.ema is not None and is_manual(self.trainer):
            self._average_by_hand(self._distillation.ema)
        super().on_train_start()

    def _average_by_hand(self, ema: EMATeacher) -> None:
        """Average each parameter after the step of its optimizer: Lightning calls no hook of the module for these."""
        trainer = self.trainer
        ownership = ownership_of(trainer)

        def update(optimizer: torch.optim.Optimizer) -> None:
            part = ema.averaged(self._student)
            parameters, owners = dict(part.named_parameters()), ownership.owners(part.parameters())
            buffers = [name for name, _ in part.named_buffers()] if optimizer is owners[0] else []
            ema.update_(self._student, step_of(trainer), frozenset([*ownership.names(optimizer, parameters), *buffers]))

        handles = after_steps(ownership.owners(ema.averaged(self._student).parameters()), update)
        patches_of_run(trainer).on_undo(lambda: release(handles))

    def on_train_epoch_end(self) -> None:
        """The student's ``on_train_epoch_end``, after a check that manual optimization asks for the losses."""
        if not self.automatic_optimization and not self._distillation.by_hand:
            raise RunError(
                "Method `training_step` must call `self.distill(batch, outputs)` with manual optimization, where it makes loss and step "
                "itself, but no step of this epoch did. Add its loss before `manual_backward`."
            )
        super().on_train_epoch_end()

    def on_fit_start(self) -> None:
        """The student's ``on_fit_start``, after checks of ``outputs``, layers and shapes."""
        check_teacher_fits(self._distillation.teacher, self.device, self.trainer.world_size)
        settle(self)  # before a call of an inner module
        settle(self._distillation.teacher)
        begin(self, self._distillation, self._inputs)
        super().on_fit_start()

    def on_after_backward(self) -> None:
        """The student's ``on_after_backward``; averages the adapters' gradients over ranks."""
        average_gradients_(self._distillation.adapters, self.trainer.world_size)
        super().on_after_backward()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """The student's ``optimizer_step``; updates an averaged teacher."""
        super().optimizer_step(*args, **kwargs)
        if self._distillation.ema is not None:
            self._distillation.ema.update_(self._student, self.trainer.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The student's ``on_save_checkpoint``; saves adapters and an averaged teacher in a separate entry."""
        super().on_save_checkpoint(checkpoint)
        accumulating = self._trainer is not None and (
            self._trainer.accumulate_grad_batches > 1 or not self.automatic_optimization
        )
        save_state(self._distillation, checkpoint, gradients=accumulating)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The student's ``on_load_checkpoint``; adapters are restored in ``on_fit_start``."""
        super().on_load_checkpoint(checkpoint)
        self._distillation.restored = load_state(checkpoint)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, IndexedBatch):
            self._distillation.index, self._distillation.digests, batch = batch.index, batch.digests, batch.batch
        return super()._on_before_batch_transfer(batch, dataloader_idx)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no annotation for it
        if self._distillation.in_charge:
            for module in self._distillation.modules():
                module._apply(fn)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as a student class, its attributes and the teacher: the combined class has no import path."""
        state = {"attributes": self.__getstate__(), "distillation": self._distillation, "inputs": self._inputs}
        return _blank, (type(self._student),), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo :meth:`__reduce_ex__`; the student object is a new one."""
        self._distillation, self._inputs = state["distillation"], state["inputs"]
        super().__setstate__(state["attributes"])  # type: ignore[no-untyped-call]  # torch has no annotation for it

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Not supported: the checkpoint holds the student only."""
        raise InvalidArgumentTypeError(
            "A checkpoint holds the student only: call `load_from_checkpoint` on the student's class."
        )


@cache  # one combined class per student class, for isinstance and pickling
def _distilled_class(student: Any) -> type[L.LightningModule]:
    base = student if issubclass(student, both(L.LightningModule)) else supervised_class(student)
    lightning = counterpart(L.LightningModule, base)

    @wraps(base.training_step)  # Lightning inspects this signature
    def training_step(self: DistillationModule, *args: Any, **kwargs: Any) -> Any:
        return self._distill(super(DistillationModule, self).training_step, args, kwargs)

    methods: dict[str, Any] = {"training_step": training_step}
    for name, stage in (("validation_step", "val"), ("test_step", "test")):
        if getattr(base, name) is not getattr(lightning, name):
            methods[name] = _evaluating(getattr(base, name), name, stage)
        # DistillationModule brings `lightning`'s LightningModule along, which must not come before the student's own classes.
    bases = (base,) if package_of(base) == "lightning" else (*module_bases(base), L.LightningModule)
    return type(f"Distilled{student.__name__}", (DistillationModule, *bases), methods)


def _evaluating(own: Callable[..., Any], name: str, stage: str) -> Callable[..., Any]:
    @wraps(own)
    def step(self: DistillationModule, *args: Any, **kwargs: Any) -> Any:
        return self._evaluate(getattr(super(DistillationModule, self), name), stage, args, kwargs)

    return step


def _blank(student_class: Any) -> nn.Module:
    """Create a distilled module and its student with shared, empty attributes."""
    module = object.__new__(_distilled_class(student_class))
    student = object.__new__(student_class)
    object.__setattr__(student, "__dict__", vars(module))
    object.__setattr__(module, "_student", student)
    return module


def _check_student(student: nn.Module, task_loss: Any, optimizer: Any) -> None:
    lightning = is_lightning_module(student)
    for argument, value in (("task_loss", task_loss), ("optimizer", optimizer)):
        if lightning and value is not None:
            raise InvalidArgumentError(
                f"Argument `{argument}` must be left out when `student` is a LightningModule, but got {value!r}. "
                "The student's own training_step and configure_optimizers are used."
            )
        if not lightning and not callable(value):
            raise InvalidArgumentError(
                f"Argument `{argument}` must be a callable when `student` is a plain nn.Module, but got {value!r}."
            )
    if lightning and not is_overridden("training_step", student):
        raise InvalidArgumentError(
            f"Argument `student` must define training_step, but got a {type(student).__name__} without. Add one, or pass its "
            "network with `task_loss` and `optimizer`."
        )
    for name in ("student", "teacher", "distill"):
        if hasattr(student, name):
            raise InvalidArgumentError(
                f"Argument `student` must not have an attribute named `{name}`, but got a {type(student).__name__} with one. "
                "Rename it: DistillationModule uses the name."
            )
    if "training_step" in vars(student):
        raise InvalidArgumentError(
            "Argument `student` must define training_step on its class, but got it on the instance."
        )


def _not_once(path: str | None, times: int, called: list[str]) -> str:
    where = "forward" if path is None else path
    if times == 0:
        seen = f" training_step called {', '.join(called)}: `outputs={called[0]!r}`." if called else ""
        return f"Argument `outputs` must name what training_step calls once, but {where!r} wasn't called.{seen}"
    return (
        f"Argument `outputs` must name what training_step calls once, but {where!r} was called {times} times. "
        "Name the submodule or method of the one call whose logits are to be distilled."
    )
