"""Hardware profiles: what a machine of a size is set to, and limits that no setting may break. MB are 2**20 bytes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

MEBIBYTE = 1 << 20
_POOL = {"pool_size": 5, "max_overflow": 10, "pool_timeout_seconds": 30.0, "pool_recycle_seconds": 3600.0}


@dataclass(frozen=True, slots=True)
class Limit:
    """A bound on one setting. `maximum` bounds from above, `exactly` allows one value only."""

    key: str
    maximum: int | None = None
    exactly: Any = None

    def broken_by(self, value: Any) -> str | None:
        """What the profile allows, where `value` is not that; None where it is. An absent value breaks nothing."""
        if self.maximum is not None:
            return f"at most {self.maximum}" if value is not None and value > self.maximum else None
        return f"only {str(self.exactly).lower()}" if value != self.exactly else None


ONE_WORKER = Limit("server.workers", exactly=1)
"""One process, one device: several devices are several servers on the same registry."""


@dataclass(frozen=True, slots=True)
class Profile:
    name: str
    description: str
    values: Mapping[str, Mapping[str, Any]]
    limits: tuple[Limit, ...] = (ONE_WORKER,)


def _values(
    *,
    max_memory_mb: int | None,
    memory_fraction: float,
    enable_fp16: bool,
    max_concurrent_models: int,
    swap_threshold_mb: int | None,
    preload_models: bool,
    max_concurrent_requests: int,
    batch_size: int,
    queue_size: int,
) -> dict[str, dict[str, Any]]:
    return {
        "gpu": {
            "max_memory_mb": max_memory_mb,
            "memory_fraction": memory_fraction,
            "allow_growth": True,
            "enable_fp16": enable_fp16,
        },
        "models": {
            "max_concurrent_models": max_concurrent_models,
            "enable_model_swapping": True,
            "swap_threshold_mb": swap_threshold_mb,
            "preload_models": preload_models,
        },
        "performance": {
            "max_concurrent_requests": max_concurrent_requests,
            "batch_size": batch_size,
            "enable_caching": True,
            "queue_size": queue_size,
        },
        "server": {"workers": 1, "request_timeout_seconds": 30.0},
        "database": dict(_POOL),
    }


RTX3050_4GB = Profile(
    "rtx3050-4gb",
    "4 GB: 5 requests at a time, no batching, two models, so that stable and candidate fill it",
    _values(
        max_memory_mb=3500,
        memory_fraction=0.85,
        enable_fp16=True,
        max_concurrent_models=2,
        swap_threshold_mb=3000,
        preload_models=False,
        max_concurrent_requests=5,
        batch_size=1,
        queue_size=64,
    ),
    (
        Limit("gpu.max_memory_mb", maximum=3500),
        Limit("performance.max_concurrent_requests", maximum=5),
        Limit("models.preload_models", exactly=False),
        ONE_WORKER,
    ),
)
GB_8 = Profile(
    "8gb",
    "8 to 16 GB",
    _values(
        max_memory_mb=7000,
        memory_fraction=0.85,
        enable_fp16=True,
        max_concurrent_models=4,
        swap_threshold_mb=6000,
        preload_models=False,
        max_concurrent_requests=32,
        batch_size=8,
        queue_size=256,
    ),
)
GB_24 = Profile(
    "24gb",
    "20 to 64 GB",
    _values(
        max_memory_mb=None,
        memory_fraction=0.9,
        enable_fp16=True,
        max_concurrent_models=8,
        swap_threshold_mb=20000,
        preload_models=True,
        max_concurrent_requests=128,
        batch_size=16,
        queue_size=512,
    ),
)
GB_80_PLUS = Profile(
    "80gb-plus",
    "80 GB and more: the device's own size decides",
    _values(
        max_memory_mb=None,
        memory_fraction=0.92,
        enable_fp16=True,
        max_concurrent_models=16,
        swap_threshold_mb=70000,
        preload_models=True,
        max_concurrent_requests=256,
        batch_size=32,
        queue_size=1024,
    ),
)
CPU = Profile(
    "cpu",
    "no NVIDIA device: 2048 MB for models, 256 requests at a time, batches to 32, no fp16",
    _values(
        max_memory_mb=2048,
        memory_fraction=1.0,
        enable_fp16=False,
        max_concurrent_models=4,
        swap_threshold_mb=1800,
        preload_models=False,
        max_concurrent_requests=256,
        batch_size=32,
        queue_size=1024,
    ),
    (
        Limit("gpu.max_memory_mb", maximum=2048),
        Limit("performance.batch_size", maximum=32),
        Limit("gpu.enable_fp16", exactly=False),
        ONE_WORKER,
    ),
)

PROFILES: dict[str, Profile] = {p.name: p for p in (RTX3050_4GB, GB_8, GB_24, GB_80_PLUS, CPU)}


@dataclass(frozen=True, slots=True)
class Device:
    name: str
    total_bytes: int


def for_memory(total_bytes: int) -> Profile:
    """The profile for a device of this size. Bounds lie below the names: a device reports less than it is sold as."""
    mb = total_bytes / MEBIBYTE
    if mb >= 72_000:
        return GB_80_PLUS
    if mb >= 19_000:
        return GB_24
    if mb >= 7_000:
        return GB_8
    return RTX3050_4GB


def _visible(index: int, environ: Mapping[str, str]) -> int | str | None:
    """Number or UUID of the device that CUDA calls `index`; None where CUDA_VISIBLE_DEVICES hides it."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return index
    listed = [part.strip() for part in visible.split(",") if part.strip()]
    if index >= len(listed) or listed[index] == "-1":
        return None
    return int(listed[index]) if listed[index].isdigit() else listed[index]


