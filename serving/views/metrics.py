"""The text of /metrics: what `Serving` has counted, read at the scrape; labels only of versions that were loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from serving.figures.telemetry import cumulative_buckets
from serving.state import Serving
from serving.text import metrics as text_metrics
from serving.views import memory_metrics
from serving.views.backup_metrics import BackupMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_VERSION = ["model", "version"]


def software_version() -> str:
    try:
        return version("modelkeep")
    except PackageNotFoundError:  # run from a checkout that was never installed
        return "unknown"


class Metrics:
    """`render()` is the page."""

    def __init__(self, serving: Serving, backups: BackupMetrics | None = None) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ServingCollector(serving, backups))
        ProcessCollector(namespace="modelkeep", registry=self._registry)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _ServingCollector(Collector):
    def __init__(self, serving: Serving, backups: BackupMetrics | None) -> None:
        self._serving = serving
        self._backups = backups
        self._software_version = software_version()

    def collect(self) -> Iterator[Metric]:
        yield from self._process()
        yield from self._requests()
        yield from self._shadow()
        yield from self._feedback()
        yield from self._cache()
        yield from self._loaded()
        yield from self._routes()
        yield from text_metrics.collect(self._serving)
        yield from memory_metrics.collect(self._serving)
        if self._backups is not None:
            yield from self._backups.collect()

    def describe(self) -> Iterator[Metric]:
        """Nothing: the registry would collect to find the names out."""
        return iter(())

    def _process(self) -> Iterator[Metric]:
        serving = self._serving
        yield InfoMetricFamily("modelkeep_build", "The software.", value={"version": self._software_version})
        names = {"replica": serving.replica_id, "environment": serving.environment, "boot": serving.boot_id}
        yield InfoMetricFamily("modelkeep_replica", "This server process.", value=names)
        yield GaugeMetricFamily("modelkeep_ready", "1 where the server takes traffic.", value=float(serving.ready))
        yield GaugeMetricFamily("modelkeep_generation", "Registry generation served.", value=float(serving.generation))
        yield GaugeMetricFamily(
            "modelkeep_requests_in_flight", "Inference requests not yet answered.", value=float(serving.in_flight)
        )
        yield GaugeMetricFamily(
            "modelkeep_python_blocks", "Pieces of memory that Python has in use.", value=float(sys.getallocatedblocks())
        )
        refused = CounterMetricFamily("modelkeep_auth_failures", "Requests refused for their key.", labels=["reason"])
        for reason, count in serving.auth_failures.items():
            refused.add_metric([reason], count)
        yield refused
        yield from self._access()
        yield from self._exchanges()
        yield from self._residency()

    def _access(self) -> Iterator[Metric]:
        serving = self._serving
        limited = CounterMetricFamily(
            "modelkeep_rate_limit_hits", "Requests beyond the rate of their key.", labels=["client", "endpoint"]
        )
        if serving.limiter is not None:
            for (client, endpoint), count in serving.limiter.hits.items():
                limited.add_metric([client, endpoint], count)
        yield limited
        shared = serving.limiter.shared if serving.limiter is not None else None
        if shared is not None:
            usable = float(shared.usable)
            yield GaugeMetricFamily("modelkeep_rate_limits_shared", "1 while rates are counted in Redis.", usable)
        places = serving.places
        full = CounterMetricFamily("modelkeep_places_refused", "Requests without a place, by why.", labels=["reason"])
        for reason, count in places.refused.items():
            full.add_metric([reason], count)
        yield full
        yield GaugeMetricFamily("modelkeep_places_waiting", "Requests that wait for a place.", float(places.waiting))
        yield CounterMetricFamily("modelkeep_places_left", "Clients that went while they waited.", float(places.left))
        uploads = serving.uploads
        yield GaugeMetricFamily("modelkeep_uploads", "Bodies on their way in several pieces.", float(uploads.count))
        yield GaugeMetricFamily("modelkeep_uploads_bytes", "Memory of those that have no place.", float(uploads.bytes))
        if (shaking := serving.handshakes) is not None:
            now = float(len(shaking.under_way))
            yield GaugeMetricFamily("modelkeep_tls_handshakes", "Connections that have not agreed on TLS yet.", now)
            ended = CounterMetricFamily("modelkeep_tls_handshakes_ended", "Those without success.", labels=["why"])
            ended.add_metric(["failed"], shaking.failed)
            ended.add_metric(["too_many"], shaking.turned_away)
            yield ended
        if serving.http is not None:
            yield from serving.http.collect()
        if serving.access is not None:
            log = serving.access
            yield CounterMetricFamily("modelkeep_access_log_lines", "Lines written.", float(log.written))
            yield CounterMetricFamily("modelkeep_access_log_dropped", "Lines that were lost.", float(log.dropped))

    def _exchanges(self) -> Iterator[Metric]:
        gate = self._serving.gate
        counts = {
            "waits": ("Requests that waited for a version that did not fit beside the one before.", gate.waited),
            "wait_seconds": ("Seconds that they waited.", gate.waited_seconds),
            "turned_away": ("Requests that were told to come again instead.", gate.turned_away),
        }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(f"modelkeep_exchange_{name}", text, value=float(value))

    def _residency(self) -> Iterator[Metric]:
        residency = self._serving.residency
        if residency is None:
            return
        yield GaugeMetricFamily(
            "modelkeep_models_dormant",
            "Models that are loaded at their next request.",
            value=len(self._serving.sleeping),
        )
        yield GaugeMetricFamily(
            "modelkeep_models_unloaded",
            "Models that this server was told not to serve.",
            value=len(self._serving.unloaded),
        )
        families = {
            "loads": CounterMetricFamily("modelkeep_model_loads", "Times that a model was loaded.", labels=["model"]),
            "evictions": CounterMetricFamily(
                "modelkeep_model_evictions", "Times that it went for others.", labels=["model"]
            ),
            "failures": CounterMetricFamily(
                "modelkeep_model_load_failures", "Times that it did not wake.", labels=["model"]
            ),
        }
        for model, figures in residency.figures.items():
            for what, family in families.items():
                family.add_metric([model], getattr(figures, what))
        yield from families.values()
        loader = self._serving.loader
        if loader is None:
            return
        hangs = float(loader.hangs)
        yield CounterMetricFamily("modelkeep_load_hangs", "Versions that hung while they were loaded.", hangs)
        under_way = GaugeMetricFamily(
            "modelkeep_loading_seconds", "For how long a version is being loaded.", labels=[*_VERSION, "hangs"]
        )
        for told in loader.as_list():
            if told["what"] == "loading":
                hung = "0" if told["hangs"] is None else "1"
                under_way.add_metric([told["model"], told["version"], hung], told["seconds"])
        yield under_way

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "modelkeep_requests",
            "Inference requests by status (no model: it never reached one).",
            labels=[*_VERSION, "code"],
        )
        duration = HistogramMetricFamily(
            "modelkeep_request_duration_seconds", "Seconds in queue and model of answered requests.", labels=_VERSION
        )
        errors = CounterMetricFamily("modelkeep_model_errors", "Requests that the version failed.", labels=_VERSION)
        kinds = CounterMetricFamily(
            "modelkeep_inference_errors",
            "Inference requests without an answer, by kind: input, not_found, client_gone; model, output, memory; deadline, busy, "
            "unavailable; internal.",
            labels=[*_VERSION, "kind"],
        )
        events = CounterMetricFamily(
            "modelkeep_bad_events",
            "Executed batches with a bad request, by stream (slow: while a promotion says what is slow).",
            labels=[*_VERSION, "stream"],
        )
        batches = CounterMetricFamily("modelkeep_batches", "Runs of the model.", labels=_VERSION)
        rows = CounterMetricFamily("modelkeep_batched_rows", "Rows computed in those runs.", labels=_VERSION)
        for code, count in self._serving.unrouted_codes.items():
            requests.add_metric(["", "", str(code)], count)
        for kind, count in self._serving.unrouted_errors.items():
            kinds.add_metric(["", "", kind], count)
        for model, name, telemetry in self._serving.telemetry():
            labels, total = [model, name], telemetry.total
            for code, count in telemetry.codes.items():
                requests.add_metric([*labels, str(code)], count)
            duration.add_metric(labels, cumulative_buckets(total.latency), total.latency_seconds_total)
            errors.add_metric(labels, total.errors)
            for kind, count in telemetry.errors.items():
                kinds.add_metric([*labels, kind], count)
            batches.add_metric(labels, telemetry.batches)
            rows.add_metric(labels, telemetry.rows)
            events.add_metric([*labels, "error"], total.error_clusters.events)
            events.add_metric([*labels, "slow"], total.slow_clusters.events)
        yield from (requests, duration, errors, kinds, events, batches, rows)

    def _shadow(self) -> Iterator[Metric]:
        texts = {
            "requests": "Copies of live requests that the candidate computed.",
            "errors": "Copies that it failed.",
            "disagreements": "Copies where its top class differs from the stable version's.",
            "differences": "Copies with a value beyond tolerance.",
            "inexact": "Copies whose answer is not equal to the bit.",
            "dropped": "Copies not computed, because live work went first.",
        }
        for what, text in texts.items():
            family = CounterMetricFamily(f"modelkeep_shadow_{what}", text, labels=_VERSION)
            for model, name, telemetry in self._serving.telemetry():
                family.add_metric([model, name], getattr(telemetry.total, f"shadow_{what}"))
            yield family

    def _feedback(self) -> Iterator[Metric]:
        inbox = self._serving.feedback
        yield GaugeMetricFamily("modelkeep_feedback_waiting", "Verdicts not yet in the registry.", value=len(inbox))
        verdicts = CounterMetricFamily("modelkeep_feedback", "Verdicts by what became of them.", labels=["result"])
        for result, count in inbox.counts.items():
            verdicts.add_metric([result], count)
        yield verdicts

    def _cache(self) -> Iterator[Metric]:
        cache = self._serving.cache
        if cache is None:
            return
        requests = CounterMetricFamily(
            "modelkeep_cache_requests",
            "Requests to deterministic versions: l1, l2, shared (hits), miss, bypass (a promotion judges them).",
            labels=[*_VERSION, "result"],
        )
        saved = CounterMetricFamily(
            "modelkeep_cache_saved_seconds", "Seconds of the model that hits did not take.", labels=_VERSION
        )
        for model, name, telemetry in self._serving.telemetry():
            counts = telemetry.cache
            found = {"l1": counts.l1, "l2": counts.l2, "shared": counts.shared}
            found |= {"miss": counts.misses, "bypass": counts.bypassed}
            if any(found.values()):
                for result, count in found.items():
                    requests.add_metric([model, name, result], count)
                saved.add_metric([model, name], counts.saved_seconds)
        yield from (requests, saved)
        yield GaugeMetricFamily(
            "modelkeep_cache_entries", "Answers held in this process.", value=float(len(cache.local))
        )
        yield GaugeMetricFamily(
            "modelkeep_cache_bytes", "Memory that they take.", value=float(cache.local.bytes + cache.written.bytes)
        )
        entries = CounterMetricFamily(
            "modelkeep_cache_entries_changed", "Answers by what became of them.", labels=["what"]
        )
        for what, count in cache.local.counts.items():
            entries.add_metric([what], count)
        yield entries
        if cache.shared is not None:
            usable = float(cache.shared.usable)
            yield GaugeMetricFamily("modelkeep_cache_redis_usable", "1 while requests ask Redis.", value=usable)
            asked = CounterMetricFamily("modelkeep_cache_redis", "What Redis did for requests.", labels=["result"])
            for result, count in cache.shared.counts.items():
                asked.add_metric([result], count)
            yield asked

    def _loaded(self) -> Iterator[Metric]:
        queue = GaugeMetricFamily("modelkeep_queue_length", "Requests waiting for the model.", labels=_VERSION)
        held = GaugeMetricFamily("modelkeep_version_requests_in_flight", "Requests in queue or model.", labels=_VERSION)
        quality = GaugeMetricFamily(
            "modelkeep_model_quality_score",
            "What the last validation measured on the golden cases: accuracy, exact_match, mean_absolute_error.",
            labels=[*_VERSION, "metric_type"],
        )
        for (model, name), loaded in self._serving.loaded.items():
            queue.add_metric([model, name], loaded.queue_length)
            held.add_metric([model, name], loaded.references)
            for metric, score in loaded.quality.items():
                quality.add_metric([model, name, metric], score)
        yield from (queue, held, quality)

    def _routes(self) -> Iterator[Metric]:
        weight = GaugeMetricFamily(
            "modelkeep_route_weight",
            "Share of the model's requests that the version answers.",
            labels=[*_VERSION, "role"],
        )
        generation = GaugeMetricFamily("modelkeep_route_generation", "Generation of the route.", labels=["model"])
        for route in self._serving.routes.values():
            share = route.weight if route.candidate is not None else 0.0
            if route.stable is not None:
                weight.add_metric([route.model, route.stable, "stable"], 1.0 - share)
            if route.candidate is not None:
                weight.add_metric([route.model, route.candidate, "candidate"], share)
            generation.add_metric([route.model], route.generation)
        yield from (weight, generation)
