"""Judge a comparison: each number is held against the tolerance, or the null divergence where that is larger."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from lightning_accel.verification.channels import FACTOR, judge_channels
from lightning_accel.verification.memberships import judge_memberships
from lightning_accel.verification.significance import upper_share

if TYPE_CHECKING:
    from lightning_accel.verification.result import Verification


def judge(result: "Verification") -> "Verification":
    """Fill in ``limits``, ``failures`` and ``worst_channel`` of a comparison; returns it."""
    result.failures, result.limits = list(result.broken), {}
    result.failures += _errors(result)
    worst = max(
        faults := judge_channels(result.channels, [n.channels for n in result.nulls.values()], result.tolerance),
        key=lambda fault: fault.excess,
        default=None,
    )
    result.worst_channel = "" if worst is None else f"{worst.channel}: {worst.share:.1e} of its spread"
    result.failures += [fault.says for fault in faults if fault.excess > 1.0]
    result.failures += _integers(result)
    result.failures += judge_memberships(
        result.memberships, [n.memberships for n in result.nulls.values()], result.tolerance
    )
    result.failures += _predictions(result)
    return result


def _errors(result: "Verification") -> Iterator[str]:
    """Judge the median, the 99th percentile and the largest of all errors."""
    errors = {
        "median": ("the median error", result.median_error),
        "p99": ("the 99th percentile of the error", result.p99_error),
        "maximum": ("the largest error", result.max_error),
    }
    for name, (what, value) in errors.items():
        most = max((null[name] for null in result.null.values()), default=0.0)
        limit = result.limits[name] = max(getattr(result.tolerance, name), FACTOR * most)
        if not value <= limit:
            yield f"{what} is {value:.2e} of the output range, above {limit:.1e}"


def _integers(result: "Verification") -> Iterator[str]:
    """Judge integers and booleans, output by output."""
    for name, line in result.outputs.items():
        own = [null.outputs[name] for null in result.nulls.values() if name in null.outputs]
        if "equal" in line:
            least = _least(result, [null["equal"] for null in own if "equal" in null])
            result.limits["equal"] = min(result.limits.get("equal", 1.0), least)
            if line["equal"] < least:
                yield f"integers and booleans of output {name} are equal on {line['equal']:.2%} of them, below {least:.2%}"


def _predictions(result: "Verification") -> Iterator[str]:
    """Judge predictions and thresholds: shares of samples, whose uncertainty on few samples is taken into account."""
    if not result.judge_predictions:
        return
    for name, found in result.predictions.items():
        own = [null.predictions[name] for null in result.nulls.values() if name in null.predictions]
        of = "" if len(result.outputs) == 1 else f" of output {name}"
        if found.agreement_decided is not None:
            shares = [null.agreement_decided for null in own if null.agreement_decided is not None]
            least = result.limits["agreement_decided"] = _least(result, shares)
            if found.agreement_decided < least:
                yield (
                    f"predictions{of} agree on {found.agreement_decided:.2%} of the samples that are decided by more than the error "
                    f"({found.decided:.0%} of all), below {least:.2%}"
                )
        if own:  # without them nothing says how many samples lie on the edge between two classes
            least = result.limits["agreement"] = _least(result, [null.agreement for null in own])
            if found.agreement < least:
                yield f"predictions{of} agree on {found.agreement:.2%} of the samples, below {least:.2%}"
    for name, line in result.outputs.items():
        sides = [null.outputs[name].get("same_side") for null in result.nulls.values() if name in null.outputs]
        if "same_side" in line and sides:
            least = result.limits["same_side"] = _least(result, [side for side in sides if side is not None])
            if line["same_side"] < least:
                yield (
                    f"values of output {name} lie on the same side of a threshold for {line['same_side']:.2%} of them, "
                    f"below {least:.2%}"
                )


def _least(result: "Verification", own: list[float]) -> float:
    """The smallest share that is accepted, from the shares of the null divergence."""
    most = max([1.0 - result.tolerance.agreement, *(FACTOR * (1.0 - share) for share in own)])
    return 1.0 - (upper_share(most, result.samples) if result.nulls else most)
