"""A teacher: frozen, in eval, and registered nowhere."""

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.distillation.recording import find_logits


@dataclass
class Distillation:
    """All that a :class:`DistillationModule` has beside its student. No Module, so that nothing in it gets registered.

    Args:
        teacher: frozen network.
        teacher_outputs: from what the teacher returns to logits.
        loss: ``(student_logits, teacher_logits) -> scalar``.
        alpha: weight of the distillation loss.
        outputs: where the student's logits are; path, callable or None.
        task_loss: for a plain ``nn.Module`` student, ``(logits, target) -> scalar``.
        optimizer: for a plain ``nn.Module`` student, ``parameters -> Optimizer``.
    """

    teacher: nn.Module
    teacher_outputs: Callable[[Any], Tensor] | None
    loss: Callable[[Tensor, Tensor], Tensor]
    alpha: float
    outputs: str | Callable[[Any], Tensor] | None
    task_loss: Callable[[Any, Any], Tensor] | None
    optimizer: Callable[..., Any] | None
    in_charge: bool = field(default=True, kw_only=True)  # of the teacher's device: copies of the student (EMA) are not
    verified: bool = field(default=False, kw_only=True)  # logits were seen exactly once in a step

    def modules(self) -> Iterator[nn.Module]:
        """What has to follow the student from device to device."""
        return (m for m in (self.teacher, self.loss, self.task_loss) if isinstance(m, nn.Module))

    @torch.no_grad()
    def teach(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The teacher's logits. ``no_grad``, not ``inference_mode``: tensors of the latter can't enter a loss."""
        try:
            output = self.teacher(*args, **kwargs)
        except Exception as error:
            error.add_note("Raised by the teacher, which is called with the arguments of the student's recorded call.")
            raise
        logits = output if self.teacher_outputs is None else self.teacher_outputs(output)
        return find_logits(logits, "teacher_outputs")

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distillation":
        other = copy(self)  # averaged models copy the student: one teacher is enough
        other.in_charge = False
        return other


def freeze_(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """Put a teacher in eval and stop its gradients.

    Raises:
        ValueError: it shares a parameter with the student, which would be frozen with it.
    """
    own = {id(parameter): name for name, parameter in student.named_parameters()}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in own:
            raise ValueError(
                f"Argument `teacher` must not share parameters with the student, but got {name!r}, which is the student's "
                f"{own[id(parameter)]!r}. Pass `copy.deepcopy(teacher)`."
            )
    return teacher.eval().requires_grad_(False)


def load_weights_(teacher: nn.Module, path: str | Path) -> None:
    """Load a Lightning checkpoint or a state-dict file into a teacher, strictly and without unpickling foreign code.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or holds the weights of something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"Argument `teacher_checkpoint` must be a checkpoint file, but got {str(path)!r}, which does not exist."
        )
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises a dozen unrelated types for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"Argument `teacher_checkpoint` must be a readable checkpoint, but got {str(path)!r}: {reason}. The file is "
            "damaged, or holds objects that `weights_only=True` refuses (keep hyper-parameters plain values)."
        ) from error
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    expected = {key: value.shape for key, value in teacher.state_dict().items() if isinstance(value, Tensor)}
    wrong = [
        *(f"{key!r} is missing" for key in expected if key not in state),
        *(f"{key!r} is unknown" for key in state if key not in expected),
        *(
            f"{key!r} is {tuple(state[key].shape)}, not {tuple(shape)}"
            for key, shape in expected.items()
            if isinstance(state.get(key), Tensor) and state[key].shape != shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"Argument `teacher_checkpoint` must hold exactly the weights of `teacher` ({type(teacher).__name__}), but got "
            f"{str(path)!r}, in which {', '.join(wrong[:3])}{more}. Build the teacher from the class that wrote the file."
        )
    teacher.load_state_dict(state)
