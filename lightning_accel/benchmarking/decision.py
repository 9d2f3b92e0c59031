"""Choose the variant to ship within budgets for accuracy, latency and size."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from lightning_accel.benchmarking.comparison import Comparison, VariantResult
from lightning_accel.benchmarking.scores import VALUES, score_titles
from lightning_accel.core.arguments import check_fields, within
from lightning_accel.errors import InvalidArgumentError


@dataclass(frozen=True)
class Budgets:
    """Limits for a variant to ship; ``None`` is no limit.

    Args:
        max_drop: largest loss in percentage points of accuracy against the float32 network in ONNX Runtime; of agreement
            with the trained network, if there are no labels; of R² (in %), if outputs are values.
        max_latency_ms: largest median latency of a call with ``batch`` samples, one caller, in ms.
        max_bytes: largest size of the file in bytes.
        batch: batch size that the latency budget refers to; ``None`` means the largest measured one.

    Raises:
        InvalidArgumentError: a number out of its range.

    Example:
        >>> Budgets(max_drop=0.5).max_drop  # half a point, e.g. from 92.0 % to 91.5 %
        0.5
    """

    max_drop: float = 1.0
    max_latency_ms: float | None = None
    max_bytes: int | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        check_fields(self, max_drop=within(0, 100, "percentage points"))
        for name in ("max_latency_ms", "max_bytes", "batch"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InvalidArgumentError(f"Argument `{name}` must be above 0 and finite, or None, but got {value}.")


def choose_variant(comparison: Comparison, budgets: Budgets) -> dict[str, Any]:
    """Choose the variant to ship.

    A variant is refused if it didn't run, if a bundle can't load it, if its kernels diverge from the file, or if it
    exceeds a budget. Among the others, the variant with the highest lower bound of the speed-up over float32 in ONNX Runtime
    ships, provided that this bound exceeds 1 and the null run; otherwise float32 ships. Variants of the bundle that this machine
    can't run, such as an engine for a GPU, are excluded, and ``why`` names them.

    Args:
        comparison: the measurements; not changed.
        budgets: the limits.

    Returns:
        ``ship`` (name of the variant, or ``None`` if nothing fits), ``why``, ``budgets``, ``refused`` (name -> reason).

    Raises:
        InvalidArgumentError: the budgets refer to a batch size that was not measured.
    """
    sizes = comparison.settings["batches"]
    batch = max(sizes) if budgets.batch is None else budgets.batch
    if batch not in sizes:
        raise InvalidArgumentError(
            f"Argument `batch` must be one of the measured sizes {list(sizes)}, but got {batch}."
        )
    limits = {**asdict(budgets), "batch": batch}
    floor = next((variant for variant in comparison.variants if variant.name == comparison.baseline), None)
    if floor is None or floor.status != "ran":
        reason = "it is not among the variants" if floor is None else f"{floor.status}: {floor.reason}"
        why = (
            f"Nothing is decided: {comparison.baseline}, which all others are held against, wasn't measured: {reason}."
        )
        return {"ship": None, "why": why, "budgets": limits, "refused": {}}
    refused, excess = {}, {}
    titles = score_titles(comparison.settings)
    for variant in comparison.variants:
        reason, over = _refusal(variant, floor, budgets, batch, titles)
        if reason:
            refused[variant.name] = reason
            if over:
                excess[variant.name] = over
    fitting = [variant for variant in comparison.variants if variant.name not in refused]
    result = {"budgets": limits, "refused": refused}
    if not fitting:
        nearest = min(excess, key=lambda name: excess[name], default=None)
        near = "" if nearest is None else f" The nearest is {nearest}: {refused[nearest]}."
        return {"ship": None, "why": f"No variant fits the budgets.{near}{_elsewhere(comparison)}", **result}
    best = max(fitting, key=lambda variant: _low(variant, batch))
    plain = next((variant for variant in fitting if variant.name == comparison.baseline), None)
    quiet = _clearly(comparison, batch)
    if plain is not None and (best is plain or _low(best, batch) <= quiet):
        ship, why = plain, _plain_is_best([variant for variant in fitting if variant is not plain], batch, quiet)
    else:
        ship, why = best, _why(best, floor, batch, titles)
    return {"ship": ship.name, "why": why + _elsewhere(comparison), **result}


def _elsewhere(comparison: Comparison) -> str:
    """A sentence about the bundle's variants that can't run on this machine; empty if there are none."""
    names = [
        variant.name
        for variant in comparison.variants
        if variant.status == "not here" and variant.file is not None and not variant.unshippable
    ]
    if not names:
        return ""
    return f" {' and '.join(names)} was excluded because it can't run on this machine: repeat the benchmark on the target machine."


def _refusal(
    variant: VariantResult, floor: VariantResult, budgets: Budgets, batch: int, titles: tuple[str, str]
) -> tuple[str, float]:
    """Reason to refuse a variant, and the factor by which it exceeds the budgets if that is the only reason."""
    point = variant.point(batch)
    if variant.status != "ran":
        return f"{variant.status}: {variant.reason}", 0.0
    if variant.unshippable:
        return f"not shippable: {variant.unshippable}", 0.0
    if point is None:
        return f"not measured at batch {batch}", 0.0
    is_floor = variant.name == floor.name
    if variant.kernels is None and not is_floor:
        return (
            "no held-out samples to verify its kernels on: pass --data, or export with keep_samples",
            0.0,
        )
    if variant.kernels is not None and not variant.kernels["passed"]:
        return f"its kernels diverge from the file on this machine: {'; '.join(variant.kernels['failures'])}", 0.0
    reasons, over = [], []
    drop = _drop(variant, floor)
    if drop is None and not is_floor:
        return (
            "neither accuracy nor agreement could be computed for `max_drop`: the outputs don't vary, or aren't finite",
            0.0,
        )
    if drop is not None and drop > budgets.max_drop:
        what = titles[variant.accuracy is None]
        reasons.append(f"{what} drops by {drop:.2f} points, more than {budgets.max_drop:g}")
        over.append(drop / max(budgets.max_drop, 0.01))
    if budgets.max_latency_ms is not None and point.p50_ms > budgets.max_latency_ms:
        reasons.append(f"p50 at batch {batch} is {point.p50_ms:.3f} ms, more than {budgets.max_latency_ms:g}")
        over.append(point.p50_ms / budgets.max_latency_ms)
    if budgets.max_bytes is not None and (variant.file_bytes or 0) > budgets.max_bytes:
        reasons.append(f"its file has {variant.file_bytes:,} bytes, more than {budgets.max_bytes:,}")
        over.append((variant.file_bytes or 0) / budgets.max_bytes)
    return "; ".join(reasons), max(over, default=0.0)


def _drop(variant: VariantResult, floor: VariantResult) -> float | None:
    """Loss against float32 in percentage points, rounded so that a loss equal to the budget is allowed."""
    if variant.score is None or floor.score is None:
        return None
    return round(100 * (floor.score - variant.score), 6)


def _low(variant: VariantResult, batch: int) -> float:
    point = variant.point(batch)
    return 0.0 if point is None or point.speedup_low is None else point.speedup_low


def _clearly(comparison: Comparison, batch: int) -> float:
    """The speed-up above which a variant is clearly faster than float32."""
    null = next((n for n in comparison.null["points"] if (n["batch"], n["callers"]) == (batch, 1)), None)
    if null is None:
        return 1.0
    return max(1.0, float(null["high"]))


def _ratio_of(variant: VariantResult, batch: int) -> str:
    point = variant.point(batch)
    if point is None or point.speedup is None:
        return "not compared with fp32"
    return f"{point.speedup:.2f}x [{point.speedup_low:.2f}, {point.speedup_high:.2f}]"


def _plain_is_best(others: list[VariantResult], batch: int, quiet: float) -> str:
    says = "Plain fp32 in ONNX Runtime ships: "
    if not others:
        return says + "no other variant fits."
    best = max(others, key=lambda variant: _low(variant, batch))
    noise = f" and above what the null run gives ({quiet:.2f})" if quiet > 1 else ""
    return (
        f"{says}no variant that fits is clearly faster. The fastest of them, {best.name}, is {_ratio_of(best, batch)} as fast "
        f"at batch {batch}, whose lower end must lie above 1{noise}."
        f"{' On a quiet machine another may ship.' if quiet > 1.1 else ''}"
    )


def _why(variant: VariantResult, floor: VariantResult, batch: int, titles: tuple[str, str]) -> str:
    says = [f"{variant.name} ships: {_ratio_of(variant, batch)} as fast as fp32 in ONNX Runtime at batch {batch}"]
    drop = _drop(variant, floor)
    if drop is not None:
        what = titles[0] if variant.accuracy is not None else f"{titles[1]} (there are no labels)"
        change = f"drops by {drop:.2f} points" if drop > 0 else f"is {-drop:.2f} points higher" if drop < 0 else "stays"
        says.append(f"its {what} {change} on {variant.samples:,} samples")
    if variant.file_bytes and floor.file_bytes:
        says.append(f"its file has {variant.file_bytes:,} bytes instead of {floor.file_bytes:,}")
    text = "; ".join(says) + "."
    point = variant.point(batch)
    if point is not None and (point.speedup_low or 0) <= 1:
        text += " It is not clearly faster than fp32, which does not fit the budgets."
    return text


def resolution(samples: int | None, budgets: Mapping[str, Any], output_kind: str | None = None) -> str:
    """A sentence if one sample is worth more than the allowed drop; empty otherwise, and for values."""
    if not samples or output_kind == VALUES or 100 / samples <= budgets["max_drop"]:
        return ""
    return (
        f"One of the {samples} samples weighs {100 / samples:.2f} points, more than the drop of {budgets['max_drop']:g} that is "
        "allowed: use more held-out data."
    )
