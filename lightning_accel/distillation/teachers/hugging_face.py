"""Teacher from a pretrained model of ``transformers``."""

from typing import Any

from torch import nn

from lightning_accel.core.arguments import checked
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

    @checked()
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
        try:
            self.network = make.from_pretrained(name_or_path, **(options or {}))
        except (OSError, ValueError) as error:
            raise InvalidArgumentError(
                f"Argument `name_or_path` must be a folder or name of a pretrained model, but got {name_or_path!r}: {error}"
            ) from error

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the model: an object with ``logits``."""
        return self.network(*args, **kwargs)
