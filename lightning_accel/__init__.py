"""Prune, distill and quantize inside ``Trainer.fit``; ship a network proven to be the one that was trained.

Public names are resolved lazily: ``import lightning_accel`` imports neither torch nor any optional package.
"""

from typing import TYPE_CHECKING

from lightning_accel.core.lazy import lazy

if TYPE_CHECKING:
    from lightning_accel import benchmarking as benchmarking
    from lightning_accel import engines as engines
    from lightning_accel import language_models as language_models
    from lightning_accel import losses as losses
    from lightning_accel import onnx as onnx
    from lightning_accel import pruning as pruning
    from lightning_accel import quantization as quantization
    from lightning_accel import reports as reports
    from lightning_accel import teachers as teachers
    from lightning_accel.benchmarking.benchmark_bundle import benchmark_bundle as benchmark_bundle
    from lightning_accel.benchmarking.compare_bundles import compare_bundles as compare_bundles
    from lightning_accel.benchmarking.comparison import BenchmarkSettings as BenchmarkSettings
    from lightning_accel.benchmarking.decision import Budgets as Budgets
    from lightning_accel.benchmarking.measure import benchmark as benchmark
    from lightning_accel.core.exact_resume import ExactResume as ExactResume
    from lightning_accel.core.initial_weights import InitialWeights as InitialWeights
    from lightning_accel.core.structure import load_from_checkpoint as load_from_checkpoint
    from lightning_accel.distillation.cache.teacher_cache import TeacherCache as TeacherCache
    from lightning_accel.distillation.module import DistillationModule as DistillationModule
    from lightning_accel.distillation.scheduled import Scheduled as Scheduled
    from lightning_accel.distillation.terms import LossTerm as LossTerm
    from lightning_accel.engines.base import load_runner as load_runner
    from lightning_accel.errors import LightningAccelError as LightningAccelError
    from lightning_accel.errors import VerificationError as VerificationError
    from lightning_accel.export.callback import ModelExport as ModelExport
    from lightning_accel.export.check import check as check
    from lightning_accel.export.export_bundle import export_bundle as export_bundle
    from lightning_accel.language_models.causal_lm import CausalLM as CausalLM
    from lightning_accel.language_models.export import LanguageModelExport as LanguageModelExport
    from lightning_accel.language_models.lora import LoRA as LoRA
    from lightning_accel.language_models.token_kl import TokenKL as TokenKL
    from lightning_accel.planning.compression.advice import advise as advise
    from lightning_accel.planning.compression.compress import compress as compress
    from lightning_accel.planning.compression.outcome import Compression as Compression
    from lightning_accel.planning.latency_recording import record_latency_table as record_latency_table
    from lightning_accel.planning.plan import plan as plan
    from lightning_accel.pruning.channels.callback import ChannelPruning as ChannelPruning
    from lightning_accel.pruning.weights.callback import WeightPruning as WeightPruning
    from lightning_accel.quantization.ptq import PostTrainingQuantization as PostTrainingQuantization
    from lightning_accel.quantization.ptq import quantize as quantize
    from lightning_accel.quantization.qat import QuantizationAwareTraining as QuantizationAwareTraining
    from lightning_accel.quantization.weight_only.callback import WeightOnlyQuantization as WeightOnlyQuantization
    from lightning_accel.serving.bulk.predict import predict_files as predict_files
    from lightning_accel.verification.bundle import verify_bundle as verify_bundle
    from lightning_accel.verification.compare import verify as verify
    from lightning_accel.verification.exported import export_onnx as export_onnx

__version__ = "0.1.0"

_PUBLIC = {
    "DistillationModule": "distillation.module",
    "LossTerm": "distillation.terms",
    "Scheduled": "distillation.scheduled",
    "TeacherCache": "distillation.cache.teacher_cache",
    "ChannelPruning": "pruning.channels.callback",
    "WeightPruning": "pruning.weights.callback",
    "QuantizationAwareTraining": "quantization.qat",
    "PostTrainingQuantization": "quantization.ptq",
    "WeightOnlyQuantization": "quantization.weight_only.callback",
    "ModelExport": "export.callback",
    "CausalLM": "language_models.causal_lm",
    "LanguageModelExport": "language_models.export",
    "LoRA": "language_models.lora",
    "TokenKL": "language_models.token_kl",
    "ExactResume": "core.exact_resume",
    "InitialWeights": "core.initial_weights",
    "quantize": "quantization.ptq",
    "export_bundle": "export.export_bundle",
    "plan": "planning.plan",
    "advise": "planning.compression.advice",
    "compress": "planning.compression.compress",
    "Compression": "planning.compression.outcome",
    "record_latency_table": "planning.latency_recording",
    "check": "export.check",
    "export_onnx": "verification.exported",
    "verify": "verification.compare",
    "verify_bundle": "verification.bundle",
    "predict_files": "serving.bulk.predict",
    "load_runner": "engines.base",
    "benchmark": "benchmarking.measure",
    "benchmark_bundle": "benchmarking.benchmark_bundle",
    "compare_bundles": "benchmarking.compare_bundles",
    "Budgets": "benchmarking.decision",
    "BenchmarkSettings": "benchmarking.comparison",
    "load_from_checkpoint": "core.structure",
    "LightningAccelError": "errors",
    "VerificationError": "errors",
    "benchmarking": "",
    "language_models": "",
    "losses": "",
    "onnx": "",
    "teachers": "",
    "pruning": "",
    "quantization": "",
    "engines": "",
    "reports": "",
}
__getattr__, __dir__, __all__ = lazy(__name__, _PUBLIC)
__all__ += ["__version__"]
