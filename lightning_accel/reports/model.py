"""The report as dataclasses: the content of ``report.json``, the page, the Markdown and the plots."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_accel.core.intervals import wilson_interval
from lightning_accel.errors import InvalidArgumentError

SCHEMA = 2

INCOMPLETE, QAT_BENEFIT, METHOD, NOISE, DECISION = "incomplete", "qat benefit", "method", "noise", "decision"
UNUSED_INPUTS, SIZE = "unused inputs", "size"
SPARSITY, CHANNELS, KEPT_FLOAT, BENEFIT = "sparsity", "channels", "kept float", "benefit"


@dataclass
class Row:
    """One network in one engine; ``None`` is a value that was not measured.

    Attributes:
        name: e.g. ``"student int8"``.
        engine: engine that ran it, e.g. ``"onnxruntime"``.
        accuracy: share of correct predictions on held-out samples, in [0, 1]. Default: ``correct / total``.
        correct: held-out samples predicted correctly.
        total: held-out samples.
        metrics: further metrics by name, e.g. the user's own.
        parameters: number of parameters.
        file_bytes: size of the file in bytes.
        p50_ms: median latency in ms.
        p90_ms: 90th percentile of the latency in ms.
        speedup: time of the first row divided by the time of this one, as measured.
        speedup_low: lower end of its 95 % interval.
        speedup_high: upper end of its 95 % interval.
        note: printed below the table.
    """

    name: str
    engine: str | None = None
    accuracy: float | None = None
    correct: int | None = None
    total: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    parameters: int | None = None
    file_bytes: int | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.correct is not None and self.total is not None:
            wilson_interval(self.correct, self.total)  # checks both
            share = self.correct / self.total
            if self.accuracy is None:
                self.accuracy = share
            elif not math.isclose(self.accuracy, share, abs_tol=5e-5):  # a metric computed in float32 may round
                raise InvalidArgumentError(
                    f"Argument `accuracy` must be correct / total = {share:.6f}, but got {self.accuracy:.6f}."
                )
        if self.accuracy is not None and not 0 <= self.accuracy <= 1:
            raise InvalidArgumentError(f"Argument `accuracy` must be in [0, 1], but got {self.accuracy}.")

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """95 % interval of the accuracy; ``None`` without the counts."""
        return None if self.correct is None or self.total is None else wilson_interval(self.correct, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; ``Row(**values)`` is this row again."""
        return asdict(self)


@dataclass(frozen=True)
class Note:
    """One sentence for the reader.

    Args:
        kind: its topic: ``"incomplete"`` (a target that wasn't reached), ``"qat benefit"`` (whether quantization-aware training
            was worth its cost), ``"method"`` (how a number was measured), ``"noise"`` or ``"decision"``.
        text: the sentence.
    """

    kind: str
    text: str

    @property
    def line(self) -> str:
        """The sentence, marked where the network is incomplete."""
        return f"INCOMPLETE: {self.text}" if self.kind == INCOMPLETE else self.text


@dataclass(frozen=True)
class LayerTable:
    """One value for each layer.

    Args:
        kind: ``"sparsity"`` (share of zeros), ``"channels"`` (remaining ones), ``"kept float"`` (the reason), or ``"benefit"`` (of a
            compression at run time, by callback).
        name: of its callback; distinguishes tables of one kind.
        values: by layer.
        total: of the whole network; ``None`` where there is no such thing.
    """

    kind: str
    name: str
    values: dict[str, Any]
    total: Any = None

    @property
    def title(self) -> str:
        """Heading for a reader."""
        return f"{self.kind} ({self.name})" if self.name else self.kind


@dataclass(frozen=True)
class Phase:
    """When a callback changed the network.

    Args:
        phase: its name.
        start: first optimizer step.
        end: last one; ``None`` where it has no end of its own.
    """

    phase: str
    start: int
    end: int | None = None


@dataclass(frozen=True)
class FailedEngine:
    """An engine that was asked for and isn't in the bundle.

    Args:
        engine: its name.
        step: the step that failed: ``"build"``, ``"load"``, ``"verify"`` (it computes something else) or ``"arithmetic"`` (its kernels
            compute another integer arithmetic).
        reason: the error, in one line.
        replaced_by: engine that is the bundle's default in its place; empty if it wouldn't have been the default.
    """

    engine: str
    step: str
    reason: str
    replaced_by: str = ""


@dataclass(frozen=True)
class Verdict:
    """Why a network ships, and its score against one baseline.

    Args:
        why: the reason, as a clause that follows the network's name.
        baseline: row that everything is compared with: the teacher if there is one, else float32; empty if it wasn't measured.
        score: ``"accuracy"``, or the metric that decided; empty if nothing says how good the networks are.
        change: change of the score from the baseline; positive is better; of accuracy as a share.
        low: lower end of its 95 % interval.
        high: upper end.
        good: ``False`` if quantization-aware training cost accuracy.
        refused: rows that don't ship, and why.
    """

    why: str
    baseline: str = ""
    score: str = ""
    change: float | None = None
    low: float | None = None
    high: float | None = None
    good: bool = True
    refused: dict[str, str] = field(default_factory=dict)


