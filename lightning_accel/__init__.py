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
    "Teacher": "distillation.teacher",
    "TeacherEnsemble": "distillation.teachers",
    "OnnxTeacher": "distillation.teachers",
    "HuggingFaceTeacher": "distillation.teachers",
    "EMATeacher": "distillation.teachers",
    "TeacherCache": "distillation.cache",
    "SoftTargetLoss": "distillation.losses",
    "HardLabelLoss": "distillation.losses",
    "LogitMSELoss": "distillation.losses",
    "MultiLabelLoss": "distillation.losses",
    "RegressionLoss": "distillation.losses",
    "DKDLoss": "distillation.decoupled",
    "DISTLoss": "distillation.correlation",
    "StandardizedLoss": "distillation.correlation",
    "HintLoss": "distillation.features",
    "AttentionTransferLoss": "distillation.features",
    "SimilarityLoss": "distillation.relations",
    "RKDLoss": "distillation.relations",
    "HiddenStateLoss": "distillation.tokens",
    "CosineLoss": "distillation.tokens",
    "AttentionLoss": "distillation.tokens",
    "MiniLMLoss": "distillation.tokens",
    "ChannelPruning": "pruning.channels",
    "WeightPruning": "pruning.weights",
    "QuantizationAwareTraining": "quantization.callback",
    "PostTrainingQuantization": "quantization.ptq",
    "Target": "quantization.targets",
    "quantize": "quantization.ptq",
    "sensitivity": "quantization.sensitivity",
    "ModelExport": "export.callback",
    "export_onnx": "export.onnx",
    "lower_precision": "export.precision",
    "verify": "export.verification",
    "verify_bundle": "export.reverify",
    "VerificationError": "export.verification",
    "ExactResume": "resume",
    "load_from_checkpoint": "structure",
    "Runner": "engines.base",
    "load_runner": "engines.base",
    "build_engine": "engines.tensorrt",
    "benchmark": "benchmarking.measure",
    "benchmark_bundle": "export.bundle_benchmark",
    "compare_bundles": "export.bundle_compare",
    "Budgets": "benchmarking.decision",
    "BenchmarkSettings": "benchmarking.comparison",
    "plan": "planning",
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
