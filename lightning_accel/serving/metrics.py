"""Metrics of a server in Prometheus's text format."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one server, each with the label ``model``."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        of = {"namespace": "lightning_accel", "registry": self._registry}
        self.requests = Counter("requests", "Requests answered, by status code.", ("model", "code"), **of)
        self.seconds = Histogram(
            "request_seconds", "Time from the request's body to its response.", ("model",), buckets=_SECONDS, **of
        )
        self.batches = Histogram("batch_rows", "Rows in a batch, without padding.", ("model",), buckets=_ROWS, **of)
        self.queue = Gauge("queue_rows", "Rows that wait for a worker.", ("model",), **of)
        self.workers = Gauge("workers_ready", "Workers that have reproduced the bundle, and live.", ("model",), **of)
        self.restarts = Counter("worker_restarts", "Workers that died, hung or changed their results.", ("model",), **of)
        self.canaries = Counter("canary_failures", "Runs of the kept samples with other results.", ("model",), **of)
        self.reloads = Counter("reloads", "New bundles asked for, by outcome.", ("model", "outcome"), **of)
        self.variant = Gauge(
            "batch_variant_rows", "Kept samples whose bits depend on the batch size.", ("model", "batch"), **of
        )

    def text(self) -> bytes:
        """All metrics."""
        return generate_latest(self._registry)
