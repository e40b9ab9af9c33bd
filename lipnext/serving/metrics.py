"""What Prometheus is told."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
RADII = (0, 18 / 255, 36 / 255, 72 / 255, 108 / 255, 0.5, 0.75, 1, 1.5, 2, 3)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "lipnext_requests", "Requests answered.", ["endpoint", "status"], registry=registry
        )
        self.seconds = Histogram(
            "lipnext_request_seconds",
            "Time from head to answer.",
            ["endpoint"],
            buckets=SECONDS,
            registry=registry,
        )
        self.radius = Histogram(
            "lipnext_radius", "Radii told, in pixel units of [0, 1].", buckets=RADII, registry=registry
        )
        self.abstentions = Counter("lipnext_abstentions", "Labels not told.", registry=registry)
        self.shed = Counter(
            "lipnext_shed", "Requests refused for lack of room.", ["reason"], registry=registry
        )
        self.batch = Histogram(
            "lipnext_batch_images", "Images evaluated together.", buckets=SIZES, registry=registry
        )
        self.waiting = Gauge("lipnext_waiting_images", "Images that wait.", registry=registry)

    def text(self) -> bytes:
        """Return the text that is scraped."""
        return generate_latest(self.registry)
