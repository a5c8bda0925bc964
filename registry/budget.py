"""The memory that models may have on this machine, by the settings and the device."""

from __future__ import annotations

import os

from registry import profiles
from registry.errors import UnavailableError
from registry.profiles import MEBIBYTE
from registry.settings import Settings

CPU_BUDGET_MB = 2048


def memory_budget_bytes(settings: Settings, device_total_bytes: int | None) -> int:
    """Memory for models: the least of `gpu.max_memory_mb`, `gpu.memory_fraction` of the device, and on cpu 2048 MB.

    `device_total_bytes` is None where it could not be measured. Raises UnavailableError where nothing is a bound.
    """
    bounds = []
    if settings.gpu.max_memory_mb is not None:
        bounds.append(settings.gpu.max_memory_mb * MEBIBYTE)
    if device_total_bytes is not None:
        bounds.append(int(settings.gpu.memory_fraction * device_total_bytes))
    if settings.hardware.name == profiles.CPU.name:
        bounds.append(CPU_BUDGET_MB * MEBIBYTE)
    if not bounds:
        raise UnavailableError(
            f"profile {settings.hardware.name}: the memory of the device could not be read; set gpu.max_memory_mb"
        )
    return min(bounds)


def of_this_machine(settings: Settings) -> int:
    """The budget with the device that this machine has. Raises UnavailableError where nothing is a bound."""
    if settings.hardware.name == profiles.CPU.name:
        return memory_budget_bytes(settings, None)
    device = profiles.read_device(settings.gpu.device, os.environ)
    return memory_budget_bytes(settings, None if isinstance(device, str) else device.total_bytes)
