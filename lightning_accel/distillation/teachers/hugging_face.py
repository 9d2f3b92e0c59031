"""Teacher from a pretrained model of ``transformers``."""

from typing import Any

from torch import nn

from lightning_accel.core.optional import require
from lightning_accel.errors import InvalidArgumentError


class HuggingFaceTeacher(nn.Module):
    """A pretrained model of ``transformers``, from a folder or the hub.

    Args:
        name_or_path: folder or name on the hub.
        auto_class: class of ``transformers`` that loads it.
        options: further arguments of its ``from_pretrained``, e.g. ``{"output_hidden_states": True}``.

    Raises:
        MissingPackageError: ``transformers`` is not installed.
        InvalidArgumentError: ``auto_class`` isn't a class of ``transformers``.

    Example:
        >>> teacher = HuggingFaceTeacher("my-folder", options={"output_hidden_states": True})  # doctest: +SKIP
    """

    layers_in = "network"

    def __init__(
        self,
        name_or_path: str,
        auto_class: str = "AutoModelForSequenceClassification",
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        transformers = require("transformers", "transformers", "`HuggingFaceTeacher`")
        make = getattr(transformers, auto_class, None)
        if make is None or not hasattr(make, "from_pretrained"):
            raise InvalidArgumentError(
                f"Argument `auto_class` must be a class of transformers with from_pretrained, but got {auto_class!r}."
            )
        self.network = make.from_pretrained(name_or_path, **(options or {}))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the model: an object with ``logits``."""
        return self.network(*args, **kwargs)
