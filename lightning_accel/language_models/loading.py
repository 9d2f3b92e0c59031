"""Load causal language models of transformers, with errors in one line."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_accel.core.optional import require
from lightning_accel.errors import InvalidArgumentError


def load_causal_lm(source: Any, argument: str = "model") -> nn.Module:
    """The model of a folder, of a ``.gguf`` file or of a hub name, in float32; a model is returned as it is.

    Args:
        source: path, name or model.
        argument: argument that it was passed as, for the error messages.

    Raises:
        MissingPackageError: transformers isn't installed.
        InvalidArgumentError: the architecture is unknown, files are missing, or a module isn't a causal language model.
    """
    if isinstance(source, nn.Module):
        if not hasattr(source, "get_output_embeddings") or not hasattr(source, "config"):
            raise InvalidArgumentError(
                f"Argument `{argument}` must be a causal language model of transformers or its path, but got a {type(source).__name__}."
            )
        return source
    transformers = require("transformers", "lm", "CausalLM")
    path = Path(source)
    try:
        if path.suffix == ".gguf":
            folder, options = str(path.parent), {"gguf_file": path.name}
        else:
            folder, options = str(source), {}
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidArgumentError(
            f"Argument `{argument}` must be a causal language model that transformers knows, but got {str(source)!r}: {reason}"
        ) from error
    return model


def vocabulary_size(model: nn.Module) -> int:
    """Number of logits of a causal language model."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]  # of transformers
    if head is None:
        raise InvalidArgumentError(
            f"Argument `model` must have an output layer over the vocabulary, but got {type(model).__name__} without one."
        )
    return int(head.weight.shape[0])


def context_length(model: nn.Module) -> int | None:
    """Longest sequence that a model has positions for; ``None`` if its config doesn't say."""
    config: Any = model.config
    return next((getattr(config, n) for n in ("max_position_embeddings", "n_positions") if hasattr(config, n)), None)


def check_length(model: nn.Module, length: int, what: str = "input_ids") -> None:
    """Raise if a sequence is longer than the model's context.

    Raises:
        InvalidArgumentError: it is.
    """
    longest = context_length(model)
    if longest is not None and length > longest:
        raise InvalidArgumentError(
            f"Argument `{what}` must have at most {longest} tokens, the model's context, but got {length}. Use shorter sequences."
        )
