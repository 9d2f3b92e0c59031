"""Language models: training, adapters, token data, distillation, files for five engines, and their proof."""

from typing import TYPE_CHECKING

from lightning_accel.core.lazy import lazy

if TYPE_CHECKING:
    from lightning_accel.language_models.bundle import write_language_bundle as write_language_bundle
    from lightning_accel.language_models.causal_lm import CausalLM as CausalLM
    from lightning_accel.language_models.export import LanguageModelExport as LanguageModelExport
    from lightning_accel.language_models.lora import LoRA as LoRA
    from lightning_accel.language_models.lora import add_lora_ as add_lora_
    from lightning_accel.language_models.lora import load_adapter_ as load_adapter_
    from lightning_accel.language_models.lora import merge_lora_ as merge_lora_
    from lightning_accel.language_models.lora import save_adapter as save_adapter
    from lightning_accel.language_models.lora import set_adapters_ as set_adapters_
    from lightning_accel.language_models.opening import open_bundle as open_bundle
    from lightning_accel.language_models.perplexity import Perplexity as Perplexity
    from lightning_accel.language_models.pruning import prune_ as prune_
    from lightning_accel.language_models.token_data import TokenDataModule as TokenDataModule
    from lightning_accel.language_models.token_data import TokenSequences as TokenSequences
    from lightning_accel.language_models.token_data import chat_tokens as chat_tokens
    from lightning_accel.language_models.token_data import pack_tokens as pack_tokens
    from lightning_accel.language_models.token_kl import TokenKL as TokenKL

_PUBLIC = {
    "CausalLM": "language_models.causal_lm",
    "LanguageModelExport": "language_models.export",
    "open_bundle": "language_models.opening",
    "write_language_bundle": "language_models.bundle",
    "LoRA": "language_models.lora",
    "add_lora_": "language_models.lora",
    "load_adapter_": "language_models.lora",
    "merge_lora_": "language_models.lora",
    "save_adapter": "language_models.lora",
    "set_adapters_": "language_models.lora",
    "Perplexity": "language_models.perplexity",
    "prune_": "language_models.pruning",
    "TokenDataModule": "language_models.token_data",
    "TokenSequences": "language_models.token_data",
    "chat_tokens": "language_models.token_data",
    "pack_tokens": "language_models.token_data",
    "TokenKL": "language_models.token_kl",
}
__getattr__, __dir__, __all__ = lazy(__name__, _PUBLIC)
