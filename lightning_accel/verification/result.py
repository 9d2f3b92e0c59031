"""The result of comparing two implementations of a network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lightning_accel.errors import VerificationError
from lightning_accel.verification.channels import ChannelErrors
from lightning_accel.verification.limits import judge
from lightning_accel.verification.memberships import Membership
from lightning_accel.verification.outputs import Predictions
from lightning_accel.verification.tolerances import Tolerance


@dataclass
class Verification:
    """Result of comparing two implementations of a network.

    Errors are absolute differences as shares of the reference's output range, over all outputs and samples.

    Args:
        engine: name of the implementation that was compared with the reference.
        samples: compared samples.
        batch_sizes: batch size -> samples compared at it.
        median_error: median error.
        p99_error: 99th percentile.
        max_error: largest.
        agreement: smallest share of samples with the same largest logit among the outputs that are logits; ``None`` if none is.
        tolerance: limits for the errors.
        distribution: error below which a share of all errors lies, by that share.
        cosine: smallest cosine between the outputs of a sample, over all outputs; ``None`` if all are zero.
        lengths: symbol of a dynamic axis beyond the batch -> sizes compared.
        decided: share of samples whose two largest reference logits are further apart than twice the 99th percentile of
            the error (of the tolerated one, if that is smaller). Only these count for the limit: on the rest an
            error within tolerance can change the order.
        agreement_decided: agreement on those.
        failures: exceeded limits, as sentences; empty if it passed.
        limits: limits that were applied: the tolerance, or more where the null divergence is larger.
        null: null divergence of the network, ``{variant: {"median": ..., "p99": ..., "maximum": ..., ...}}``.
        worst_channel: the channel that differs most of its own spread, and by how much: the median over samples.
        equal: smallest share of equal integers and booleans of an output; ``None`` where there are none.
        same_side: smallest share of an output's values on the same side of a threshold: 0 where the output has both signs, 0.5 for
            probabilities.
        outputs: by output its ``kind`` (``"logits"``, ``"mixed scales"``, ``"embedding"``, ``"values"`` or ``"integers"``), its errors
            ``median``, ``p99`` and ``maximum`` as shares of its own range, ``same_side``, or the share ``equal``.
        metric: the user's metrics, reference and engine, by name.
        first_divergence: first node whose output differs on the same inputs, if it was looked for.
        note: measurements that were not possible, and why.
    """

    engine: str
    samples: int
    batch_sizes: dict[int, int]
    median_error: float
    p99_error: float
    max_error: float
    agreement: float | None
    tolerance: Tolerance
    distribution: dict[str, float] = field(default_factory=dict)
    cosine: float | None = None
    lengths: dict[str, list[int]] = field(default_factory=dict)
    decided: float | None = None
    agreement_decided: float | None = None
    failures: list[str] = field(default_factory=list)
    limits: dict[str, float] = field(default_factory=dict)
    null: dict[str, dict[str, float]] = field(default_factory=dict)
    worst_channel: str = ""
    equal: float | None = None
    same_side: float | None = None
    metric: dict[str, tuple[float, float]] = field(default_factory=dict)
    first_divergence: str = ""
    note: str = ""
    outputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list, repr=False)  # what no limit is asked about: shapes
    channels: dict[str, ChannelErrors] = field(default_factory=dict, repr=False)
    memberships: dict[str, Membership] = field(default_factory=dict, repr=False)
    predictions: dict[str, Predictions] = field(default_factory=dict, repr=False)
    nulls: dict[str, "Verification"] = field(default_factory=dict, repr=False)
    judge_predictions: bool = field(default=True, repr=False)

    @property
    def passed(self) -> bool:
        """Whether no limit was exceeded."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.repr}
        return {
            **values,
            "tolerance": dict(vars(self.tolerance)),
            "passed": self.passed,
            "batch_sizes": {str(k): v for k, v in self.batch_sizes.items()},
        }

    def against(self, nulls: Mapping[str, "Verification"]) -> "Verification":
        """The same measurements with the null divergence as limits, where it exceeds the tolerance.

        Args:
            nulls: comparisons of the network with itself, by the change: rounding, order of summation.
        """
        nulls = {
            name: null for name, null in nulls.items() if math.isfinite(null.max_error)
        }  # no yardstick where noise overflows
        known = {**self.null, **{name: null.own_numbers() for name, null in nulls.items()}}
        return judge(replace(self, null=known, nulls={**self.nulls, **nulls}))

    def own_numbers(self) -> dict[str, float]:
        """The numbers that serve as limits for another comparison."""
        found = {
            "median": self.median_error,
            "p99": self.p99_error,
            "maximum": self.max_error,
            "agreement": self.agreement,
            "agreement_decided": self.agreement_decided,
            "equal": self.equal,
            "same_side": self.same_side,
        }
        return {name: value for name, value in found.items() if value is not None}

    def raise_if_failed(self, repeat: str = "") -> None:
        """Raise if a limit was exceeded.

        Args:
            repeat: command that repeats the step.

        Raises:
            VerificationError: with the numbers and the first diverging node.
        """
        if self.passed:
            return
        message = f"What {self.engine} computes must be what was trained, but {'; '.join(self.failures)} ({self.samples} samples)."
        if self.first_divergence:
            message += f" {self.first_divergence}"
        raise VerificationError(message + (f" Repeat this step with: {repeat}" if repeat else ""))
