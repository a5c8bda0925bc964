"""The memory that models compute in, and what became of runs that did not fit it, as metrics."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from registry.profiles import MEBIBYTE
from serving.device.loads import memory_by_type
from serving.device.memory_limits import Pressure
from serving.state import Serving

_VERSION = ["model", "version"]


def collect(serving: Serving) -> Iterator[Metric]:
    """Of every version, and of the memory as it was looked at last: a scrape asks no driver."""
    taken = GaugeMetricFamily(
        "modelkeep_model_memory_bytes", "Memory that loading it took.", labels=[*_VERSION, "memory_type"]
    )
    rows = GaugeMetricFamily("modelkeep_batch_rows_limit", "Rows that are computed together at most.", labels=_VERSION)
    for (model, name), loaded in serving.loaded.items():
        for kind, size in memory_by_type(loaded.runtime).items():
            taken.add_metric([model, name, kind], size)
        rows.add_metric([model, name], loaded.limit.rows)
    split = CounterMetricFamily(
        "modelkeep_out_of_memory", "Runs that did not fit the memory: clean-up, and again in less.", labels=_VERSION
    )
    failed = CounterMetricFamily(
        "modelkeep_out_of_memory_failed", "Requests that did not fit by themselves either.", labels=_VERSION
    )
    for model, name, telemetry in serving.telemetry():
        split.add_metric([model, name], telemetry.out_of_memory)
        failed.add_metric([model, name], telemetry.out_of_memory_failed)
    yield from (taken, rows, split, failed)
    yield from _of_the_device(serving)


def _of_the_device(serving: Serving) -> Iterator[Metric]:
    memory = serving.memory
    newest = memory.newest if memory is not None else None
    if memory is None or newest is None:
        return
    kind = memory.device.kind
    sizes = GaugeMetricFamily(
        "modelkeep_memory_bytes", "Memory that models compute in, by the last look.", labels=["device", "what"]
    )
    for what in ("total", "allocated", "reserved", "free"):
        sizes.add_metric([kind, what], getattr(newest, f"{what}_mb") * MEBIBYTE)
    yield sizes
    fragmentation = newest.fragmentation_ratio
    yield GaugeMetricFamily(
        "modelkeep_memory_fragmentation_ratio", "Share held that is not in use.", value=fragmentation
    )
    pressure = GaugeMetricFamily("modelkeep_memory_pressure", "1 for the level that it is at.", labels=["level"])
    for level in Pressure:
        pressure.add_metric([level.value], float(level is newest.pressure_level))
    yield pressure
    count, freed = memory.clean_up_count, memory.freed_mb_total * MEBIBYTE
    yield CounterMetricFamily("modelkeep_memory_clean_ups", "Clean-ups of the memory.", value=float(count))
    yield CounterMetricFamily("modelkeep_memory_freed_bytes", "Reserved bytes that they gave back.", value=freed)
