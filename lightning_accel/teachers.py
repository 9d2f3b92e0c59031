"""Teachers of a :class:`~lightning_accel.DistillationModule`."""

from typing import TYPE_CHECKING

from lightning_accel.core.lazy import lazy

if TYPE_CHECKING:
    from lightning_accel.distillation.teachers.base import Teacher as Teacher
    from lightning_accel.distillation.teachers.ema import EMATeacher as EMATeacher
    from lightning_accel.distillation.teachers.ensemble import TeacherEnsemble as TeacherEnsemble
    from lightning_accel.distillation.teachers.hugging_face import HuggingFaceTeacher as HuggingFaceTeacher
    from lightning_accel.distillation.teachers.onnx import OnnxTeacher as OnnxTeacher

_PUBLIC = {
    "Teacher": "distillation.teachers.base",
    "TeacherEnsemble": "distillation.teachers.ensemble",
    "OnnxTeacher": "distillation.teachers.onnx",
    "HuggingFaceTeacher": "distillation.teachers.hugging_face",
    "EMATeacher": "distillation.teachers.ema",
}
__getattr__, __dir__, __all__ = lazy(__name__, _PUBLIC)
