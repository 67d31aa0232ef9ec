"""What gateways count, in Prometheus's text format. Names follow vLLM's where the meaning is the same."""

import uuid
from collections.abc import Iterable, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_OUTPUTS = (16, 64, 256, 1024)
_RATIO = (1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)

Counted = tuple[str, list[Metric]]  # a gateway's name, and what it has counted


class GatewayMetrics:
    """One registry a gateway process; nothing global, so tests and replicas do not mix.

    Behind one address any gateway answers /metrics, so it tells what all have counted, each under its own label: one
    that ends takes its own series along, and no counter ever falls. What replicas say of their load is said once.
    """

    def __init__(self) -> None:
        self._name = uuid.uuid4().hex[:8]
        self._registry, self._loads = CollectorRegistry(), CollectorRegistry()
        own, loads = self._registry, self._loads
        self._success = Counter("dllm_request_success", "Finished choices", ["finished_reason"], registry=own)
        self._errors = Counter("dllm_request_errors", "Refused or failed requests", ["status"], registry=own)
        self._prompt = Counter(
            "dllm_prompt_tokens", "Prompt and suffix tokens, once for all choices of a prompt", registry=own
        )
        self._generated = Counter("dllm_generation_tokens", "Committed tokens, end tokens included", registry=own)
        self._calls = Counter("dllm_denoiser_calls", "Denoiser calls, summed over choices (NFE)", registry=own)
        self._canvas = Counter("dllm_canvas_tokens", "Open positions that requests asked for", registry=own)
        self._ratio = Histogram(
            "dllm_tokens_per_call", "Committed tokens per denoiser call", buckets=_RATIO, registry=own
        )
        self._first = Histogram(
            "dllm_time_to_first_token_seconds", "To the first committed token (TTFC)", buckets=_SECONDS, registry=own
        )
        self._whole = Histogram(
            "dllm_e2e_request_latency_seconds",
            "From the request to its last token, by the most tokens that it has (+Inf: more)",
            ["tokens"],
            buckets=_SECONDS,
            registry=own,
        )
        self._queue = Histogram(
            "dllm_request_queue_time_seconds", "From the request to its first call", buckets=_SECONDS, registry=own
        )
        self._gap = Histogram(
            "dllm_inter_chunk_seconds", "Between two pieces of a stream", buckets=_SECONDS, registry=own
        )
        self._work = Gauge("dllm_work", "Denoiser calls still to come, over the rows of these replicas", registry=loads)
        self._replicas = Gauge("dllm_decode_replicas", "Decode replicas that answer", registry=loads)
        self._running = Gauge("dllm_num_requests_running", "Rows in the batches of these replicas", registry=loads)
        self._waiting = Gauge("dllm_num_requests_waiting", "Rows waiting in these replicas", registry=loads)

    def finished(
        self,
        *,
        reason: str,
        prompt: int,
        tokens: int,
        calls: int,
        canvas: int,
        seconds: float,
        first: float | None,
        waited: float,
    ) -> None:
        """One choice was answered."""
        self._success.labels(reason).inc()
        self._whole.labels(next((str(most) for most in _OUTPUTS if tokens <= most), "+Inf")).observe(seconds)
        self._queue.observe(waited)
        if first is not None:
            self._first.observe(first)
        if calls:
            self._ratio.observe(tokens / calls)
        self._prompt.inc(prompt)
        self._generated.inc(tokens)
        self._calls.inc(calls)
        self._canvas.inc(canvas)

    def failed(self, status: int) -> None:
        """One request was refused or failed."""
        self._errors.labels(str(status)).inc()

    def gap(self, seconds: float) -> None:
        """Time between two pieces of a stream."""
        self._gap.observe(seconds)

    def load(self, loads: Sequence[dict[str, int]]) -> None:
        """What each replica says of its rows."""
        self._replicas.set(len(loads))
        self._running.set(sum(load["running"] for load in loads))
        self._waiting.set(sum(load["waiting"] for load in loads))
        self._work.set(sum(load.get("work", 0) for load in loads))

    def counted(self) -> Counted:
        """For another gateway's `text`."""
        return self._name, list(self._registry.collect())

    def text(self, others: Iterable[Counted] = ()) -> bytes:
        """The exposition: what this gateway and these others have counted, and the load."""
        everyone = CollectorRegistry()
        everyone.register(_Joined(dict([*others, self.counted()])))
        return bytes(generate_latest(everyone) + generate_latest(self._loads))


class _Joined(Collector):
    """The same metrics of several gateways, each sample with the name of its own."""

    def __init__(self, counted: Mapping[str, Sequence[Metric]]) -> None:
        self._counted = counted

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for name, metrics in self._counted.items():
            for metric in metrics:
                family = families.setdefault(metric.name, Metric(metric.name, metric.documentation, metric.type))
                family.samples += [one._replace(labels={**one.labels, "gateway": name}) for one in metric.samples]
        return families.values()
