"""Metrics of a server in Prometheus's text format."""

from typing import Any, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_Kind = TypeVar("_Kind", Counter, Gauge, Histogram)


class Metrics:
    """Counters of one server, each with the label ``model``."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()

        def of(kind: type[_Kind], name: str, text: str, *labels: str, **options: Any) -> _Kind:
            return kind(name, text, ("model", *labels), namespace="lightning_accel", registry=registry, **options)

        self.requests = of(Counter, "requests", "Requests answered, by status code.", "code")
        self.seconds = of(Histogram, "request_seconds", "Time from a request's body to its response.", buckets=_SECONDS)
        self.batches = of(Histogram, "batch_rows", "Rows in a batch, without padding.", buckets=_ROWS)
        self.queue = of(Gauge, "queue_rows", "Rows that wait for a worker.")
        self.workers = of(Gauge, "workers_ready", "Workers that have reproduced the bundle, and live.")
        self.restarts = of(Counter, "worker_restarts", "Workers that died, hung or changed their results.")
        self.canaries = of(Counter, "canary_failures", "Runs of the kept samples with other results.")
        self.reloads = of(Counter, "reloads", "New bundles asked for, by outcome.", "outcome")
        self.variant = of(Gauge, "batch_variant_rows", "Kept samples whose bits depend on the batch size.", "batch")

        self.rows = of(Counter, "input_rows", "Rows of each input.", "input")
        self.outside = of(
            Counter,
            "input_rows_outside",
            "Rows with numbers outside of those that the bundle was verified on.",
            "input",
        )
        self.shadow = of(Counter, "shadow_predictions", "Predictions compared with the float32 reference.", "outcome")
        self.shadow_alarm = of(Gauge, "shadow_alarm", "1 while answers leave the reference more than the bundle says.")

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)
