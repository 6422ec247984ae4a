"""Counters of a service, as Prometheus reads them."""

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """What a service counts; each has its own, so that several in one process do not mix."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mmssl_requests", "Requests that were answered.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "mmssl_request_seconds", "From first byte to answer.", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.in_flight = Gauge("mmssl_requests_in_flight", "Requests that are worked on.", registry=self.registry)
        self.batch = Histogram(
            "mmssl_batch_size", "Signals that went through a model together.", buckets=SIZES, registry=self.registry
        )
        self.classes = Counter(
            "mmssl_class_vectors", "Sets of class names, by whether they were known.", ["known"], registry=self.registry
        )

    def batched(self, size: int) -> None:
        """Count a batch."""
        self.batch.observe(size)

    def looked_up(self, known: bool) -> None:
        """Count a set of class names."""
        self.classes.labels(str(known).lower()).inc()

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """Return all of it."""
        return generate_latest(self.registry)
