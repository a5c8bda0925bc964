"""Whether this machine has an NVIDIA device that its driver answers for."""

import pynvml


def device_names() -> list[str]:
    """Names of the devices that NVML lists; empty without a driver or a device."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
