"""Weight-only targets: integer weights with a scale for each group of inputs, activations in float."""

from dataclasses import dataclass

from lightning_accel.errors import InvalidArgumentError


@dataclass(frozen=True)
class WeightOnlyTarget:
    """Format of the weights; activations stay float, so no ranges are learned and no graph is captured.

    Args:
        name: name in ``target=...``.
        bits: bits of an integer.
        formats: file formats that hold exactly these integers.
        why: explanation in one sentence, for the report.
    """

    name: str
    bits: int
    formats: tuple[str, ...]
    why: str


WEIGHT_ONLY = {
    target.name: target
    for target in (
        WeightOnlyTarget(
            "int4",
            4,
            ("compressed-tensors", "gptq", "gguf", "onnx-genai"),
            "4-bit weights on the grid of ggml's Q4_0 and ONNX Runtime's MatMulNBits: stock quantizers keep the trained integers",
        ),
        WeightOnlyTarget(
            "int8-weights",
            8,
            ("compressed-tensors", "gguf"),
            "8-bit weights on the grid of ggml's Q8_0, float activations",
        ),
    )
}


def is_weight_only(target: object) -> bool:
    """Whether a target, or the name of one, is weight-only."""
    return isinstance(target, WeightOnlyTarget) or (isinstance(target, str) and target in WEIGHT_ONLY)


def weight_only_target(target: str | WeightOnlyTarget) -> WeightOnlyTarget:
    """Look up a weight-only target by its name.

    Raises:
        InvalidArgumentError: none has this name.
    """
    if isinstance(target, WeightOnlyTarget):
        return target
    if target not in WEIGHT_ONLY:
        raise InvalidArgumentError(
            f"Argument `target` must be one of {sorted(WEIGHT_ONLY)} for weights alone, but got {target!r}."
        )
    return WEIGHT_ONLY[target]
