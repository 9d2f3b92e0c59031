"""Prune, distill and quantize inside ``Trainer.fit``; ship a network proven to be the one that was trained.

Public names are resolved lazily: ``import lightning_accel`` imports neither torch nor any optional package.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "DistillationModule": "distillation.module",
    "LossTerm": "distillation.terms",
    "Scheduled": "distillation.scheduled",
    "Teacher": "distillation.teachers.base",
    "TeacherEnsemble": "distillation.teachers.ensemble",
    "OnnxTeacher": "distillation.teachers.onnx",
    "HuggingFaceTeacher": "distillation.teachers.hugging_face",
    "EMATeacher": "distillation.teachers.ema",
    "TeacherCache": "distillation.cache.teacher_cache",
    "SoftTargetLoss": "distillation.losses.logits",
    "HardLabelLoss": "distillation.losses.logits",
    "LogitMSELoss": "distillation.losses.logits",
    "MultiLabelLoss": "distillation.losses.logits",
    "RegressionLoss": "distillation.losses.logits",
    "DKDLoss": "distillation.losses.decoupled",
    "DISTLoss": "distillation.losses.correlation",
    "StandardizedLoss": "distillation.losses.correlation",
    "HintLoss": "distillation.losses.features",
    "AttentionTransferLoss": "distillation.losses.features",
    "SimilarityLoss": "distillation.losses.relations",
    "RKDLoss": "distillation.losses.relations",
    "HiddenStateLoss": "distillation.losses.tokens",
    "CosineLoss": "distillation.losses.tokens",
    "AttentionLoss": "distillation.losses.tokens",
    "MiniLMLoss": "distillation.losses.tokens",
    "ChannelPruning": "pruning.channels.callback",
    "WeightPruning": "pruning.weights.callback",
    "QuantizationAwareTraining": "quantization.qat",
    "PostTrainingQuantization": "quantization.ptq",
    "Target": "quantization.arithmetic.targets",
    "quantize": "quantization.ptq",
    "sensitivity": "quantization.sensitivity",
    "ModelExport": "export.callback",
    "export_onnx": "onnx.export",
    "lower_precision": "onnx.half_precision",
    "verify": "verification.compare",
    "verify_bundle": "verification.bundle",
    "VerificationError": "errors",
    "ExactResume": "core.exact_resume",
    "load_from_checkpoint": "core.structure",
    "Runner": "engines.base",
    "load_runner": "engines.base",
    "build_engine": "engines.tensorrt.build",
    "benchmark": "benchmarking.measure",
    "benchmark_bundle": "benchmarking.benchmark_bundle",
    "compare_bundles": "benchmarking.compare_bundles",
    "Budgets": "benchmarking.decision",
    "BenchmarkSettings": "benchmarking.comparison",
    "plan": "planning.plan",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(import_module(f"lightning_accel.{_PUBLIC[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module `lightning_accel` has no attribute `{name}`")


def __dir__() -> list[str]:
    return sorted(__all__)
