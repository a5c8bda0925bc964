"""`/api/gpu`: the memory that models compute in, and what is to be said about it and about the server's figures."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter

from serving.device.loads import memory_by_type
from serving.device.memory import NO_DEVICE, MemoryOptimizer, MemoryProfile
from serving.figures.performance import Performance, advice
from serving.state import Serving

TARGET_PERCENT = 75.0
"""What the memory of a device shall be used to at most, where it was 90 % and more."""


def router(serving: Serving, memory: MemoryOptimizer, performance: Performance) -> APIRouter:
    found = APIRouter(prefix="/api/gpu")

    @found.get("/profile", summary="The memory that models compute in, now")
    async def gpu_profile() -> dict[str, Any]:
        profile = await asyncio.to_thread(memory.profile)
        return {**_where(memory, profile), "models": _models(serving)}

    @found.get(
        "/optimization-report", summary="Memory over time, clean-ups, limits learnt, figures of the server, advice"
    )
    async def gpu_optimization_report() -> dict[str, Any]:
        profile = await asyncio.to_thread(memory.profile)
        return report(serving, memory, performance, profile)

    return found


def report(
    serving: Serving, memory: MemoryOptimizer, performance: Performance, profile: MemoryProfile
) -> dict[str, Any]:
    """JSON-able; `profile` is the newest."""
    mean = memory.fragmentation_mean
    return {
        **_where(memory, profile),
        "fragmentation_stats": {
            "max": round(memory.fragmentation_max, 4),
            "mean": None if mean is None else round(mean, 4),
            "samples": memory.looks,
        },
        "trend": memory.trend(),
        "utilisation_percent": round(100 * profile.utilisation, 1),
        "target_percent": TARGET_PERCENT,
        "above_warning_threshold": memory.warned,
        "clean_up_predicted": memory.predict_cleanup_need(),
        "cleanup_events_count": memory.clean_up_count,
        "cleanup_events": [event.as_dict() for event in memory.clean_ups],
        "total_freed_mb": round(memory.freed_mb_total, 1),
        "out_of_memory_count": memory.out_of_memory_count,
        "models": _models(serving),
        "performance": performance.report(),
        "recommendations": advice(
            profile.pressure_level, profile.fragmentation_ratio, memory.recent_clean_ups(), warned=memory.warned
        ),
    }


def _where(memory: MemoryOptimizer, profile: MemoryProfile) -> dict[str, Any]:
    """`profile` is the device's, all zeros where there is none; `memory` is what this server goes by, device or not."""
    device = memory.device
    shown = profile.as_dict()
    if device.name is None:
        return {"device": None, "profile": NO_DEVICE, "memory": {"of": "the memory budget", **shown}}
    about = {
        "index": device.index,
        "name": device.name,
        "temperature_celsius": device.temperature_celsius(),
        "busy_percent": device.utilisation_percent(),
    }
    return {"device": about, "profile": shown, "memory": {"of": "the device", **shown}}


def _models(serving: Serving) -> list[dict[str, Any]]:
    """What each loaded version takes, its key/value caches apart, how it computes, and how many rows of it are computed together."""
    return [
        {
            "model": model,
            "version": version,
            "memory_bytes": dict(memory_by_type(loaded.runtime)),
            "caches": loaded.cache_figures(),
            "computes_on": getattr(loaded.runtime, "device", "cpu"),
            "precision": getattr(loaded.runtime, "precision", "fp32"),
            "precision_reason": getattr(loaded.runtime, "precision_reason", None),
            "batch_rows": loaded.limit.rows,
            "batch_rows_most": loaded.limit.most,
            "rows_learnt": loaded.limit.learnt,
            "out_of_memory": loaded.telemetry.out_of_memory,
        }
        for (model, version), loaded in sorted(serving.loaded.items())
    ]