def nvml_handle(index: int, environ: Mapping[str, str]) -> Any:
    """NVML's handle of the device that the server would use; None where there is none. NVML must have been started.

    Raises NVMLError for a device that does not answer.
    """
    import pynvml

    chosen = _visible(index, environ)
    if chosen is None:
        return None
    if isinstance(chosen, str):
        return pynvml.nvmlDeviceGetHandleByUUID(chosen)
    return pynvml.nvmlDeviceGetHandleByIndex(chosen) if chosen < pynvml.nvmlDeviceGetCount() else None


def read_device(index: int, environ: Mapping[str, str]) -> Device | str:
    """The NVIDIA device that the server would use, or why there is none. CUDA_VISIBLE_DEVICES is respected."""
    chosen = _visible(index, environ)
    if chosen is None:
        return f"CUDA_VISIBLE_DEVICES={environ.get('CUDA_VISIBLE_DEVICES')!r} shows no device {index}"
    try:
        import pynvml
    except ImportError as error:
        logger.debug("NVML is not to be had: %s", error)
        return "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        logger.debug("NVML does not start: %s", error)
        return "no NVIDIA device"
    try:
        handle = nvml_handle(index, environ)
        if handle is None:
            return "no NVIDIA device" if chosen == 0 else f"no NVIDIA device {chosen}"
        name = pynvml.nvmlDeviceGetName(handle)
        total = int(pynvml.nvmlDeviceGetMemoryInfo(handle).total)
        return Device(name.decode() if isinstance(name, bytes) else str(name), total)
    except pynvml.NVMLError as error:
        logger.debug("NVML does not describe device %s: %s", chosen, error)
        return f"NVIDIA device {chosen} does not answer: {error}"
    finally:
        try:
            pynvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            logger.debug("NVML does not end: %s", error)


def choose(
    asked: str,
    *,
    index: int = 0,
    environ: Mapping[str, str] | None = None,
    read: Callable[[int, Mapping[str, str]], Device | str] = read_device,
) -> tuple[Profile, str]:
    """The profile for what was asked ("auto" or a name of PROFILES), and the source that its values show."""
    if asked != "auto":
        return PROFILES[asked], f"profile {asked}"
    found = read(index, os.environ if environ is None else environ)
    if isinstance(found, str):
        return CPU, f"profile cpu (auto: {found})"
    profile = for_memory(found.total_bytes)
    return profile, f"profile {profile.name} (auto: {found.name}, {found.total_bytes // MEBIBYTE} MB)"