@dataclass
class Report:
    """The report of one bundle; an empty value was not measured or doesn't apply.

    Args:
        title: name of the module.
        command: command that repeats the export.
        ships: name of the row that is the bundle's default.
        verdict: why it ships.
        rows: the networks and engines that were compared; speed-ups are over the first.
        batch_size: samples in a call of the latency measurement.
        threads: of each engine.
        verification: each comparison with the trained network, see
            :meth:`~lightning_accel.verification.result.Verification.to_dict`.
        proofs: counts of what is equal: ``integers`` bit for bit, ``nodes`` one by one, ``lowered`` to half precision, ``kernels``.
        engines: the manifest's line for each engine.
        failed: engines that were asked for, failed, and aren't in the bundle.
        layers: tables by layer.
        quantization: operator -> ``"int8"``, or ``"float: "`` and the reason.
        phases: changes to the network, as sentences.
        timeline: the same in optimizer steps.
        curves: for each epoch ``epoch`` (0-based), ``step`` and ``metrics``.
        run: ``command`` and ``config`` of the run, or ``settings``.
        comparison: the variants, where they were compared; as in ``comparison.json``.
        benchmark: ``null_ratio`` (interval of a network over itself), ``rounds``, ``noisy``.
        environment: the machine.
        classes: predictions class by class: ``names``; ``network``, the row that ships, and ``baseline``; ``confusion`` (a row for each
            class, a column for each prediction of what ships); ``accuracy`` and ``baseline_accuracy`` of each class.
        flipped: predictions of what ships that aren't those of ``baseline``, the float32 network: ``count`` of ``samples``, ``better``,
            ``worse``, ``neither``; ``shown``: ``index``, ``label``, ``before``, ``after`` and, of images, ``picture`` (a data URI).
        layer_times: ONNX Runtime's profile of ``file``: ``batch``, ``threads``, ``total_ms`` and ``layers`` (``name``, ``kind``, ``ms``,
            ``share``).
        previous: the bundle that this one is compared with: ``path``, ``written``, ``ships``; its ``row`` and this one's ``now``, measured
            in turns; ``change`` of accuracy with ``low`` and ``high``, ``same`` (share of equal predictions); or ``reason`` if it can't be.
        price_per_hour: of a machine like this one, from the user.
        notes: further sentences.
        schema: of this format.
    """

    title: str = "Report"
    command: str = ""
    ships: str = ""
    verdict: Verdict | None = None
    rows: list[Row] = field(default_factory=list)
    batch_size: int | None = None
    threads: int | None = None
    verification: list[dict[str, Any]] = field(default_factory=list)
    proofs: dict[str, Any] = field(default_factory=dict)
    engines: list[dict[str, Any]] = field(default_factory=list)
    failed: list[FailedEngine] = field(default_factory=list)
    layers: list[LayerTable] = field(default_factory=list)
    quantization: dict[str, str] = field(default_factory=dict)
    phases: list[str] = field(default_factory=list)
    timeline: list[Phase] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    run: dict[str, Any] = field(default_factory=dict)
    comparison: dict[str, Any] | None = None
    benchmark: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, Any] = field(default_factory=dict)
    flipped: dict[str, Any] = field(default_factory=dict)
    layer_times: dict[str, Any] = field(default_factory=dict)
    previous: dict[str, Any] = field(default_factory=dict)
    price_per_hour: float | None = None
    notes: list[Note] = field(default_factory=list)
    schema: int = SCHEMA

    def cost_of_a_million(self, row: Row) -> float | None:
        """Price of a million samples in calls of ``batch_size``, one after the other; ``None`` without price or latency."""
        if self.price_per_hour is None or row.p50_ms is None or not self.batch_size:
            return None
        return 1e6 / self.batch_size * row.p50_ms / 3_600_000 * self.price_per_hour

    def notes_of(self, kind: str) -> list[str]:
        """The sentences of one kind."""
        return [note.text for note in self.notes if note.kind == kind]

    def to_dict(self) -> dict[str, Any]:
        """The content of ``report.json``."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        """Read what :meth:`to_dict` wrote; keys that are missing get their defaults, unknown ones are ignored.

        Raises:
            InvalidArgumentError: another schema.
        """
        if values.get("schema", SCHEMA) != SCHEMA:
            raise InvalidArgumentError(
                f"Argument `report` must have schema {SCHEMA}, but got {values['schema']!r}. Write the bundle again."
            )
        known = {f.name: values[f.name] for f in fields(cls) if values.get(f.name) is not None}
        for name, kind in (
            ("rows", Row),
            ("layers", LayerTable),
            ("timeline", Phase),
            ("notes", Note),
            ("failed", FailedEngine),
        ):
            known[name] = [item if isinstance(item, kind) else kind(**item) for item in known.get(name, [])]
        if isinstance(verdict := known.get("verdict"), Mapping):
            known["verdict"] = Verdict(**verdict)
        return cls(**known)


def as_report(report: "Report | Mapping[str, Any]") -> Report:
    """A report, or the content of ``report.json``, as a report."""
    return report if isinstance(report, Report) else Report.from_dict(report)
