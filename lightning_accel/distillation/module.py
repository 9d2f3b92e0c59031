"""A student that trains beside a frozen teacher and stays what it was."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import cache, wraps
from inspect import signature
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_accel.distillation.hparams import keep_own_hparams_
from lightning_accel.distillation.losses import SoftTargetLoss
from lightning_accel.distillation.recording import called_submodules, find_logits, observed, resolve
from lightning_accel.distillation.supervised import adopt_, supervised_class
from lightning_accel.distillation.teacher import Distillation, freeze_, load_weights_

_TEMPERATURE = 4.0


class _SharesStudent(L.LightningModule):
    """Makes the instance; apart from DistillationModule, whose parameters a command line then reads off ``__init__``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """An instance of the student's class that shares the student's attributes."""
        student = signature(cls.__init__).bind(None, *args, **kwargs).arguments["student"]
        if not isinstance(student, nn.Module):
            raise ValueError(
                f"Argument `student` must be a LightningModule or an nn.Module, but got a {type(student).__name__}."
            )
        if isinstance(student, _SharesStudent):
            raise ValueError("Argument `student` must not be distilled already, but got a DistillationModule.")
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
    Logged: ``distillation_loss`` and ``task_loss``.

    Args:
        student: a LightningModule with a ``training_step``, or a plain ``nn.Module``, which is then trained on batches
            ``(inputs, target)`` and needs ``task_loss`` and ``optimizer``.
        teacher: any module that takes the arguments of the student's ``forward``; frozen in place.
        losses: ``"kd"`` for :class:`SoftTargetLoss`, or a callable ``(student_logits, teacher_logits) -> scalar``.
        alpha: weight of the distillation loss, in [0, 1].
        temperature: of the soft targets, above 0; only with ``losses="kd"``.
        outputs: where the student's logits, ``(N, C)``, are to be seen: ``None`` for what ``forward`` returns (a Tensor, or
            something with ``logits``); the dotted path of a submodule or method (``"net"``, ``"net.encode"``) when
            ``training_step`` calls that instead; a callable from what ``forward`` returns to the logits.
        teacher_outputs: a callable from what the teacher returns to its logits.
        teacher_checkpoint: a Lightning checkpoint or state-dict file with the teacher's weights.
        task_loss: ``(logits, target) -> scalar``, for an ``nn.Module`` student.
        optimizer: from parameters to an Optimizer, or to what ``configure_optimizers`` may return; for an ``nn.Module``
            student.

    Raises:
        ValueError: an argument breaks a rule above; logits of student and teacher differ in shape.
        RuntimeError: in a training step, logits weren't seen exactly once.

    Example:
        >>> student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
        >>> module = DistillationModule(student, teacher, task_loss=nn.CrossEntropyLoss(), optimizer=torch.optim.Adam)
        >>> list(module.state_dict())
        ['weight', 'bias']
    """

    __slots__ = ("_distillation", "_student")  # beside the student's `__dict__`, which is shared and stays as it was
    _distillation: Distillation
    _student: nn.Module

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        losses: Callable | str = "kd",
        alpha: float = 0.7,
        temperature: float = _TEMPERATURE,
        outputs: Callable | str | None = None,
        teacher_outputs: Callable | None = None,
        teacher_checkpoint: str | Path | None = None,
        task_loss: Callable | None = None,
        optimizer: Callable[[Iterable], torch.optim.Optimizer] | None = None,
    ) -> None:
        # no super().__init__(): the student is built already, and this object is the student
        if not isinstance(teacher, nn.Module):
            raise ValueError(f"Argument `teacher` must be an nn.Module, but got a {type(teacher).__name__}.")
        if not 0 <= alpha <= 1:
            raise ValueError(f"Argument `alpha` must be in [0, 1], but got {alpha}.")
        loss = _make_loss(losses, temperature)
        _check_student(student, task_loss, optimizer)
        if teacher_checkpoint is not None:
            load_weights_(teacher, teacher_checkpoint)
        freeze_(teacher, student)
        if isinstance(student, L.LightningModule):
            keep_own_hparams_(student, DistillationModule)
        else:
            adopt_(student)
        self._distillation = Distillation(teacher, teacher_outputs, loss, alpha, outputs, task_loss, optimizer)

    @property
    def student(self) -> nn.Module:
        """The student as it was handed in; it shares everything with this module and doesn't distill."""
        return self._student

    @property
    def teacher(self) -> nn.Module:
        """The frozen teacher."""
        return self._distillation.teacher

    def _distill(self, step: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the student's training step, see its logits on the way, and add what they should have been to its loss."""
        distillation = self._distillation
        path = distillation.outputs if isinstance(distillation.outputs, str) else None
        seen: list[tuple[Any, Tensor]] = []

        def observe(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            target = distillation.teach(args, kwargs)  # first: its activations are gone before the student's pile up
            output = call(*args, **kwargs)
            seen.append((output, target))
            return output

        with ExitStack() as stack:
            called = [] if distillation.verified else stack.enter_context(called_submodules(self))
            stack.enter_context(observed(*resolve(self, path), observe))
            result = step(*args, **kwargs)

        task_loss = result.get("loss") if isinstance(result, Mapping) else result
        if task_loss is None:
            return result  # the student skips this batch; a dict without "loss" is Lightning's to refuse
        if len(seen) != 1:
            raise RuntimeError(_not_once(path, len(seen), called))
        distillation.verified = True
        output, target = seen[0]
        student_logits = find_logits(
            distillation.outputs(output) if callable(distillation.outputs) else output, "outputs"
        )
        if torch.is_grad_enabled() and not student_logits.requires_grad:
            raise RuntimeError(
                f"Argument `outputs` must name a call made with gradients, but {path or 'forward'!r} was called without. "
                "Name the submodule or method that computes the logits in training_step."
            )
        if student_logits.shape != target.shape:
            raise ValueError(
                f"Logits of student and teacher must have the same shape, but got {tuple(student_logits.shape)} and "
                f"{tuple(target.shape)}. Select them with `outputs` and `teacher_outputs`."
            )
        distillation_loss = distillation.loss(student_logits, target)
        self.log("distillation_loss", distillation_loss.detach())
        self.log("task_loss", task_loss.detach())
        loss = distillation.alpha * distillation_loss + (1 - distillation.alpha) * task_loss
        return {**result, "loss": loss} if isinstance(result, Mapping) else loss

    def setup(self, stage: str) -> None:
        """The student's ``setup``; then refuse what can't be distilled."""
        super().setup(stage)
        if stage == "fit":
            if not self.automatic_optimization:
                raise ValueError(
                    "Argument `student` must use automatic optimization, but got `automatic_optimization = False`: with "
                    "manual optimization its training_step makes the loss and the step itself."
                )
            self._distillation.in_charge = True
            self._distillation.teacher.eval()

    def on_fit_start(self) -> None:
        """The student's ``on_fit_start``, once ``outputs`` is known to lead somewhere."""
        if isinstance(self._distillation.outputs, str):
            resolve(self, self._distillation.outputs)
        super().on_fit_start()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        if self._distillation.in_charge:
            for module in self._distillation.modules():
                module._apply(fn)
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle and copy as a student class, its attributes and the teacher: the combined class has no import path."""
        return _blank, (type(self._student),), {"attributes": self.__getstate__(), "distillation": self._distillation}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Undo :meth:`__reduce_ex__`; the student object is a new one."""
        self._distillation = state["distillation"]
        super().__setstate__(state["attributes"])

    @classmethod
    def load_from_checkpoint(cls, *args: Any, **kwargs: Any) -> Any:
        """Refused: the checkpoint holds the student alone."""
        raise TypeError("A checkpoint holds the student alone: call `load_from_checkpoint` on the student's class.")


@cache  # a class per class, for isinstance and pickling
def _distilled_class(student: Any) -> type[L.LightningModule]:
    base = student if issubclass(student, L.LightningModule) else supervised_class(student)

    @wraps(base.training_step)  # Lightning reads the signature to know what to pass
    def training_step(self: DistillationModule, *args: Any, **kwargs: Any) -> Any:
        return self._distill(super(DistillationModule, self).training_step, args, kwargs)

    return type(f"Distilled{student.__name__}", (DistillationModule, base), {"training_step": training_step})


def _blank(student_class: Any) -> nn.Module:
    """A distilled module without attributes yet, and its student, which shares them."""
    module = object.__new__(_distilled_class(student_class))
    student = object.__new__(student_class)
    object.__setattr__(student, "__dict__", vars(module))
    object.__setattr__(module, "_student", student)
    return module


def _make_loss(
    losses: str | Callable[[Tensor, Tensor], Tensor], temperature: float
) -> Callable[[Tensor, Tensor], Tensor]:
    if losses == "kd":
        return SoftTargetLoss(temperature)
    if not callable(losses):
        raise ValueError(
            f'Argument `losses` must be "kd" or a callable (student_logits, teacher_logits) -> loss, but got {losses!r}.'
        )
    if temperature != _TEMPERATURE:
        raise ValueError(
            f'Argument `temperature` must be left out unless `losses="kd"`, but got {temperature}. Give it to the loss.'
        )
    if isinstance(losses, nn.Module) and any(p.requires_grad for p in losses.parameters()):
        raise ValueError(
            f"Argument `losses` must hold no parameters to train, but got a {type(losses).__name__} with some: no "
            "optimizer would see them."
        )
    return losses


def _check_student(student: nn.Module, task_loss: Any, optimizer: Any) -> None:
    lightning = isinstance(student, L.LightningModule)
    for argument, value in (("task_loss", task_loss), ("optimizer", optimizer)):
        if lightning and value is not None:
            raise ValueError(
                f"Argument `{argument}` must be left out when `student` is a LightningModule, but got {value!r}. "
                "The student's own training_step and configure_optimizers are used."
            )
        if not lightning and not callable(value):
            raise ValueError(
                f"Argument `{argument}` must be a callable when `student` is a plain nn.Module, but got {value!r}."
            )
    if lightning and not is_overridden("training_step", student):
        raise ValueError(
            f"Argument `student` must define training_step, but got a {type(student).__name__} without. Add one, or pass its "
            "network with `task_loss` and `optimizer`."
        )
    for name in ("student", "teacher"):
        if hasattr(student, name):
            raise ValueError(
                f"Argument `student` must not have an attribute named `{name}`, but got a {type(student).__name__} with one. "
                "Rename it: DistillationModule uses the name."
            )
    if "training_step" in vars(student):
        raise ValueError("Argument `student` must define training_step on its class, but got it on the instance.")


def _not_once(path: str | None, times: int, called: list[str]) -> str:
    where = "forward" if path is None else path
    if times == 0:
        seen = f" training_step called {', '.join(called)}: `outputs={called[0]!r}`." if called else ""
        return f"Argument `outputs` must name what training_step calls once, but {where!r} wasn't called.{seen}"
    return (
        f"Argument `outputs` must name what training_step calls once, but {where!r} was called {times} times. "
        "Name the submodule or method of the one call whose logits are to be distilled."
    )
