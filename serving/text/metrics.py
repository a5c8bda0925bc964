"""What /metrics says of versions that generate text. Absent for the others."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from serving.figures.telemetry import cumulative_buckets
from serving.state import Serving
from serving.text.version import TextVersion

_VERSION = ["model", "version"]


def collect(serving: Serving) -> Iterator[Metric]:
    """Counts of every version that generated text here; gauges of those that are loaded."""
    yield from _counts(serving)
    yield from _now(serving)


def _counts(serving: Serving) -> Iterator[Metric]:
    tokens = CounterMetricFamily(
        "modelkeep_text_tokens", "Tokens of prompts and of answers.", labels=[*_VERSION, "kind"]
    )
    endings = CounterMetricFamily(
        "modelkeep_text_endings", "Texts by how they ended: stop, length, error, cancelled.", labels=[*_VERSION, "how"]
    )
    errors = CounterMetricFamily("modelkeep_text_errors", "Texts that failed, by kind.", labels=[*_VERSION, "kind"])
    again = CounterMetricFamily(
        "modelkeep_text_computed_again", "Texts that gave their cache up for others for a while.", labels=_VERSION
    )
    cut = CounterMetricFamily(
        "modelkeep_text_cut", "Texts that ended because the memory held no more of them.", labels=_VERSION
    )
    first = HistogramMetricFamily(
        "modelkeep_text_first_token_seconds", "Seconds from the request to its first token.", labels=_VERSION
    )
    streams = CounterMetricFamily("modelkeep_text_streams", "Streams that are closed.", labels=_VERSION)
    seconds = CounterMetricFamily("modelkeep_text_stream_seconds", "How long they were open.", labels=_VERSION)
    streamed = CounterMetricFamily("modelkeep_text_stream_tokens", "Tokens generated for them.", labels=_VERSION)
    open_ = GaugeMetricFamily("modelkeep_text_streams_open", "Streams that are open.", labels=_VERSION)
    speed = GaugeMetricFamily(
        "modelkeep_text_tokens_per_second", "Tokens of answers a second, over the last 10 seconds.", labels=_VERSION
    )
    for model, name, telemetry in serving.telemetry():
        counts, labels = telemetry.text, [model, name]
        if counts is None:
            continue
        tokens.add_metric([*labels, "prompt"], counts.prompt_tokens)
        tokens.add_metric([*labels, "completion"], counts.completion_tokens)
        for how, count in counts.endings.items():
            endings.add_metric([*labels, how], count)
        for kind, count in counts.errors.items():
            errors.add_metric([*labels, kind], count)
        again.add_metric(labels, counts.computed_again)
        cut.add_metric(labels, counts.cut)
        first.add_metric(labels, cumulative_buckets(counts.first_token), counts.first_token_seconds_total)
        streams.add_metric(labels, counts.streams)
        seconds.add_metric(labels, counts.stream_seconds_total)
        streamed.add_metric(labels, counts.stream_tokens)
        open_.add_metric(labels, counts.streams_open)
        speed.add_metric(labels, counts.tokens_per_second())
    yield from (tokens, endings, errors, again, cut, first, streams, seconds, streamed, open_, speed)


def _now(serving: Serving) -> Iterator[Metric]:
    texts = GaugeMetricFamily(
        "modelkeep_text_texts", "Texts that are generated now, and that wait.", labels=[*_VERSION, "state"]
    )
    cache = GaugeMetricFamily("modelkeep_text_cache_bytes", "Memory of their key/value caches.", labels=_VERSION)
    claim = GaugeMetricFamily(
        "modelkeep_text_cache_claim_bytes", "Memory for models that is kept free for them.", labels=_VERSION
    )
    for (model, name), loaded in serving.loaded.items():
        if isinstance(loaded, TextVersion):
            texts.add_metric([model, name, "running"], loaded.batcher.running)
            texts.add_metric([model, name, "waiting"], loaded.batcher.queued)
            cache.add_metric([model, name], loaded.batcher.cache_bytes)
            claim.add_metric([model, name], loaded.claim_bytes - loaded.runtime.memory_bytes)
    yield from (texts, cache, claim)
