"""Libraries that report on their user are told not to, before the first of them is imported."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

SETTINGS = {
    "ORT_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "ANONYMIZED_TELEMETRY": "False",
    "GX_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""ONNX Runtime from 1.29 on (its Privacy.md), Prefect's client, Prefect's server, Chroma, Great Expectations, the Hugging Face hub.

ONNX Runtime would send the file name, hashes, origin and use of every model that it loads; what cannot be sent waits in a database
in the home of the user, and its queue keeps 50 bytes of every session.
"""


def settle(environment: MutableMapping[str, str]) -> None:
    """What the person has set already stays: someone who wants to report may."""
    for name, value in SETTINGS.items():
        environment.setdefault(name, value)


def told(environment: Mapping[str, str]) -> dict[str, str]:
    """What holds there, for a process whose environment is not inherited."""
    return {name: environment.get(name, value) for name, value in SETTINGS.items()}
