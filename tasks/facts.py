"""What the checks of a validation look at, and what each of them says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from registry.policy import PromotionPolicy
from tasks.probe import Figures

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One check: its verdict, what it counts for, and the figures, as a sentence and as data."""

    name: str
    passed: bool
    text: str
    severity: Severity = "error"
    data: Mapping[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "passed": self.passed,
            "severity": self.severity,
            "text": self.text,
            "data": dict(self.data or {}),
        }


@dataclass(frozen=True, slots=True)
class Budget:
    """The memory for models of the hardware profile; where it could not be found, `problem` says why."""

    profile: str
    size_bytes: int | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Subject:
    """What the registry and the settings say of a candidate, beside what the probe measures.

    Without a budget nobody asks whether it fits. `together` says whether servers hold it beside the stable version while it is judged.
    """

    tags: Mapping[str, Any] = field(default_factory=dict)
    budget: Budget | None = None
    together: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """What the checks look at: a candidate that was loaded, and the stable version's figures where there are some."""

    candidate: Figures
    stable: Figures | None
    golden_cases: int | None
    policy: PromotionPolicy
    subject: Subject = Subject()
    metric: str | None = None
    """What the golden cases were scored by; None where there are none."""
